"""What bench_zklora.py prints of leaks: errors of thieves, their shares, and a buyer's decision."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from paris_ray.zklora.fixed_point import QuantisedModule, evaluate, quantise, quantise_rows
from paris_ray.zklora.leakage import Span, assumed_inputs, chosen_rows, predicted_error

GOALS_HEAD = (["", "goal", "measured", ""], ["---"] * 4)


def goal(what: str, value: float, most: float, unit: str) -> list[str]:
    """Return a line of a table of goals: a value that may be so much at most."""
    verdict = "met" if value <= most else "**missed**"
    return [what, f"<= {most:g} {unit}", f"{value:.3g} {unit}", verdict]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def random_module(d_in: int, r: int, d_out: int, random: np.random.Generator) -> QuantisedModule:
    """Return a module with normal weights."""
    return quantise(random.standard_normal((d_in, r)), random.standard_normal((r, d_out)))


LEAKAGE_ROWS = (4, 16, 64, 144, 256, 576)
POWERS = (0.0, 0.5, 1.0)
NUM_SESSIONS = 20
METER_GOAL = 10.0  # per cent


def bench_leakage(options: Any) -> str:
    """Return how well thieves predict a module after some rows, beside what the meter says."""
    (d_in, r, d_out), counts = (1152, 16, 1152), LEAKAGE_ROWS
    if options.quick:
        (d_in, r, d_out), counts = (64, 4, 64), (4, 8)
    random = np.random.default_rng(0)
    module = random_module(d_in, r, d_out, random)
    rows = [["rows seen", *map(str, counts)], ["---"] * (len(counts) + 1)]
    for power in POWERS:
        for chooses, how in ((False, "as they come"), (True, "chosen")):
            errors = [_errors(module, count, power, chooses, 0) for count in counts]
            cells = [f"{predicted:.2g} / {real:.2g}" for predicted, real in errors]
            rows.append([f"i^-{power:g}, {how}", *cells])
    worst = 0.0
    for session in range(NUM_SESSIONS):
        small = random_module(int(random.integers(32, 257)), 8, 64, random)
        count, power = int(random.integers(1, small.d_in // 2)), float(random.choice(POWERS))
        for chooses in (False, True):
            predicted, real = _errors(small, count, power, chooses, session + 1)
            worst = max(worst, 100 * abs(predicted / real - 1))
    verdict = goal(f"largest difference in {NUM_SESSIONS} random sessions", worst, METER_GOAL, "%")
    return f"{table(rows)}\n\n{table([*GOALS_HEAD, verdict])}"


def _errors(
    module: QuantisedModule, count: int, power: float, chooses: bool, seed: int
) -> tuple[float, float]:
    """Return the predicted error of a thief, and that of one who solves by least squares."""
    random = np.random.default_rng(seed)
    known, fresh, asked = (
        assumed_inputs(module.d_in, n, power, random) for n in (2048, 1024, count)
    )
    x = chosen_rows(known, count) if chooses else quantise_rows(asked)[0]
    answers = evaluate(module, x).astype(np.float64)
    guess = np.linalg.lstsq(x.astype(np.float64), answers, rcond=None)[0]
    truth = fresh @ module.a.astype(np.float64) @ module.b.astype(np.float64)
    real = float(np.linalg.norm(fresh @ guess - truth) / np.linalg.norm(truth))
    return predicted_error(Span(module.d_in, [x]), known, module), real


SHARE_ROWS = (1, 2, 4, 8, 16, 32, 64)
SHARE_GOAL = 25.0  # per cent
SHARE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def bench_share(options: Any) -> str:
    """Return what part of the demo's adapter thieves have, by the rows that they saw."""
    if (found := _demo(options)) is None:
        return f"not measured: {options.demo} has no adapter, `make demo-zklora` makes one"
    from paris_ray.zklora.offer import default_budget
    from paris_ray.zklora.share import Worth

    subject, modules, scale = found
    worth = Worth(subject, modules, scale)
    counts = SHARE_ROWS[: 2 if options.quick else None]
    thieves = {
        chooses: [worth.thief(count, chooses=chooses) for count in counts]
        for chooses in (False, True)
    }
    rows = [["rows seen", *map(str, counts)], ["---"] * (len(counts) + 1)]
    for chooses, how in ((False, "as they come"), (True, "chosen")):
        rows.append([f"share, {how}", *(f"{100 * t.share:.0f} %" for t in thieves[chooses])])
        rows.append([f"relative error, {how}", *(f"{t.error:.2f}" for t in thieves[chooses])])
    budget = default_budget([module.d_in for module in modules.values()])
    shares = [100 * worth.thief(budget, chooses=chooses).share for chooses in (False, True)]
    goals = [
        goal(f"share at the default budget of {budget}, {how}", share, SHARE_GOAL, "%")
        for how, share in zip(("as they come", "chosen"), shares, strict=True)
    ]
    width = max(module.d_in for module in modules.values())
    head = f"{len(modules)} modules up to {width} wide; loss lowered by {worth.gain:.3g}:"
    return f"{head}\n\n{table(rows)}\n\n{table([*GOALS_HEAD, *goals])}"


