"""Print the sections of docs/results.md, each from runs on this machine.

    make bench        or        python tests/benchmarks/results.py [SECTION ...]

With `--write docs/results.md` they also replace those in the document, between
`<!-- bench: SECTION -->` and `<!-- end -->`. All of them take more than an hour on two cores that
do nothing else. `distilled`, `solvers`, `last_resort`, `roster`, `admission`, `federation`,
`engine`, `serving`, `capacity`, `kills`, `scaling`, `replicas`, `plan` and `data` need the run that
`quickstart` leaves, `few_steps` that it is distilled. Nothing is asserted.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sections import check_sections, write_section

from paris_ray.artifacts import TIMINGS, read_manifest
from paris_ray.config import load
from paris_ray.evaluation.summary import comparison, headline
from paris_ray.folders import Folder
from paris_ray.run import EVALUATION, ROUTER, Run

_IS_ASIDE = re.compile(r"# |.*\(raylet\)")  # a title, or what Ray says of processes that end
SERVING = ("batching", "paper", "skew", "cancelling", "clock")
TOO_MUCH = ("overload", "capacity")
REPLICAS = ("ready", "processes")
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LABELS = "an? (?P<object>.+) on an? (?P<colour>.+) background"  # of the captions of other_corpus


def quickstart(runs: Path) -> str:
    """Run the quickstart in a fresh folder, as `make quickstart` does, and stop it."""
    run_dir = runs / "quickstart"
    shutil.rmtree(run_dir, ignore_errors=True)
    try:
        printed = _run("-m", "jobs.quickstart", f"run_dir={run_dir}")
    finally:
        _run("-m", "jobs.stop", str(run_dir))
    last_lines = printed[printed.index("\ndone in") :].split("\n  pictures ")[0].strip()
    run = Run(load("quickstart", [f"run_dir={run_dir}"]))
    stages = [json.loads(line) for line in run.folder.read(TIMINGS).splitlines()]
    seconds = ", ".join(f"{stage['stage']} {stage['seconds']:.0f}" for stage in stages)
    facts = read_manifest(run.evaluation, EVALUATION).facts
    router = read_manifest(run.router, ROUTER).facts["held_out"]
    return "\n\n".join(
        [
            f"```\n{last_lines}\n```",
            f"Seconds of its stages: {seconds}.",
            _losses(facts["held_out_losses"]),
            _router(router),
            f"Of the pictures drawn from held-out captions {facts['memorisation']['0.05']:.1%} are "
            "as close to a training picture as the closest 5 % of held-out pictures are.",
        ]
    )


def _losses(matrix: list[list[float]]) -> str:
    own = [row[k] for k, row in enumerate(matrix)]
    others = [loss for k, row in enumerate(matrix) for j, loss in enumerate(row) if j != k]
    return (
        f"Held-out denoising loss of the experts: own cluster {min(own):.2f} to {max(own):.2f}, "
        f"others' clusters {min(others):.2f} to {max(others):.2f}."
    )


def _router(quality: Mapping[str, Any]) -> str:
    levels = quality["levels"].values()
    shares = {
        kind: [level[kind] for level in levels] for kind in ("accuracy", "prototype_accuracy")
    }
    found = {kind: f"{min(each):.3f} to {max(each):.3f}" for kind, each in shares.items()}
    return (
        f"Router on {quality['rows']} held-out rows: {found['accuracy']} right over the noise "
        f"levels, temperature {quality['temperature']:.2f}; the cosine to cluster means, without "
        f"training: {found['prototype_accuracy']}."
    )


def other(runs: Path) -> str:
    """Run the pipeline on a corpus that the recipe was not made for."""
    run_dir = runs / "other"
    shutil.rmtree(run_dir, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        _run(str(HERE / "other_corpus.py"), f"{folder}/corpus")
        own = ("corpus.kind=image_folder", f"corpus.path={folder}/corpus")
        labels = (f"corpus.held_out_key={LABELS}", f"corpus.attributes={LABELS}")
        settings = ("--config", "quickstart", f"run_dir={run_dir}")
        _run("-m", "jobs.pipeline", *settings, *own, *labels)
    facts = read_manifest(Folder(run_dir) / "evaluation", EVALUATION).facts
    return "```\n" + "\n".join(headline(facts)) + "\n```"


def distilled(runs: Path) -> str:
    """Distil the quickstart's ensemble."""
    run_dir = runs / "quickstart"
    shutil.rmtree(run_dir / "distilled", ignore_errors=True)
    _run("-m", "jobs.distil", "--config", "quickstart", f"run_dir={run_dir}")
    bundle = json.loads((run_dir / "distilled" / "bundle" / "manifest.json").read_text())
    return "```\n" + "\n".join(comparison(bundle["facts"])) + "\n```"


def script(name: str, *arguments: str) -> Callable[[Path], str]:
    """Return a section that is what another script prints, its titles two levels lower."""

    def section(runs: Path) -> str:
        printed = _run(str(HERE / name), *(part.format(runs=runs) for part in arguments))
        lines = (line for line in printed.splitlines() if not _IS_ASIDE.match(line))
        return "\n".join(f"##{line}" if line.startswith("## ") else line for line in lines).strip()

    return section


def _run(*arguments: str) -> str:
    """Run Python; return what it printed, or exit with it."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(f"{process.stdout}\n{' '.join(arguments)} failed")
    return process.stdout


SECTIONS: dict[str, Callable[[Path], str]] = {
    "quickstart": quickstart,
    "other": other,
    "distilled": distilled,
    "few_steps": script("bench_few_steps.py", "{runs}/quickstart"),
    "solvers": script("bench_solvers.py", "{runs}/quickstart"),
    "last_resort": script("bench_last_resort.py", "{runs}/quickstart"),
    "roster": script("bench_roster.py", "{runs}/quickstart"),
    "admission": script("bench_admission.py", "{runs}/quickstart"),
    "federation": script("bench_federation.py", "{runs}/quickstart"),
    "engine": script("bench_engine.py", "--bundle", "{runs}/quickstart/bundle"),
    "serving": script("bench_serving.py", "--bundle", "{runs}/quickstart/bundle", *SERVING),
    "capacity": script("bench_serving.py", "--bundle", "{runs}/quickstart/bundle", *TOO_MUCH),
    "kills": script("bench_serving.py", "--bundle", "{runs}/quickstart/bundle", "kills"),
    "scaling": script("bench_serving.py", "--bundle", "{runs}/quickstart/bundle", "scaling"),
    "replicas": script("bench_serving.py", "--bundle", "{runs}/quickstart/bundle", *REPLICAS),
    "plan": script("bench_plan.py", "--run-dir", "{runs}/quickstart", "--probe"),
    "models": script("bench_models.py"),
    "kernels": script("bench_kernels.py"),
    "memory": script("bench_memory.py"),
    "data": script("bench_data.py", "--run-dir", "{runs}/quickstart"),
    "filters": script("bench_filters.py", "features", "pictures"),
    "languages": script("bench_filters.py", "languages"),
    "stages": script("bench.py", "--run-dir", "{runs}/stages"),
}


def main() -> None:
    """Print the sections."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="is overwritten")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the document's parts")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.write:  # before half an hour of work, not after it
        check_sections(options.write, options.sections or list(SECTIONS))
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    for name in options.sections or SECTIONS:
        body = SECTIONS[name](options.runs.resolve())
        print(f"\n## {name}\n\n{body}", flush=True)
        if options.write:
            write_section(options.write, name, body)


if __name__ == "__main__":
    main()
