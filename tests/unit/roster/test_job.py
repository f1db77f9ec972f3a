"""`jobs.roster`, as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.roster import main
from paris_ray.bundle import load_bundle
from paris_ray.identity import Identity
from tests.unit.roster.conftest import Made

REPOSITORY = Path(__file__).resolve().parents[3]


def settings(made: Made) -> list[str]:
    counts = ("cluster.num_clusters=3", "router.num_experts=3")
    return ["--config", "quickstart", f"run_dir={made.run.folder.uri}", *counts]


def test_an_expert_leaves(made: Made, tmp_path: Path) -> None:
    signer, output = Identity.create(tmp_path / "me"), tmp_path / "new"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.roster", "retire", "--bundle", made.bundle),
            *("--index", "1", "--output", str(output), "--data-of", "Museum of Cats"),
            *("--identity", str(tmp_path / "me"), *settings(made)),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "roster: router (head) from 32 of 120 rows" in done.stdout
    assert f"roster: finished ({output})" in done.stdout
    _, entry = load_bundle(str(output)).history
    assert (entry.event, entry.signed_by) == ("retired", signer.public_key)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["roster", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retire",), "retire needs --index"),
        (("add", "--expert", "e"), "add needs --rows"),
        (("add", "--index", "0", "--expert", "e", "--rows", "r"), "add takes no --index"),
        (("retire", "--index", "0", "--rows", "r"), "retire takes no --rows"),
        (("sell",), "invalid choice: 'sell'"),
    ],
)
def test_what_a_verb_lacks_is_said(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(monkeypatch, *arguments, "--bundle", "absent", "--output", "new")
    assert message in capsys.readouterr().err


def test_an_error_is_one_line(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    replica_threads: None,
) -> None:
    places = ("--bundle", made.bundle, "--output", str(tmp_path / "new"))
    refused(monkeypatch, "retire", "--index", "3", *places, *settings(made))
    error = "error: index=3 is not allowed: the bundle has experts 0 to 2\n"
    assert capsys.readouterr().err == error
