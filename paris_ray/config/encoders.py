"""What turns captions and pictures into numbers."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """The Ray Data actors of one encoder."""

    num_actors: int = 1
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text encoder."""

    kind: Literal["minilm", "clip", "open_clip"] = "minilm"
    # minilm: a local folder; null: the packaged all-MiniLM-L6-v2. clip: a local folder or hub name
    # such as openai/clip-vit-large-patch14. open_clip: a tag such as openai, or a local path.
    path: str | None = None
    model: str = "ViT-L-14"  # open_clip architecture
    # minilm: states of the first so many tokens of a caption beside its sentence vector, for
    # cross-attention; 0: the vector alone, which cross-attention then takes for the only token
    token_states: int = 0
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """The image model whose features are clustered."""

    kind: Literal["open_clip", "timm"] = "open_clip"
    model: str = "paris-tiny"  # architecture; paris-tiny, for open_clip, ships with this package
    # A local folder or file, an open_clip tag or, for timm, a hub name; null: train on the corpus
    checkpoint: str | None = None
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-3
    max_images: int = 20_000  # the first valid images train the model and fit the codec
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """The codec between pictures and latents."""

    kind: Literal["patch_pca", "autoencoder_kl"] = "patch_pca"
    path: str | None = None  # autoencoder_kl: local folder or hub name (stabilityai/sd-vae-ft-mse)
    posterior: Literal["mode", "sample"] = "mode"  # autoencoder_kl: its mode, or one recorded draw
    patch_size: int = 8  # pixels a latent pixel
    num_components: int = 96  # latent channels
    pool: PoolConfig = field(default_factory=PoolConfig)
