"""Experts with modern blocks and a text adapter, trained for a few steps, as a bundle's parts."""

import shutil
from pathlib import Path

import numpy as np

from paris_ray.config import ExpertConfig, TrainingConfig
from paris_ray.embeddings import to_table, write_null_text, write_part
from paris_ray.encoders.text import copy_text_encoder
from paris_ray.folders import Folder
from paris_ray.training.expert import ExpertData, train_expert
from paris_ray.training.loop import Progress

ROWS, TOKEN_STATES = 24, 5
# At this rate what begins silent (text, adapter, output) has spoken up after a few steps.
TRAINING = TrainingConfig(
    steps=6,
    batch_size=8,
    learning_rate=0.05,
    warmup_steps=0,
    schedule="constant",
    ema_decay=0.5,
    precision="float32",
    device="cpu",
    log_every=2,
)


def newer_experts(geometry: dict[str, int], width: dict[str, int]) -> tuple[ExpertConfig, ...]:
    """Return both techniques together, with and without a projection of the sentence; and alone."""
    both = ExpertConfig(
        **geometry,
        **width,
        blocks="modern",
        text_adapter=True,
        text_padding_mask=True,
        text_injection="both",
        text_hidden_size=8,
    )
    without = ExpertConfig(**geometry, **width, blocks="modern", text_adapter=True)
    return both, without, ExpertConfig(**geometry, **width, text_adapter=True)


def write_newer_shard(folder: Folder, geometry: dict[str, int], text_width: int) -> Folder:
    """Rows of random latents, and of captions of one to `TOKEN_STATES` tokens."""
    generator = np.random.default_rng(0)
    size = geometry["input_size"]
    latents = generator.standard_normal((ROWS, geometry["in_channels"], size, size))
    text = generator.standard_normal((ROWS, 1, 1 + TOKEN_STATES, text_width))
    for row in range(ROWS):
        text[row, :, 2 + row % TOKEN_STATES :] = 0  # padding
    columns = {"latents": latents.astype(np.float16), "text_embedding": text.astype(np.float16)}
    write_part(folder, "part-0.parquet", to_table(columns))
    null_text = np.zeros((1 + TOKEN_STATES, text_width), np.float32)
    null_text[:2] = 0.5
    write_null_text(folder, null_text)
    return folder


def train_newer(
    expert: ExpertConfig,
    shard: Folder,
    output: Folder,
    seed: int,
    config: TrainingConfig = TRAINING,
) -> None:
    """Train an expert of this architecture."""

    def carry_on(progress: Progress) -> None:
        pass

    train_expert(
        expert,
        config,
        data=ExpertData(shards=[shard], digests={}),
        seed=seed,
        output=output,
        on_progress=carry_on,
    )


def write_newer_parts(
    root: Path, tiny_parts: Path, geometry: dict[str, int], width: dict[str, int]
) -> None:
    """Write the parts of a bundle of newer experts that reads token states.

    Args:
        root: Where to.
        tiny_parts: Whose codec, router and text encoder it has.
        geometry: Sizes of latents.
        width: Sizes of experts.
    """
    for name in ("codec", "router"):
        shutil.copytree(tiny_parts / name, root / name)
    encoder = Folder(root / "text_encoder")
    copy_text_encoder(tiny_parts / "text_encoder", encoder, TOKEN_STATES)
    work = root.parent / "trained"
    shard = write_newer_shard(Folder(work / "shard"), geometry, width["text_embed_dim"])
    for k, config in enumerate(newer_experts(geometry, width)):
        trained = Folder(work / f"expert_{k}")
        train_newer(config, shard, trained, seed=k)
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            Folder(root / f"expert_{k}").write(name, trained.read(name))
