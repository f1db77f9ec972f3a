"""LAION's aesthetic scores: linear layers over CLIP's image embedding, about 1 to 10.

Two layouts of weights are read, as safetensors:

    weight, bias                          aesthetic-predictor: one layer
    layers.N.weight, layers.N.bias        improved-aesthetic-predictor: five of them, without
                                          activations; between them it has dropout, which is off

Both take unit-length embeddings: of ViT-L/14 (768) the second, the first of the model it names.
Source: github.com/LAION-AI/aesthetic-predictor and christophschuhmann/improved-aesthetic-predictor.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paris_ray.encoders.pretrained import read_weights
from paris_ray.errors import BundleError, ConfigError

_FIELD = "corpus.filters.aesthetic_model"
_WEIGHT = re.compile(r"(?:layers\.(\d+)\.)?weight")

Layer = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight (out, in) and bias (out,)


class AestheticHead:
    """Rates image embeddings.

    Args:
        layers: In their order; the last has one output.
        where: What to call them in an error.
    """

    def __init__(self, layers: Sequence[Layer], where: str) -> None:
        self.layers, self.where = layers, where

    @classmethod
    def load(cls, path: str) -> "AestheticHead":
        """Return the head in a safetensors file.

        Raises:
            ConfigError: if there is no such file.
            BundleError: if it holds something else.
        """
        if not Path(path).is_file():
            raise ConfigError(f"{_FIELD}={path!r} does not exist; put the file there")
        state = {name: value.float().numpy() for name, value in read_weights(Path(path)).items()}
        numbers = {int(m[1] or 0): name for name in state if (m := _WEIGHT.fullmatch(name))}
        names = [numbers[number] for number in sorted(numbers)]
        biases = [name.removesuffix("weight") + "bias" for name in names]
        if not names or {*names, *biases} != state.keys():
            raise BundleError(f"{path} has {sorted(state)[:6]}, not weight, bias or layers.N.*")
        layers = [(state[name], state[bias]) for name, bias in zip(names, biases, strict=True)]
        _check_shapes(layers, path)
        return cls(layers, path)

    def __call__(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the ratings `(B,)` of unit-length embeddings `(B, J)`.

        Raises:
            BundleError: if they have another width than the head was made for.
        """
        width = self.layers[0][0].shape[1]
        if embeddings.shape[1] != width:
            raise BundleError(
                f"{self.where} rates embeddings of {width} numbers, corpus.filters.clip makes "
                f"{embeddings.shape[1]}"
            )
        for weight, bias in self.layers:
            embeddings = embeddings @ weight.T + bias
        return embeddings[:, 0]


def _check_shapes(layers: Sequence[Layer], where: str) -> None:
    are_layers = all(w.ndim == 2 and b.shape == w.shape[:1] for w, b in layers)
    if are_layers and len(layers[-1][1]) == 1:
        follow = all(len(before[1]) == w.shape[1] for before, (w, _) in pairwise(layers))
        if follow:
            return
    shapes = [weight.shape for weight, _ in layers]
    raise BundleError(f"{where} has weights of shapes {shapes}, no layers that end in one number")
