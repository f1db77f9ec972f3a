"""docs/zklora.md says what is so: its commands parse, its Python runs, its tables are printed."""

import errno
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.long_tests import chaos

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "zklora.md").read_text()
JOBS = ("jobs.check_receipt", "jobs.contribute_lora", "jobs.escrow", "jobs.verify_lora")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Return module and arguments of every job in the shell blocks."""
    lines = [line for block in blocks("sh") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [shlex.split(line[len("python -m ") :]) for line in lines if line.startswith("python")]


def test_every_command_parses() -> None:
    found = {module: arguments for module, *arguments in commands()}
    assert set(JOBS) <= found.keys()
    for module in JOBS:
        parsed = importlib.import_module(module)._parser().parse_args(found[module])
        assert vars(parsed)


PARTIES = ("jobs.contribute_lora", "jobs.escrow", "jobs.verify_lora", "jobs.identity")


@pytest.mark.parametrize("module", PARTIES)
def test_a_full_disk_ends_a_party_with_a_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "key.pem"))

    arguments = {name: own for name, *own in commands()} | {"jobs.identity": ["runs/me"]}
    monkeypatch.setattr("paris_ray.identity.Identity.load_or_create", fill)
    monkeypatch.setattr("jobs.parties.certificate", lambda option, path: "")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [module, *arguments[module]])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 2
    assert re.search("error: .*No space left.*: make room in .*key.pem", capsys.readouterr().err)


def test_the_python_of_the_core_runs() -> None:
    (core,) = [block for block in blocks("python") if "zklora.commit(" in block]
    namespace: dict[str, object] = {}
    exec(core, namespace)
    assert len(namespace["proof"]) == 4304  # as its comment says


@pytest.mark.parametrize(
    "section", ["modules", "leakage", pytest.param("language", marks=[pytest.mark.ray, chaos])]
)
def test_the_bench_prints_what_the_tables_have(section: str) -> None:
    result = subprocess.run(
        [sys.executable, "tests/benchmarks/bench_zklora.py", section, "--quick"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    quoted = GUIDE.split(f"<!-- bench: {section} -->")[1].split("<!-- end -->")[0]
    heading = next((line for line in quoted.splitlines() if line.startswith("|")), "| goal")
    assert heading.split("|")[1] in result.stdout
