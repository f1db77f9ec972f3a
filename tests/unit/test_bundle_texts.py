"""Prompts of a bundle: encoded together without changing a byte, and remembered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paris_ray.bundle import load_bundle
from paris_ray.bundle.texts import Texts
from paris_ray.encoders.text import TextEncoder
from paris_ray.encoders.tokenizers import LENGTHS
from paris_ray.exactness import MOST_TRIED
from paris_ray.models import TextConditioning

SHORT = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("cat", "dog")]
LONG = ["a red cat " * 9, "a blue dog " * 9]
PROMPTS = [*SHORT, LONG[0], "", *(f"{prompt} circle" for prompt in SHORT), LONG[1], *(
    f"a {prompt} a square" for prompt in SHORT
)]  # fmt: skip


pytestmark = pytest.mark.usefixtures("replica_threads")


@pytest.fixture(params=["tiny_bundle_path", "release_path"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    """An encoder that a test may watch."""
    return load_bundle(str(request.getfixturevalue(request.param))).text_encoder


def watch(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes that the encoder itself, not its copies in trials, is asked to encode."""
    shapes: list[tuple[int, ...]] = []
    encode = type(encoder).encode_tokens

    def watched(self: Any, token_ids: np.ndarray) -> TextConditioning:
        if self is encoder:
            shapes.append(token_ids.shape)
        return encode(self, token_ids)

    monkeypatch.setattr(type(encoder), "encode_tokens", watched)
    return shapes


def assert_equal(one: TextConditioning, other: TextConditioning) -> None:
    assert torch.equal(one.text_embeddings, other.text_embeddings)
    assert torch.equal(one.pooled_text, other.pooled_text)
    if one.text_mask is not None or other.text_mask is not None:
        assert one.text_mask is not None
        assert other.text_mask is not None
        assert torch.equal(one.text_mask, other.text_mask)


def each_alone(encoder: TextEncoder, prompts: Sequence[str]) -> TextConditioning:
    return TextConditioning.concatenate([Texts(encoder).encode([prompt]) for prompt in prompts])


def test_prompts_get_together_what_they_get_alone(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = each_alone(encoder, PROMPTS)
    shapes = watch(encoder, monkeypatch)
    assert_equal(Texts(encoder).encode(PROMPTS), alone)
    # As few passes as the largest that is tried allows, of texts of one length each.
    few = [(16, 16), (3, 16), (2, 32)] if encoder.lengths == LENGTHS else [(16, 77), (5, 77)]
    assert shapes == few
    assert few[0][0] == MOST_TRIED
    shapes.clear()
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    shuffled = Texts(encoder).encode([PROMPTS[i] for i in order])
    assert_equal(shuffled, alone.rows(torch.tensor(order)))
    assert shapes == few


def test_the_encoding_is_that_of_the_encoder(encoder: TextEncoder) -> None:
    """Padding changes the last bits alone."""
    texts, plain = Texts(encoder).encode(PROMPTS), encoder.encode(PROMPTS)
    torch.testing.assert_close(texts.pooled_text, plain.pooled_text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts.text_embeddings, plain.text_embeddings, rtol=1e-5, atol=1e-5)


def test_where_texts_depend_on_their_batch_they_are_encoded_one_by_one(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = each_alone(encoder, PROMPTS)
    monkeypatch.setattr("paris_ray.bundle.texts.texts_are_independent", lambda *_: False)
    texts, shapes = Texts(encoder), watch(encoder, monkeypatch)
    assert_equal(texts.encode(SHORT[:4]), alone.rows(slice(0, 4)))
    assert [count for count, _ in shapes] == [1] * 4
    texts.encode(SHORT[4:])
    (said,) = caplog.records  # once a length
    assert "encoded one by one" in said.message
    shapes.clear()
    Texts(encoder).encode(SHORT, exact=False)
    assert [count for count, _ in shapes] == [len(SHORT)]


def test_one_text_of_its_length_needs_no_trial(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def trial(_: TextEncoder, length: int) -> bool:
        tried.append(length)
        return True

    monkeypatch.setattr("paris_ray.bundle.texts.texts_are_independent", trial)
    texts = Texts(encoder)
    texts.encode(SHORT[:1])
    assert not tried
    texts.try_out()
    assert tried == list(encoder.lengths)
    texts.encode(PROMPTS)
    assert tried == list(encoder.lengths)  # what is known is not tried again


def test_another_number_of_threads_is_tried_anew(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def trial(_: TextEncoder, length: int) -> bool:
        tried.append(torch.get_num_threads())
        return True

    monkeypatch.setattr("paris_ray.bundle.texts.texts_are_independent", trial)
    texts = Texts(encoder)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        texts.try_out()
    assert tried == [1] * len(encoder.lengths) + [2] * len(encoder.lengths)


def test_the_last_prompts_are_encoded_once(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_ray.bundle.texts.MAX_PROMPTS", 2)
    texts, shapes = Texts(encoder), watch(encoder, monkeypatch)

    def encoded(*prompts: str) -> int:
        """How many of the prompts were not known."""
        shapes.clear()
        texts.encode(prompts)
        return sum(count for count, _ in shapes)

    assert encoded("a red cat", "blue dog", "a red cat") == 2
    assert encoded("blue dog", "a red cat") == 0
    assert encoded("circle") == 1
    assert encoded("a red cat") == 0  # asked for later than the dog
    assert encoded("blue dog") == 1
    assert encoded("circle") == 1
    many = texts.encode(["a", "red", "blue", "green"])  # more than are kept
    assert len(many) == 4


def test_what_is_kept_does_not_keep_its_batch(encoder: TextEncoder) -> None:
    texts = Texts(encoder)
    texts.encode(SHORT)
    for text in texts._known.values():
        for tensor in (text.text_embeddings, text.pooled_text):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_bundle_encodes_by_them(tiny_bundle_path: Path) -> None:
    bundle = load_bundle(str(tiny_bundle_path))
    assert_equal(bundle.encode_text(PROMPTS), each_alone(bundle.text_encoder, PROMPTS))
    assert_equal(bundle.null_text, each_alone(bundle.text_encoder, [""]))
