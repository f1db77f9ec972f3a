"""Print what a lost expert costs, with and without the seed as last resort.

    python tests/benchmarks/bench_last_resort.py runs/quickstart        (results.py does)

The run must have its bundle; it is not written to. Captions and noise are those of its evaluation,
on one thread and without Ray: an expert is lost by not being answered for, as the server's engine
does it.
"""

from collections.abc import Iterator

import numpy as np
from bench_solvers import BATCH_SIZE, Captions, Pictures, open_run, read_captions, right_share

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import Samples, advance, start_denoising
from paris_ray.sampling_options import sampling_options


def draw_without(
    bundle: Bundle, captions: Captions, rows: list[int], lost: set[int], last_resort: int | None
) -> Samples:
    """Draw some of the captions without some experts."""
    text = bundle.encode_text([captions.texts[row] for row in rows])
    seeds = [captions.seeds[row] for row in rows]
    models = LocalModels(bundle)
    denoising = start_denoising(bundle, text, seeds, sampling_options(bundle), last_resort)
    step = advance(denoising)
    while not isinstance(step, Samples):
        there = [call for call in step.calls if call.model not in lost]
        answers = iter(models.answer_all(there))
        step = advance(
            denoising, [None if call.model in lost else next(answers) for call in step.calls]
        )
    return step


def parts(rows: list[int]) -> Iterator[list[int]]:
    """Yield the rows in batches."""
    for start in range(0, len(rows), BATCH_SIZE):
        yield rows[start : start + BATCH_SIZE]


def draw(
    bundle: Bundle, captions: Captions, lost_of_row: list[set[int]], last_resort: int | None
) -> tuple[Pictures, list[int]]:
    """Return pictures `(N, S, S, 3)`, each without its lost experts, and each one's main expert."""
    drawn: dict[int, tuple[Pictures, int]] = {}
    for lost in {frozenset(lost) for lost in lost_of_row}:
        for rows in parts([row for row, own in enumerate(lost_of_row) if own == lost]):
            samples = draw_without(bundle, captions, rows, set(lost), last_resort)
            pictures = bundle.codec.decode(samples.latents)
            main = samples.expert_usage.argmax(dim=1).tolist()
            drawn |= zip(rows, zip(pictures, main, strict=True), strict=True)
    pictures, main = zip(*(drawn[row] for row in range(len(lost_of_row))), strict=True)
    return np.stack(pictures), list(main)


def main() -> None:
    """Measure."""
    run, num_captions = open_run(__doc__ or "", "a finished run of the quickstart")
    bundle, captions = load_bundle(run.bundle.uri), read_captions(run, num_captions)
    assert bundle.last_resort is not None, "the quickstart trains a seed"
    right = right_share(run, captions.attributes)
    nothing: list[set[int]] = [set() for _ in captions.texts]
    whole, main_experts = draw(bundle, captions, nothing, None)
    own = [{expert} for expert in main_experts]
    every = [set(range(bundle.num_experts)) for _ in captions.texts]
    ways = {
        "every expert there": whole,
        "the main expert lost, the seed in its place": draw(
            bundle, captions, own, bundle.last_resort
        )[0],
        "the main expert lost, the others in its place": draw(bundle, captions, own, None)[0],
        "all experts lost, the seed alone": draw(bundle, captions, every, bundle.last_resort)[0],
    }
    print(
        f"{len(captions.texts)} captions that were never shown; right is a picture in all "
        "attributes. The main expert of a picture is the one with most weight when none is lost.\n"
    )
    print("| drawn with | share right |\n|---|---|")
    for name, pictures in ways.items():
        print(f"| {name} | {right(pictures):.4f} |")


if __name__ == "__main__":
    main()
