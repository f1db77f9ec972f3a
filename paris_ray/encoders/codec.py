"""Codecs between pictures and latents."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import safetensors.torch
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import CodecConfig
from paris_ray.encoders.autoencoder import AutoencoderKLCodec
from paris_ray.encoders.folders import CODEC_WEIGHTS, CONFIG
from paris_ray.encoders.pixels import to_uint8, to_unit_range
from paris_ray.errors import BundleError, CorpusError
from paris_ray.folders import Folder
from paris_ray.models.stored import check_stored

PCA_TENSORS = ("mean", "components", "scale")


class Codec(Protocol):
    """Whatever turns pictures `(B, S, S, 3)` uint8 into latents `(B, C, H, W)` and back."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one picture's latents."""
        ...

    def encode(
        self, images: NDArray[np.uint8], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Return latents `(B, C, H, W)`, float32, on the CPU, standard deviation about 1.

        Args:
            images: Pictures `(B, S, S, 3)`.
            generators: One a picture, to draw its latents from a codec's posterior; None takes
                the posterior's mode. A codec without a posterior has nothing to draw.
        """
        ...

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return pictures `(B, S, S, 3)`, rounded and clipped to 0..255."""
        ...

    def to(self, device: torch.device) -> "Codec":
        """Move the codec to a device."""
        ...


class PatchPCA:
    """A linear codec: principal components of picture patches; one latent pixel a patch.

    Every patch position has its own mean, all share the components, and one scalar brings latents
    to unit variance. It is fitted in under a second, and exactly invertible on its span.

    Args:
        mean: `(H * W, patch * patch * 3)` average patch of each position.
        components: `(C, patch * patch * 3)` orthonormal rows, strongest first.
        scale: Standard deviation of the raw coefficients.
    """

    def __init__(self, mean: Tensor, components: Tensor, scale: Tensor) -> None:
        self.mean, self.components, self.scale = mean, components, scale
        self.patch_size = int((mean.shape[1] // 3) ** 0.5)
        self.grid = int(mean.shape[0] ** 0.5)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one picture's latents."""
        return self.components.shape[0], self.grid, self.grid

    @classmethod
    def fit(cls, images: NDArray[np.uint8], config: CodecConfig) -> "PatchPCA":
        """Fit to pictures `(N, S, S, 3)` uint8; raises CorpusError if all are equal."""
        patches = _to_patches(to_unit_range(images), config.patch_size).double()
        mean = patches.mean(dim=0)
        centred = (patches - mean).flatten(0, 1)
        _, eigenvectors = torch.linalg.eigh(centred.T @ centred)
        components = eigenvectors.flip(1)[:, : config.num_components].T
        # The sign of an eigenvector is arbitrary; fix it so that refitting gives equal latents.
        largest = components.abs().argmax(dim=1, keepdim=True)
        components = components * components.gather(1, largest).sign()
        scale = (centred @ components.T).std()
        if scale == 0:
            raise CorpusError("all pictures of the corpus are equal: there is nothing to encode")
        return cls(mean.float(), components.float().contiguous(), scale.float())

    def encode(
        self, images: NDArray[np.uint8], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Return latents `(B, C, H, W)` of uint8 pictures `(B, S, S, 3)`; there is no posterior."""
        pixels = to_unit_range(images).to(self.mean.device)
        coefficients = (_to_patches(pixels, self.patch_size) - self.mean) @ self.components.T
        latents = rearrange(coefficients / self.scale, "b (h w) c -> b c h w", h=self.grid)
        return latents.contiguous().cpu()

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return uint8 pictures `(B, S, S, 3)` of latents `(B, C, H, W)`."""
        coefficients = rearrange(latents.float().to(self.mean.device), "b c h w -> b (h w) c")
        patches = coefficients * self.scale @ self.components + self.mean
        pixels = rearrange(
            patches,
            "b (h w) (p q c) -> b (h p) (w q) c",
            h=self.grid,
            p=self.patch_size,
            q=self.patch_size,
        )
        return to_uint8(pixels)

    def to(self, device: torch.device) -> "PatchPCA":
        """Move the codec to a device."""
        self.mean, self.components = self.mean.to(device), self.components.to(device)
        self.scale = self.scale.to(device)
        return self

    def save(self, folder: Folder) -> None:
        """Write weights and configuration."""
        tensors = {name: getattr(self, name) for name in PCA_TENSORS}
        folder.write(CODEC_WEIGHTS, safetensors.torch.save(tensors))
        folder.write_json(CONFIG, {"kind": "patch_pca", "patch_size": self.patch_size})


def _to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    return rearrange(pixels, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def load_codec(source: VerifiedFolder, image_size: int | None = None) -> Codec:
    """Return the codec in a folder: one of our own, or a `vae/` of diffusers.

    Args:
        source: The folder.
        image_size: Height and width of the pictures, which an AutoencoderKL is not bound to; None
            takes the size that it was published for.

    Raises:
        BundleError: if its kind is unknown or tensors are missing.
        ArtifactError: if files are missing or not the published ones.
    """
    where = source.folder.uri
    document = source.read_json(CONFIG)
    fields = document if isinstance(document, dict) else {}
    kind = fields.get("kind", fields.get("_class_name"))
    if kind == "AutoencoderKL":
        return AutoencoderKLCodec.load(source, image_size)
    if kind != "patch_pca":
        allowed = "expected 'patch_pca' or 'AutoencoderKL'"
        raise BundleError(f"{where}/{CONFIG}: kind={kind!r}, {allowed}")
    return _load_patch_pca(source)


def _load_patch_pca(source: VerifiedFolder) -> PatchPCA:
    where = f"{source.folder.uri}/{CODEC_WEIGHTS}"
    try:
        tensors = safetensors.torch.load(source.read(CODEC_WEIGHTS))
        mean, components, scale = (tensors[name] for name in PCA_TENSORS)
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{where} is not a patch_pca codec: {error}") from None
    for name in PCA_TENSORS:
        check_stored(f"{where} is not a patch_pca codec: tensor {name!r}", tensors[name])
    if not _fit(mean, components, scale):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise BundleError(f"{where} is not a patch_pca codec: shapes {shapes}")
    return PatchPCA(mean.float(), components.float(), scale.float())


def _fit(mean: Tensor, components: Tensor, scale: Tensor) -> bool:
    """Return whether these are of square patches, on a square grid, in three colours."""
    if mean.dim() != 2 or components.shape[1:] != mean.shape[1:] or scale.dim() != 0:
        return False
    positions, numbers = mean.shape
    squares = numbers % 3 == 0 and all(math.isqrt(n) ** 2 == n for n in (positions, numbers // 3))
    return squares and positions > 0 and numbers > 0 and len(components) > 0
