"""Measure the engine in one process, without Ray: admission, exact bytes, adapters, texts, mixes.

    python tests/benchmarks/bench_engine.py --bundle RUN/bundle

Costs are seconds of the processor in one thread, the two sides of each ratio in alternation, so
that other work on the machine matters little. Nothing is asserted: a bar that is missed is printed
as missed.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import LoRAConfig
from paris_ray.exactness import MOST_TRIED
from paris_ray.folders import Folder
from paris_ray.models import layers, lora
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.sampling.calls import ROUTER, ExpertCall
from paris_ray.sampling.engine import Batch, Engine, Event, Finished, Limits, Ticket
from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import initial_noise, start_denoising
from paris_ray.sampling_options import SamplingOptions, num_evaluations, sampling_options

ARRIVALS = 300
BUSY = 16  # pictures that are being drawn when another arrives
ADAPTERS = ("a", "b", "c")
ROUNDS = 200
FEW_ROUNDS = 20
KINDS, MIXES = 40, 200


def report(what: str, values: Sequence[float], sign: str, bar: float) -> bool:
    """Print the median of some measurements beside its bar; return whether that is met."""
    middle = statistics.median(values)
    met = middle >= bar if sign == ">=" else middle <= bar
    each = f" of {', '.join(f'{value:.2f}' for value in values)}" if 1 < len(values) < 10 else ""
    print(
        f"- {what}: {middle:.2f}{each} (bar {sign} {bar}: {'met' if met else 'MISSED'})", flush=True
    )
    return met


class _Admission:
    """An engine under load, and what passes there before a newcomer is computed for."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._models = bundle, LocalModels(bundle)
        self._every = (ROUTER, *range(bundle.num_experts))
        self._engine = Engine(self._every, Limits())
        self._number = 0
        self._steps: dict[Ticket, int] = {}  # of the pictures in work

    def arrive(self) -> Ticket:
        """A request for one picture comes, and starts."""
        prompts, number = self._bundle.facts.example_prompts, self._number
        now = time.monotonic()
        self._number += 1
        options = sampling_options(self._bundle)
        text = self._bundle.encode_text([prompts[number % len(prompts)]])
        ticket = self._engine.admit(
            "bench",
            num_pictures=1,
            evaluations=options.num_inference_steps,
            timeout_s=1e9,
            listener=self._forget,
            now=now,
        )
        self._engine.start(ticket, [start_denoising(self._bundle, text, [number], options)], now)
        self._steps[ticket] = 0
        return ticket

    def _forget(self, event: Event) -> None:
        self._steps = {ticket: done for ticket, done in self._steps.items() if ticket.is_open}

    def compute(self) -> Batch:
        """Compute what waits for the model that was kept waiting longest."""
        batch = self._engine.take(self._every, time.monotonic())
        assert batch is not None
        self._engine.answer(batch, self._models.answer(batch.calls), time.monotonic())
        return batch

    def steps_until_computed(self) -> int:
        """Return the most steps that another picture makes before a newcomer is computed for."""
        while len(self._steps) < BUSY:
            self.arrive()
        before = {ticket: ticket.done[0] for ticket in self._steps}
        newcomer = self.arrive()
        while all(waiting.picture.ticket is not newcomer for waiting in self.compute().waiting):
            pass
        return max(ticket.done[0] - done for ticket, done in before.items())


def admission(bundle: Bundle) -> None:
    """A request that comes to a busy engine is computed for within one step of the others."""
    engine, chance = _Admission(bundle), random.Random(0)
    waited = []
    for _ in range(ARRIVALS):
        waited.append(engine.steps_until_computed())
        for _ in range(chance.randrange(2 * BUSY)):
            engine.compute()
    p99 = sorted(waited)[int(0.99 * len(waited))]
    report(f"steps from arrival to the first computation, p99 of {ARRIVALS}", [p99], "<=", 1)


def exactness(bundle: Bundle) -> None:
    """What products of their own for vectors cost, against batches of any product."""
    models = LocalModels(bundle)
    for rows in (1, 2, MOST_TRIED):
        calls = _calls(bundle, 0, [None] * rows)
        exact = [layers.apply_linear, lora.apply_linear]

        def inexact() -> None:
            layers.apply_linear = lora.apply_linear = functional.linear  # type: ignore[attr-defined,assignment]
            try:
                models.answer(calls)  # noqa: B023
            finally:
                layers.apply_linear, lora.apply_linear = exact  # type: ignore[attr-defined] # noqa: B023

        cost = _ratio(lambda: models.answer(calls), inexact)  # noqa: B023
        report(f"cost of exact bytes, an expert's pass of {rows} rows", [cost], "<=", 1.03)


