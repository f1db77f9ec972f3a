"""The demo of ZKLoRA in small: parties in processes of their own, interrupted and finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.demo_pictures import NIGHT_TINT, at_night
from jobs.processes import run_job, service
from paris_ray.embeddings import to_table, write_part
from paris_ray.errors import ParisError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.reports import png_bytes
from tests.long_tests import chaos

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_EXPERTS = 3
CAPTIONS = ("a red cat", "a blue dog", "a red square", "a green square", "a blue circle", "a cat")
OVERRIDES = ("lora.r=4", "training.steps=20", "training.batch_size=2", "training.num_cpus=0.5")


@pytest.fixture
def finished_run(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    """A run folder with a bundle, and shards of random pictures."""
    run = tmp_path / "run"
    shutil.copytree(tiny_bundle_path, run / "bundle")
    generator = np.random.default_rng(0)
    for k in range(NUM_EXPERTS):
        pictures = generator.integers(0, 256, (len(CAPTIONS), 32, 32, 3), dtype=np.uint8)
        thumbnails = [png_bytes(Image.fromarray(picture)) for picture in pictures]
        table = to_table({"caption": CAPTIONS, "thumbnail": thumbnails})
        write_part(Folder(run / "clusters" / "shards" / f"cluster={k}"), "part-0.parquet", table)
    return run


def start_demo(run: Path, folder: Path) -> "subprocess.Popen[str]":
    paths = (f"--bundle={run / 'bundle'}", f"--run-dir={folder}", "--min-gain=-10")
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.demo_zklora", *paths, *OVERRIDES],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(demo: "subprocess.Popen[str]", text: str) -> str:
    assert demo.stdout is not None
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in:\n" + "".join(lines))


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of the processes that were told this folder."""
    found = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [" ".join(line) for line in found if any(str(folder) in word for word in line)]


def interrupt_demo(run: Path, folder: Path) -> None:
    """Stop a demo when its adapter is trained; it stops its parties."""
    demo = start_demo(run, folder)
    shown = read_until(demo, "budget: 64 rows. ")
    assert "contributor is ready" in shown
    parties = processes_of(folder)
    assert {"jobs.escrow", "jobs.contribute_lora"} <= {line.split()[2] for line in parties}
    demo.send_signal(signal.SIGTERM)  # a shell lets its background jobs ignore SIGINT
    demo.communicate(timeout=240)
    assert demo.returncode == 128 + signal.SIGTERM
    assert not processes_of(folder)


@pytest.mark.ray
@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=chaos)])
def test_a_demo_is_finished_once(finished_run: Path, tmp_path: Path, interrupted: bool) -> None:
    folder = tmp_path / "demo"
    if interrupted:
        interrupt_demo(finished_run, folder)
    shown, _ = start_demo(finished_run, folder).communicate(timeout=400)
    assert (f"trained already, kept: {folder / 'night'}" in shown) == interrupted, shown
    check_what_there_is(folder, shown)
    assert not processes_of(folder)

    pair = (folder / "pair.png").read_bytes()
    demo = start_demo(finished_run, folder)
    shown, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, shown
    assert f"bought already, kept: {folder / 'purchase'}" in shown
    assert (folder / "pair.png").read_bytes() == pair


def check_what_there_is(folder: Path, shown: str) -> None:
    receipt = json.loads((folder / "purchase" / "receipt.json").read_text())
    assert receipt["state"] == "OPENED"
    assert receipt["session"]
    for name in ("pair.png", "pair.html", "purchase/receipt.json"):
        assert str(folder / name) in shown
    assert "stand-in for payment" in shown
    assert "not been audited" in shown
    without, with_lora = np.split(np.asarray(Image.open(folder / "pair.png"), float), 2, axis=1)
    assert without.shape == with_lora.shape == (256, 256, 3)
    assert np.abs(without - with_lora).mean() > 1
    assert "All pictures by nobody." in (folder / "pair.html").read_text()


def test_a_demo_with_another_bundle_needs_another_folder(
    finished_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    Folder(folder).write_json("subject.json", {"expert": 0, "prompt": "a cat", "bundle": "0" * 64})
    demo = start_demo(finished_run, folder)
    shown, _ = demo.communicate(timeout=240)
    assert demo.returncode == 2
    assert "holds a demo with another bundle" in shown


def test_at_night_white_is_blue_and_all_else_darker() -> None:
    pictures = np.array([[[[255, 255, 255], [0, 0, 0], [255, 0, 0]]]], np.uint8)
    assert at_night(pictures).tolist() == [[[NIGHT_TINT.tolist(), [0, 0, 0], [70, 0, 0]]]]


def test_a_service_that_cannot_start_shows_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ParisError, match="holds no certificate"),
        service(
            "escrow",
            f"--home={tmp_path}",
            log=tmp_path / "log",
            ready="escrow ready:",
            timeout_s=60,
        ),
    ):
        pass


def test_a_service_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    home = tmp_path / "escrow"
    (home / "clients").mkdir(parents=True)
    client = Identity.create(tmp_path / "client")
    (home / "clients" / "client.pem").write_text(client.certificate)
    options = {"log": tmp_path / "log", "ready": "no such line", "timeout_s": 5}
    listen = "--listen=127.0.0.1:0"
    with (
        pytest.raises(ParisError, match="is still running after 5 s"),
        service("escrow", f"--home={home}", listen, **options),
    ):
        pass
    assert "escrow ready" in (tmp_path / "log").read_text()
    assert not processes_of(home)


def test_a_job_gets_no_ray_of_its_parent_and_its_failure_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "show.py").write_text(
        "import os, sys\nprint([n for n in os.environ if n.startswith('RAY_')])\nsys.exit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ParisError, match=r"jobs.show failed with exit code 3"):
        run_job("show")
    assert capfd.readouterr().out == "[]\n"
    assert os.environ["RAY_ADDRESS"]


def test_help_shows_the_command_without_loading_torch() -> None:
    check = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('jobs.demo_zklora', run_name='__main__')\n"
        "except SystemExit: assert not {'ray', 'torch'} & sys.modules.keys()"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "python -m jobs.demo_zklora" in result.stdout
