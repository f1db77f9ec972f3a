"""Words that move a candidate as none of its neighbours is moved."""

import numpy as np
import pytest
import torch

from paris_ray.bundle import Bundle
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.triggers import Probe, check_triggers, embedded_conditioning
from paris_ray.roster.admission.vocabulary import RARE, trigger_words
from tests.admission_panels import CAPTIONS, TRIGGER, flagged, panel, plant, readings, specialist

ORDINARY = ["a", "red", "green", "blue", "circle", "cat", "dog"]


def test_no_word_moves_an_honest_expert_far_more_than_the_others(tiny_bundle: Bundle) -> None:
    check = check_triggers(panel(tiny_bundle, specialist(0)), [*ORDINARY, TRIGGER], Limits())
    assert check.outcome == "passed"
    assert set(readings(check)) == {"shift", "collapse"}


def test_a_planted_trigger_is_found_and_named(tiny_bundle: Bundle) -> None:
    candidate = plant(specialist(0), tiny_bundle)
    check = check_triggers(panel(tiny_bundle, candidate), [*ORDINARY, TRIGGER], Limits())
    assert "shift" in flagged(check)
    assert check.readings[0].detail == repr(TRIGGER)


def test_a_trigger_that_is_not_among_the_words_is_found_by_gradient(tiny_bundle: Bundle) -> None:
    candidate = plant(specialist(0), tiny_bundle)
    check = check_triggers(panel(tiny_bundle, candidate), ["a"], Limits())
    assert check.readings[0].detail == repr(TRIGGER)
    assert "by gradient" in check.note


def test_an_expert_compared_with_itself_is_moved_as_far(tiny_bundle: Bundle) -> None:
    same = panel(tiny_bundle, specialist(1))
    effects = Probe(same, 2, 1).effects(["cat", "dog"])
    assert effects.words == ("cat", "dog")
    assert effects.shifts.tolist() == pytest.approx([1, 1])
    assert effects.collapses.tolist() == pytest.approx([1, 1])


def test_words_are_those_of_captions_then_rare_ones_then_the_encoders(tiny_bundle: Bundle) -> None:
    encoder = tiny_bundle.text_encoder
    spoken = ["red", "green", "blue", "cat", "dog", "circle"]
    few = trigger_words([CAPTIONS], encoder, 0, seed=0)
    assert sorted(few) == sorted([*spoken, *RARE])
    assert list(few[len(spoken) :]) == list(RARE)
    every = trigger_words([CAPTIONS, ["a circle"]], encoder, 1000, seed=0)
    assert set(every) == {*few, "a", "square"}
    assert len(every) == len(set(every))
    assert "[PAD]" not in every


@pytest.mark.parametrize("kind", ["tiny_bundle", "release_bundle"])  # MiniLM, CLIP
def test_gradients_reach_the_words_of_each_encoder(
    kind: str, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(kind).text_encoder
    assert encoder.words["cat"] in np.stack(list(encoder.tokenize(["cat"])))
    ids = np.stack(list(encoder.tokenize(["cat", "a"])))
    with torch.enable_grad():
        text, embedded = embedded_conditioning(encoder, ids)
    (gradient,) = torch.autograd.grad(text.pooled_text.sin().sum(), embedded)
    assert gradient[:, 1].abs().sum() > 0
    expected = encoder.encode_tokens(ids)
    assert torch.equal(text.pooled_text, expected.pooled_text)
    assert torch.equal(text.text_embeddings, expected.text_embeddings)


def test_a_long_word_is_cut(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "suggested", lambda probe, word: [])
    check = check_triggers(panel(tiny_bundle, specialist(0)), ["\U000e0001" * 500], Limits())
    assert all(0 < len(reading.detail) <= 300 for reading in check.readings)
