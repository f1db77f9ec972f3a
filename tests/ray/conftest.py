"""A small real corpus and a configuration that trains on it in seconds."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from paris_ray.config import Config, load

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("square", "circle", "triangle", "cross")
NUM_GOOD = 72
BAD_ROWS = {
    "truncated.png": "truncated_image",
    "text.png": "not_an_image",
    "missing.png": "missing_file",
    "empty.png": "empty_image",
    "silent.png": "empty_caption",
}


def draw_shape(colour: str, shape: str, shift: int) -> Image.Image:
    """Draw one coloured shape on white."""
    image = Image.new("RGB", (48, 40), "white")
    pen = ImageDraw.Draw(image)
    box = (8 + shift, 6, 34 + shift, 32)
    if shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(box[0], 32), (box[2], 32), (21 + shift, 6)], fill=colour)
    else:
        pen.line(box, fill=colour, width=7)
        pen.line((box[2], 6, box[0], 32), fill=colour, width=7)
    return image


@pytest.fixture(scope="session")
def shapes_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of shapes, with five kinds of bad rows and a duplicate among them."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def write_shapes(folder: Path) -> Path:
    """Write that image folder; return it."""
    rows = []
    for i in range(NUM_GOOD):
        colour, shape = COLOURS[i % 6], SHAPES[i // 6 % 4]
        draw_shape(colour, shape, shift=i // 24).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": f"a {colour} {shape} number {i // 24}"})
    good = (folder / "000.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "silent.png").write_bytes(good)
    rows += [{"file_name": name, "text": "bad"} for name in BAD_ROWS if name != "silent.png"]
    rows += [{"file_name": "silent.png", "text": "  "}, {"file_name": "003.png", "text": "again"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def tiny_overrides(shapes_corpus: Path) -> list[str]:
    """The overrides, all but run_dir, of a run that takes seconds."""
    return overrides(shapes_corpus)


def overrides(corpus: Path) -> list[str]:
    """Return those overrides for an image folder of shapes."""
    return [
        "corpus.kind=image_folder",
        f"corpus.path={corpus}",
        "corpus.rows_per_shard=16",
        r"corpus.attributes=a (?P<colour>\w+) (?P<shape>\w+)",
        "text.token_states=6",
        "features.steps=4",
        "features.batch_size=16",
        "features.num_cpus=1",
        "features.threads=1",
        "cluster.num_clusters=3",
        "cluster.num_fine=12",
        "codec.num_components=16",
        "expert.hidden_size=32",
        "expert.num_layers=2",
        "seed_training.steps=10",
        "seed_training.batch_size=16",
        "seed_training.log_every=5",
        "seed_training.threads=1",
        "seed_training.num_cpus=0.5",
        "training.steps=30",
        "training.batch_size=16",
        "training.log_every=5",
        "training.checkpoint_every=10",
        "training.num_cpus=0.5",
        "router.hidden_size=32",
        "router_training.steps=20",
        "router_training.num_cpus=1",
        "router_training.threads=1",
        "sampling.num_inference_steps=3",
        "evaluation.num_tasks=1",
    ]


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Config:
    """The configuration of the one finished run that the tests share."""
    run_dir = tmp_path_factory.mktemp("run") / "shapes"
    return load("quickstart", [f"run_dir={run_dir}", *tiny_overrides])


@pytest.fixture(scope="session")
def num_good_rows() -> int:
    """How many rows of the corpus are usable."""
    return NUM_GOOD


@pytest.fixture(scope="session")
def bad_rows() -> dict[str, str]:
    """The keys of the unusable rows and why they are."""
    return BAD_ROWS | {"003.png": "duplicate_key"}
