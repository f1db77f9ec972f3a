"""Image encoders: pictures in, unit-length features for clustering out."""

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch.nn import functional

from paris_ray.artifacts import Folder
from paris_ray.config import FeaturesConfig
from paris_ray.encoders.codec import to_unit_range
from paris_ray.errors import ConfigError

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = (CONFIG, WEIGHTS)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def register_packaged_models() -> None:
    """Make this package's open_clip architectures known to open_clip."""
    open_clip.add_model_config(str(resources.files("paris_ray.encoders") / "open_clip_configs"))


def preprocess(images: NDArray[np.uint8], image_size: int) -> torch.Tensor:
    """Return `(B, 3, image_size, image_size)` normalised as CLIP expects."""
    pixels = (to_unit_range(images).permute(0, 3, 1, 2) + 1) / 2
    if pixels.shape[-1] != image_size:
        pixels = functional.interpolate(
            pixels, size=(image_size, image_size), mode="bicubic", antialias=True
        )
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


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
        size = self.visual.image_size
        self.image_size = size[0] if isinstance(size, tuple) else int(size)

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit-length features `(B, D)` of pictures `(B, S, S, 3)` uint8."""
        pixels = preprocess(images, self.image_size)
        device = next(self.visual.parameters()).device
        features = functional.normalize(self.visual(pixels.to(device)), dim=-1)
        array: NDArray[np.float32] = features.float().cpu().numpy()
        return array

    def to(self, device: torch.device) -> "OpenClipFeatures":
        """Move the tower to a device."""
        self.visual.to(device)
        return self


def load_features(config: FeaturesConfig, trained: Path | None = None) -> OpenClipFeatures:
    """Load the image encoder; a model trained here and a published one take the same path.

    Args:
        config: `checkpoint` is a folder with `open_clip_config.json` and
            `open_clip_model.safetensors`, a `.safetensors` file of architecture `model`, or an
            open_clip tag such as `openai`.
        trained: The folder of a model trained on the corpus, used when `checkpoint` is null.

    Raises:
        ConfigError: if the checkpoint is absent or is not safetensors.
    """
    register_packaged_models()
    checkpoint = config.checkpoint if trained is None else str(trained)
    if checkpoint is None:
        raise ConfigError("features.checkpoint is null and no model was trained")
    path = Path(checkpoint)
    if path.is_dir():
        if not (path / WEIGHTS).is_file() or not (path / CONFIG).is_file():
            raise ConfigError(f"features.checkpoint={checkpoint!r} lacks {CONFIG} or {WEIGHTS}")
        return OpenClipFeatures(open_clip.create_model(f"local-dir:{path}"))
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if path.suffix != ".safetensors" and checkpoint not in tags:
        raise ConfigError(
            f"features.checkpoint={checkpoint!r} is neither a folder, a .safetensors file, nor "
            f"a tag of {config.model!r} (allowed: {', '.join(tags) or 'none'})"
        )
    if path.suffix == ".safetensors" and not path.is_file():
        raise ConfigError(f"features.checkpoint={checkpoint!r} does not exist; put the file there")
    return OpenClipFeatures(open_clip.create_model(config.model, pretrained=checkpoint))


def save_open_clip(model: Any, name: str, folder: Folder) -> None:
    """Write a trained open_clip model as the folder layout that `local-dir:` reads."""
    import safetensors.torch

    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    folder.write(WEIGHTS, safetensors.torch.save(state))
    folder.write_json(
        CONFIG,
        {
            "model_cfg": open_clip.get_model_config(name),
            "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD},
        },
    )
