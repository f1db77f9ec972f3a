"""A LoRA trained on a real Ray, from a folder of pictures to a folder that peft loads."""

import copy
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from paris_ray.artifacts import METRICS, Manifest, VerifiedFolder, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.config import load_lora
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.embeddings import column_names, read_table
from paris_ray.errors import ArtifactError, ConfigError, CorpusError
from paris_ray.folders import Folder
from paris_ray.models.lora import attach
from paris_ray.models.peft_layout import EXPERT_DIGEST, load_adapter

pytestmark = pytest.mark.ray

NUM_PICTURES = 8
EXPERT = 1
OVERRIDES = [
    "lora.r=4",
    "training.steps=30",
    "training.batch_size=4",
    "training.learning_rate=0.01",
    "training.schedule=constant",
    "training.log_every=5",
    "training.checkpoint_every=10",
    "training.num_cpus=0.5",
    "training.device=cpu",
    "corpus.max_bad_share=0.2",
]

Train = Callable[..., Manifest]


def draw_square(number: int) -> bytes:
    image = Image.new("RGB", (40, 36), "white")
    ImageDraw.Draw(image).rectangle((4 + number, 4, 30, 30), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of red squares; the last one is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = [{"file_name": f"{i}.png", "text": "a red square"} for i in range(NUM_PICTURES + 1)]
    for i, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(draw_square(i)[: 60 if i == NUM_PICTURES else None])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train(ray_session: None, tiny_bundle_path: Path, pictures: Path) -> Train:
    """A function that trains a LoRA of the tiny bundle."""
    from paris_ray.pipeline.lora import train_lora

    def run(output: Path, *overrides: str, **changes: Any) -> Manifest:
        options = {"bundle": str(tiny_bundle_path), "expert": EXPERT, "data": str(pictures)}
        config = load_lora(overrides=[*OVERRIDES, *overrides])
        return train_lora(config, output=str(output), **(options | changes))

    return run


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(
    train: Train, tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Folder:
    output = tmp_path_factory.mktemp("loras") / "squares"
    before = digests(tiny_bundle_path)
    train(output)
    assert digests(tiny_bundle_path) == before
    return Folder(output)


def test_it_is_an_artefact_that_tells_what_it_was_made_of(
    trained: Folder, tiny_bundle: Bundle
) -> None:
    manifest = read_manifest(trained, "lora")
    assert manifest.facts["expert"] == EXPERT
    assert manifest.facts[EXPERT_DIGEST] == tiny_bundle.weights_digest(f"expert_{EXPERT}")
    assert manifest.facts["rows"] == NUM_PICTURES
    assert manifest.facts["quarantined"] == {"truncated_image": 1}
    assert manifest.parents.keys() == {
        *(f"expert_{EXPERT}", "codec", "text_encoder"),
        "pictures",
    }
    assert {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "samples.png"} <= manifest.files.keys()
    quarantine = read_table(trained / "quarantine", ["key", "reason"]).to_pylist()
    assert quarantine == [{"key": f"{NUM_PICTURES}.png", "reason": "truncated_image"}]
    assert manifest.facts["loss"] > 0
    document = trained.read_json(ADAPTER_CONFIG)
    assert document["base_model_name_or_path"] == f"{tiny_bundle.facts.model_name}/expert_{EXPERT}"


def test_the_loss_falls(trained: Folder) -> None:
    losses = [json.loads(line)["loss"] for line in trained.read(METRICS).splitlines()]
    assert len(losses) == 6
    assert np.mean(losses[-2:]) < 0.8 * losses[0], losses


def test_pictures_are_drawn_with_it_and_without(trained: Folder) -> None:
    grids = [
        np.asarray(Image.open(io.BytesIO(trained.read(name))).convert("RGB"), float)
        for name in ("samples.png", "samples_without_lora.png")
    ]
    assert grids[0].shape == grids[1].shape
    assert np.abs(grids[0] - grids[1]).mean() > 1


def test_peft_loads_it(trained: Folder, tiny_bundle: Bundle) -> None:
    expert = tiny_bundle.expert(EXPERT)
    ours = attach(expert, load_adapter(VerifiedFolder(trained, None), expert))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(expert), trained.local_path)
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, *tiny_bundle.latent_shape, generator=generator),
        torch.tensor([100.0, 900.0]),
        torch.randn(2, 1, expert.config.text_embed_dim, generator=generator),
    )
    torch.testing.assert_close(theirs(*inputs), ours(*inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(*inputs), expert(*inputs), atol=1e-2)


def test_a_finished_one_is_kept_and_another_does_not_replace_it(
    train: Train, trained: Folder
) -> None:
    before = digests(trained.local_path)
    train(trained.local_path)
    for overrides, changes in ((["lora.r=2"], {}), ([], {"expert": EXPERT + 1})):
        with pytest.raises(ArtifactError, match="was made"):
            train(trained.local_path, *overrides, **changes)
    assert digests(trained.local_path) == before


def test_one_of_other_pictures_is_refused(train: Train, trained: Folder, pictures: Path) -> None:
    caption = pictures / "metadata.jsonl"
    before, times = caption.read_bytes(), caption.stat()
    caption.write_bytes(before.replace(b"a red square", b"a red block", 1))
    with pytest.raises(ArtifactError, match="was made from another pictures"):
        train(trained.local_path)
    caption.write_bytes(before)
    os.utime(caption, ns=(times.st_atime_ns, times.st_mtime_ns))
    train(trained.local_path)


def test_nothing_of_a_user_is_deleted(train: Train, pictures: Path, tmp_path: Path) -> None:
    before = digests(pictures)
    with pytest.raises(ArtifactError, match=f"{pictures} is not empty: choose another folder"):
        train(pictures)
    assert digests(pictures) == before
    with pytest.raises(CorpusError):
        train(tmp_path, "corpus.max_bad_share=0.01")
    with pytest.raises(ArtifactError, match="is not empty"):
        train(tmp_path, "lora.r=2")


def test_too_many_bad_pictures_are_refused_until_that_is_allowed(
    train: Train, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=r"1 of 9 rows are bad .*: 1 truncated_image "):
        train(tmp_path, "corpus.max_bad_share=0.01", "training.steps=2")
    assert train(tmp_path, "training.steps=2").facts["rows"] == NUM_PICTURES


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"expert": 3}, "expert=3 is not allowed: the bundle has 0 to 2"),
        ({"expert": -1}, "expert=-1 is not allowed"),
        ({"overrides": ["lora.r=64"]}, "r=64 is not allowed: 1 to 32 for layers"),
        ({"overrides": ["lora.target_modules=[to_q]"]}, "target_modules='to_q' is not allowed"),
    ],
)
def test_what_does_not_fit_the_bundle_is_refused(
    train: Train, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    overrides = changes.pop("overrides", [])
    with pytest.raises(ConfigError, match=f"^{reason}"):
        train(tmp_path, *overrides, **changes)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_no_one_kind_is_refused(train: Train, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(CorpusError, match=r"^no layout of captioned pictures was recognised: "):
        train(tmp_path / "lora", data=str(data))
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    (data / "a.png").write_bytes(draw_square(0))
    with tarfile.open(data / "a.tar", "w") as tar:
        tar.add(data / "a.png", "a.png")
    either = "image_folder and webdataset: say corpus.kind=image_folder|webdataset"
    with pytest.raises(ConfigError, match=rf"^data='{data}' can be read as {re.escape(either)}"):
        train(tmp_path / "lora", data=str(data))
    with pytest.raises(ConfigError, match="does not exist"):
        train(tmp_path / "lora", data=f"file://{tmp_path}/none")


def test_pictures_with_sidecars_need_no_name_of_their_layout(train: Train, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        (data / f"{i}.png").write_bytes(draw_square(i))
        (data / f"{i}.txt").write_text(f"a square {i}")
    manifest = train(tmp_path / "lora", "training.steps=2", data=f"file://{data}")
    assert manifest.facts["rows"] == 4


def test_the_public_release_is_adapted_too(
    train: Train, release_path: Path, tmp_path: Path
) -> None:
    captions = [f"a cat {i}" for i in range(4)]
    table = pa.table({"image": [draw_square(i) for i in range(4)], "caption": captions})
    pq.write_table(table, tmp_path / "cats.parquet")
    overrides = ("training.steps=3", "corpus.horizontal_flip=true", "corpus.rows_per_shard=3")
    changes = {"bundle": str(release_path), "data": str(tmp_path / "cats.parquet"), "expert": 2}
    manifest = train(tmp_path / "lora", *overrides, **changes)
    assert manifest.facts["rows"] == 4
    assert manifest.parents.keys() == {
        *("expert_2", "vae", "text_encoder", "tokenizer"),
        "pictures",
    }
    columns = column_names(Folder(tmp_path / "lora" / "embeddings"))
    assert {"latents", "latents_flipped", "token_ids"} <= set(columns)
