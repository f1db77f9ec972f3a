"""The pictures of ZKLoRA's demo: a style that a LoRA can learn, and what is drawn with it."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray import reports
from paris_ray.bundle import load_bundle
from paris_ray.embeddings import read_table
from paris_ray.folders import Folder
from paris_ray.sampling import generate
from paris_ray.sampling.generation import sample
from paris_ray.sampling_options import sampling_options

NIGHT_TINT = np.array([70, 90, 160])  # what white looks like by night
NUM_HELD_OUT = 8  # half of all at most
SEED = 0
SCALE = 8
PAIR, PAGE = "pair.png", "pair.html"
TITLE = "paris_ray: a LoRA bought through ZKLoRA"


class Subject(NamedTuple):
    """What the demo is about: a prompt, and the expert that draws it."""

    expert: int
    prompt: str


def choose_subject(bundle_path: str) -> Subject:
    """Return the example prompt of a bundle that one expert draws most alone, and that expert."""
    bundle = load_bundle(bundle_path)
    prompts = bundle.facts.example_prompts
    text, seeds = bundle.encode_text(prompts), [SEED] * len(prompts)
    usage = sample(bundle, text, seeds, sampling_options(bundle)).expert_usage
    prompt, expert = divmod(int(usage.argmax()), bundle.num_experts)
    return Subject(expert, prompts[prompt])


def write_night_pictures(shard: Folder, prompt: str, training: Path, held_out: Path) -> None:
    """Write an expert's own pictures as they look at night: two folders with `metadata.jsonl`.

    Args:
        shard: The training data of the expert.
        prompt: The picture with this caption comes first of those that are held out.
        training: For all others.
        held_out: For a few that the LoRA is tried on, and not trained on.
    """
    table = read_table(shard, ["caption", "thumbnail"])
    captions = table["caption"].to_pylist()
    pictures = at_night(reports.decode_thumbnails(table["thumbnail"].to_pylist()))
    order = np.random.default_rng(SEED).permutation(len(captions)).tolist()
    order.sort(key=lambda i: captions[i] != prompt)
    number = min(NUM_HELD_OUT, len(order) // 2)
    for folder, rows in (held_out, order[:number]), (training, order[number:]):
        _write_image_folder(folder, {captions[i]: pictures[i] for i in rows})


def at_night(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pictures `(n, S, S, 3)` as they look in the blue light of the night."""
    return (pictures * (NIGHT_TINT / 255)).round().astype(np.uint8)


def _write_image_folder(path: Path, pictures: dict[str, NDArray[np.uint8]]) -> None:
    folder, lines = Folder(path), []
    for i, (caption, picture) in enumerate(pictures.items()):
        name = f"{i:04d}.png"
        folder.write(name, reports.png_bytes(Image.fromarray(picture)))
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    folder.write("metadata.jsonl", "".join(lines).encode())


def draw_pair(bundle_path: str, adapter: Path, receipt_key: str, prompt: str, folder: Path) -> None:
    """Draw a prompt without a bought adapter and with it, from the same noise.

    Writes both side by side, and a page that says what they are.

    Raises:
        ReceiptError: if the receipt beside the adapter does not allow it.
    """
    bundle = load_bundle(bundle_path)
    bundle.add_lora("bought", str(adapter), receipt_key=receipt_key)
    pair = [generate(bundle, [prompt], seed=SEED, lora=lora)[0] for lora in (None, "bought")]
    grid = reports.picture_grid(np.stack([np.asarray(image) for image in pair]), 2, SCALE)
    (folder / PAIR).write_bytes(reports.png_bytes(grid))
    captions = ("without the LoRA", "with the LoRA, from the weights that were bought")
    figures = [reports.figure(image, text) for image, text in zip(pair, captions, strict=True)]
    section = reports.section(prompt, *figures)
    (folder / PAGE).write_bytes(reports.page(TITLE, [section], bundle.facts.attribution))
