"""Codecs between pictures and latents."""

from typing import Protocol

import numpy as np
import safetensors.torch
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from paris_ray.artifacts import Folder, VerifiedFolder
from paris_ray.config import CodecConfig
from paris_ray.errors import BundleError, CorpusError

WEIGHTS = "codec.safetensors"
CONFIG = "config.json"


class Codec(Protocol):
    """Whatever turns pictures `(B, S, S, 3)` uint8 into latents `(B, C, H, W)` and back."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one picture's latents."""
        ...

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Return latents `(B, C, H, W)`, float32, standard deviation about 1."""
        ...

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return pictures `(B, S, S, 3)`, rounded and clipped to 0..255."""
        ...


def to_unit_range(images: NDArray[np.uint8]) -> Tensor:
    """Map uint8 `(B, S, S, 3)` to float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Map floats in [-1, 1] to uint8."""
    scaled = ((pixels + 1) * 127.5).round().clamp(0, 255)
    array: NDArray[np.uint8] = scaled.to(torch.uint8).cpu().numpy()
    return array


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

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Return latents `(B, C, H, W)` of uint8 pictures `(B, S, S, 3)`."""
        centred = _to_patches(to_unit_range(images), self.patch_size) - self.mean
        coefficients = centred @ self.components.T / self.scale
        return rearrange(coefficients, "b (h w) c -> b c h w", h=self.grid).contiguous()

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return uint8 pictures `(B, S, S, 3)` of latents `(B, C, H, W)`."""
        coefficients = rearrange(latents.float().cpu(), "b c h w -> b (h w) c")
        patches = coefficients * self.scale @ self.components + self.mean
        pixels = rearrange(
            patches,
            "b (h w) (p q c) -> b (h p) (w q) c",
            h=self.grid,
            p=self.patch_size,
            q=self.patch_size,
        )
        return to_uint8(pixels)

    def save(self, folder: Folder) -> None:
        """Write weights and configuration."""
        tensors = {"mean": self.mean, "components": self.components, "scale": self.scale}
        folder.write(WEIGHTS, safetensors.torch.save(tensors))
        folder.write_json(CONFIG, {"kind": "patch_pca", "patch_size": self.patch_size})


def _to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    return rearrange(pixels, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def load_codec(source: VerifiedFolder) -> Codec:
    """Return the codec saved in a folder.

    Raises:
        BundleError: if its kind is unknown or tensors are missing.
        ArtifactError: if files are missing or not the published ones.
    """
    where = source.folder.uri
    document = source.read_json(CONFIG)
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind != "patch_pca":
        raise BundleError(f"{where}/{CONFIG}: kind={kind!r}, expected 'patch_pca'")
    try:
        tensors = safetensors.torch.load(source.read(WEIGHTS))
        mean, components, scale = (tensors[name] for name in ("mean", "components", "scale"))
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{where}/{WEIGHTS} is not a patch_pca codec: {error}") from None
    if mean.dim() != 2 or components.shape[1:] != mean.shape[1:] or scale.dim() != 0:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise BundleError(f"{where}/{WEIGHTS} is not a patch_pca codec: shapes {shapes}")
    return PatchPCA(mean, components, scale)
