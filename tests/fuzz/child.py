"""Runs the cases of one kind: `python -m tests.fuzz.child FOLDER KIND SEED FIRST STOP`."""

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from paris_ray.errors import ParisError
from tests.fuzz.corpora import CORPORA
from tests.fuzz.guard import Guard
from tests.fuzz.kinds import Kind, mutate
from tests.fuzz.models import MODELS

KINDS: Mapping[str, Kind] = {**MODELS, **CORPORA}


def run(root: Path, kind: Kind, name: str, seed: int, cases: range) -> None:
    """Run some cases; what became of each is a line of `report.jsonl`."""
    valid, changed, outside = (root / part for part in ("valid", "changed", "outside"))
    for folder in (valid, outside):
        folder.mkdir()
    (outside / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    beside = kind.write(valid)
    shutil.copytree(valid, changed)
    kind.read(changed, beside)  # what is refused anyway would prove nothing
    guard = Guard([root, Path(tempfile.gettempdir())], outside)
    names = [p.relative_to(valid) for p in sorted(valid.glob(kind.changed)) if p.is_file()]
    with (root / "report.jsonl").open("w", buffering=1) as report:
        for case in cases:
            rng = Random(f"{name} {seed} {case}")
            path = changed / rng.choice(names)
            how = mutate(rng, path, None if kind.may_lead_out else outside)
            what = f"{path.relative_to(changed)}: {how}"
            outcome, faults = _read(kind, changed, beside, guard)
            _restore(path, valid / path.relative_to(changed))
            line = {"case": case, "what": what, "outcome": outcome, "faults": faults}
            report.write(json.dumps(line) + "\n")


def _read(kind: Kind, folder: Path, beside: Any, guard: Guard) -> tuple[str, list[str]]:
    """Return what became of the files, and what should not have."""
    faults: list[str] = []
    outcome = "accepted"
    try:
        with guard.case(faults):
            kind.read(folder, beside)
    except ParisError:
        outcome = "refused"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in place if "paris_ray/" in f.filename]
        faults.append(f"{type(error).__name__}: {error!s:.300} at {' '.join(ours[-4:])}")
    return outcome, faults


def _restore(path: Path, intact: Path) -> None:
    """Undo the change of a file."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    shutil.copyfile(intact, path)


def main() -> None:
    folder, name, seed, first, stop = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0", "OMP_NUM_THREADS": "1"}
    run(Path(folder), KINDS[name], name, int(seed), range(int(first), int(stop)))


if __name__ == "__main__":
    main()
