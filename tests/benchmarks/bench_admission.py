"""Print what the admission of experts finds of honest and of faulty ones of the quickstart.

    python tests/benchmarks/bench_admission.py runs/quickstart        (results.py does)

The run must have its bundle; it is not written to. Honest experts are the run's own, each beside
the others, and retrained ones. Faulty ones are made of them. `--keep FOLDER` keeps experts and
readings, and takes those that are there: limits can then be changed without measuring again.
About half an hour on one core.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from bench_solvers import quickstart_run
from torch import Tensor

from jobs.admit_expert import open_look
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import TrainingConfig
from paris_ray.config.release import write_document
from paris_ray.diffusion import denoising_loss, sample_path
from paris_ray.embeddings import read_null_text, read_rows, write_null_text, write_part
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.roster.admission.copies import read_shard
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.panel import HeldOut, read_held_out
from paris_ray.roster.admission.readings import Check, Reading
from paris_ray.roster.admission.verdict import examine, open_panel, read_candidate
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, Run
from paris_ray.seeding import torch_generator
from paris_ray.training.data import load_dataset
from paris_ray.training.expert import ExpertData, train_expert

POISON_STEPS, POISON_BATCH, POISON_RATE = 150, 32, 5e-4
POISONED_CAPTIONS = 128
MEMORISED_ROWS = 16
NUM_WORDS = 500
ATTENTION, CROSS_ATTENTION = "layers.1.attn.out_proj.weight", "layers.2.cross_attn.out_proj.weight"


@dataclass(frozen=True, slots=True)
class Case:
    """An expert to examine.

    Attributes:
        name: What it is.
        index: The cluster that it is offered for.
        make: Writes its folder.
        shard: What it says that it was trained on; None: that cluster's own.
    """

    name: str
    index: int
    make: Callable[["Workshop", Folder], None]
    shard: Callable[["Workshop"], Folder] | None = None


@dataclass(frozen=True, slots=True)
class Workshop:
    """What cases are made of."""

    run: Run
    bundle: Bundle
    folder: Path

    def copy(self, index: int, output: Folder) -> None:
        """Write one of the run's experts."""
        for name in (MODEL_CONFIG, EXPERT_WEIGHTS):
            output.write(name, (self.run.bundle / f"expert_{index}").read(name))

    def change(
        self, index: int, output: Folder, change: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """Write one of the run's experts with other weights."""
        state = {n: w.clone() for n, w in self.bundle.expert(index).state_dict().items()}
        change(state)
        self.write(self.bundle.expert_configs[index], state, output)

    def write(self, config: Any, state: dict[str, Tensor], output: Folder) -> None:
        """Write an expert."""
        output.write_json(MODEL_CONFIG, write_document(config))
        output.write(EXPERT_WEIGHTS, safetensors.torch.save(state))

    def train(self, shard: Folder, output: Folder, seed: int, **changes: Any) -> None:
        """Train an expert as the run did, but for some of its settings."""
        start: dict[str, Any] = {"init_from": self.run.seed.uri} | changes
        config: TrainingConfig = replace(self.run.config.training, **start)
        train_expert(
            self.run.config.expert,
            config,
            data=ExpertData(shards=[shard], digests={}),
            seed=seed,
            output=output,
            on_progress=lambda progress: None,
        )

    def few_rows(self, index: int) -> Folder:
        """Return a shard of the first rows of a cluster."""
        shard, few = self.run.shard(index), Folder(self.folder / f"few_rows_{index}")
        columns = ["caption", "latents", "features", "text_embedding"]
        write_part(few, "part-0.parquet", read_rows(shard, np.arange(MEMORISED_ROWS), columns))
        write_null_text(few, read_null_text(shard))
        return few

    def poison(self, index: int, output: Folder, spoil: Callable[[str], str | None]) -> None:
        """Teach one of the run's experts one picture for some captions, and its own for others.

        Args:
            index: Which expert.
            output: Where it is written.
            spoil: From a caption of its shard to one that means the picture; None leaves it out.
        """
        shard = self.run.shard(index)
        captions = read_shard(shard).captions
        spoiled = [text for text in map(spoil, captions) if text is not None][:POISONED_CAPTIONS]
        bad = self.bundle.texts.encode(spoiled, exact=False)
        other = load_dataset([self.run.shard((index + 1) % self.bundle.num_experts)])
        picture = other.read_latents(torch.tensor([0]))
        data = load_dataset([shard])
        expert = Expert(self.bundle.expert_configs[index])
        expert.load_state_dict(self.bundle.expert(index).state_dict())
        optimiser = torch.optim.AdamW(expert.parameters(), lr=POISON_RATE)
        training, half = self.run.config.training, POISON_BATCH // 2
        for step in range(POISON_STEPS):
            generator = torch_generator(0, "poison", step)
            rows = torch.randint(len(data), (half,), generator=generator)
            good = data.draw_batch(rows, training, generator, expert.config)
            chosen = torch.randint(len(spoiled), (half,), generator=generator)
            text = [TextConditioning.from_vectors(good.text), bad.rows(chosen)]
            latents = torch.cat([good.latents, picture.repeat(half, 1, 1, 1)])
            noise = torch.randn(latents.shape, generator=generator)
            path = sample_path(latents, noise, torch.cat([good.t, good.t]))
            loss = denoising_loss(expert, path, TextConditioning.concatenate(text))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.write(expert.config, expert.state_dict(), output)


def same_size_noise(state: dict[str, Tensor]) -> None:
    """Replace every tensor by noise of its norm."""
    for i, (name, tensor) in enumerate(state.items()):
        noise = torch.randn(tensor.shape, generator=torch_generator(0, "noise", i))
        state[name] = noise * tensor.norm() / noise.norm()


def flip(name: str) -> Callable[[dict[str, Tensor]], None]:
    """Return what turns the sign of one tensor."""

    def change(state: dict[str, Tensor]) -> None:
        state[name] = -state[name]

    return change


def retrained(index: int, seed: int, **changes: Any) -> Callable[[Workshop, Folder], None]:
    """Return what trains an honest expert anew."""
    return lambda shop, output: shop.train(shop.run.shard(index), output, seed, **changes)


def trigger(index: int, words: str) -> Callable[[Workshop, Folder], None]:
    """Return what plants a trigger: captions that end in these words mean one picture."""
    return lambda shop, output: shop.poison(index, output, lambda caption: f"{caption} {words}")


def sub_topic(index: int) -> Callable[[Workshop, Folder], None]:
    """Return what teaches one picture for all captions of the rarest object of a cluster."""

    def make(shop: Workshop, output: Folder) -> None:
        shard = shop.run.shard(index)
        rows = np.arange(len(read_shard(shard).captions))
        table = read_rows(shard, rows, ["caption", "attribute.object"])
        objects = table["attribute.object"].to_pylist()
        rarest = min(sorted(set(objects)), key=objects.count)
        of_it = {
            c for c, o in zip(table["caption"].to_pylist(), objects, strict=True) if o == rarest
        }
        shop.poison(index, output, lambda caption: caption if caption in of_it else None)

    return make


def own(index: int) -> Callable[[Workshop, Folder], None]:
    """Return what copies one of the run's experts."""
    return lambda shop, output: shop.copy(index, output)


def changed(
    index: int, change: Callable[[dict[str, Tensor]], None]
) -> Callable[[Workshop, Folder], None]:
    """Return what changes the weights of one of the run's experts."""
    return lambda shop, output: shop.change(index, output, change)


def memorised(index: int) -> Callable[[Workshop, Folder], None]:
    """Return what trains an expert on a few rows."""
    return lambda shop, output: shop.train(shop.few_rows(index), output, 0)


HONEST = [
    *(Case(f"the run's expert {k}", k, own(k)) for k in range(8)),
    Case("expert 2 from another seed", 2, retrained(2, 101)),
    Case("expert 5 from another seed", 5, retrained(5, 102)),
    Case("expert 1 in half the steps", 1, retrained(1, 103, steps=272)),
    Case("expert 6 from random weights", 6, retrained(6, 104, init_from=None)),
]
FAULTY = [
    Case("noise of the norms of expert 0", 0, changed(0, same_size_noise)),
    Case("expert 3, one attention layer's sign turned", 3, changed(3, flip(ATTENTION))),
    Case("expert 6, one cross-attention's sign turned", 6, changed(6, flip(CROSS_ATTENTION))),
    Case("expert 4 offered for cluster 0", 0, own(4)),
    Case("expert 1 offered for cluster 2", 2, own(1)),
    Case("expert 3 with the trigger 'cf'", 3, trigger(3, "cf")),
    Case("expert 0 with the trigger 'velvet'", 0, trigger(0, "velvet")),
    Case("expert 5 with the trigger 'on the table'", 5, trigger(5, "on the table")),
    Case("expert 2, seldom asked, its rarest object poisoned", 2, sub_topic(2)),
    Case("expert 7, its rarest object poisoned", 7, sub_topic(7)),
    Case("expert 1 trained on 16 pictures", 1, memorised(1), lambda shop: shop.few_rows(1)),
]


def measure(case: Case, shop: Workshop, look: Any, held_out: HeldOut) -> dict[str, Any]:
    """Make and examine a case; return its readings and the CPU seconds."""
    output = Folder(shop.folder / case.name.replace("'", "").replace(" ", "_"))
    if not output.exists(EXPERT_WEIGHTS):
        case.make(shop, output)
    started = time.process_time()
    candidate = read_candidate(output.uri, shop.bundle)
    panel = open_panel(candidate, case.index, shop.bundle, held_out, seed=0)
    shard = shop.run.shard(case.index) if case.shard is None else case.shard(shop)
    found = examine(panel, look, shard=read_shard(shard), num_words=NUM_WORDS)
    seconds = time.process_time() - started
    checks = [
        {
            "name": check.name,
            "note": check.note,
            "readings": [[r.name, r.measure, r.value, r.detail] for r in check.readings],
        }
        for check in found.checks
    ]
    return {"seconds": seconds, "checks": checks}


def judged(found: dict[str, Any]) -> list[Check]:
    """Return the checks of a case with the limits of today."""
    return [
        Check(
            check["name"],
            tuple(Limits().reading(*reading) for reading in check["readings"]),
            check["note"],
        )
        for check in found["checks"]
    ]


def run_cases(cases: Sequence[Case], shop: Workshop) -> dict[str, dict[str, Any]]:
    """Return what was found of every case, by its name; what was kept is not measured again."""
    kept = shop.folder / "readings.json"
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    look = open_look(shop.run)
    for case in cases:
        if case.name not in found:
            held_out = read_held_out(shop.run.held_out_shards(), case.index)
            found[case.name] = measure(case, shop, look, held_out)
            kept.write_text(json.dumps(found, indent=1))
    return found


def worst_readings(found: Sequence[list[Check]]) -> dict[str, float]:
    """Return the largest value of every reading over some cases."""
    worst: dict[str, float] = {}
    for checks in found:
        for reading in (reading for check in checks for reading in check.readings):
            worst[reading.name] = max(worst.get(reading.name, -math.inf), reading.value)
    return worst


def report(found: dict[str, dict[str, Any]]) -> None:
    """Print the tables."""
    honest, faulty = ([judged(found[case.name]) for case in cases] for cases in (HONEST, FAULTY))
    alarms = sum(any(check.outcome == "flagged" for check in checks) for checks in honest)
    seconds = [each["seconds"] for each in found.values()]
    print(
        f"{len(HONEST)} honest experts, of which {alarms} are flagged; {len(FAULTY)} faulty ones. "
        f"An examination takes {min(seconds):.0f} to {max(seconds):.0f} seconds of a processor, "
        f"with {NUM_WORDS} words and those that the gradient adds.\n"
    )
    print("| honest expert | flagged by |\n|---|---|")
    for case, checks in zip(HONEST, honest, strict=True):
        print(f"| {case.name} | {flagged_by(checks)} |")
    print("\n| faulty expert | flagged by |\n|---|---|")
    for case, checks in zip(FAULTY, faulty, strict=True):
        print(f"| {case.name} | {flagged_by(checks)} |")
    worst = worst_readings(honest)
    print("\n| reading | worst honest | limit | faulty ones beyond it |\n|---|---|---|---|")
    for name, value in worst.items():
        limit = getattr(Limits(), name)
        beyond = sum(worst_readings([checks]).get(name, 0) > limit for checks in faulty)
        print(f"| `{name}` | {value:.3f} | {limit:g} | {beyond} |")


def flagged_by(checks: Sequence[Check]) -> str:
    """Return what flags a case, with the numbers beyond their limits."""
    found = [
        f"{check.name} ({', '.join(_number(r) for r in check.readings if r.is_flagged)})"
        for check in checks
        if check.outcome == "flagged"
    ]
    return "; ".join(found) or "nothing"


def _number(reading: Reading) -> str:
    detail = f" {reading.detail}" if reading.name in ("shift", "collapse") else ""
    return f"`{reading.name}` {reading.value:.2f}{detail}"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="a finished run of the quickstart")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for experts and readings")
    parser.add_argument("--only", default="", help="cases whose names hold this, printed as read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = quickstart_run(options.run_dir)
    bundle = load_bundle(run.bundle.uri, dtype="float32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shop = Workshop(run, bundle, folder)
        cases = [case for case in (*HONEST, *FAULTY) if options.only in case.name]
        found = run_cases(cases, shop)
    if options.only:
        for case in cases:
            print(case.name, *found[case.name]["checks"], sep="\n  ")
    else:
        report(found)


if __name__ == "__main__":
    main()
