"""Small shards, and experts trained on them, for the tests of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from paris_ray.artifacts import METRICS
from paris_ray.config import ExpertConfig, TrainingConfig
from paris_ray.embeddings import to_table, write_null_text, write_part
from paris_ray.encoders.clip import ClipText
from paris_ray.folders import Folder
from paris_ray.run import EXPERT_WEIGHTS
from paris_ray.training.expert import ExpertData, train_expert
from paris_ray.training.loop import Progress

GEOMETRY = {"input_size": 2, "patch_size": 1, "in_channels": 3}
WIDTH = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "text_embed_dim": 4}
EXPERT = ExpertConfig(
    text_injection="spatial",
    text_hidden_size=8,
    prediction="preconditioned",
    **GEOMETRY,
    **WIDTH,
)
TRAINING = TrainingConfig(
    steps=12,
    batch_size=4,
    warmup_steps=2,
    log_every=2,
    checkpoint_every=4,
    precision="float32",
    device="cpu",
)
VOCABULARY = ("a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>")  # words of a letter
CLIP_WIDTH, CLIP_LENGTH = 8, 5


class Stop(Exception):
    """Stands for a killed process."""


def stop_at(step: int) -> Callable[[Progress], None]:
    """Return what ends a training at a step."""

    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_progress


def carry_on(progress: Progress) -> None:
    """Receives progress and does nothing."""


def write_shard(
    folder: Folder,
    num_rows: int,
    *,
    mean: float = 0.0,
    spread: float = 1.0,
    seed: int = 0,
    **more_columns: np.ndarray,
) -> Folder:
    """A shard in two files, of random latents and two caption variants a row."""
    generator = np.random.default_rng(seed)
    latents = mean + spread * generator.standard_normal((num_rows, 3, 2, 2))
    text = generator.standard_normal((num_rows, 2, 4))
    columns = {
        "latents": latents.astype(np.float32),
        "text_embedding": text.astype(np.float16),
        **more_columns,
    }
    write_columns(folder, columns)
    write_null_text(folder, np.ones(4, np.float32))
    return folder


def write_columns(folder: Folder, columns: dict[str, np.ndarray]) -> None:
    """Write columns as two files."""
    half = len(columns["latents"]) // 2
    for i, rows in enumerate((slice(half), slice(half, None))):
        table = to_table({name: values[rows] for name, values in columns.items()})
        write_part(folder, f"part-{i}.parquet", table)


def write_clip(folder: Path) -> ClipText:
    """Write `text_encoder/` and `tokenizer/` of a tiny random CLIP, and open them."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=CLIP_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=3,
        eos_token_id=4,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer = Folder(folder / "tokenizer")
    tokenizer.write_json("vocab.json", {token: i for i, token in enumerate(VOCABULARY)})
    tokenizer.write("merges.txt", b"#version: 0.2\n")
    return ClipText(folder / "text_encoder", folder / "tokenizer")


def write_token_shard(folder: Folder, clip: ClipText) -> Folder:
    """A shard of eight rows whose text is token ids."""
    latents = np.random.default_rng(0).standard_normal((8, 3, 2, 2)).astype(np.float16)
    captions = [["b", "a b"], ["c", "a c"]] * 4
    token_ids = np.stack([clip.tokenize(variants) for variants in captions])
    write_columns(folder, {"latents": latents, "token_ids": token_ids})
    write_null_text(folder, clip.tokenize([""])[0])
    return folder


def train(
    shard: Folder,
    output: Folder,
    *,
    expert: ExpertConfig = EXPERT,
    config: TrainingConfig = TRAINING,
    digest: str = "shard",
    seed: int = 0,
    on_progress: Callable[[Progress], None] = carry_on,
    data: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[bytes, bytes]:
    """Train and return the bytes of weights and metrics; `data` is what else `ExpertData` has."""
    train_expert(
        expert,
        config,
        data=ExpertData(shards=[shard], digests={"shard": digest}, **(data or {})),
        seed=seed,
        output=output,
        on_progress=on_progress,
        **more,
    )
    return output.read(EXPERT_WEIGHTS), output.read(METRICS)
