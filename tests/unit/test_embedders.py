"""What the encoders' actors add to a batch, without Ray."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import CodecConfig, Config, load
from paris_ray.embeddings import write_null_text
from paris_ray.encoders.autoencoder import copy_autoencoder_kl
from paris_ray.encoders.clip import ClipText, copy_clip
from paris_ray.encoders.codec import PatchPCA, load_codec
from paris_ray.encoders.text import MiniLM, write_text_encoder
from paris_ray.folders import Folder
from paris_ray.pipeline.embed import actor_pools
from paris_ray.pipeline.embedders import (
    Encoders,
    FeatureEmbedder,
    LatentEmbedder,
    RowScorer,
    TextEmbedder,
)
from paris_ray.pipeline.shards import Batch
from paris_ray.run import Run

CAPTIONS = ["a cat", "a very long caption " * 20, ""]


@pytest.fixture
def config(tmp_path: Path, release_path: Path) -> Config:
    """A run with the encoders of a small release."""
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "codec.kind=autoencoder_kl",
        f"codec.path={release_path / 'vae'}",
        "codec.num_components=4",
        "text.kind=clip",
        f"text.path={release_path}",
        "text.token_states=0",
        "cluster.features=image",
        "expert.text_embed_dim=16",
        "expert.text_injection=cross_attention",
        "training.text_noise=0",
        "router_training.text_noise=0",
        "seed_training.text_noise=0",
        "corpus.caption_templates=['{}','a picture of {}']",
    ]
    config = load("quickstart", overrides)
    run = Run(config)
    copy_autoencoder_kl(str(release_path / "vae"), run.codec)
    copy_clip(release_path, run.encoders)
    clip = ClipText(release_path / "text_encoder", release_path / "tokenizer")
    write_null_text(run.encoders, clip.tokenize([""])[0])
    return config


@pytest.fixture
def pictures() -> Batch:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    return {"image": images, "key": np.array(list("abcde"), dtype=object)}


def with_posterior(config: Config, posterior: str, **corpus: object) -> Config:
    codec = replace(config.codec, posterior=posterior)
    return replace(config, codec=codec, corpus=replace(config.corpus, **corpus))


def test_clip_text_is_kept_as_token_ids_of_every_template(
    config: Config, release_path: Path
) -> None:
    batch = TextEmbedder(config).columns({"caption": np.array(CAPTIONS, dtype=object)})
    assert set(batch) == {"token_ids"}
    clip = ClipText(release_path / "text_encoder", release_path / "tokenizer")
    expected = [clip.tokenize([c, f"a picture of {c}"]) for c in CAPTIONS]
    assert batch["token_ids"].dtype == np.uint16
    np.testing.assert_array_equal(batch["token_ids"], np.stack(expected))


@pytest.mark.parametrize("token_states", [0, 4])
def test_sentences_are_kept_as_vectors_and_their_tokens_states(
    tmp_path: Path, tiny_parts: Path, token_states: int
) -> None:
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"text.path={tiny_parts / 'text_encoder'}",
        f"text.token_states={token_states}",
        "text.pool.batch_size=2",
        "corpus.caption_templates=['{}','a {}']",
    ]
    config = load("quickstart", overrides)
    write_text_encoder(config.text, Run(config).encoders)
    captions = ["red cat", "a green circle a blue square", "", "dog"]
    batch = TextEmbedder(config).columns({"caption": np.array(captions, dtype=object)})
    found = batch["text_embedding"]
    assert found.dtype == np.float16
    assert found.shape == ((4, 2, 1 + 4, 16) if token_states else (4, 2, 16))
    encoder = MiniLM(tmp_path / "run" / "encoders" / "text_encoder")
    expected = [encoder.encode([c, f"a {c}"]).vectors().numpy() for c in captions]
    np.testing.assert_allclose(found.astype(np.float32), np.stack(expected), atol=4e-3)


def test_the_mirror_image_is_encoded_beside_the_picture(config: Config, pictures: Batch) -> None:
    batch = LatentEmbedder(with_posterior(config, "mode", horizontal_flip=True)).columns(pictures)
    codec = load_codec(VerifiedFolder(Run(config).codec, None), 32)
    mirrored = codec.encode(np.flip(pictures["image"], axis=2)).numpy().astype(np.float16)
    np.testing.assert_array_equal(batch["latents_flipped"], mirrored)
    assert (batch["latents"] != batch["latents_flipped"]).any()
    without = LatentEmbedder(with_posterior(config, "mode")).columns(pictures)
    assert "latents_flipped" not in without
    np.testing.assert_array_equal(without["latents"], batch["latents"])


def test_a_draw_from_the_posterior_depends_on_the_key_and_not_on_the_batch(
    config: Config, pictures: Batch
) -> None:
    config = with_posterior(config, "sample", horizontal_flip=True)
    whole = LatentEmbedder(config).columns(pictures)
    order = [4, 2, 0]
    chosen = {name: column[order] for name, column in pictures.items()}
    part = LatentEmbedder(config).columns(chosen)
    for name in ("latents", "latents_flipped"):
        np.testing.assert_allclose(
            part[name].astype(np.float32), whole[name][order].astype(np.float32), atol=2e-3
        )


def test_draws_differ_between_keys_seeds_and_the_mirror_image(
    config: Config, pictures: Batch
) -> None:
    symmetric = np.repeat(pictures["image"][:1], 2, axis=0)
    symmetric = np.maximum(symmetric, symmetric[:, :, ::-1])
    batch = {"image": symmetric, "key": np.array(["one", "two"], dtype=object)}
    config = with_posterior(config, "sample", horizontal_flip=True)
    drawn = LatentEmbedder(config).columns(batch)
    assert np.abs(drawn["latents"][0] - drawn["latents"][1]).max() > 0.01
    assert np.abs(drawn["latents"] - drawn["latents_flipped"]).max() > 0.01
    other = LatentEmbedder(replace(config, seed=1)).columns(batch)
    assert np.abs(drawn["latents"] - other["latents"]).max() > 0.01
    mode = LatentEmbedder(with_posterior(config, "mode")).columns(batch)
    np.testing.assert_array_equal(mode["latents"][0], mode["latents"][1])


def test_a_codec_without_posterior_has_nothing_to_draw(tmp_path: Path, pictures: Batch) -> None:
    config = load("quickstart", [f"run_dir={tmp_path}", "codec.posterior=sample"])
    folder = Folder(tmp_path / "encoders" / "codec")
    PatchPCA.fit(pictures["image"], CodecConfig(num_components=96)).save(folder)
    drawn = LatentEmbedder(config).columns(pictures)
    mode = LatentEmbedder(with_posterior(config, "mode")).columns(pictures)
    np.testing.assert_array_equal(drawn["latents"], mode["latents"])


def test_pieces_of_a_file_are_passed_on_and_told_apart_from_waiting(
    config: Config, pictures: Batch
) -> None:
    """Whatever Ray Data joined: who is next begins with what is ready."""
    short = replace(config, corpus=replace(config.corpus, rows_per_shard=2))
    batch = pictures | {"row": np.arange(5), "caption": np.array(list("abcde"), dtype=object)}
    pieces = list(Encoders(short, [TextEmbedder, LatentEmbedder])(batch))
    assert [piece["row"].tolist() for piece in pieces] == [[0, 1], [2, 3], [4]]
    joined = np.concatenate([piece["token_ids"] for piece in pieces])
    np.testing.assert_array_equal(joined, TextEmbedder(short).columns(batch)["token_ids"])
    for piece in pieces:
        rows = {name: piece[name] for name in ("image", "key")}
        alone = LatentEmbedder(short).columns(rows)["latents"]
        np.testing.assert_array_equal(piece["latents"], alone)
        for step in ("text", "latents"):
            busy = piece[f"busy.{step}"]
            assert busy[0] > 0
            assert not busy[1:].any()


def test_encoders_share_actors_unless_their_pools_differ_or_one_has_a_gpu(tmp_path: Path) -> None:
    def pools(*overrides: str) -> list[tuple[list[type], int, float]]:
        config = load("quickstart", [f"run_dir={tmp_path}", *overrides])
        return [(kinds, p.num_actors, p.num_cpus) for kinds, p in actor_pools(config)]

    pictures = [FeatureEmbedder, LatentEmbedder]
    assert pools() == [([TextEmbedder, *pictures], 1, 0.75)]
    scored = pools("corpus.filters.max_nsfw_score=0.5")
    assert scored == [([TextEmbedder, *pictures, RowScorer], 1, 1.0)]
    two = pools("text.pool.num_actors=2", "text.pool.num_cpus=1")
    assert two == [([TextEmbedder], 2, 1.0), (pictures, 1, 0.5)]
    for cpus in (0.9, 4.0):  # a node might have room for each, and for all together none
        apart = pools(*(f"{name}.pool.num_cpus={cpus}" for name in ("text", "features", "codec")))
        assert apart == [([kind], 1, cpus) for kind in (TextEmbedder, *pictures)]
    gpus = pools("features.pool.num_gpus=0.5", "codec.pool.num_gpus=0.5")
    assert gpus == [([kind], 1, 0.25) for kind in (TextEmbedder, *pictures)]
