"""The text adapter: a block by hand, silent at first, blind to padding, left out where off."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from paris_ray.config import ExpertConfig, identity, load, unlike_fields
from paris_ray.config.release import read_document, write_document
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.models.flops import forward_macs
from tests.training_shards import GEOMETRY, TRAINING, Stop, stop_at, train, write_shard

PLAIN = ExpertConfig(**GEOMETRY, hidden_size=16, num_layers=2, num_heads=2, text_embed_dim=4)
ADAPTED = replace(PLAIN, text_adapter=True, text_padding_mask=True)


def conditioning() -> TextConditioning:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * n + [False] * (5 - n) for n in (5, 3, 1)])
    return TextConditioning(states * mask[..., None], states.mean(dim=1), mask)


def adapted() -> Expert:
    torch.manual_seed(0)
    expert = Expert(ADAPTED)
    assert expert.text_adapter is not None
    for layer in (expert.text_adapter.attn.out_proj, expert.text_adapter.mlp[2]):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return expert.eval().requires_grad_(False)


def test_it_is_a_block_of_attention_and_mlp_among_tokens() -> None:
    expert = adapted()
    adapter = expert.text_adapter
    assert adapter is not None
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    normed = functional.layer_norm(x, (16,), eps=ADAPTED.layer_norm_eps)
    inputs = adapter.attn.in_proj(normed)[0]
    mixed = torch.zeros(4, 16)
    for head in (slice(0, 8), slice(8, 16)):
        query, key, value = (part[:, head] for part in inputs.chunk(3, dim=1))
        mixed[:, head] = (query @ key.T / 8**0.5).softmax(dim=1) @ value
    after = x[0] + adapter.attn.out_proj(mixed[None])[0]
    normed = functional.layer_norm(after, (16,), eps=ADAPTED.layer_norm_eps)
    inner = functional.gelu(adapter.mlp[0](normed[None]), approximate="tanh")
    torch.testing.assert_close(adapter(x)[0], after + adapter.mlp[2](inner)[0])


def test_it_begins_by_changing_nothing() -> None:
    torch.manual_seed(0)
    expert, text = Expert(ADAPTED), conditioning()
    assert expert.text_adapter is not None
    context = expert.text_proj(text.text_embeddings)
    assert torch.equal(expert.text_adapter(context, text.text_mask), context)


def test_padding_changes_no_token_that_counts() -> None:
    expert, text = adapted(), conditioning()
    assert text.text_mask is not None
    short = TextConditioning(text.text_embeddings[1:2, :3], text.pooled_text[1:2])
    whole = expert.encode_text(text)
    for padded, alone in zip(whole.keys_values, expert.encode_text(short).keys_values, strict=True):
        torch.testing.assert_close(padded[1:2, :, :, :3], alone)


@torch.no_grad()
def test_one_caption_is_encoded_as_in_any_batch() -> None:
    expert, text = adapted(), conditioning()
    together = expert.encode_text(text).keys_values
    for i in range(3):
        alone = expert.encode_text(text.rows(slice(i, i + 1))).keys_values
        assert torch.equal(alone[0], together[0][i : i + 1])


def test_documents_and_identities_of_before_are_without_it() -> None:
    assert "text_adapter" not in write_document(PLAIN)["paris_ray"]
    assert "text_adapter" not in identity(PLAIN)
    assert identity(ADAPTED)["text_adapter"] is True
    for config in (PLAIN, ADAPTED):
        assert read_document(ExpertConfig, write_document(config), "config.json") == config
    assert unlike_fields(ADAPTED, replace(PLAIN, text_padding_mask=True)) == {
        "text_adapter": (True, False)
    }


def test_it_costs_a_block_of_text_tokens_once() -> None:
    more = forward_macs(ADAPTED, 5) - forward_macs(PLAIN, 5)
    assert more == 5 * 16 * (4 * 16 + 2 * 64) + 2 * 5 * 5 * 16


def test_it_needs_tokens() -> None:
    with pytest.raises(ConfigError) as caught:
        load("quickstart+text_adapter", ["expert.text_injection=spatial"])
    assert str(caught.value) == (
        "expert.text_adapter=True is not allowed: false for text_injection=spatial, which reads no "
        "tokens"
    )


def test_a_training_with_it_resumes_to_the_bit(tmp_path: Path) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 10)
    expert = replace(PLAIN, text_adapter=True)
    whole = train(shard, Folder(tmp_path / "whole"), expert=expert, config=TRAINING)
    with pytest.raises(Stop):
        train(shard, Folder(tmp_path / "killed"), expert=expert, on_progress=stop_at(6))
    assert train(shard, Folder(tmp_path / "killed"), expert=expert) == whole
    plain = train(shard, Folder(tmp_path / "plain"), expert=PLAIN)
    assert plain[0] != whole[0]
