"""Change files of strangers, and read them: errors of ours, or what is right; nothing else.

    python -m tests.fuzz --mutations 10000                all kinds; exit code 1 on any failure
    python -m tests.fuzz --kinds tar --first 4711 --mutations 1     one case again

Each kind runs in a process of its own, which a case may kill: it is begun again after that case.
A case fails if it raises what is no ParisError, kills its process, takes too long or too much
memory, opens or changes files elsewhere, or reaches a pickle.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz.child import KINDS

SHOWN = 5  # failures of a kind


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    failed = 0
    for kind in options.kinds:
        failed += _fuzz(kind, options.seed, options.first, options.first + options.mutations)
    print("every file was refused, or read rightly" if not failed else f"{failed} FAILURES")
    return 1 if failed else 0


def _fuzz(kind: str, seed: int, first: int, stop: int) -> int:
    """Run the cases of a kind, in as many processes as it takes; return how many failed."""
    started, case = time.monotonic(), first
    totals = {"refused": 0, "accepted": 0}
    failures: list[str] = []
    while case < stop:
        with tempfile.TemporaryDirectory(prefix="paris_fuzz-") as folder:
            command = [sys.executable, "-m", "tests.fuzz.child", folder, kind]
            command += [str(seed), str(case), str(stop)]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if not (Path(folder) / "report.jsonl").exists():
                raise SystemExit(f"{kind}: the valid files were not read:\n{child.stderr}")
            reports = [json.loads(line) for line in (Path(folder) / "report.jsonl").open()]
        for report in reports:
            case = report["case"] + 1
            _count(report, totals, failures)
        if child.returncode:  # what it was at when it ended is not in the report
            failures.append(f"case {case} ended its process: {_how(child)}")
            case += 1
    counts = f"{totals['refused']} refused, {totals['accepted']} accepted, {len(failures)} failures"
    print(
        f"{kind}: {stop - first} mutations, {counts}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    for failure in failures[:SHOWN]:
        print(f"  {failure}")
    return len(failures)


def _count(report: dict[str, Any], totals: dict[str, int], failures: list[str]) -> None:
    if report["faults"]:
        failures.append(f"case {report['case']} ({report['what']}): {'; '.join(report['faults'])}")
    else:
        totals[report["outcome"]] += 1


def _how(child: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {child.returncode}\n{child.stderr[-3000:]}"


if __name__ == "__main__":
    sys.exit(main())
