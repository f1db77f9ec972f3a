"""A few cases of `tests.fuzz`, and that it would notice what must not happen."""

import json
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LIGHT = ("picture", "tar", "parquet", "manifest")  # whose readers need no torch
HEAVY = ("dit", "bundle")  # pickles of torch, models


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_hostile_files_are_refused_or_read_rightly() -> None:
    for kinds, mutations in ((LIGHT, 20), (HEAVY, 5)):
        done = run("-m", "tests.fuzz", "--kinds", *kinds, "--mutations", f"{mutations}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(f"{mutations} mutations") == len(kinds)


DEEDS = {
    "path.read_bytes()": "open {path}",
    "link.read_bytes()": "open {path}",
    "path.with_name('new').symlink_to(path)": "os.symlink",
    "os.rename(link, path)": "os.rename {path}",
    "open('/etc/passwd')": "open /etc/passwd",
    "os.open(outside / 'other', os.O_CREAT)": "open {path.parent}/other",
    "subprocess.run(['true'])": "subprocess.Popen",
    "pickle.loads(pickle.dumps(Path))": "pickle.find_class",
    "bytearray(600 << 20)": "MiB of memory",
    "bytearray(60 << 30)": "MemoryError",
    # And what may happen.
    "open(sys.executable, 'rb').read(9)": "",
    "(inside / 'mine').write_bytes(b'')": "",
}
CODE = """
import json, os, pickle, subprocess, sys
from contextlib import suppress
from pathlib import Path
from tests.fuzz.guard import Guard
inside, outside = Path(sys.argv[1]), Path(sys.argv[1]) / "outside"
path, link = outside / "secret", inside / "link"
guard, seen = Guard([inside], outside), []
for deed in sys.argv[2:]:
    faults = []
    with suppress(OSError), guard.case(faults):
        exec(deed)
    seen.append(faults)
print(json.dumps(seen))
"""


def test_a_case_that_does_not_end_ends_its_process(tmp_path: Path) -> None:
    code = CODE.replace("guard, seen", "sys.modules[Guard.__module__].LIMIT_S = 0.2; guard, seen")
    done = run("-c", code, str(tmp_path), "while True: pass")
    assert done.returncode == -signal.SIGPROF
    assert "while" not in done.stdout and "<string>" in done.stderr  # where it was


def test_what_must_not_happen_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.touch()
    (tmp_path / "link").symlink_to(path)
    done = run("-c", CODE, str(tmp_path), *DEEDS)
    assert done.returncode == 0, done.stderr
    for (deed, fault), faults in zip(DEEDS.items(), json.loads(done.stdout), strict=True):
        assert fault.format(path=path) in " ".join(faults), deed
        assert bool(fault) == bool(faults), deed
