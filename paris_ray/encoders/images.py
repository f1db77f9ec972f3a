"""Image encoders: pictures in, unit-length features for clustering out."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torch.nn import functional

from paris_ray.config import FeaturesConfig
from paris_ray.encoders.hub import model_folder
from paris_ray.encoders.pixels import to_unit_range
from paris_ray.encoders.pretrained import load_strictly, read_weights
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder, parse_json

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = (CONFIG, WEIGHTS)
TIMM_FILES = ("config.json", "model.safetensors")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# DINOv2 is trained on pictures of 224 and 518 pixels; 224 is what it is evaluated at (Oquab et al.
# 2023), and five times cheaper.
TIMM_IMAGE_SIZE = 224


def register_packaged_models() -> None:
    """Make this package's open_clip architectures known to open_clip."""
    open_clip.add_model_config(str(resources.files("paris_ray.encoders") / "open_clip_configs"))


class ImageFeatures(Protocol):
    """Whatever turns pictures into the features that are clustered."""

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit-length features `(B, D)` of pictures `(B, S, S, 3)` uint8."""
        ...

    def to(self, device: torch.device) -> "ImageFeatures":
        """Move the model to a device."""
        ...


def preprocess(
    images: NDArray[np.uint8],
    image_size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Return `(B, 3, image_size, image_size)`, normalised; by default as CLIP expects."""
    pixels = (to_unit_range(images).permute(0, 3, 1, 2) + 1) / 2
    if pixels.shape[-1] != image_size:
        pixels = functional.interpolate(
            pixels, size=(image_size, image_size), mode="bicubic", antialias=True
        )
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _preprocess_for(tower: Any, images: NDArray[np.uint8]) -> Tensor:
    """Return what an open_clip image tower expects of pictures."""
    size = tower.image_size[0] if isinstance(tower.image_size, tuple) else int(tower.image_size)
    return preprocess(images, size, tower.image_mean, tower.image_std)


