"""How well a router finds clusters: routers whose answers are known, and separable rows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paris_ray.config import RouterConfig
from paris_ray.embeddings import write_null_text
from paris_ray.folders import Folder
from paris_ray.models import Router, TextConditioning
from paris_ray.training.data import LatentDataset, load_dataset
from paris_ray.training.router import train_router
from paris_ray.training.router_quality import NOISE_LEVELS, held_out_quality, right_cluster
from tests.training_shards import GEOMETRY, TRAINING, WIDTH, carry_on, write_columns, write_shard

LEVELS = [f"{t:g}" for t in NOISE_LEVELS]
encode = TextConditioning.from_vectors


class ReadsTheAnswer(Router):
    """Its logits are a multiple of the text, in which the tests write the cluster."""

    def __init__(self, scale: float, num_experts: int = 2) -> None:
        sizes = WIDTH | {"text_embed_dim": num_experts}
        super().__init__(RouterConfig(num_experts=num_experts, **GEOMETRY, **sizes))
        self.scale = scale

    def forward(
        self, latents: Tensor, timesteps: Tensor, pooled_text: Tensor | None = None
    ) -> Tensor:
        assert pooled_text is not None
        return self.scale * pooled_text


def rows_that_say(folder: Path, said: list[int], clusters: list[int]) -> LatentDataset:
    """Random latents of clusters, whose text is the one-hot vector of what is said of them."""
    order = np.argsort(clusters, kind="stable")
    text = np.eye(2, dtype=np.float16)[np.array(said)[order]][:, None]
    latents = np.random.default_rng(0).standard_normal((len(said), 3, 2, 2)).astype(np.float32)
    write_columns(Folder(folder), {"latents": latents, "text_embedding": text})
    write_null_text(Folder(folder), np.zeros(2, np.float32))
    dataset = load_dataset([Folder(folder)])
    return replace(dataset, clusters=torch.tensor(clusters)[torch.from_numpy(order)])


def test_a_router_that_is_always_right_and_one_that_never_is(tmp_path: Path) -> None:
    clusters = [0, 1] * 20
    rows = rows_that_say(tmp_path, clusters, clusters)
    # Neither says what the temperature should be: it stays within what few rows can tell.
    for scale, share, temperature in ((3.0, 1.0, 0.2), (-3.0, 0.0, 5.0)):
        router = ReadsTheAnswer(scale)
        assert right_cluster(router, rows, encode, 0) == dict.fromkeys(LEVELS, share)
        quality = held_out_quality(router, rows, rows, encode, 0)
        assert (quality["rows"], quality["temperature"]) == (40, temperature)
        assert [level["accuracy"] for level in quality["levels"].values()] == [share] * 6


def test_the_temperature_makes_confidence_what_it_should_be(tmp_path: Path) -> None:
    """Right of three rows in four: softmax(scale / T, 0) is 3/4 at T = scale / ln 3."""
    clusters = [0, 1] * 40
    said = [c if i % 8 < 6 else 1 - c for i, c in enumerate(clusters)]
    rows = rows_that_say(tmp_path, said, clusters)
    for scale in (0.5, 5.0):
        quality = held_out_quality(ReadsTheAnswer(scale), rows, rows, encode, 0)
        assert list(quality["levels"]) == LEVELS
        assert quality["temperature"] == pytest.approx(scale / math.log(3), rel=1e-3)
        for level in quality["levels"].values():
            assert level["accuracy"] == 0.75
            confidence = 1 / (1 + math.exp(-scale))
            assert level["ece"] == pytest.approx(abs(0.75 - confidence), abs=1e-6)
            assert level["ece_calibrated"] < 1e-3
            assert sum(level["reliability"]["counts"]) == 80


def test_a_share_counts_every_row_once(tmp_path: Path) -> None:
    clusters = [0] * 200 + [1] * 100  # more rows than a batch has
    rows = rows_that_say(tmp_path, [0] * 300, clusters)
    shares = right_cluster(ReadsTheAnswer(1.0), rows, encode, 0)
    assert shares == dict.fromkeys(LEVELS, pytest.approx(2 / 3))


def separable(root: Path, seed: int) -> list[Folder]:
    """Shards of three clusters, whose latents lie in directions of their own."""
    folders = []
    for k in range(3):
        generator = np.random.default_rng([seed, k])
        latents = 0.1 * generator.standard_normal((12, 3, 2, 2)).astype(np.float32)
        latents[:, k] += 2
        folders.append(write_shard(Folder(root / f"{seed}-{k}"), 12, latents=latents))
    return folders


def router_without_text(**changes: Any) -> RouterConfig:
    sizes = WIDTH | {"text_embed_dim": 0} | changes
    return RouterConfig(num_experts=3, **GEOMETRY, **sizes)


def test_prototypes_find_separable_clusters(tmp_path: Path, randomised: Any) -> None:
    router = randomised(Router(router_without_text()), 0).eval()
    training = load_dataset(separable(tmp_path, 0))
    held_out = load_dataset(separable(tmp_path, 1))
    quality = held_out_quality(router, training, held_out, encode, 0)
    shares = [level["prototype_accuracy"] for level in quality["levels"].values()]
    assert shares[:3] == [1.0, 1.0, 1.0]
    assert shares[-1] < 0.7  # of pure noise there is nothing to tell
    assert quality["levels"]["0.1"]["accuracy"] < 1


def test_prototypes_read_the_text_that_the_router_reads(tmp_path: Path) -> None:
    clusters = [0, 1] * 20
    rows = rows_that_say(tmp_path / "text", clusters, clusters)
    quality = held_out_quality(ReadsTheAnswer(1.0), rows, rows, encode, 0)
    assert quality["levels"]["1"]["prototype_accuracy"] > 0.85  # latents are noise, text is not


def test_held_out_rows_keep_the_numbers_of_their_clusters(tmp_path: Path) -> None:
    """Cluster 1 has none: 2 must not be taken for it."""
    shards, held_out = separable(tmp_path, 0), separable(tmp_path, 1)
    facts = train_router(
        router_without_text(),
        replace(TRAINING, steps=60, batch_size=32, log_every=60, learning_rate=5e-3),
        shards=shards,
        shards_digest="shards",
        seed=0,
        output=Folder(tmp_path / "router"),
        on_progress=carry_on,
        held_out={0: held_out[0], 2: held_out[2]},
    )
    assert facts.keys() == {"right_cluster", "held_out"}
    quality = facts["held_out"]
    assert quality["rows"] == 24
    assert facts["right_cluster"]["0.1"] > 0.95
    assert quality["levels"]["0.1"]["accuracy"] > 0.95
    assert quality["levels"]["0.1"]["prototype_accuracy"] == 1.0
    assert 0.2 <= quality["temperature"] <= 5