def _demo(options: Any) -> Any:
    """Return the demo's expert with held-out pictures, integers and scale; None: not made."""
    from paris_ray.zklora.adapter import quantise_adapter, read_peft
    from paris_ray.zklora.subjects import PictureSubject, read_pictures

    folder, location = options.demo, options.bundle
    if not (folder / "night" / "adapter_model.safetensors").exists():
        return None
    subject = json.loads((folder / "subject.json").read_text())
    adapter = read_peft(folder / "night")
    pictures, captions = read_pictures(str(folder / "pictures" / "held_out"), location)
    examples = PictureSubject(
        bundle=location,
        expert=subject["expert"],
        pictures=pictures,
        captions=captions,
        noise=SHARE_LEVELS,
    )
    return examples, quantise_adapter(adapter), adapter.config.scale


NUM_NOISES = 32  # of every held-out picture: examples to draw trials from
NUM_TRIALS = 2000
TODAY = 8  # losses of the fixed test: four pictures at two levels
TWO_LEVELS, ONE_LEVEL = (0.3, 0.7), (0.5,)  # of before, and of the demo
ROWS_GOAL = 50.0  # per cent


def bench_decision(options: Any) -> str:
    """Return how many losses a buyer needs, and how often it errs."""
    if (found := _demo(options)) is None:
        return f"not measured: {options.demo} has no adapter, `make demo-zklora` makes one"
    from paris_ray.zklora.sequential import ERROR_RATE, MIN_GAIN

    noises = 2 if options.quick else NUM_NOISES
    of_levels = {levels: _log_ratios(found, levels, noises) for levels in (TWO_LEVELS, ONE_LEVEL)}
    head = ["true gain", "fixed test: wrong"]
    for levels in of_levels:
        where = " and ".join(map(str, levels))
        head += [f"sequential at {where}: wrong", "undecided", "mean losses"]
    rows, used = [head, ["---"] * len(head)], {}
    # The adapter itself, and adapters with as much noise that gain less, nothing, or just enough.
    enough = -np.log1p(-MIN_GAIN)
    own = of_levels[TWO_LEVELS].mean()
    for what, mean in (
        (f"{100 * -np.expm1(-own):.0f} %, the demo's", None),
        (f"{100 * MIN_GAIN:.0f} %, just enough", enough),
        ("0 %", 0.0),
        ("-20 %", np.log(1 / 1.2)),
    ):
        cells = []
        for levels, gains in of_levels.items():
            shifted = gains if mean is None else gains - gains.mean() + mean
            fixed, wrong, undecided, losses = _trials(shifted, mean is not None and mean < enough)
            cells += [f"{100 * fixed:.1f} %"] if levels == TWO_LEVELS else []
            cells += [f"{100 * wrong:.1f} %", f"{100 * undecided:.1f} %", f"{losses:.1f}"]
            used[levels, what] = losses
        rows.append([what, *cells])
    needed = next(losses for (levels, _), losses in used.items() if levels == ONE_LEVEL)
    what = f"losses for the demo's, of the {TODAY} of before"
    verdict = goal(what, 100 * needed / TODAY, ROWS_GOAL, "%")
    told = f"Stated error rate {100 * ERROR_RATE:g} %, wanted gain {100 * MIN_GAIN:g} %:"
    return f"{told}\n\n{table(rows)}\n\n{table([*GOALS_HEAD, verdict])}"


def _log_ratios(found: Any, levels: Sequence[float], noises: int) -> Any:
    """Return the log ratios `(levels, examples)` of losses without the demo's adapter and with."""
    from paris_ray.bundle import load_bundle
    from paris_ray.evaluation.denoising import denoising_losses
    from paris_ray.zklora.inference import adapt

    subject, modules, scale = found
    bundle = load_bundle(subject.bundle)
    expert, latents = bundle.expert(subject.expert), bundle.codec.encode(subject.pictures)
    text = bundle.encode_text(subject.captions)
    view = adapt(expert, modules, scale, lambda name, x, _: evaluate(modules[name], x))
    without, with_adapter = (
        np.concatenate(
            [denoising_losses(m, latents, text, levels, seed=s).numpy() for s in range(noises)], 1
        ).astype(np.float64)
        for m in (expert, view)
    )
    return np.log(without / with_adapter)


def _trials(gains: Any, worse: bool) -> tuple[float, float, float, float]:
    """Return how often a fixed and the sequential test err, and what the latter needs.

    Both see examples drawn from these log ratios `(levels, examples)`, at most TODAY losses. The
    fixed test goes by the sign of the mean.

    Returns:
        Rate of errors of the fixed test, of the sequential one, of no decision, and mean losses.
    """
    from paris_ray.zklora.sequential import MIN_GAIN, Verdict, Wanted

    random, (levels, count) = np.random.default_rng(0), gains.shape
    wrong = Verdict.WORTH if worse else Verdict.NOT_WORTH
    fixed = errors = undecided = losses = 0
    for _ in range(NUM_TRIALS):
        drawn = gains[:, random.choice(count, TODAY // levels)]
        fixed += (drawn.mean() > -np.log1p(-MIN_GAIN)) == worse
        for n in range(2, TODAY // levels + 1):
            verdict = Wanted().verdict(np.exp(drawn[:, :n]), np.ones((levels, n)))
            if verdict is not Verdict.UNDECIDED:
                break
        losses += levels * n
        errors += verdict is wrong
        undecided += verdict is Verdict.UNDECIDED
    return fixed / NUM_TRIALS, errors / NUM_TRIALS, undecided / NUM_TRIALS, losses / NUM_TRIALS
