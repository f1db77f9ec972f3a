"""Print the numbers of docs/zklora.md, from one run on this machine.

    make bench        or        python tests/benchmarks/bench_zklora.py [SECTION ...]
    python tests/benchmarks/bench_zklora.py --quick     of tiny modules, in half a minute

With `--write docs/zklora.md` the tables also replace those in the document, between
`<!-- bench: SECTION -->` and `<!-- end -->`, and the charts are drawn into `images/` beside it.
Seconds are CPU seconds of one process with one thread, medians where they are short. Weights and
inputs are random: they cost what others do. Nothing is asserted.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ezkl_backend import BindingEzkl
from sections import write_section
from zklora_language import measure_session
from zklora_leaks import GOALS_HEAD, bench_decision, bench_leakage, bench_share, goal, table
from zklora_published import LORA_MODULES, OTHER_SYSTEMS

from paris_ray import zklora
from paris_ray.errors import ParisError

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
CONTEXT = b"bench"
BATCH = 16
REPEATS = 5
MANY_WEIGHTS = 10**6  # so many take long enough to be measured once


@dataclass(frozen=True)
class Shape:
    """A module, and how many rows are proved."""

    d_in: int
    r: int
    d_out: int
    rows: int

    def __str__(self) -> str:
        return f"{self.d_in}-{self.r}-{self.d_out}, {self.rows} row{'s' * (self.rows > 1)}"


Figures = dict[str, float]  # of one module: CPU seconds, and sizes in bytes

GOAL_SHAPE = Shape(1152, 16, 1152, 16)
LANGUAGE_SHAPE = Shape(4096, 16, 4096, 128)
SHAPES = (
    Shape(768, 4, 768, 1),
    GOAL_SHAPE,
    Shape(1152, 16, 3456, 256),
    Shape(1152, 64, 1152, 256),
    LANGUAGE_SHAPE,
    Shape(11008, 24, 4096, 16),
    Shape(16384, 256, 16384, 16),
)
QUICK_SHAPE = Shape(64, 4, 64, 4)

GOALS: tuple[tuple[str, str, float, float, str], ...] = (
    ("commit", "commit", 0.2, 1, "s"),
    ("prove", "prove", 0.5, 1, "s"),
    ("verify alone", "verify", 0.06, 1, "s"),
    (f"verify, one of {BATCH}", "verify_batched", 0.015, 1, "s"),
    ("proof", "proof_bytes", 8, 1e3, "kB"),
    ("memory of a verifier", "verifier_bytes", 200, 1e6, "MB"),
)
LANGUAGE_GOALS = (
    ("prove", "prove", 0.5, 1, "s"),
    (f"verify, one of {BATCH}", "verify_batched", 0.03, 1, "s"),
    ("proof", "proof_bytes", 8, 1e3, "kB"),
)


def make_claim(shape: Shape, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return a random module, and the rows that a session with it had."""
    random = np.random.default_rng(seed)
    a, b = ((shape.d_in, shape.r), (shape.r, shape.d_out))
    module = zklora.quantise(random.standard_normal(a), random.standard_normal(b))
    x = random.integers(-(2**15), 2**15, (shape.rows, shape.d_in), np.int16)
    return module, x, zklora.evaluate(module, x)


def num_weights(shape: Shape) -> int:
    """Return how many numbers are committed to."""
    return shape.r * (shape.d_in + shape.d_out)


def cpu_seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the median CPU time of a call."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def verifier_bytes(claim: Any) -> int:
    """Verify in this process, and return its peak resident memory."""
    zklora.verify(*claim)
    # Linux alone; `ru_maxrss` would begin with what the parent had.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]


def measure(shape: Shape, repeats: int = REPEATS) -> tuple[Figures, Any]:
    """Return what a module of this shape costs, and what is to be verified of it."""
    module, x, y = make_claim(shape)
    commitment, opening = zklora.commit(module)  # and the generators are there from now on
    claim = (commitment, x, y, CONTEXT, zklora.prove(opening, x, y, CONTEXT))
    figures: Figures = {
        "commit": cpu_seconds(lambda: zklora.commit(module), repeats),
        "prove": cpu_seconds(lambda: zklora.prove(opening, x, y, CONTEXT), repeats),
        "verify": cpu_seconds(lambda: zklora.verify(*claim), repeats),
        "opening_check": cpu_seconds(lambda: zklora.open_commitment(commitment, opening), repeats),
        "proof_bytes": len(claim[-1]),
        "commitment_bytes": sum(map(len, (*commitment.a, *commitment.b))),
    }
    return figures, claim


