"""Print how much sooner a planned run is done, and what a plan said of a run that was trained.

    python tests/benchmarks/bench_plan.py [--run-dir runs/quickstart] [--probe]

The first part is simulated (paris_ray/planning/simulation.py), with the four kinds of GPU of
docs/examples/fleet.yaml: nothing of it was measured on them. The second compares with what experts
and router of a finished run took. Plans know what each stage logged in its first seconds, or with
--probe what `jobs.plan --probe` finds on this machine now; and from the seed, which came before,
how long a training takes beside its steps (`start_s`): to start, to load, to draw its samples.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from jobs.command import ray_session
from paris_ray.artifacts import LEDGER, RESOLVED_CONFIG, TIMINGS
from paris_ray.config import Config, FleetConfig, GpuConfig, load, with_fleet
from paris_ray.folders import Folder
from paris_ray.planning import Plan, ledger_of, plan
from paris_ray.planning.schedule import job_of, slots
from paris_ray.planning.simulation import Next, equal_split, first_come, planned, simulate
from paris_ray.run import Run

REPOSITORY = Path(__file__).resolve().parents[2]
FLEET = REPOSITORY / "docs" / "examples" / "fleet.yaml"
NUM_RUNS = 500
GOAL_SPEEDUP, GOAL_ERROR = 1.5, 0.1
FIRST_SECONDS = 20.0
STAGES = {"seed": "train_seed", "expert": "train_experts", "router": "train_router"}


def bench_makespan() -> None:
    """Let the plan, an equal split and Ray's order run through the same simulator."""
    result = plan(with_fleet(load("paris_xl2"), str(FLEET)))
    names = " + ".join(f"{gpu.count} {gpu.name}" for gpu in result.gpus)
    print(f"## Eight experts of XL/2 on {names}, mean of {NUM_RUNS} simulated runs\n")
    days = {name: _mean_days(result, rule) for name, rule in _rules(result).items()}
    print("| which expert where | days until all are trained | the plan is faster by |")
    print("|---|---|---|")
    for name, each in days.items():
        print(f"| {name} | {each:.2f} | {each / days['planned']:.2f} |")
    speedup = days["an equal split"] / days["planned"]
    print(f"\nplan against an equal split: {speedup:.2f} x ({_goal(speedup, GOAL_SPEEDUP)})")


def _rules(result: Plan) -> dict[str, Callable[[], Next]]:
    """Return by name what makes the rule of one run: who trains what next."""
    machines = slots(result.gpus)
    experts = {t.name: t for t in result.trainings if t.stage == "expert"}

    def may_run(name: str, machine: int) -> bool:
        return job_of(experts[name], result.gpus).days[machines[machine][0]] is not None

    assert result.schedule is not None
    number = {name: machine for machine, (_, name) in enumerate(machines)}
    own = {a.name: number[a.gpu] for a in result.schedule.assignments if a.name in experts}
    split = equal_split(list(experts), len(machines), may_run)
    return {
        "planned": partial(planned, own),
        "an equal split": partial(planned, split),
        "whoever is free takes the next, as Ray does": partial(first_come, list(experts), may_run),
    }


def _mean_days(result: Plan, rule: Callable[[], Next]) -> float:
    durations = {t.name: t.durations for t in result.trainings if t.stage == "expert"}
    kinds = [kind for kind, _ in slots(result.gpus)]
    runs = (simulate(durations, kinds, rule(), seed=seed) for seed in range(NUM_RUNS))
    return fmean(run.makespan for run in runs)


def _goal(value: float, goal: float) -> str:
    return f"goal >= {goal}: {'met' if value >= goal else 'missed'}"


