"""The autoencoder of Stable Diffusion, read from a `vae/` folder as diffusers writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from paris_ray.artifacts import VerifiedFolder
from paris_ray.encoders.folders import (
    CONFIG,
    MAX_BLOCKS,
    VAE_FILES,
    VAE_WEIGHTS,
    downsampling,
    require_package,
)
from paris_ray.encoders.hub import model_folder
from paris_ray.encoders.pixels import to_uint8, to_unit_range
from paris_ray.encoders.pretrained import check_sizes, load_strictly
from paris_ray.errors import BundleError
from paris_ray.folders import Folder

# Of Stable Diffusion 1 and 2; their older config.json does not state it (Rombach et al. 2022).
SCALING_FACTOR = 0.18215
LIMITS = {
    "layers_per_block": 8,
    "latent_channels": 64,
    "norm_num_groups": 256,
}
PICTURE_LIMITS = {"sample_size": 8192}
MAX_CHANNELS, MAX_SCALING_FACTOR = 2048, 1000
DECODE_BATCH = 4  # pictures; 64 of 256 x 256 pixels at once would need over 10 GB
# What the later autoencoders of other models changed, and this codec does not know.
EXPECTED = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# The attention of files that diffusers wrote before version 0.13, as in sd-vae-ft-mse.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class AutoencoderKLCodec:
    """diffusers' AutoencoderKL: the latents that Paris is trained on (4 x 32 x 32 of 256 x 256).

    Args:
        autoencoder: The diffusers model.
        image_size: Height and width of the pictures, in pixels.
        scaling_factor: What brings latents to a standard deviation of about 1.
    """

    def __init__(
        self, autoencoder: Any, image_size: int, scaling_factor: float = SCALING_FACTOR
    ) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.image_size, self.scaling_factor = image_size, scaling_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one picture's latents."""
        config = self.autoencoder.config
        size = self.image_size // downsampling(config.block_out_channels)
        return config.latent_channels, size, size

    @torch.no_grad()
    def encode(
        self, images: NDArray[np.uint8], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Return latents `(B, C, H, W)` of uint8 pictures `(B, S, S, 3)`, on the CPU.

        Args:
            images: The pictures.
            generators: One a picture, on the CPU, to draw from the posterior; None takes its mode.
        """
        pixels = rearrange(to_unit_range(images), "b h w c -> b c h w")
        posterior = self.autoencoder.encode(pixels.to(self.autoencoder.device)).latent_dist
        latents = posterior.mean.cpu()
        if generators is not None:
            noise = [torch.randn(latents.shape[1:], generator=g) for g in generators]
            latents = latents + posterior.std.cpu() * torch.stack(noise)
        return latents * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return uint8 pictures `(B, S, S, 3)` of latents `(B, C, H, W)`, a few at a time."""
        return np.concatenate([self._decode(part) for part in latents.split(DECODE_BATCH)])

    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        unscaled = latents.to(self.autoencoder.device, torch.float32) / self.scaling_factor
        pixels = self.autoencoder.decode(unscaled).sample
        return to_uint8(rearrange(pixels, "b c h w -> b h w c"))

    def to(self, device: torch.device) -> "AutoencoderKLCodec":
        """Move the autoencoder to a device."""
        self.autoencoder.to(device)
        return self

    @classmethod
    def load(cls, source: VerifiedFolder, image_size: int | None = None) -> "AutoencoderKLCodec":
        """Return the codec in a `vae/` folder, in float32 whatever is stored.

        Weights that are stored so stay mapped on a CPU, like those of experts.

        Args:
            source: Holds VAE_FILES.
            image_size: Height and width of the pictures; None takes the model's `sample_size`.

        Raises:
            BundleError: if the files are not an autoencoder of Stable Diffusion, or diffusers is
                not installed.
            ArtifactError: if one is missing or not the published one.
        """
        where = source.folder.uri
        require_package("diffusers", where)
        # Imported here: whoever has another codec needs no diffusers, and its import is slow.
        from diffusers import AutoencoderKL

        document = source.read_json(CONFIG)
        architecture = _checked(document, f"{where}/{CONFIG}")
        if image_size is None:
            check_sizes(document, PICTURE_LIMITS, f"{where}/{CONFIG}")
        size = document["sample_size"] if image_size is None else image_size
        factor = downsampling(architecture["block_out_channels"])
        if size % factor:
            raise BundleError(
                f"{where}: pictures of {size} pixels, allowed: a multiple of {factor}"
            )
        with torch.device("meta"):
            autoencoder: Any = AutoencoderKL(**architecture)
        load_strictly(autoencoder, _read_weights(source), f"{where}/{VAE_WEIGHTS}")
        return cls(autoencoder, size, document.get("scaling_factor", SCALING_FACTOR))


def _checked(document: Any, where: str) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL; raises BundleError if one is not allowed."""
    if not isinstance(document, dict):
        raise BundleError(f"{where} does not hold a mapping")
    check_sizes(document, LIMITS, where)
    channels = _checked_channels(document, where)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    for key, value in (EXPECTED | blocks).items():
        if document.get(key, value) != value:
            raise BundleError(f"{where}: {key}={document[key]!r}, allowed: {value!r}")
    scaling_factor = document.get("scaling_factor", SCALING_FACTOR)
    is_number = type(scaling_factor) in (int, float)  # a bool is none
    if not is_number or not 0 < scaling_factor <= MAX_SCALING_FACTOR:
        allowed = f"above 0, at most {MAX_SCALING_FACTOR}"
        raise BundleError(f"{where}: scaling_factor={scaling_factor!r}, allowed: {allowed}")
    return {**blocks, "block_out_channels": channels, **{key: document[key] for key in LIMITS}}


def _checked_channels(document: Mapping[str, Any], where: str) -> list[int]:
    channels, groups = document.get("block_out_channels"), document["norm_num_groups"]
    if not isinstance(channels, list) or not 1 <= len(channels) <= MAX_BLOCKS:
        raise BundleError(
            f"{where}: block_out_channels={channels!r}, allowed: 1 to {MAX_BLOCKS} numbers"
        )
    for width in channels:
        if not isinstance(width, int) or not 1 <= width <= MAX_CHANNELS or width % groups:
            raise BundleError(
                f"{where}: block_out_channels={channels!r}, allowed: multiples of "
                f"norm_num_groups={groups} up to {MAX_CHANNELS}"
            )
    return channels


def _read_weights(source: VerifiedFolder) -> dict[str, Tensor]:
    """Return the tensors in float32, under the names of today's diffusers."""
    try:
        stored = safetensors.torch.load_file(source.verified_file(VAE_WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{source.folder.uri}/{VAE_WEIGHTS} is damaged: {error}") from None
    return {_renamed(name): value.float() for name, value in stored.items()}


def _renamed(name: str) -> str:
    if ".attentions." not in name:
        return name
    return ".".join(OLD_NAMES.get(part, part) for part in name.split("."))


def copy_autoencoder_kl(name_or_path: str, target: Folder) -> None:
    """Copy VAE_FILES of a local folder or of a hub model such as stabilityai/sd-vae-ft-mse.

    Raises:
        ConfigError: if `codec.path` is neither, or a file cannot be had.
    """
    folder = model_folder(name_or_path, VAE_FILES, field="codec.path")
    for name in VAE_FILES:
        target.write(name, (folder / name).read_bytes())
