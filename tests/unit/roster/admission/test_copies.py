"""Pictures that are training pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from paris_ray.bundle import Bundle
from paris_ray.embeddings import to_table, write_part
from paris_ray.errors import ArtifactError, EvaluationError
from paris_ray.folders import Folder
from paris_ray.roster.admission.copies import Shard, check_copies, read_shard
from paris_ray.roster.admission.limits import Limits
from tests.admission_panels import (
    CAPTIONS,
    changed,
    flagged,
    look,
    means,
    panel,
    readings,
    specialist,
)


def test_without_its_shard_nothing_is_checked(tiny_bundle: Bundle) -> None:
    check = check_copies(panel(tiny_bundle, specialist(0)), None, look, Limits())
    assert check.outcome == "not checked"
    assert "--shard" in check.note


def shard_of(tiny_bundle: Bundle, seed: int) -> Shard:
    generator = np.random.default_rng(seed)
    rows = means(0)[:, None, None] + 0.3 * torch.from_numpy(
        generator.standard_normal((12, 8, 4, 4)).astype(np.float32)
    )
    return Shard(tuple(CAPTIONS[:6]) * 2, look(tiny_bundle.codec.decode(rows)))


def test_an_honest_expert_passes(tiny_bundle: Bundle) -> None:
    honest = panel(tiny_bundle, specialist(0))
    check = check_copies(honest, shard_of(tiny_bundle, 3), look, Limits())
    assert check.outcome == "passed"
    assert set(readings(check)) == {"close", "copied"}


def test_an_expert_that_gives_a_training_picture_back_is_flagged(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = replace(tiny_bundle.facts.sampling, num_inference_steps=1)
    monkeypatch.setattr(tiny_bundle, "facts", replace(tiny_bundle.facts, sampling=once))
    constant = specialist(0, prediction="preconditioned")

    def answer_with_its_mean(expert):  # type: ignore[no-untyped-def]
        expert.final_layer.linear.weight.zero_()
        expert.final_layer.linear.bias.copy_(means(0))

    copyist = panel(tiny_bundle, changed(constant, answer_with_its_mean))
    shard = shard_of(tiny_bundle, 3)
    shard.features[0] = look(
        tiny_bundle.codec.decode(means(0)[None, :, None, None].expand(1, 8, 4, 4).contiguous())
    )
    check = check_copies(copyist, shard, look, Limits())
    assert flagged(check) == {"close", "copied"}
    assert readings(check)["close"] == 1.0


def test_a_shard_of_another_image_model_is_an_error(tiny_bundle: Bundle) -> None:
    shard = Shard(("a red cat",) * 4, np.zeros((4, 5), np.float32))
    with pytest.raises(EvaluationError, match="5"):
        check_copies(panel(tiny_bundle, specialist(0)), shard, look, Limits())


def test_a_shard_is_read_by_its_columns(tmp_path) -> None:  # type: ignore[no-untyped-def]
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    table = to_table({"caption": ["a", "b", "c"], "features": features})
    write_part(Folder(tmp_path), "part-0.parquet", table)
    shard = read_shard(Folder(tmp_path))
    assert shard.captions == ("a", "b", "c")
    assert (shard.features == features).all()
    write_part(Folder(tmp_path / "other"), "part-0.parquet", table.drop_columns(["features"]))
    with pytest.raises(ArtifactError, match="has no column features"):
        read_shard(Folder(tmp_path / "other"))


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "has no rows"),
        (["a", None], "caption 1 of those that were read is None, not a string"),
        ([1, 2], "caption 0 of those that were read is 1, not a string"),
    ],
)
def test_a_shard_has_rows_and_captions(
    captions: list[str | None], message: str, tmp_path: Path
) -> None:
    features = to_table({"features": np.zeros((2, 2), np.float32)})  # there are no empty arrays
    table = features.slice(0, len(captions)).append_column("caption", pa.array(captions))
    write_part(Folder(tmp_path), "part-0.parquet", table)
    with pytest.raises(ArtifactError, match=message):
        read_shard(Folder(tmp_path))


def test_drawings_of_training_captions_that_are_not_finite_are_flagged(tiny_bundle: Bundle) -> None:
    broken = changed(specialist(0), lambda e: e.final_layer.linear.bias.fill_(torch.inf))
    check = check_copies(panel(tiny_bundle, broken), shard_of(tiny_bundle, 3), look, Limits())
    assert check.outcome == "flagged"
    assert readings(check) == {"not_finite": 12}


def test_a_long_caption_is_cut(tiny_bundle: Bundle) -> None:
    shard = replace(shard_of(tiny_bundle, 3), captions=("\U000e0001" * 500,) * 12)
    check = check_copies(panel(tiny_bundle, specialist(0)), shard, look, Limits())
    assert 0 < len(check.readings[1].detail) <= 300
