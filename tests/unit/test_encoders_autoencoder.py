"""diffusers' AutoencoderKL as a codec; small, real, with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

from paris_ray.artifacts import VerifiedFolder
from paris_ray.encoders.autoencoder import (
    DECODE_BATCH,
    AutoencoderKLCodec,
    copy_autoencoder_kl,
)
from paris_ray.encoders.codec import load_codec
from paris_ray.encoders.folders import CONFIG, VAE_WEIGHTS
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.seeding import torch_generator

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        sample_size=64,
    ).eval()


@pytest.fixture(scope="module")
def published(model: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def vae(published: Path, tmp_path: Path) -> Path:
    """A copy of the published folder that a test may damage."""
    copy_autoencoder_kl(str(published), Folder(tmp_path / "vae"))
    return tmp_path / "vae"


def load(folder: Path, image_size: int | None = 32) -> AutoencoderKLCodec:
    codec = load_codec(VerifiedFolder(Folder(folder), None), image_size)
    assert isinstance(codec, AutoencoderKLCodec)
    return codec


def change_config(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(document))


def test_latents_are_the_scaled_mode_of_diffusers(model: AutoencoderKL, published: Path) -> None:
    codec = load(published)
    latents = codec.encode(PICTURES)
    pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = 0.18215 * model.encode(pixels).latent_dist.mode()
    assert latents.shape == (3, *codec.latent_shape) == (3, 4, 8, 8)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)


def test_pictures_are_decoded_from_unscaled_latents(model: AutoencoderKL, published: Path) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = load(published).decode(latents)
    with torch.no_grad():
        expected = model.decode(latents / 0.18215).sample.permute(0, 2, 3, 1)
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == np.uint8
    assert len(np.unique(pictures)) > 9
    difference = pictures - ((expected + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(difference).max() <= 0.51


def test_a_draw_from_the_posterior_is_a_matter_of_its_generators(
    model: AutoencoderKL, published: Path
) -> None:
    codec = load(published)

    def draw(*rows: int) -> torch.Tensor:
        generators = [torch_generator(0, "posterior", row) for row in rows]
        return codec.encode(PICTURES[list(rows)], generators)

    drawn, mode = draw(0, 1, 2), codec.encode(PICTURES)
    torch.testing.assert_close(drawn[[1]], draw(1), rtol=1e-5, atol=1e-6)
    assert (drawn - mode).abs().min(dim=0).values.max() > 1e-3
    pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        std = model.encode(pixels).latent_dist.std
    noise = torch.randn(4, 8, 8, generator=torch_generator(0, "posterior", 2))
    torch.testing.assert_close((drawn - mode)[2], 0.18215 * std[2] * noise, rtol=1e-3, atol=1e-5)


def test_the_autoencoder_moves(published: Path) -> None:
    codec = load(published).to(torch.device("meta"))
    assert codec.autoencoder.device.type == "meta"


def test_the_scaling_factor_is_the_published_one(vae: Path) -> None:
    ours = load(vae).encode(PICTURES)
    change_config(vae, scaling_factor=0.5)
    torch.testing.assert_close(load(vae).encode(PICTURES), ours * 0.5 / 0.18215)
    document = json.loads((vae / CONFIG).read_text())
    del document["scaling_factor"]  # as in sd-vae-ft-mse
    (vae / CONFIG).write_text(json.dumps(document))
    assert torch.equal(load(vae).encode(PICTURES), ours)
    change_config(vae, scaling_factor=1)  # JSON has one kind of numbers
    torch.testing.assert_close(load(vae).encode(PICTURES), ours / 0.18215)


def test_the_picture_size_decides_the_shape_of_latents(vae: Path) -> None:
    assert load(vae, 256).latent_shape == (4, 64, 64)
    assert load(vae, None).latent_shape == (4, 16, 16)
    with pytest.raises(BundleError, match="pictures of 30 pixels, allowed: a multiple of 4"):
        load(vae, 30)
    change_config(vae, sample_size=None)
    assert load(vae, 256).latent_shape == (4, 64, 64)
    with pytest.raises(BundleError, match="sample_size=None, allowed: 1 to"):
        load(vae, None)


def test_weights_are_mapped(vae: Path) -> None:
    codec = load(vae)
    assert str(vae / VAE_WEIGHTS) in Path("/proc/self/maps").read_text()
    assert codec.autoencoder.decoder.conv_in.weight.isfinite().all()


def test_many_pictures_are_decoded_a_few_at_a_time(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, sizes = load(published), []
    latents = torch.randn(2 * DECODE_BATCH + 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = np.concatenate([codec.decode(latents[i : i + 1]) for i in range(len(latents))])
    decode = codec.autoencoder.decode

    def counted(part: torch.Tensor) -> Any:
        sizes.append(len(part))
        return decode(part)

    monkeypatch.setattr(codec.autoencoder, "decode", counted)
    difference = codec.decode(latents).astype(int) - expected
    assert sizes == [DECODE_BATCH, DECODE_BATCH, 1]
    assert np.abs(difference).max() <= 1  # the last bit may round otherwise in a batch


def test_attention_under_its_old_names_is_read(published: Path, vae: Path) -> None:
    """sd-vae-ft-mse was written before diffusers renamed it."""
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = safetensors.torch.load_file(vae / VAE_WEIGHTS)
    for new, old in old_names.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert sum("proj_attn" in name for name in state) == 4
    safetensors.torch.save_file(state, vae / VAE_WEIGHTS)
    assert torch.equal(load(vae).encode(PICTURES), load(published).encode(PICTURES))


def test_half_precision_weights_are_computed_in_float32(vae: Path) -> None:
    state = safetensors.torch.load_file(vae / VAE_WEIGHTS)
    safetensors.torch.save_file({n: v.half() for n, v in state.items()}, vae / VAE_WEIGHTS)
    latents = load(vae).encode(PICTURES)
    assert latents.dtype == torch.float32
    assert load(vae).decode(latents.half()).shape == PICTURES.shape


@pytest.mark.parametrize("change", ["missing", "left over", "misshapen", "damaged"])
def test_weights_that_do_not_fit_are_refused(vae: Path, change: str) -> None:
    state = safetensors.torch.load_file(vae / VAE_WEIGHTS)
    weight = state["decoder.conv_in.weight"]
    if change == "missing":
        del state["decoder.conv_in.weight"]
    elif change == "left over":
        state["surplus"] = weight.clone()
    else:
        state["decoder.conv_in.weight"] = weight[:1].clone()
    safetensors.torch.save_file(state, vae / VAE_WEIGHTS)
    if change == "damaged":
        (vae / VAE_WEIGHTS).write_bytes((vae / VAE_WEIGHTS).read_bytes()[:-9])
    with pytest.raises(BundleError, match=f"{VAE_WEIGHTS} (does not fit|is damaged)"):
        load(vae)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"latent_channels": 10**9}, "latent_channels=1000000000, allowed: 1 to"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ({"norm_num_groups": 0}, "norm_num_groups=0"),
        ({"block_out_channels": [8, 10**9]}, "block_out_channels=.8, 1000000000., allowed: mult"),
        ({"block_out_channels": [8, 9]}, "multiples of norm_num_groups=4"),
        ({"block_out_channels": [8] * 99}, "allowed: 1 to 8 numbers"),
        ({"block_out_channels": "8"}, "block_out_channels='8'"),
        ({"down_block_types": ["os.system"] * 3}, "down_block_types=.'os.system'"),
        ({"in_channels": 10**9}, "in_channels=1000000000, allowed: 3"),
        ({"act_fn": "mish"}, "act_fn='mish', allowed: 'silu'"),
        ({"shift_factor": 0.1}, "shift_factor=0.1, allowed: None"),
        ({"use_quant_conv": False}, "use_quant_conv=False, allowed: True"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0, allowed: above 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor=nan"),
        ({"scaling_factor": "0.2"}, "scaling_factor='0.2'"),
        ({"scaling_factor": True}, "scaling_factor=True"),
        ({"scaling_factor": 10**400}, "scaling_factor=1000"),
        ({"_class_name": "AutoencoderTiny"}, "kind='AutoencoderTiny', expected"),
        ({"latent_channels": 8}, "does not fit"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    vae: Path, changes: dict[str, Any], fragment: str
) -> None:
    change_config(vae, **changes)
    with pytest.raises(BundleError, match=fragment):
        load(vae)


@pytest.mark.parametrize("document", ["[]", '"AutoencoderKL"', "null"])
def test_configurations_without_fields_are_refused(vae: Path, document: str) -> None:
    (vae / CONFIG).write_text(document)
    with pytest.raises(BundleError, match="kind=None, expected"):
        load(vae)


@pytest.mark.parametrize("name", [CONFIG, VAE_WEIGHTS])
def test_a_missing_file_is_named(vae: Path, tmp_path: Path, name: str) -> None:
    (vae / name).unlink()
    with pytest.raises(ConfigError, match=f"codec.path='{vae}' lacks {name}"):
        copy_autoencoder_kl(str(vae), Folder(tmp_path / "other"))
    with pytest.raises(ArtifactError, match=f"{name} does not exist"):
        load(vae)


def test_pickled_weights_do_not_count(vae: Path) -> None:
    (vae / VAE_WEIGHTS).rename(vae / "diffusion_pytorch_model.bin")
    with pytest.raises(ArtifactError, match=f"{VAE_WEIGHTS} does not exist"):
        load(vae)
