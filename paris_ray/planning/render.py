"""A plan as text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace

from paris_ray.planning.accounting import compare, cost_of
from paris_ray.planning.memory import Memory
from paris_ray.planning.run import Plan
from paris_ray.planning.schedule import Assignment, Schedule
from paris_ray.planning.tables import number, scaled, table
from paris_ray.planning.training import TrainingPlan

NOT_PLANNED = """\
Each training is to have a GPU of its own; shards are equal unless fleet.cluster_rows has their
sizes. Not planned: the time of prepare (encoding and clustering), of sample grids and of
evaluation."""


def render(plan: Plan) -> str:
    """Return a plan as aligned tables."""
    groups = _groups(plan.trainings)
    sections = [
        "Plan of the run; nothing was started or allocated.",
        _trainings(plan, groups),
        _memory(groups),
        _gpus(plan, groups),
        _disk(plan, groups),
        _fleet(plan),
        compare("this plan", cost_of(plan.num_rows, sum(t.flops for t in plan.trainings))),
        NOT_PLANNED,
    ]
    return "\n\n".join(section for section in sections if section)


def _groups(trainings: Sequence[TrainingPlan]) -> list[tuple[str, TrainingPlan]]:
    """Return the trainings that differ, each with the names of all that equal it."""
    groups: dict[TrainingPlan, list[int]] = {}
    for training in trainings:
        if training.expert is None:
            groups[training] = []
        else:
            groups.setdefault(replace(training, expert=0), []).append(training.expert)
    return [
        (f"expert {_ranges(numbers)}" if numbers else training.name, training)
        for training, numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `0-2, 4`."""
    parts: list[list[int]] = []
    for own in numbers:
        if parts and own == parts[-1][-1] + 1:
            parts[-1].append(own)
        else:
            parts.append([own])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _trainings(plan: Plan, groups: Iterable[tuple[str, TrainingPlan]]) -> str:
    head = ["Training", "parameters", "rows", "batch", "steps", "steps/epoch", "epochs"]
    rows = [[*head, "samples seen", "an image", "in all"]]
    for name, training in groups:
        per_epoch = training.num_rows / training.batch_size
        counts = (training.num_parameters, training.num_rows, training.batch_size)
        cells = [f"{count:,}" for count in (*counts, training.num_steps)]
        cells += [f"{per_epoch:,.1f}", f"{training.num_steps / per_epoch:,.1f}"]
        cells.append(f"{training.samples_seen:,}")
        flops = (training.flops_per_image, training.flops)
        rows.append([name, *cells, *(scaled(count, "FLOP") for count in flops)])
    total = scaled(sum(training.flops for training in plan.trainings), "FLOP")
    blanks = [""] * 7
    rows.append(["in all", f"{plan.num_parameters:,}", *blanks, total])
    return table(rows)


def _memory(groups: Sequence[tuple[str, TrainingPlan]]) -> str:
    """Return a column for everything that takes memory in one of the trainings."""
    memories = [training.memory for _, training in groups]
    parts = [f.name for f in fields(Memory) if any(getattr(m, f.name) for m in memories)]
    rows = [["Memory of a GPU", "images at once", *(p.replace("_", " ") for p in parts), "in all"]]
    for name, training in groups:
        sizes = [getattr(training.memory, part) for part in parts]
        cells = [scaled(size, "B") for size in (*sizes, training.memory.total)]
        at_once = training.batch_size // training.accumulation_steps
        rows.append([name, f"{at_once:,}", *cells])
    return table(rows)


def _gpus(plan: Plan, groups: Iterable[tuple[str, TrainingPlan]]) -> str:
    """Say what fits where, and why not; a tenth of a GPU's memory is kept free."""
    lines = []
    for i, gpu in enumerate(plan.gpus):
        lines.append(f"{gpu.count} x {gpu.name}, {gpu.memory_gb:g} GB")
        for name, training in groups:
            fit, duration = training.fits[i], training.durations[i]
            verdict = f"fits, in {fit.precision}"
            if not fit.fits:
                needs = f"needs {scaled(fit.num_bytes, 'B')} in {fit.precision}"
                verdict = f"does not fit: {needs}; would with {fit.advice}"
            elif duration.days is None:
                verdict = f"never ends: a preemption costs {duration.lost:.3f} days, and "
                verdict += f"{duration.preemption_rate:g} come a day; checkpoint_every may be less"
            lines.append(f"  {name}: {verdict}")
    return "\n".join(lines)


def _disk(plan: Plan, groups: Iterable[tuple[str, TrainingPlan]]) -> str:
    row = [["A row on disk", "bytes"]]
    row += [[name, number(size)] for name, size in plan.row_bytes.items()]
    row.append(["in all", f"{sum(size or 0 for size in plan.row_bytes.values()):,}"])
    run = [[f"Disk for {plan.num_rows:,} rows", ""]]
    run += [[name, scaled(size, "B")] for name, size in plan.run_bytes.items()]
    run.append(["in all", scaled(sum(plan.run_bytes.values()), "B")])
    for name, training in groups:
        size = scaled(training.temporary_bytes, "B")
        run.append([f"while it trains, in TMPDIR of its node: {name}", size])
    return f"{table(row)}\n\n{table(run)}"


def _fleet(plan: Plan) -> str:
    schedule = plan.schedule
    if schedule is None:
        return "Days: unknown, dollars: unknown (fleet.gpus names no GPU)"
    head = ["Fleet", "GPU", "precision", "from day", "to day", "days", "preemptions", "dollars"]
    rows = [[*head, "kWh"]]
    for job in schedule.assignments:
        times = [f"{value:,.2f}" for value in (job.start, job.end, job.days, job.preemptions)]
        costs = [f"{job.dollars:,.0f}", number(job.kwh)]
        rows.append([job.name, job.gpu, job.precision, *times, *costs])
    rows += [[name, "none fits"] for name in schedule.unplaced]
    days = [number(schedule.days, 2), number(schedule.gpu_days, 2), ""]
    rows.append(["in all", "", "", "", *days, number(schedule.dollars), number(schedule.kwh)])
    parts = [table(rows), _by_gpu(schedule), *_deadline(plan.deadline_days, schedule)]
    return "\n\n".join(parts)


def _by_gpu(schedule: Schedule) -> str:
    """Return what each GPU trains, in its order."""
    jobs: dict[str, list[Assignment]] = {}
    for job in schedule.assignments:
        jobs.setdefault(job.gpu, []).append(job)
    rows = [["GPU", "free from day", "trains"]]
    for gpu, own in sorted(jobs.items()):
        rows.append([gpu, f"{own[-1].end:,.2f}", ", ".join(job.name for job in own)])
    return table(rows)


def _deadline(deadline: float | None, schedule: Schedule) -> Iterator[str]:
    if deadline is None or schedule.days is None:
        return
    kept = schedule.days <= deadline
    told = "the cheapest found that keeps it" if kept else "missed; this is the earliest found"
    yield f"Deadline: {deadline:g} days, {told}."
