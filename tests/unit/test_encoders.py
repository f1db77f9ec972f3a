"""Codec, text encoder and image encoder, each small and real."""

import asyncio
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import CodecConfig, FeaturesConfig, TextConfig
from paris_ray.encoders.codec import PatchPCA, load_codec
from paris_ray.encoders.images import (
    CONFIG,
    WEIGHTS,
    JointEmbedding,
    load_features,
    load_open_clip,
    preprocess,
)
from paris_ray.encoders.text import PADDING, MiniLM, copy_text_encoder, text_encoder_folder
from paris_ray.encoders.tokenizers import LENGTHS, MAX_TOKENS, tokenizing
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models import TextConditioning
from paris_ray.training.contrastive import train_open_clip
from paris_ray.training.loop import Progress

PATCH = 4
EVERYTHING = CodecConfig(patch_size=PATCH, num_components=3 * PATCH**2)


def random_pictures(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_a_full_codec_is_exactly_invertible() -> None:
    pictures, unseen = random_pictures(40), random_pictures(5, seed=1)
    codec = PatchPCA.fit(pictures, EVERYTHING)
    for images in (pictures, unseen):
        assert np.array_equal(codec.decode(codec.encode(images)), images)


def test_a_codec_is_exact_on_its_span() -> None:
    """Pictures of one free grey value a patch need one component only."""
    values = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    pictures = np.broadcast_to(values, (30, 4, 4, 3)).repeat(PATCH, 1).repeat(PATCH, 2)
    codec = PatchPCA.fit(pictures, CodecConfig(patch_size=PATCH, num_components=1))
    latents = codec.encode(pictures)
    assert latents.shape == (30, 1, 4, 4)
    assert np.array_equal(codec.decode(latents), pictures)


def test_latents_have_unit_variance_and_keep_their_place() -> None:
    pictures = random_pictures(200)
    codec = PatchPCA.fit(pictures, CodecConfig(patch_size=PATCH, num_components=8))
    latents = codec.encode(pictures)
    assert latents.shape == (200, 8, 4, 4)
    assert latents.dtype == torch.float32
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert latents.mean(dim=0).abs().max() < 1e-4
    pictures[:, :PATCH, -PATCH:] = 0  # the upper right patch
    changed = (codec.encode(pictures) != latents).any(dim=1).any(dim=0)
    assert changed.nonzero().tolist() == [[0, 3]]


def test_refitting_gives_the_same_codec() -> None:
    config = CodecConfig(patch_size=PATCH, num_components=8)
    first, second = (PatchPCA.fit(random_pictures(40), config) for _ in range(2))
    assert torch.equal(first.components, second.components)
    assert torch.equal(first.scale, second.scale)
    identity = first.components @ first.components.T
    torch.testing.assert_close(identity, torch.eye(8), rtol=0, atol=1e-5)


def test_wild_latents_are_clipped() -> None:
    codec = PatchPCA.fit(random_pictures(40), EVERYTHING)
    wild = 1e4 * torch.randn(2, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    decoded = codec.decode(wild)
    assert set(np.unique(decoded)) >= {0, 255}
    assert decoded.dtype == np.uint8


def test_a_codec_is_saved_and_loaded(tmp_path: Path) -> None:
    codec = PatchPCA.fit(random_pictures(40), CodecConfig(patch_size=PATCH, num_components=8))
    codec.save(Folder(tmp_path))
    loaded = load_codec(VerifiedFolder(Folder(tmp_path), None))
    pictures = random_pictures(3, seed=2)
    assert torch.equal(loaded.encode(pictures), codec.encode(pictures))
    assert np.array_equal(
        loaded.decode(codec.encode(pictures)), codec.decode(codec.encode(pictures))
    )


def test_a_codec_moves_and_has_no_posterior_to_draw_from() -> None:
    codec = PatchPCA.fit(random_pictures(40), EVERYTHING)
    pictures = random_pictures(2)
    drawn = codec.encode(pictures, [torch.Generator(), torch.Generator()])
    assert torch.equal(drawn, codec.encode(pictures))
    assert codec.to(torch.device("meta")) is codec
    tensors = (codec.mean, codec.components, codec.scale)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.fixture(scope="module")
def text_encoder(tiny_parts: Path) -> MiniLM:
    return MiniLM(tiny_parts / "text_encoder")


CAPTIONS = ["a red cat", "", "dog", "a green circle a blue square", "nothing known " * 99]


def test_captions_mean_the_same_in_a_batch_and_alone(text_encoder: MiniLM) -> None:
    together = text_encoder.encode(CAPTIONS)
    assert together.text_embeddings.shape == (5, 1, 16)
    for i, caption in enumerate(CAPTIONS):
        alone = text_encoder.encode([caption]).pooled_text[0]
        torch.testing.assert_close(alone, together.pooled_text[i], rtol=1e-5, atol=1e-5)


def test_captions_are_padded_to_one_of_few_lengths(text_encoder: MiniLM) -> None:
    counts = [0, 13, 14, 15, 30, 31, 62, 63, 126, 127, 500]  # of words, between two marks
    rows = text_encoder.tokenize(["cat " * count for count in counts])
    assert [len(row) for row in rows] == [16, 16, 16, 32, 32, 64, 64, 128, 128, 128, 128]
    num_tokens = [int((row != PADDING).sum()) for row in rows]
    assert num_tokens == [min(count + 2, MAX_TOKENS) for count in counts]
    assert all((row[count:] == PADDING).all() for row, count in zip(rows, num_tokens, strict=True))
    assert text_encoder.lengths == LENGTHS


STATES = 6


@pytest.fixture(scope="module")
def token_encoder(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> MiniLM:
    folder = tmp_path_factory.mktemp("states")
    copy_text_encoder(tiny_parts / "text_encoder", Folder(folder), STATES)
    return MiniLM(folder)


def test_token_states_are_the_same_in_every_batch(token_encoder: MiniLM) -> None:
    assert token_encoder.token_states == STATES
    together = token_encoder.encode(CAPTIONS)
    assert together.text_embeddings.shape == (5, STATES, 16)
    assert together.text_mask is not None
    for i, caption in enumerate(CAPTIONS):
        alone, pair = token_encoder.encode([caption]), token_encoder.encode([caption, "a cat"])
        for text in (alone, pair):
            assert text.text_mask is not None
            assert torch.equal(text.text_mask[0], together.text_mask[i])
            for name in ("text_embeddings", "pooled_text"):
                one, other = getattr(text, name)[0], getattr(together, name)[i]
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_token_states_are_cut_padded_with_zeros_and_of_unit_variance(
    token_encoder: MiniLM, text_encoder: MiniLM
) -> None:
    text = token_encoder.encode(CAPTIONS)
    assert text.text_mask is not None
    # Beginning and end of a caption are tokens too.
    assert text.text_mask.sum(dim=1).tolist() == [5, 2, 3, STATES, STATES]
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in text.text_mask)
    norms = text.text_embeddings.norm(dim=2)
    torch.testing.assert_close(norms, 4.0 * text.text_mask)  # sqrt(16), and 0 at padding
    vectors = text_encoder.encode(CAPTIONS)
    torch.testing.assert_close(text.pooled_text, vectors.pooled_text)
    assert vectors.text_mask is None
    first = text.text_embeddings[0, :5]
    assert torch.cdist(first, first).add(torch.eye(5)).min() > 1e-2  # tokens differ


def test_without_token_states_config_json_stays_as_it_was(tiny_parts: Path, tmp_path: Path) -> None:
    source = tiny_parts / "text_encoder"
    copy_text_encoder(source, Folder(tmp_path))
    assert (tmp_path / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert MiniLM(tmp_path).token_states == 0


@pytest.mark.parametrize("value", [-1, 129, "6", True, 1.5, None])
def test_other_numbers_of_token_states_are_refused(
    tiny_parts: Path, tmp_path: Path, value: object
) -> None:
    copy_text_encoder(tiny_parts / "text_encoder", Folder(tmp_path))
    folder = Folder(tmp_path)
    folder.write_json("config.json", folder.read_json("config.json") | {"token_states": value})
    with pytest.raises(BundleError) as caught:
        MiniLM(tmp_path)
    expected = f"{tmp_path}/config.json: token_states={value!r}, allowed: 0 to 128"
    assert str(caught.value) == expected


def test_text_is_stored_as_vectors_and_comes_back(
    token_encoder: MiniLM, text_encoder: MiniLM
) -> None:
    for encoder, shape in ((token_encoder, (5, 1 + STATES, 16)), (text_encoder, (5, 16))):
        text = encoder.encode(CAPTIONS)
        assert text.vectors().shape == shape
        back = TextConditioning.from_vectors(text.vectors())
        assert torch.equal(back.text_embeddings, text.text_embeddings)
        assert torch.equal(back.pooled_text, text.pooled_text)
        assert (back.text_mask is None) == (text.text_mask is None)
        if text.text_mask is not None and back.text_mask is not None:
            assert torch.equal(back.text_mask, text.text_mask)


def test_what_is_at_padding_is_not_stored() -> None:
    states, mask = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    vectors = TextConditioning(states, 2 * torch.ones(2, 4), mask).vectors()
    assert (vectors[:, 0] == 2).all()
    assert (vectors[:, 1:] != 0).any(dim=2).tolist() == mask.tolist()


def test_text_vectors_have_unit_variance_and_differ(text_encoder: MiniLM) -> None:
    pooled = text_encoder.encode(CAPTIONS).pooled_text
    torch.testing.assert_close(pooled.norm(dim=1), torch.full((5,), 4.0))  # sqrt(16)
    assert torch.cdist(pooled, pooled).add(torch.eye(5)).min() > 1e-2


def test_the_null_text_is_the_empty_caption(text_encoder: MiniLM) -> None:
    assert text_encoder.embed_dim == 16
    null_text = text_encoder.encode([""]).pooled_text
    assert null_text.isfinite().all()
    torch.testing.assert_close(text_encoder.encode(["", "cat"]).pooled_text[:1], null_text)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_text_encoders_are_refused(tiny_parts: Path, tmp_path: Path, name: str) -> None:
    copy_text_encoder(tiny_parts / "text_encoder", Folder(tmp_path / "copy"))
    assert MiniLM(tmp_path / "copy").embed_dim == 16
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        MiniLM(tmp_path / "copy")
    with pytest.raises(BundleError, match=f"lacks {name}"):
        copy_text_encoder(tmp_path / "copy", Folder(tmp_path / "other"))


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_text_weights_that_do_not_fit_are_refused(
    tiny_parts: Path, tmp_path: Path, change: str
) -> None:
    copy_text_encoder(tiny_parts / "text_encoder", Folder(tmp_path))
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weight = state.pop("encoder.layer.0.attention.self.query.weight")
    if change == "other shape":
        state["encoder.layer.0.attention.self.query.weight"] = weight[:, :8].contiguous()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match=r"model.safetensors .*"):
        MiniLM(tmp_path)


def test_a_text_model_of_too_few_positions_is_refused(tiny_parts: Path, tmp_path: Path) -> None:
    copy_text_encoder(tiny_parts / "text_encoder", Folder(tmp_path))
    document = Folder(tmp_path).read_json("config.json")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "embeddings.position_embeddings.weight"
    for count in (MAX_TOKENS, MAX_TOKENS - 1):
        cut = state | {name: state[name][:count].contiguous()}
        safetensors.torch.save_file(cut, tmp_path / "model.safetensors", {"format": "pt"})
        Folder(tmp_path).write_json("config.json", document | {"max_position_embeddings": count})
        if count == MAX_TOKENS:
            MiniLM(tmp_path).encode(["cat " * 500])
    with pytest.raises(BundleError, match="max_position_embeddings=127, allowed: at least 128"):
        MiniLM(tmp_path)


def test_another_kind_of_text_model_is_refused(tiny_parts: Path, tmp_path: Path) -> None:
    copy_text_encoder(tiny_parts / "text_encoder", Folder(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BundleError, match="model_type='gpt2', expected 'bert'"):
        MiniLM(tmp_path)


def test_a_configured_text_encoder_wins() -> None:
    assert text_encoder_folder(TextConfig(path="/some/where")) == Path("/some/where")


FEATURES = FeaturesConfig(steps=3, batch_size=8, learning_rate=1e-3)


def train_features(folder: Path, seed: int = 0) -> tuple[float, list[int]]:
    steps: list[int] = []

    def on_progress(progress: Progress) -> None:
        steps.append(progress.step)

    captions = [f"picture number {i}" for i in range(12)]
    loss = train_open_clip(
        FEATURES,
        random_pictures(12, size=32),
        captions,
        seed=seed,
        output=Folder(folder),
        on_progress=on_progress,
    )
    return loss, steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    loss, steps = train_features(folder)
    assert np.isfinite(loss)
    assert steps == [3]
    return folder


def test_trained_features_are_unit_vectors_that_differ(trained: Path) -> None:
    encoder = load_features(FEATURES, trained)
    features = encoder.encode(random_pictures(6, size=32))
    assert features.shape == (6, 128)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert (features @ features.T - np.eye(6)).max() < 1 - 1e-4
    alone = encoder.encode(random_pictures(6, size=32)[2:3])
    np.testing.assert_allclose(alone[0], features[2], atol=1e-5)


def test_pictures_and_captions_share_a_space(trained: Path) -> None:
    joint = JointEmbedding.load(FeaturesConfig(), trained, torch.device("cpu"))
    images = joint.encode_images(random_pictures(5, size=32))
    captions = joint.encode_captions(["a red square", "a blue circle"])
    assert images.shape == (5, captions.shape[1])
    lengths = np.linalg.norm(np.concatenate([images, captions]), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert not np.allclose(captions[0], captions[1])
    # It is the model that the features are of, not another one.
    model = load_open_clip("paris-tiny", str(trained), field="features.checkpoint").eval()
    pixels = preprocess(
        random_pictures(5, size=32), 32, model.visual.image_mean, model.visual.image_std
    )
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)
    np.testing.assert_allclose(images, expected.numpy(), atol=1e-5)


def test_pictures_of_another_size_are_resized(trained: Path) -> None:
    assert load_features(FEATURES, trained).encode(random_pictures(2, size=40)).shape == (2, 128)


def test_training_is_deterministic_whatever_the_global_state(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    train_features(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    weights = (trained / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == weights
    train_features(tmp_path / "other", seed=1)
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != weights


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features.model='ViT-nothing'"):
        train_open_clip(
            FeaturesConfig(model="ViT-nothing"),
            random_pictures(2),
            ["a", "b"],
            seed=0,
            output=Folder(tmp_path),
            on_progress=lambda progress: None,
        )


@pytest.mark.parametrize(
    ("checkpoint", "fragment"),
    [
        (None, "features.checkpoint is null"),
        ("absent.safetensors", "absent.safetensors' does not exist"),
        ("pickled.pt", "neither a folder, a .safetensors file"),
        ("some-tag", "nor a tag of 'paris-tiny'"),
        ("empty", f"lacks {CONFIG}, {WEIGHTS}"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str | None, fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled.pt").write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ConfigError, match=fragment):
        load_features(FeaturesConfig(checkpoint=checkpoint))


def test_a_folder_of_pickles_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((trained / CONFIG).read_bytes())
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ConfigError, match=f"' lacks {WEIGHTS}"):
        load_features(FeaturesConfig(checkpoint=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {"components": torch.ones(2, 48, dtype=torch.int64)},
            "'components' has dtype",
        ),
        (
            {"mean": torch.ones(16, 48).to(torch.float8_e4m3fn)},
            "'mean' has dtype",
        ),
        ({"scale": torch.tensor(float("nan"))}, "'scale' has values that are not finite"),
        ({"mean": torch.zeros(15, 48)}, r"shapes .*\(15, 48\)"),
        ({"mean": torch.zeros(16, 45), "components": torch.ones(2, 45)}, r"shapes .*\(16, 45\)"),
        ({"components": torch.ones(0, 48)}, r"shapes .*\(0, 48\)"),
    ],
)
def test_a_codec_that_could_not_decode_is_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor], fragment: str
) -> None:
    PatchPCA.fit(random_pictures(40), EVERYTHING).save(Folder(tmp_path))
    path = tmp_path / "codec.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | changes, path)
    with pytest.raises(BundleError, match=f"is not a patch_pca codec: .*{fragment}"):
        load_codec(VerifiedFolder(Folder(tmp_path), None))


def test_a_tokenizer_of_more_words_than_the_model_is_refused(
    tiny_parts: Path, tmp_path: Path
) -> None:
    """Also where no word has the id, but it is put before every text."""
    folder = shutil.copytree(tiny_parts / "text_encoder", tmp_path / "text_encoder")
    intact = (folder / "tokenizer.json").read_text()
    more_words, more_before = json.loads(intact), json.loads(intact)
    more_words["model"]["vocab"]["mouse"] = 12
    more_before["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [99]
    for document, largest in ((more_words, 12), (more_before, 99)):
        (folder / "tokenizer.json").write_text(json.dumps(document))
        with pytest.raises(BundleError, match=rf"has ids up to {largest}, .* has vocab_size=12"):
            MiniLM(folder)


@pytest.mark.parametrize("how", ["no unknown word", "panic", "endless pattern"])
def test_a_tokenizer_that_cannot_encode_is_refused(
    tiny_parts: Path, tmp_path: Path, how: str
) -> None:
    """Its library panics: of a token that a template lacks, or a pattern that finds no end."""
    folder = shutil.copytree(tiny_parts / "text_encoder", tmp_path / "text_encoder")
    document = json.loads((folder / "tokenizer.json").read_text())
    if how == "panic":
        del document["post_processor"]["special_tokens"]["[CLS]"]
    elif how == "endless pattern":
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        document["pre_tokenizer"] = split | {"pattern": {"Regex": "(a+)+$"}}
    else:
        del document["model"]["vocab"]["[UNK]"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"the tokenizer in .* is damaged"):
        MiniLM(folder).tokenize([f"{'a' * 40}!"])


@pytest.mark.parametrize(
    "kind", [MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
)
def test_what_is_no_fault_of_a_tokenizer_passes(kind: type[BaseException]) -> None:
    with pytest.raises(kind), tokenizing("tokenizer.json"):
        raise kind