def measure_verifier(claim: Any) -> Figures:
    """Return what verifying costs in a batch, and the memory of a process that does nothing else.

    One claim many times over costs what as many claims do: they share the generators alone.
    """
    seconds = cpu_seconds(lambda: zklora.verify_batch([claim] * BATCH)) / BATCH
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(verifier_bytes, claim).result()
    return {"verify_batched": seconds, "verifier_bytes": peak}


def bench_modules(options: Any) -> str:
    """Return what single modules cost, and which goals are met."""
    seconds = {
        "commit": "commit s",
        "prove": "prove s",
        "verify": "verify s",
        "verify_batched": f"verify s, one of {BATCH}",
        "opening_check": "opening check s",
    }
    sizes = {"proof_bytes": "proof B", "commitment_bytes": "commitment B"}
    head = ["module", *seconds.values(), *sizes.values(), "verifier's memory MB"]
    rows, figures = [head, ["---"] * len(head)], {}
    for shape in (QUICK_SHAPE,) if options.quick else SHAPES:
        cost, claim = measure(shape, REPEATS if num_weights(shape) < MANY_WEIGHTS else 1)
        cost |= measure_verifier(claim)
        figures[shape] = cost
        numbers = [f"{cost[name]:.3f}" for name in seconds] + [f"{cost[name]:,}" for name in sizes]
        rows.append([str(shape), *numbers, f"{cost['verifier_bytes'] / 1e6:.0f}"])
    parts = [table(rows)]
    for wanted, goals in ((GOAL_SHAPE, GOALS), (LANGUAGE_SHAPE, LANGUAGE_GOALS)):
        shape = QUICK_SHAPE if options.quick else wanted
        cost = figures[shape]
        met = [goal(what, cost[name] / unit, most, of) for what, name, most, unit, of in goals]
        parts.append(f"The goals, for {shape}:\n\n{table([*GOALS_HEAD, *met])}")
    return "\n\n".join(parts)


LANGUAGE_MODULES = 64


def bench_language(options: Any) -> str:
    """Return what a session of a language model's LoRA costs both parties, and what it moves."""
    shape, modules = (QUICK_SHAPE, 8) if options.quick else (LANGUAGE_SHAPE, LANGUAGE_MODULES)
    found = measure_session(modules, shape.d_in, shape.r, shape.rows)
    user, contributor = found["user"], found["contributor"]
    cost, claim = measure(shape)
    cost |= measure_verifier(claim)
    rows = modules * shape.rows * (2 * shape.d_in + 8 * shape.d_out)
    parties = [["", "CPU s", "peak memory of a process MB"], ["---"] * 3]
    for party, costs in found.items():
        parties.append([party, f"{costs['cpu']:.1f}", f"{costs['peak'] / 1e6:.0f}"])
    peak = max(user["peak"], contributor["peak"]) / 1e6
    goals = [
        goal("offer to verified, both sides", user["cpu"] + contributor["cpu"], 45, "CPU-s"),
        goal("peak memory of a process", peak, 800, "MB"),
        goal("bytes moved, of those of the rows", 100 * user["bytes"] / rows, 105, "%"),
        goal("prove a module", cost["prove"], 0.5, "CPU-s"),
        goal(f"verify a module, one of {BATCH}", cost["verify_batched"], 0.03, "CPU-s"),
    ]
    head = (
        f"{modules} modules of {shape}: {user['requests']:.0f} requests, {rows / 1e6:.0f} MB of "
        f"rows, {user['bytes'] / 1e6:.0f} MB moved; {contributor['commit']:.1f} CPU-s for the "
        f"commitments, {contributor['wall']:.0f} s in all"
    )
    return f"{head}:\n\n{table(parties)}\n\n{table([*GOALS_HEAD, *goals])}"


ADAPTER = (("qkv", Shape(1152, 16, 3456, 256)), ("proj", Shape(1152, 16, 1152, 256)))
LAYERS = 28


def bench_adapter(options: Any) -> str:
    """Return what a LoRA of all self-attention of DiT-XL/2 costs, beside the paper's modules."""
    kinds = (("tiny", QUICK_SHAPE),) if options.quick else ADAPTER
    layers = 2 if options.quick else LAYERS
    head = ["base", "modules", "weights/module", "rows"]
    head += ["set-up s", "witness s", "prove s", "verify s"]
    rows = [head, ["---"] * len(head)]
    for base, modules, weights, *seconds in LORA_MODULES:
        rows.append([f"{base} (paper)", f"{modules}", f"{weights:,}", "15", *map(str, seconds)])
    made = {kind: _prove_layers(shape, layers) for kind, shape in kinds}
    claims = [claim for _, _, claims in made.values() for claim in claims]
    verify = cpu_seconds(lambda: zklora.verify_batch(claims))
    for kind, shape in kinds:
        weights = num_weights(shape)
        commit, prove, _ = made[kind]
        seconds = [f"{commit / layers:.2f}", "-", f"{prove / layers:.2f}"]
        seconds.append(f"{verify / len(claims):.3f}")
        rows.append([f"XL/2, {kind}", f"{layers}", f"{weights:,}", f"{shape.rows}", *seconds])
    total = sum(commit + prove for commit, prove, _ in made.values())
    goals = [
        goal("commit and prove", total, 55, "CPU-s"),
        goal("verify, one batch", verify, 4, "CPU-s"),
    ]
    kilobytes = sum(len(claim[-1]) for claim in claims) / 1e3
    ours = f"All {len(claims)} modules of ours, {kilobytes:.0f} kB of proofs:"
    return f"{table(rows)}\n\n{ours}\n\n{table([*GOALS_HEAD, *goals])}"


