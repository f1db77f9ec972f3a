"""Modern blocks: what rotation, normed queries and keys, and RMSNorm mean, by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paris_ray.config import ExpertConfig, identity, load
from paris_ray.config.release import read_document, write_document
from paris_ray.devices import autocast
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.models.modern import ModernAttention, rotate
from tests.training_shards import GEOMETRY, Stop, stop_at, train, write_shard

RELEASED = ExpertConfig(**GEOMETRY, hidden_size=16, num_layers=2, num_heads=2, text_embed_dim=4)
MODERN = replace(RELEASED, blocks="modern")
GRID, CHANNELS = 3, 8


def test_a_pair_of_channels_is_turned_by_row_and_column() -> None:
    x = torch.randn(1, 1, GRID**2, CHANNELS, generator=torch.Generator().manual_seed(0))
    turned = rotate(x)[0, 0]
    for n, vector in enumerate(x[0, 0]):
        for half, place in ((0, n % GRID), (4, n // GRID)):
            for i in (0, 1):
                pair = complex(vector[half + i], vector[half + i + 2])
                angle = place * 100.0 ** (-i / 2)
                expected = pair * complex(math.cos(angle), math.sin(angle))
                found = complex(turned[n, half + i], turned[n, half + i + 2])
                assert found == pytest.approx(expected, abs=1e-5)


def test_products_depend_on_how_far_two_tokens_are_apart() -> None:
    query, key = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(0))
    turned = [rotate(v.expand(1, 1, GRID**2, CHANNELS))[0, 0] for v in (query, key)]
    scores = turned[0] @ turned[1].T
    by_distance: dict[tuple[int, int], list[float]] = {}
    for i in range(GRID**2):
        for j in range(GRID**2):
            apart = (i // GRID - j // GRID, i % GRID - j % GRID)
            by_distance.setdefault(apart, []).append(scores[i, j].item())
    assert len(by_distance) == 25
    for found in by_distance.values():
        assert found == pytest.approx([found[0]] * len(found), abs=1e-5)
    assert len({round(found[0], 4) for found in by_distance.values()}) == 25


def test_the_size_of_queries_and_keys_does_not_matter() -> None:
    torch.manual_seed(0)
    attention, x = ModernAttention(16, 2), torch.randn(2, 9, 16)
    before = attention(x)
    with torch.no_grad():
        for part in (attention.in_proj.weight, attention.in_proj.bias):
            part[:32] *= 100.0
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-5)


def test_norms_keep_the_mean() -> None:
    torch.manual_seed(0)
    expert, x = Expert(MODERN), torch.randn(2, 4, 16) + 3
    expected = x / (x.square().mean(dim=-1, keepdim=True) + MODERN.layer_norm_eps).sqrt()
    for norm in (expert.layers[0].norm, expert.final_layer.norm):
        torch.testing.assert_close(norm(x), expected)
    assert Expert(RELEASED).layers[0].norm(x).mean().abs() < 1e-5


@torch.no_grad()
def test_one_sample_has_its_bytes_in_any_batch_and_either_precision() -> None:
    torch.manual_seed(0)
    expert = Expert(MODERN).eval().requires_grad_(False)
    torch.nn.init.normal_(expert.final_layer.linear.weight)
    latents, t = torch.randn(3, 3, 2, 2), torch.tensor([100.0, 500.0, 900.0])
    text = TextConditioning.from_vectors(torch.randn(3, 4))
    together = expert(latents, t, text)
    for i in range(3):
        rows = slice(i, i + 1)
        assert torch.equal(expert(latents[rows], t[rows], text.rows(rows))[0], together[i])
    with autocast(torch.device("cpu"), torch.bfloat16):
        torch.testing.assert_close(expert(latents, t, text).float(), together, rtol=0.1, atol=0.1)


def test_released_blocks_are_the_default_and_say_nothing() -> None:
    assert "blocks" not in write_document(RELEASED)["paris_ray"]
    assert "blocks" not in identity(RELEASED)
    assert read_document(ExpertConfig, write_document(MODERN), "config.json") == MODERN
    more = Expert(MODERN).state_dict().keys() - Expert(RELEASED).state_dict().keys()
    assert more == {
        f"layers.{i}.{attention}.{part}_norm.weight"
        for i in range(2)
        for attention in ("attn", "cross_attn")
        for part in ("query", "key")
    }


def test_heads_have_pairs_along_both_axes() -> None:
    with pytest.raises(ConfigError) as caught:
        load("quickstart+modern", ["expert.num_heads=64"])
    assert str(caught.value) == (
        "expert.blocks='modern' is not allowed: released, unless hidden_size / num_heads is a "
        "multiple of 4"
    )


def test_a_training_with_them_resumes_to_the_bit(tmp_path: Path) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 10)
    whole = train(shard, Folder(tmp_path / "whole"), expert=MODERN)
    with pytest.raises(Stop):
        train(shard, Folder(tmp_path / "killed"), expert=MODERN, on_progress=stop_at(6))
    assert train(shard, Folder(tmp_path / "killed"), expert=MODERN) == whole
