"""Measures of a set, as numbers for a manifest."""

import numpy as np
import pytest

from paris_ray.evaluation import summary
from paris_ray.evaluation.attributes import AttributeAccuracy
from paris_ray.evaluation.summary import (
    attribute_summary,
    by_cluster,
    comparison,
    distribution_summary,
    headline,
    mean_with_interval,
    own_cluster_loss,
    retrieval_summary,
)


def test_an_interval_holds_the_mean_and_shrinks_to_it_when_all_are_alike() -> None:
    values = np.array([0.0, 1.0] * 50)
    found = mean_with_interval(values, seed=0)
    assert found["mean"] == 0.5
    assert 0.3 < found["low"] < 0.5 < found["high"] < 0.7
    assert mean_with_interval(np.ones(5), seed=0) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_attributes_are_summed_up_one_by_one_and_together() -> None:
    right = np.array([[True, True], [True, False], [False, True], [True, True]])
    accuracy = AttributeAccuracy(("object", "colour"), right, right.all(axis=1))
    found = attribute_summary(accuracy, seed=0)
    assert {name: value["mean"] for name, value in found.items()} == {
        "object": 0.75,
        "colour": 0.75,
        "all": 0.5,
    }


def test_equal_distributions_are_close_and_shifted_ones_far() -> None:
    generator = np.random.default_rng(0)
    real, alike, other = (generator.standard_normal((60, 4)) for _ in range(3))
    near, far = (distribution_summary(x, real, seed=0) for x in (alike, other + 3))
    assert near["frechet"] < 1 < 30 < far["frechet"]
    assert near["kid"] < far["kid"]
    assert near["precision"] > 0.8 > far["precision"]
    assert far["coverage"] < 0.2
    assert distribution_summary(alike[:3], real, seed=0) == {}


def test_of_very_many_pictures_the_distance_is_extrapolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(summary, "MIN_SUBSET", 500)
    generator = np.random.default_rng(0)
    real, drawn = (generator.standard_normal((2000, 24)) for _ in range(2))
    found = distribution_summary(drawn, real, seed=0)
    assert found["frechet_infinity"] < 0.8 * found["frechet"] < 0.3  # part of it is the bias
    assert "frechet_infinity" not in distribution_summary(drawn[:999], real, seed=0)


def test_captions_that_find_their_pictures_have_full_recall() -> None:
    embeddings = np.eye(3, dtype=np.float32)
    found = retrieval_summary(embeddings, embeddings, ["a", "b", "c"], seed=0)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1.0
    assert found["clip_score"]["mean"] == pytest.approx(100.0)
    turned = retrieval_summary(embeddings, embeddings[[1, 2, 0]], ["a", "b", "c"], seed=0)
    assert turned["image_to_text_r1"] == 0.0


def test_clusters_show_where_the_bad_pictures_are_and_an_empty_one_its_count() -> None:
    clusters, error = np.array([0, 0, 2]), np.array([1.0, 3.0, 5.0])
    assert by_cluster(clusters, {"error": error}, 3) == [
        {"captions": 2, "error": 2.0},
        {"captions": 0},
        {"captions": 1, "error": 5.0},
    ]


def test_the_headline_tells_trained_on_and_never_shown_apart() -> None:
    interval = {"low": 0.0, "high": 1.0}
    shown = {
        "captions": 9,
        "caption_recall": {"mean": 0.875, **interval},
        "attributes": {"object": {"mean": 1.0, **interval}, "all": {"mean": 0.5, **interval}},
    }
    held_out = {"captions": 4, "attributes": {"all": {"mean": 0.25, **interval}}}
    assert headline({"shown": shown, "held_out": held_out}) == [
        "caption recall 0.8750 (9 trained on)",
        "right of 9 captions trained on: object 1.000, all 0.500",
        "right of 4 captions never shown: all 0.250",
    ]
    del shown["attributes"]
    assert headline({"shown": shown}) == ["caption recall 0.8750 (9 trained on)"]


def test_the_headline_says_that_recall_is_chance() -> None:
    shown = {"captions": 9, "caption_recall": {"mean": 1.0}, "recall_by_chance": 0.0001}
    assert headline({"shown": shown}) == ["caption recall 1.0000 (9 trained on)"]
    assert headline({"shown": shown | {"recall_by_chance": 1.0}}) == [
        "caption recall 1.0000 (9 trained on)",
        "of it 1.0000 by chance: many pictures share their caption",
    ]


def test_models_are_compared_on_what_all_of_them_have() -> None:
    def facts(mean: float, losses: list[list[float | None]]) -> dict[str, object]:
        split = {"attributes": {"all": {"mean": mean}}}
        return {"shown": {}, "held_out": split, "held_out_losses": losses}

    ensemble = facts(0.75, [[0.5, 9.0, None], [9.0, 0.25, None], [9.0, 9.0, None]])
    student = facts(0.5, [[0.5, 1.0, None]])
    assert own_cluster_loss(ensemble) == 0.375
    assert own_cluster_loss(student) == 0.75
    assert comparison({"ensemble": ensemble, "student": student}) == [
        "all right of captions never shown: ensemble 0.7500, student 0.5000",
        "held-out velocity error, each cluster's own expert: ensemble 0.3750, student 0.7500",
    ]
    assert comparison({"ensemble": {"shown": {}}, "student": {"shown": {}}}) == []
