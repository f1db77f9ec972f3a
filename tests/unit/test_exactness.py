"""Trials of this machine: rows that depend on their batch are found out, of any kind of model."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation, QuickGELUActivation
from transformers.models.bert.modeling_bert import BertLayer

from paris_ray.bundle import Bundle
from paris_ray.config import ExpertConfig, LoRAConfig
from paris_ray.encoders.clip import ClipText
from paris_ray.encoders.text import PADDING, MiniLM, TextEncoder, copy_text_encoder
from paris_ray.encoders.tokenizers import LENGTHS
from paris_ray.exactness import (
    BATCH_SIZES,
    MOST_TRIED,
    rows_are_independent,
    texts_are_independent,
)
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.models.lora import Adapter, LowRankUpdate, attach_all

MASKED = {"text_injection": "cross_attention", "text_padding_mask": True}


pytestmark = pytest.mark.usefixtures("replica_threads")


# -- Experts and router ----------------------------------------------------------------------------


def test_a_model_whose_rows_depend_on_their_batch_is_found_out(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = tiny_bundle.expert(0)

    class Dependent(Expert):
        def forward(self, latents: Tensor, *arguments: Any) -> Tensor:
            return super().forward(latents, *arguments) + 1e-6 * (len(latents) > 1)

    dependent = Dependent(expert.config)
    dependent.load_state_dict(expert.state_dict())
    assert rows_are_independent(expert)
    assert not rows_are_independent(dependent)
    tried: list[Tensor] = []
    monkeypatch.setattr(Expert, "forward", lambda self, *arguments: tried.append(arguments[0]))
    assert rows_are_independent(expert)
    assert not tried  # what is known of one is known of its like


def test_parts_of_activations_that_threads_leave_over_are_found_out() -> None:
    """Of three parts of a tensor the ends are no whole vectors; of two or four they are here."""
    geometry = {"input_size": 4, "patch_size": 1, "in_channels": 4, "text_embed_dim": 32}
    config = ExpertConfig(hidden_size=128, num_layers=1, num_heads=2, **geometry)
    expert = Expert(config).requires_grad_(False)
    batch = torch.full((16, 16, 512), 0.0)  # enough that torch gives a part to each of the threads
    numbers = torch.linspace(-6, 6, 1001).tolist()
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found[threads] = rows_are_independent(expert)
        computed = (functional.gelu(batch.fill_(n), approximate="tanh") for n in numbers)
        assert found[threads] == all(bool((each == each[0, 0, 0]).all()) for each in computed)
    assert found[1]


def test_masks_and_adapters_are_tried(
    tiny_bundle: Bundle,
    randomised: Callable[[nn.Module, int], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expert = Expert(replace(tiny_bundle.expert(0).config, **MASKED)).requires_grad_(False)
    assert rows_are_independent(randomised(expert, 0))
    attend = functional.scaled_dot_product_attention
    masks: list[Tensor | None] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        masks.append(mask)
        return attend(q, k, v, mask)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    adapter = randomised(Adapter.create(expert, LoRAConfig(r=2, lora_alpha=8), 0), 1)
    mixed = attach_all(expert, {"a": adapter})
    assert rows_are_independent(mixed)  # another kind: it is tried anew
    assert any(mask is not None and not mask.all() for mask in masks)
    update = LowRankUpdate.forward

    def dependent(self: LowRankUpdate, x: Tensor, *rows: Any) -> Tensor:
        return update(self, x, *rows) + 1e-3 * (len(x) > 1)

    monkeypatch.setattr(LowRankUpdate, "forward", dependent)
    config = LoRAConfig(r=3, lora_alpha=8)
    other = attach_all(expert, {"b": randomised(Adapter.create(expert, config, 0), 1)})
    assert not rows_are_independent(other)


# -- Text encoders ---------------------------------------------------------------------------------


def sentence_encoder(tiny_parts: Path, release_path: Path, tmp_path: Path) -> TextEncoder:
    return MiniLM(tiny_parts / "text_encoder")


def token_encoder(tiny_parts: Path, release_path: Path, tmp_path: Path) -> TextEncoder:
    copy_text_encoder(tiny_parts / "text_encoder", Folder(tmp_path), 24)
    return MiniLM(tmp_path)


def clip_encoder(tiny_parts: Path, release_path: Path, tmp_path: Path) -> TextEncoder:
    return ClipText(release_path / "text_encoder", release_path / "tokenizer")


KINDS = {"sentence": sentence_encoder, "tokens": token_encoder, "clip": clip_encoder}


@pytest.fixture(params=KINDS)
def encoder(
    request: pytest.FixtureRequest, tiny_parts: Path, release_path: Path, tmp_path: Path
) -> TextEncoder:
    """An encoder of each kind."""
    return KINDS[request.param](tiny_parts, release_path, tmp_path)


def parts_of(text: TextConditioning) -> list[Tensor]:
    parts = [text.text_embeddings, text.pooled_text, text.text_mask]
    return [part for part in parts if part is not None]


def test_texts_of_any_length_are_equal_alone_and_in_batches(encoder: TextEncoder) -> None:
    """What the trial says, and what is so of other texts than those that it tries."""
    texts = ["red cat " * n + "dog" for n in range(70)]
    rows = list(encoder.tokenize(texts))
    assert {len(row) for row in rows} == set(encoder.lengths)
    for length in encoder.lengths:
        assert texts_are_independent(encoder, length)
        alike = np.stack([row for row in rows if len(row) == length][-MOST_TRIED:])
        alone = [parts_of(encoder.encode_tokens(row[None])) for row in alike]
        for size in range(1, len(alike) + 1):
            for together, each in zip(
                parts_of(encoder.encode_tokens(alike[:size])),
                zip(*alone[:size], strict=True),
                strict=True,
            ):
                assert torch.equal(together, torch.cat(each))


def test_an_encoder_whose_texts_depend_on_their_batch_is_found_out(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = type(encoder).encode_tokens
    changed = ["text_embeddings"]

    def dependent(self: Any, token_ids: Any) -> TextConditioning:
        text = encode(self, token_ids)
        more = {name: getattr(text, name) + 1e-6 * (len(text) > 2) for name in changed}
        return replace(text, **more)

    monkeypatch.setattr(type(encoder), "encode_tokens", dependent)
    assert not texts_are_independent(encoder, encoder.lengths[0])
    changed[:] = ["pooled_text"]
    assert not texts_are_independent(encoder, encoder.lengths[0])
    changed.clear()
    assert texts_are_independent(encoder, encoder.lengths[0])


def test_texts_with_and_without_padding_are_tried_together(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries may have another way of attending to a batch in which nothing is padded."""
    encode = type(encoder).encode_tokens
    tried: list[np.ndarray] = []

    def watched(self: Any, token_ids: Any) -> TextConditioning:
        tried.append(token_ids)
        return encode(self, token_ids)

    monkeypatch.setattr(type(encoder), "encode_tokens", watched)
    length = encoder.lengths[-1]
    assert texts_are_independent(encoder, length)
    last = encoder.tokenizer.end_of_text if isinstance(encoder, ClipText) else PADDING
    assert {len(rows) for rows in tried} == {1, *BATCH_SIZES}
    for rows in (rows for rows in tried if len(rows) > 1):
        assert rows.shape[1] == length
        assert rows[0, -2] != last  # before the end of a text that fills its row
        assert (rows[1:, -2] == last).any()
        assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_activations_of_text_encoders_are_tried_apart(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they are wrong in the last place of a tensor of one number, as no caption gives."""

    def dependent(self: nn.Module, x: Tensor) -> Tensor:
        y = functional.gelu(x)
        if x.numel() == 1 or (x == x.flatten()[0]).all():
            y.view(-1)[-1] += 1e-3
        return y

    assert texts_are_independent(encoder, encoder.lengths[0])
    for activation in (GELUActivation, QuickGELUActivation):
        monkeypatch.setattr(activation, "forward", dependent)
    assert not texts_are_independent(encoder, encoder.lengths[0])


def test_one_of_the_layers_is_tried_and_the_encoder_stays_as_it_is(
    tiny_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = MiniLM(tiny_parts / "text_encoder")
    layers = encoder.model.encoder.layer
    layers.extend(copy.deepcopy(layers[0]) for _ in range(2))
    before = encoder.encode(["a red cat"]).pooled_text
    forward, passed = BertLayer.forward, list[int]()

    def counted(self: BertLayer, *arguments: Any, **options: Any) -> Tensor:
        passed.append(len(arguments[0]))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BertLayer, "forward", counted)
    assert texts_are_independent(encoder, LENGTHS[0])
    assert sorted(passed) == [*[1] * MOST_TRIED, *BATCH_SIZES, MOST_TRIED]
    assert torch.equal(encoder.encode(["a red cat"]).pooled_text, before)
    assert len(encoder.model.encoder.layer) == 3


def test_nothing_is_known_of_lengths_that_letters_do_not_give(encoder: TextEncoder) -> None:
    assert not texts_are_independent(encoder, 17)
