"""Weights of experts and routers: checked by their header alone, then mapped rather than read."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import Dtype, ExpertConfig, RouterConfig
from paris_ray.errors import BundleError
from paris_ray.model_folder.description import read_config
from paris_ray.models import Expert, Router
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED_DTYPES = ("F32", "BF16", "F16")  # as safetensors calls them

Model = TypeVar("Model", Expert, Router)


# Configuration and file of the weights of each.
KINDS: Mapping[type, tuple[type[Any], str]] = {
    Expert: (ExpertConfig, EXPERT_WEIGHTS),
    Router: (RouterConfig, ROUTER_WEIGHTS),
}


class StoredTensor(NamedTuple):
    """A tensor as the header of a file describes it."""

    shape: tuple[int, ...]
    dtype: str


class StoredModel(Generic[Model]):
    """An expert or a router in a folder.

    Args:
        model_class: `Expert` or `Router`.
        part: The folder.
        defaults: Values of fields that its `config.json` does not tell.
    """

    def __init__(
        self,
        model_class: type[Model],
        part: VerifiedFolder,
        *,
        defaults: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._model_class: type[Model] = model_class
        self._config_class, self._weights = KINDS[model_class]
        self._part, self._defaults = part, defaults
        self._where = f"{part.folder.uri}/{self._weights}"

    @cached_property
    def config(self) -> Any:
        """Its architecture, checked before anything is allocated for it.

        Raises:
            BundleError: naming the field that is missing or not allowed.
        """
        return read_config(self._config_class, self._part, self._defaults)

    def num_parameters(self) -> int:
        """Return how many parameters the architecture has."""
        return sum(math.prod(shape) for shape in self._expected.values())

    def check_header(self, dtype: torch.dtype | None) -> None:
        """Compare the header of the weights with the architecture; no tensor is read.

        Only for a local folder, before its digests are verified.

        Raises:
            BundleError: naming the tensor that does not fit.
        """
        self._check_header(self._part.folder.local_path / self._weights, dtype)

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> Model:
        """Return the model, in evaluation mode and frozen.

        On a CPU and in the stored data type its parameters are the file, mapped.

        Args:
            device: Where to.
            dtype: Data type of the parameters; None keeps the stored one.

        Raises:
            BundleError: if the weights do not fit the architecture.
            ArtifactError: if the file is not the published one.
        """
        self._check_header(self._file, dtype)
        state = safetensors.torch.load_file(self._file)
        with torch.device("meta"):
            model = self._model_class(self.config)
        placed = {name: value.to(device, dtype or value.dtype) for name, value in state.items()}
        model.load_state_dict(placed, assign=True)
        return model.eval().requires_grad_(False)

    @cached_property
    def _expected(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor of the architecture, from a model on the meta device."""
        with torch.device("meta"):
            model = self._model_class(self.config)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    @cached_property
    def _file(self) -> Path:
        """The weights, verified once however often they are loaded."""
        return self._part.verified_file(self._weights)

    def _check_header(self, file: Path, dtype: torch.dtype | None) -> None:
        stored, expected = read_header(file, self._where), self._expected
        for name in sorted(expected.keys() | stored.keys()):
            shape = stored[name].shape if name in stored else "missing"
            if shape != expected.get(name):
                raise BundleError(
                    f"{self._where}: tensor {name!r} has shape {shape}, "
                    f"its {MODEL_CONFIG} means {expected.get(name, 'none')}"
                )
        self._check_dtypes(stored, dtype)

    def _check_dtypes(self, stored: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> None:
        first = next(iter(stored))
        for name, (_, found) in stored.items():
            if found not in STORED_DTYPES:
                allowed = ", ".join(STORED_DTYPES)
                raise BundleError(f"{self._where}: tensor {name!r} is {found}, allowed: {allowed}")
            if dtype is None and found != stored[first].dtype:
                raise BundleError(
                    f"{self._where}: tensor {name!r} is {found}, but {first!r} is "
                    f"{stored[first].dtype}: load the bundle with a dtype"
                )


def read_header(file: Path, where: str) -> dict[str, StoredTensor]:
    """Return what a safetensors file says that it holds; no tensor is read.

    Raises:
        BundleError: naming `where`, if the header is none or the file is not as long as it says.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(tuple(tensor.get_shape()), tensor.get_dtype())
                for name, tensor in tensors.items()
            }
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{where} is damaged: {error}") from None