def adapters(bundle: Bundle) -> None:
    """Several adapters and none in one batch, against one adapter for all."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ADAPTERS:
            path = Path(folder) / name
            adapter = Adapter.create(bundle.expert(0), LoRAConfig(), seed=0)
            save_adapter(adapter, Folder(path))
            bundle.add_lora(name, str(path), expert=0)
        models = LocalModels(bundle)
        mixed = _calls(bundle, 0, [*ADAPTERS, None] * (MOST_TRIED // 4))
        one = _calls(bundle, 0, [ADAPTERS[0]] * MOST_TRIED)
        speed = _ratio(lambda: models.answer(one), lambda: models.answer(mixed))
    report(f"{len(ADAPTERS)} adapters and none over one adapter, speed", [speed], ">=", 0.9)


def texts(bundle: Bundle) -> None:
    """What a text costs beside others, and what padding costs one alone."""
    encode, plain, numbers = bundle.encode_text, bundle.text_encoder.encode, count()
    bundle.texts.try_out()

    def encode_all(encode: Callable[[Sequence[str]], object], size: int) -> None:
        """Encode MOST_TRIED prompts, so many at a time."""
        for _ in range(MOST_TRIED // size):
            encode(_new_prompts(bundle, numbers, size))

    alone = partial(encode_all, encode, 1)
    for size in (2, 4, MOST_TRIED):
        cost = _ratio(partial(encode_all, encode, size), alone, FEW_ROUNDS)
        report(f"cost of a text among {size} over one alone", [cost], "<=", 1.0)
    cost = _ratio(alone, partial(encode_all, plain, 1), FEW_ROUNDS)
    report("cost of padding a text that is encoded alone", [cost], "<=", 1.25)


def together(bundle: Bundle) -> None:
    """What a picture costs, with its text, that is drawn with others, all models in one process."""
    models, numbers, options = LocalModels(bundle), count(), sampling_options(bundle)

    def draw_all(size: int) -> None:
        """Draw BUSY pictures, so many at a time."""
        for _ in range(BUSY // size):
            prompts = _new_prompts(bundle, numbers, size)
            _draw(bundle, models, prompts, [options] * size, range(size))

    draw_all(BUSY)
    cost = _ratio(partial(draw_all, BUSY), partial(draw_all, 1), FEW_ROUNDS)
    report(f"cost of a picture among {BUSY} over one alone", [cost], "<=", 0.33)


def mixes(bundle: Bundle) -> None:
    """Pictures of all kinds, in any mix, get the bytes that each gets alone."""
    chance, models = random.Random(0), LocalModels(bundle)
    kinds = [_any_options(bundle, chance) for _ in range(KINDS)]
    prompts = _new_prompts(bundle, count(), KINDS)
    alone = [_draw(bundle, models, [prompts[i]], [kinds[i]], [i])[0] for i in range(KINDS)]
    unlike = 0
    for _ in range(MIXES):
        mix = chance.sample(range(KINDS), chance.randint(2, BUSY))
        drawn = _draw(bundle, models, [prompts[i] for i in mix], [kinds[i] for i in mix], mix)
        unlike += sum(not torch.equal(alone[i], got) for i, got in zip(mix, drawn, strict=True))
    report(f"pictures of {MIXES} random mixes that differ from each alone", [unlike], "<=", 0)


def _any_options(bundle: Bundle, chance: random.Random) -> SamplingOptions:
    return sampling_options(
        bundle,
        num_inference_steps=chance.randint(1, 8),
        guidance_scale=chance.choice([1.0, 2.0, 7.5]),
        routing=chance.choice(["top-1", "top-2", "full"]),
        solver=chance.choice(["euler", "heun", "ab2", "dpm++2m"]),
    )


def _new_prompts(bundle: Bundle, numbers: Iterator[int], size: int) -> list[str]:
    """Return prompts that were never asked for, so that none is remembered."""
    prompts = bundle.facts.example_prompts
    return [f"{prompts[n % len(prompts)]} {n}" for n in islice(numbers, size)]


def _draw(
    bundle: Bundle,
    models: LocalModels,
    prompts: Sequence[str],
    kinds: Sequence[SamplingOptions],
    seeds: Sequence[int],
) -> list[Tensor]:
    """Return the latents of a picture of each prompt, for a request each, all at once."""
    every, text = (ROUTER, *range(bundle.num_experts)), bundle.encode_text(prompts)
    engine, told = Engine(every, Limits()), [list[Event]() for _ in prompts]
    for i, (options, seed) in enumerate(zip(kinds, seeds, strict=True)):
        ticket = engine.admit(
            "bench",
            num_pictures=1,
            evaluations=num_evaluations(options.solver, options.num_inference_steps),
            timeout_s=1e9,
            listener=told[i].append,
            now=0.0,
        )
        text_of_one = text.rows(slice(i, i + 1))
        engine.start(ticket, [start_denoising(bundle, text_of_one, [seed], options)], 0)
    while (batch := engine.take(every, 0.0)) is not None:
        engine.answer(batch, models.answer(batch.calls), 0.0)
    ends = [events[-1] for events in told]
    return [end.samples[0].latents for end in ends if isinstance(end, Finished)]


def _calls(bundle: Bundle, expert: int, loras: Sequence[str | None]) -> list[ExpertCall]:
    """Return a call for each adapter, about different pictures."""
    prompts = bundle.facts.example_prompts
    text = KeyedText.of(bundle.encode_text(prompts))
    noise = initial_noise(bundle.latent_shape, range(len(loras)))
    return [
        ExpertCall(
            expert=expert,
            lora=name,
            latents=noise[i : i + 1],
            t=0.5,
            text=text.rows(torch.tensor([i % len(prompts)])),
            null_text=None,
            guidance_scale=1.0,
        )
        for i, name in enumerate(loras)
    ]


def _ratio(one: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the processor time of one thing over that of another, each once in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, times in zip((one, other), seconds, strict=True):
            began = time.thread_time()
            function()
            times.append(time.thread_time() - began)
    first, second = map(statistics.median, seconds)
    return first / second


PARTS = {
    "admission": admission,
    "exactness": exactness,
    "adapters": adapters,
    "texts": texts,
    "together": together,
    "mixes": mixes,
}


def main() -> None:
    """Print the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--bundle", default="runs/bench/quickstart/bundle")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    bundle = load_bundle(options.bundle)
    for name in options.parts or PARTS:
        PARTS[name](bundle)


if __name__ == "__main__":
    main()