def _unit_length(features: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = functional.normalize(features.float(), dim=-1).cpu().numpy()
    return array


class OpenClipFeatures:
    """The penultimate features of an open_clip image tower: before the joint projection.

    Args:
        model: Any open_clip model with a vision transformer.
    """

    def __init__(self, model: Any) -> None:
        self.visual = model.visual.eval()
        if getattr(self.visual, "proj", None) is None:
            raise ConfigError(
                f"features.model: {type(self.visual).__name__} has no projection to remove; "
                "use an open_clip model with a vision transformer"
            )
        self.visual.proj = None

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit-length features `(B, D)` of pictures `(B, S, S, 3)` uint8."""
        pixels = _preprocess_for(self.visual, images)
        device = next(self.visual.parameters()).device
        return _unit_length(self.visual(pixels.to(device)))

    def to(self, device: torch.device) -> "OpenClipFeatures":
        """Move the tower to a device."""
        self.visual.to(device)
        return self


class TimmFeatures:
    """The pooled features of a timm model: of DINOv2, the class token (1024-d at ViT-L/14).

    Args:
        model: A timm model without a classifier that takes pictures of TIMM_IMAGE_SIZE.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.preprocessing = resolve_model_data_config(model)

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit-length features `(B, D)` of pictures `(B, S, S, 3)` uint8."""
        mean, std = self.preprocessing["mean"], self.preprocessing["std"]
        pixels = preprocess(images, TIMM_IMAGE_SIZE, mean, std)
        device = next(self.model.parameters()).device
        return _unit_length(self.model(pixels.to(device)))

    def to(self, device: torch.device) -> "TimmFeatures":
        """Move the model to a device."""
        self.model.to(device)
        return self


def load_features(config: FeaturesConfig, trained: Path | None = None) -> ImageFeatures:
    """Load the image encoder; a model trained here and a published one take the same path.

    Args:
        config: `checkpoint` as in `load_open_clip` or `load_timm`, by `kind`.
        trained: The folder of a model trained on the corpus, used when `checkpoint` is null.

    Raises:
        ConfigError: if the checkpoint is absent or is not safetensors.
        BundleError: if its weights do not fit `model`.
    """
    checkpoint = _checkpoint(config, trained)
    if config.kind == "timm":
        return TimmFeatures(load_timm(config.model, checkpoint))
    return OpenClipFeatures(load_open_clip(config.model, checkpoint, field="features.checkpoint"))


def _checkpoint(config: FeaturesConfig, trained: Path | None) -> str:
    checkpoint = config.checkpoint if trained is None else str(trained)
    if checkpoint is None:
        raise ConfigError("features.checkpoint is null and no model was trained")
    return checkpoint


def load_open_clip(model: str, checkpoint: str, *, field: str) -> Any:
    """Return an open_clip model with its weights.

    Args:
        model: Architecture. A file of OpenAI's weights needs the one with QuickGELU, such as
            `ViT-L-14-quickgelu`; a tag and a folder know their activation.
        checkpoint: A folder with OPEN_CLIP_FILES, a `.safetensors` file of the architecture, or
            one of its open_clip tags, such as `openai`.
        field: The configuration field that gave the checkpoint, for errors.

    Raises:
        ConfigError: if the checkpoint is absent or is not safetensors.
        BundleError: if its weights do not fit the architecture.
    """
    register_packaged_models()
    if Path(checkpoint).is_dir():
        folder = model_folder(checkpoint, OPEN_CLIP_FILES, field=field)
        return _create_open_clip(f"local-dir:{folder}")
    if Path(checkpoint).suffix == ".safetensors":
        return _create_open_clip(model, pretrained=str(_existing(checkpoint, field)))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if checkpoint not in tags:
        raise ConfigError(
            f"{field}={checkpoint!r} is neither a folder, a .safetensors file, nor "
            f"a tag of {model!r} (allowed: {', '.join(tags) or 'none'})"
        )
    published = open_clip.get_pretrained_cfg(model, checkpoint)
    repository, _, _ = published["hf_hub"].rpartition("/")
    if not repository:
        raise ConfigError(f"{field}={checkpoint!r} is a tag without safetensors on the hub")
    folder = model_folder(repository, OPEN_CLIP_FILES, field=field)
    quick_gelu = published.get("quick_gelu", False)  # else open_clip only warns of the mismatch
    return _create_open_clip(f"local-dir:{folder}", force_quick_gelu=quick_gelu)


def _create_open_clip(name: str, **options: Any) -> Any:
    try:
        return open_clip.create_model(name, **options)
    except (RuntimeError, ValueError, SafetensorError) as error:
        where = options.get("pretrained", name)
        raise BundleError(f"{where} does not fit: {' '.join(str(error).split())[:500]}") from None


def load_timm(model: str, checkpoint: str) -> Any:
    """Return a timm model with its weights, without classifier.

    Args:
        model: Architecture, such as `vit_large_patch14_dinov2`.
        checkpoint: A `.safetensors` file, a folder in the hub's layout (TIMM_FILES), or a hub name
            such as `timm/vit_large_patch14_dinov2.lvd142m`.

    Raises:
        ConfigError: if the checkpoint is absent, or timm has no such vision transformer.
        BundleError: if its weights do not fit the architecture.
    """
    weights = _timm_weights(model, checkpoint)
    try:
        # Positions are interpolated: models come with those of their own picture size.
        network = timm.create_model(model, num_classes=0, dynamic_img_size=True)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"features.model={model!r} is not a vision transformer of timm: {error}"
        ) from None
    state = read_weights(weights)
    features = {name: value for name, value in state.items() if not name.startswith("head.")}
    load_strictly(network, features, str(weights))
    return network.float()


def _timm_weights(model: str, checkpoint: str) -> Path:
    field = "features.checkpoint"
    if Path(checkpoint).suffix == ".safetensors":
        return _existing(checkpoint, field)
    folder = model_folder(checkpoint, TIMM_FILES, field=field)
    config, weights = (folder / name for name in TIMM_FILES)
    document = parse_json(config.read_bytes(), str(config))
    architecture = document.get("architecture") if isinstance(document, dict) else None
    if architecture != model.partition(".")[0]:
        raise ConfigError(f"features.model={model!r}, but {config} says {architecture!r}")
    return weights


def _existing(checkpoint: str, field: str) -> Path:
    path = Path(checkpoint)
    if not path.is_file():
        raise ConfigError(f"{field}={checkpoint!r} does not exist; put the file there")
    return path


def save_open_clip(model: Any, name: str, folder: Folder) -> None:
    """Write a trained open_clip model as the folder layout that `local-dir:` reads."""
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    folder.write(WEIGHTS, safetensors.torch.save(state))
    folder.write_json(
        CONFIG,
        {
            "model_cfg": open_clip.get_model_config(name),
            "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD},
        },
    )


class JointEmbedding:
    """An open_clip model as a measure: pictures and captions in one space.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(
        cls, config: FeaturesConfig, trained: Path | None, device: torch.device
    ) -> "JointEmbedding":
        """Return the model of a configuration; arguments and errors as of `load_features`.

        Raises:
            ConfigError: if the checkpoint is absent or is not safetensors.
            BundleError: if its weights do not fit `model`.
        """
        checkpoint = _checkpoint(config, trained)
        return cls.from_checkpoint(
            config.model, checkpoint, field="features.checkpoint", device=device
        )

    @classmethod
    def from_checkpoint(
        cls, model: str, checkpoint: str, *, field: str, device: torch.device
    ) -> "JointEmbedding":
        """Return the model of a checkpoint; arguments and errors as of `load_open_clip`."""
        loaded = load_open_clip(model, checkpoint, field=field)
        return cls(loaded.to(device), open_clip.get_tokenizer(model))

    @torch.inference_mode()
    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit-length embeddings `(B, J)` of pictures `(B, S, S, 3)` uint8."""
        pixels = _preprocess_for(self.model.visual, images)
        return _unit_length(self.model.encode_image(pixels.to(self._device)))

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Return unit-length embeddings `(B, J)` of captions."""
        tokens = self.tokenizer(list(captions)).to(self._device)
        return _unit_length(self.model.encode_text(tokens))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
