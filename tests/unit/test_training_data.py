"""Data of training: streamed to mapped files, drawn as a pure function of the step."""

import resource
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from paris_ray.embeddings import ROWS_PER_GROUP, to_table, write_null_text, write_part
from paris_ray.errors import ArtifactError, ConfigError, TrainingError
from paris_ray.folders import Folder
from paris_ray.training.data import Batch, MixedOrder, batches, load_dataset
from paris_ray.training.prefetch import draw_ahead
from tests.training_shards import (
    EXPERT,
    TRAINING,
    write_clip,
    write_columns,
    write_shard,
    write_token_shard,
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write_shard(Folder(tmp_path_factory.mktemp("shard")), 10)


@contextmanager
def counted_arrow_memory() -> Iterator[pa.MemoryPool]:
    """Count what Arrow allocates meanwhile."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted
    pa.set_memory_pool(before)


def test_the_dataset_is_what_was_written(shard: Folder, tmp_path: Path) -> None:
    other = write_shard(Folder(tmp_path), 4, seed=1)
    dataset = load_dataset([shard, other])
    assert len(dataset) == 14
    assert dataset.latents.shape == (14, 3, 2, 2)
    assert dataset.text.shape == (14, 2, 4)
    assert dataset.clusters.tolist() == [0] * 10 + [1] * 4
    for rows, seed in ((slice(10), 0), (slice(10, 14), 1)):
        generator = np.random.default_rng(seed)
        expected = generator.standard_normal(dataset.latents[rows].shape).astype(np.float32)
        assert np.array_equal(dataset.latents[rows], expected)
    read = dataset.read_latents(torch.tensor([3, 11]))
    assert read.dtype == torch.float32
    assert np.array_equal(read.numpy(), dataset.latents[[3, 11]])


def test_a_shard_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    num_rows, shape = 16 * ROWS_PER_GROUP, (4, 16, 16)
    shard = Folder(tmp_path)
    latents = np.random.default_rng(0).standard_normal((num_rows, *shape)).astype(np.float16)
    columns = {"latents": latents, "text_embedding": np.ones((num_rows, 1, 2), np.float16)}
    write_part(shard, "part-0.parquet", to_table(columns))
    write_null_text(shard, np.ones(2, np.float32))
    assert pq.read_metadata(tmp_path / "part-0.parquet").num_row_groups == 16
    tracemalloc.start()
    with counted_arrow_memory() as arrow:
        dataset = load_dataset([shard])
        batches(dataset, TRAINING, seed=0, purpose="test")(0)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python_peak < latents.nbytes / 4
    assert 0 < arrow.max_memory() < latents.nbytes / 4
    assert np.array_equal(dataset.latents, latents)


def test_mapped_files_have_no_name(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dataset = load_dataset([shard])
    assert list(tmp_path.iterdir()) == []
    assert np.isfinite(dataset.latents).all()


def test_a_full_disk_is_an_error_that_says_what_to_do(shard: Folder) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(TrainingError, match=r"latents of 1 shards does not fit.*TMPDIR"):
            load_dataset([shard])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_shard_without_text_is_refused(tmp_path: Path) -> None:
    write_columns(Folder(tmp_path), {"latents": np.zeros((4, 3, 2, 2), np.float16)})
    with pytest.raises(TrainingError, match="neither text_embedding nor token_ids"):
        load_dataset([Folder(tmp_path)])


def test_shards_of_another_shape_or_type_are_refused(shard: Folder, tmp_path: Path) -> None:
    text = np.zeros((4, 2, 4), np.float16)
    for name, latents in (
        ("shape", np.zeros((4, 3, 4, 4), np.float32)),
        ("type", np.zeros((4, 3, 2, 2), np.float16)),
    ):
        other = Folder(tmp_path / name)
        write_columns(other, {"latents": latents, "text_embedding": text})
        with pytest.raises(TrainingError, match=r"column latents.*all rows must be alike"):
            load_dataset([shard, other])


def test_a_shard_without_mirror_images_beside_one_with_them_is_refused(
    shard: Folder, tmp_path: Path
) -> None:
    flipped = np.zeros((10, 3, 2, 2), np.float32)
    mirrored = write_shard(Folder(tmp_path), 10, latents_flipped=flipped)
    with pytest.raises(ArtifactError, match="no column latents_flipped"):
        load_dataset([mirrored, shard])


def test_text_is_dropped_to_the_null_text(shard: Folder) -> None:
    dataset, index = load_dataset([shard]), torch.arange(10).repeat(20)

    def draw(dropout: float) -> torch.Tensor:
        config = replace(TRAINING, text_dropout=dropout)
        return dataset.draw_text(index, config, torch.Generator().manual_seed(0))

    assert (draw(1.0) == 1).all()
    dropped = (draw(0.3) == 1).all(dim=1).float().mean()
    assert 0.15 < dropped < 0.45
    kept = draw(0.0)
    text = torch.from_numpy(dataset.text.astype(np.float32))
    is_variant = (kept[:, None] == text[index]).all(dim=2)
    assert is_variant.any(dim=1).all()
    assert is_variant.any(dim=0).all()


def test_captions_are_drawn_as_often_as_their_weights_say(tmp_path: Path) -> None:
    """In every template alike: here of two captions in two templates each."""
    text = np.arange(4, dtype=np.float32).repeat(4).reshape(1, 4, 4).repeat(2, axis=0)
    dataset = load_dataset([write_shard(Folder(tmp_path), 2, text_embedding=text)])
    config = replace(TRAINING, text_dropout=0.0, caption_weights=[3.0, 1.0])
    index = torch.zeros(4000, dtype=torch.long)
    drawn = dataset.draw_text(index, config, torch.Generator().manual_seed(0))[:, 0]
    shares = [(drawn == variant).float().mean().item() for variant in range(4)]
    assert shares == pytest.approx([0.375, 0.375, 0.125, 0.125], abs=0.03)
    never = replace(config, caption_weights=[0.0, 1.0])
    assert dataset.draw_text(index, never, torch.Generator()).min() == 2


def test_token_ids_are_drawn_and_dropped_to_null_tokens(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "encoders")
    dataset = load_dataset([write_token_shard(Folder(tmp_path / "shard"), clip)])
    assert dataset.has_token_ids
    index = torch.arange(8).repeat(50)
    drawn = dataset.draw_text(index, replace(TRAINING, text_dropout=0.2), torch.Generator())
    for caption in ("", "b", "a b", "c", "a c"):
        ids = torch.from_numpy(clip.tokenize([caption]).astype(np.int32))
        assert (drawn == ids).all(dim=1).float().mean().item() == pytest.approx(0.2, abs=0.08)


def test_noise_on_token_ids_is_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "encoders")
    dataset = load_dataset([write_token_shard(Folder(tmp_path / "shard"), clip)])
    with pytest.raises(ConfigError, match=r"text_noise=0\.1 is not allowed"):
        batches(dataset, replace(TRAINING, text_noise=0.1), seed=0, purpose="test")


def test_every_other_sample_is_mirrored_and_nothing_else_changes(tmp_path: Path) -> None:
    plain = write_shard(Folder(tmp_path / "plain"), 10)
    latents = load_dataset([plain]).latents
    flipped = np.ascontiguousarray(latents[..., ::-1])
    mirrored = write_shard(Folder(tmp_path / "mirrored"), 10, latents_flipped=flipped)
    config = replace(TRAINING, batch_size=400)
    without, with_mirrors = (
        batches(load_dataset([shard]), config, seed=0, purpose="test")(0)
        for shard in (plain, mirrored)
    )
    for name in ("noise", "t", "text", "clusters"):
        assert torch.equal(getattr(without, name), getattr(with_mirrors, name))
    same = (without.latents == with_mirrors.latents).flatten(1).all(dim=1)
    turned = (without.latents.flip(-1) == with_mirrors.latents).flatten(1).all(dim=1)
    assert (same ^ turned).all()
    assert 0.4 < turned.float().mean() < 0.6


def test_an_expert_of_noise_gets_times_as_it_counts_them(shard: Folder) -> None:
    dataset = load_dataset([shard])
    epsilon = replace(EXPERT, prediction="epsilon")
    config = replace(TRAINING, t_one_share=0.0)
    straight, other = (
        batches(dataset, config, seed=0, purpose="test", expert=expert)(0)
        for expert in (EXPERT, epsilon)
    )
    assert not torch.equal(straight.t, other.t)
    # Equal signal-to-noise ratio: tan(pi s / 2) = t / (1 - t).
    torch.testing.assert_close(torch.tan(torch.pi / 2 * straight.t), other.t / (1 - other.t))


def test_a_batch_falls_into_equal_parts() -> None:
    whole = Batch(*(torch.arange(6) + i for i in range(5)))
    parts = whole.split(3)
    assert [part.t.tolist() for part in parts] == [[2, 3], [4, 5], [6, 7]]
    assert torch.equal(torch.cat([part.clusters for part in parts]), whole.clusters)


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_drawing_ahead_changes_nothing(depth: int) -> None:
    assert list(draw_ahead(str, range(3, 9), depth)) == ["3", "4", "5", "6", "7", "8"]
    assert list(draw_ahead(str, range(0), depth)) == []


def test_no_more_is_drawn_ahead_than_asked_for_and_the_thread_ends() -> None:
    drawn = [threading.Event() for _ in range(9)]
    items = draw_ahead(lambda step: drawn[step].set(), range(9), 2)
    next(items)
    assert drawn[2].wait(10)
    assert not drawn[3].wait(0.2)
    items.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_in_drawing_comes_at_its_step(depth: int) -> None:
    def draw(step: int) -> int:
        if step == 3:
            raise OSError("the disk is gone")
        return step

    items = draw_ahead(draw, range(9), depth)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def write_states(folder: Folder) -> np.ndarray:
    """A shard whose text is a sentence vector and three token states, of which one is padding."""
    text = np.random.default_rng(0).standard_normal((6, 2, 1 + 3, 4)).astype(np.float16)
    text[:, :, 3] = 0
    latents = np.zeros((6, 3, 2, 2), np.float32)
    write_columns(folder, {"latents": latents, "text_embedding": text})
    null_text = np.zeros((1 + 3, 4), np.float32)
    null_text[:2] = 7
    write_null_text(folder, null_text)
    return text


def test_token_states_are_drawn_dropped_and_noised_but_not_at_padding(tmp_path: Path) -> None:
    stored = torch.from_numpy(write_states(Folder(tmp_path)).astype(np.float32))
    dataset, index = load_dataset([Folder(tmp_path)]), torch.arange(6).repeat(30)
    assert (dataset.text_length, dataset.has_token_ids) == (3, False)

    def draw(dropout: float, noise: float) -> torch.Tensor:
        config = replace(TRAINING, text_dropout=dropout, text_noise=noise)
        return dataset.draw_text(index, config, torch.Generator().manual_seed(0))

    plain = draw(0.0, 0.0)
    assert plain.shape == (180, 4, 4)
    variants = (plain[:, None] == stored[index]).flatten(2).all(dim=2)
    assert variants.any(dim=1).all() and variants.any(dim=0).all()
    moved = draw(0.0, 0.5) - plain
    assert (moved[:, 3] == 0).all()
    assert moved[:, :3].std().item() == pytest.approx(0.5, rel=0.1)
    dropped = (draw(0.3, 0.5) == dataset.null_text).flatten(1).all(dim=1)
    assert 0.15 < dropped.float().mean() < 0.45  # and the null text has no noise


# --- rows that all experts have ---


@pytest.mark.parametrize(
    ("batch_size", "share", "shared"), [(8, 0.25, 2), (8, 0.5, 4), (10, 0.01, 1), (10, 0.34, 3)]
)
def test_every_batch_has_its_share_of_shared_rows(
    batch_size: int, share: float, shared: int
) -> None:
    order = MixedOrder(20, 7, batch_size, share, seed=0)
    for step in range(40):
        rows = order.batch(step)
        assert rows.shape == (batch_size,)
        assert int((rows >= 20).sum()) == shared
        assert int(rows.min()) >= 0 and int(rows.max()) < 27


def test_every_row_of_its_own_is_seen_once_an_epoch_and_shared_ones_in_turn() -> None:
    order = MixedOrder(12, 4, 8, 0.25, seed=0)  # six own rows and two shared ones a batch
    rows = [order.batch(step) for step in range(8)]
    for epoch in range(4):
        both = torch.cat(rows[2 * epoch : 2 * epoch + 2])
        assert sorted(both[both < 12].tolist()) == list(range(12))
        assert sorted(both[both >= 12].tolist()) == list(range(12, 16))


def test_mixed_batches_depend_on_seed_and_step_alone_and_have_no_place_for_shared_rows() -> None:
    order = MixedOrder(12, 4, 8, 0.25, seed=3)
    forward = [order.batch(step).tolist() for step in range(50)]
    fresh = MixedOrder(12, 4, 8, 0.25, seed=3)
    assert [fresh.batch(step).tolist() for step in reversed(range(50))] == forward[::-1]
    assert [MixedOrder(12, 4, 8, 0.25, seed=4).batch(i).tolist() for i in range(50)] != forward
    places = [i for rows in forward for i, row in enumerate(rows) if row >= 12]
    assert set(places) == set(range(8))