def bench_wall_time(run_dir: Path, *, probe: bool) -> None:
    """Compare what plans say of a finished run's trainings with what they took."""
    config = load(str(run_dir / "experts" / "expert_0" / RESOLVED_CONFIG))
    config = replace(config, run_dir=str(run_dir))
    took = _took(run_dir)
    whole = sum(seconds for stage, seconds in _stages(run_dir) if ": " not in stage)
    print(f"\n## Experts and router of {run_dir.name}, {_later(took):.0f} of its {whole:.0f} s\n")
    fleets = {f"the first {FIRST_SECONDS:g} s of each stage": _logged(config)}
    if probe:
        with ray_session(None):
            from paris_ray.pipeline.probe import probed_fleet

            fleets["jobs.plan --probe"] = probed_fleet(config)
    print("| known from | seed | experts | router | experts and router | off by |")
    print("|---|---|---|---|---|---|")
    print(f"| it took | {_cells(took)} | |")
    verdicts = []
    for name, fleet in fleets.items():
        first = _planned_seconds(replace(config, fleet=fleet))
        start_s = max(0.0, took["seed"] - first["seed"])
        later = replace(fleet, gpus=[replace(gpu, start_s=start_s) for gpu in fleet.gpus])
        told = _planned_seconds(replace(config, fleet=later))
        error = _error(told, took)
        print(f"| {name} | {_cells(first)} | {_error(first, took):.1%} |")
        print(f"| {name}, start_s={start_s:.1f} | {_cells(told)} | {error:.1%} |")
        kept = "met" if error <= GOAL_ERROR else "missed"
        goal = f"goal <= {GOAL_ERROR:.0%}: {kept}"
        verdicts.append(f"{name}, and what the seed told: {error:.1%} off ({goal})")
    print("", *verdicts, sep="\n")
    if (run_dir / LEDGER).exists():
        print(f"\n## What it took\n\n```\n{ledger_of(config)}\n```")


def _error(told: Mapping[str, float], took: Mapping[str, float]) -> float:
    return abs(_later(told) / _later(took) - 1)


def _later(seconds: Mapping[str, float]) -> float:
    """Return the seconds of what comes after the seed."""
    return seconds["expert"] + seconds["router"]


def _cells(seconds: Mapping[str, float]) -> str:
    return " | ".join(f"{each:.0f} s" for each in (*seconds.values(), _later(seconds)))


def _stages(run_dir: Path) -> Iterator[tuple[str, float]]:
    for line in (run_dir / TIMINGS).read_text().splitlines():
        row = json.loads(line)
        yield row["stage"], row["seconds"]


def _took(run_dir: Path) -> dict[str, float]:
    """Return the seconds of each training stage, Ray's tasks and all around them included."""
    return {
        stage: sum(seconds for name, seconds in _stages(run_dir) if name == verb)
        for stage, verb in STAGES.items()
    }


def _logged(config: Config) -> FleetConfig:
    """Return this machine as a fleet, by the rates that were logged when stages began."""
    run, places = Run(config), int((os.cpu_count() or 1) / config.training.num_cpus)
    experts = [_first_rate(run.expert(k)) for k in range(places)]  # these run side by side
    rates = {
        "seed": _first_rate(run.seed),
        "expert": fmean(experts),
        "router": _first_rate(run.router),
    }
    gpu = GpuConfig(name="this machine", count=places, memory_gb=8, samples_per_second=rates)
    return FleetConfig(cluster_rows=[], gpus=[replace(gpu, dollars_per_hour=0.0)])


def _first_rate(folder: Folder) -> float:
    """Return the samples a second of a training's first seconds, from its second log on."""
    rows = [json.loads(line) for line in folder.read(TIMINGS).splitlines()]
    first = rows[0]
    early = [row for row in rows if row["unix_time"] - first["unix_time"] <= FIRST_SECONDS]
    samples = early[-1]["samples_seen"] - first["samples_seen"]
    return samples / (early[-1]["unix_time"] - first["unix_time"])


def _planned_seconds(config: Config) -> dict[str, float]:
    schedule = plan(config).schedule
    assert schedule is not None
    ends = {"seed": 0.0, "expert": 0.0, "router": 0.0}
    for job in schedule.assignments:
        ends[job.name.split()[0]] = max(ends[job.name.split()[0]], job.end)
    seconds = {stage: 86_400 * end for stage, end in ends.items()}
    return {
        "seed": seconds["seed"],
        "expert": seconds["expert"] - seconds["seed"],
        "router": seconds["router"] - seconds["expert"],
    }


def main() -> None:
    """Print both parts; the second needs a finished run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", type=Path, help="a finished run of this machine")
    parser.add_argument("--probe", action="store_true", help="train here for a minute, too")
    options = parser.parse_args()
    bench_makespan()
    if options.run_dir is not None:
        bench_wall_time(options.run_dir.resolve(), probe=options.probe)


if __name__ == "__main__":
    main()