def _prove_layers(shape: Shape, layers: int) -> tuple[float, float, list[Any]]:
    """Return the CPU seconds of all commitments and of all proofs, and what is to be verified."""
    commit = prove = 0.0
    claims = []
    for seed in range(layers):
        module, x, y = make_claim(shape, seed)
        started = time.process_time()
        commitment, opening = zklora.commit(module)
        committed = time.process_time()
        proof = zklora.prove(opening, x, y, CONTEXT)
        prove += time.process_time() - committed
        commit += committed - started
        claims.append((commitment, x, y, CONTEXT, proof))
    return commit, prove, claims


EZKL_SHAPE = Shape(768, 4, 768, 1)
EZKL_RATIO = 25.0
BACKEND_STEPS = ("commit", "prove", "verify")
COSTS = ("prove", "verify", "proof_bytes")


def bench_ezkl(options: Any) -> str:
    """Return what EZKL takes for the same module: as it comes, and made to prove our statement."""
    shape = QUICK_SHAPE if options.quick else EZKL_SHAPE
    measured = {"ours": _measure_backend(zklora, shape, REPEATS)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            ezkl = BindingEzkl(Path(folder))
        except ParisError as error:
            return f"not installed: {error}"
        set_up = cpu_seconds(lambda: _set_up(ezkl, shape))
        measured["EZKL, our circuit of integers"] = _measure_backend(ezkl, shape, REPEATS)
        measured["EZKL, our circuit of integers"]["set_up"] = set_up
    measured["EZKL, its own settings"] = _measure_stock_ezkl(shape)
    columns = {name: f"{name.replace('_', '-')} s" for name in ("set_up", *BACKEND_STEPS)}
    head = ["", *columns.values(), "proof B", "times ours to prove", "goal"]
    rows = [head, ["---"] * len(head)]
    for name, figures in measured.items():
        numbers = [f"{figures[what]:.3g}" if what in figures else "-" for what in columns]
        ratio = figures["prove"] / measured["ours"]["prove"]
        verdict = "met" if ratio >= EZKL_RATIO else "**missed**"
        against = ["", ""] if name == "ours" else [f"{ratio:.0f}", f">= {EZKL_RATIO:g}, {verdict}"]
        rows.append([name, *numbers, f"{figures['proof_bytes']:,}", *against])
    return f"{shape}:\n\n{table(rows)}"


WEIGHTS_SHAPES = (EZKL_SHAPE, LANGUAGE_SHAPE, Shape(4096, 256, 4096, 128))


def bench_weights(options: Any) -> str:
    """Return what a million weights cost: ours and EZKL's of this run, others' as published."""
    shapes = (QUICK_SHAPE,) if options.quick else WEIGHTS_SHAPES
    rows: list[tuple[str, int, float | None, float | None, float | None]] = []
    for shape in shapes:
        cost = _measure_backend(zklora, shape, 1)
        rows.append((f"ours: {shape}", num_weights(shape), *map(cost.get, COSTS)))
    with tempfile.TemporaryDirectory() as folder, suppress(ParisError):  # if EZKL is not installed
        ezkl = BindingEzkl(Path(folder))
        _set_up(ezkl, shapes[0])
        cost = _measure_backend(ezkl, shapes[0], 1)
        rows.append((f"EZKL: {shapes[0]}", num_weights(shapes[0]), *map(cost.get, COSTS)))
    head = ["", "weights", "prove s", "verify s", "proof B"]
    head += [f"{name} / million" for name in head[2:]]
    lines = [head, ["---"] * len(head)]
    for name, weights, *figures in (*rows, *OTHER_SYSTEMS):
        scaled = [None if cost is None else cost * 1e6 / weights for cost in figures]
        lines.append([name, f"{weights:,}", *map(_rounded, (*figures, *scaled))])
    return table(lines)


def _rounded(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"


def _set_up(ezkl: Any, shape: Shape) -> None:
    """Make the parameters, and both keys."""
    ezkl.create_srs(shape.d_in, shape.r, shape.d_out)
    ezkl.commit(make_claim(shape)[0])


def _measure_backend(backend: Any, shape: Shape, repeats: int) -> Figures:
    module, x, y = make_claim(shape)
    commitment, opening = backend.commit(module)
    proof = backend.prove(opening, x, y, CONTEXT)
    calls = (
        partial(backend.commit, module),
        partial(backend.prove, opening, x, y, CONTEXT),
        partial(backend.verify, commitment, x, y, CONTEXT, proof),
    )
    seconds = [cpu_seconds(call, repeats) for call in calls]
    return {**dict(zip(BACKEND_STEPS, seconds, strict=True)), "proof_bytes": len(proof)}


def _measure_stock_ezkl(shape: Shape) -> Figures:
    script = Path(__file__).with_name("stock_ezkl.py")
    dimensions = map(str, (shape.d_in, shape.r, shape.d_out))
    command = [sys.executable, str(script), *dimensions]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (report,) = (line for line in output.splitlines() if line.startswith("{"))
    figures: Figures = json.loads(report)
    return figures


SWEEPS = {
    "rows": ("rows of 1152-16-1152", {4**n: Shape(1152, 16, 1152, 4**n) for n in range(6)}),
    "rank": ("r of 1152-r-1152, 16 rows", {2**n: Shape(1152, 2**n, 1152, 16) for n in range(2, 8)}),
    "width": ("d of d-16-d, 16 rows", {2**n: Shape(2**n, 16, 2**n, 16) for n in range(8, 13)}),
}
SWEEP_REPEATS = 3
LINES = ("commit", "prove", "verify")


def bench_sweeps(options: Any) -> str:
    """Return how cost grows with rows, rank and width; draw it if there is a document."""
    parts = []
    for name, (label, shapes) in SWEEPS.items():
        swept = {x: shapes[x] for x in list(shapes)[: 2 if options.quick else None]}
        costs = {x: measure(shape, SWEEP_REPEATS)[0] for x, shape in swept.items()}
        rows = [[label, *map(str, costs)], ["---"] * (len(costs) + 1)]
        for line in LINES:
            rows.append([f"{line} s", *(f"{cost[line]:.3f}" for cost in costs.values())])
        rows.append(["proof B", *(f"{cost['proof_bytes']:,}" for cost in costs.values())])
        parts.append(table(rows))
        if options.write:
            parts.append(_draw(options.write.parent, name, label, costs))
    return "\n\n".join(parts)


def _draw(folder: Path, name: str, label: str, costs: dict[int, Figures]) -> str:
    """Draw one sweep, and return the Markdown that shows it."""
    from paris_ray.charts import line_chart  # not at the top: a verifier needs no Pillow

    series = {line: [(float(x), cost[line]) for x, cost in costs.items()] for line in LINES}
    picture = f"images/zklora_{name}.png"
    line_chart(label, "CPU s", series).save(folder / picture, optimize=True)
    return f'<img src="{picture}" width="380" alt="CPU seconds against {label}">'


SECTIONS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "modules": ("ZKLoRA: one module", bench_modules),
    "language": ("ZKLoRA: a session of a language model's LoRA", bench_language),
    "adapter": ("ZKLoRA: a whole adapter, beside the paper's figures per module", bench_adapter),
    "ezkl": ("ZKLoRA: beside EZKL, in CPU seconds of all its threads", bench_ezkl),
    "weights": ("ZKLoRA: a million weights, beside other systems", bench_weights),
    "sweeps": ("ZKLoRA: CPU seconds against rows, rank and width", bench_sweeps),
    "leakage": ("ZKLoRA: errors of thieves, predicted and by least squares", bench_leakage),
    "share": ("ZKLoRA: what part of the demo's adapter a thief has", bench_share),
    "decision": ("ZKLoRA: losses until a buyer decides", bench_decision),
}


def main() -> None:
    """Print the sections."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/zklora-demo"), help="that of `make demo-zklora`"
    )
    parser.add_argument(
        "--bundle", default="runs/quickstart/bundle", help="that the demo's adapter is for"
    )
    parser.add_argument("--quick", action="store_true", help="tiny modules: does it run at all?")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the document's tables")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.quick and options.write:
        parser.error("--quick measures nothing worth writing")
    if not ONE_THREAD.items() <= os.environ.items():  # BLAS reads them when it is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ONE_THREAD)
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, one thread")
    for name in options.sections or SECTIONS:
        title, bench = SECTIONS[name]
        print(f"\n## {title}\n")
        body = bench(options)
        print(body, flush=True)
        if options.write:
            write_section(options.write, name, body)


if __name__ == "__main__":
    main()
