"""What an adapter is tried on: its base, and examples on which losses are compared.

An expert of a bundle with captioned pictures, or a language model with texts. A subject is small
and may be sent to another process; what is loaded of it stays where it was loaded.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_ray.artifacts import sha256_hex
from paris_ray.bundle import load_bundle
from paris_ray.config import CorpusConfig
from paris_ray.corpora import DecodedRow, decode_row, open_corpus
from paris_ray.errors import ConfigError, ProtocolError
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.models import Expert
from paris_ray.zklora import language
from paris_ray.zklora.manifest import Base

MAX_EXAMPLES = 64
MAX_TEXT_BYTES = 2**24  # of a file of texts
LEVELS = (0.3, 0.7)  # of noise, at which losses of pictures are compared
SEED = 0  # of the first picture's noise: all models that are compared see the same

logger = logging.getLogger("paris_ray")


@dataclass(frozen=True, eq=False, slots=True)
class Scorer:
    """A loaded base with its examples.

    Attributes:
        model: The base.
        losses: Of the base, or a view of it, on the example of a number: `(levels, 1)` float32 on
            the CPU, each above zero.
        largest: Number of an example that takes as many rows of a module as any.
    """

    model: nn.Module
    losses: Callable[[Any, int], Tensor]
    largest: int


class Subject(ABC):
    """A base, and the examples on which its adapters are tried."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """How many there are; perhaps none."""

    @property
    @abstractmethod
    def levels(self) -> tuple[str, ...]:
        """What each loss of an example is called."""

    @property
    @abstractmethod
    def example(self) -> str:
        """What an example is, in an error."""

    @abstractmethod
    def base(self) -> Base:
        """Return what the manifest of an adapter must name; raises ParisError if there is none."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """Return what is tried, as JSON values: two subjects that differ in it are others."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """Return the base without memory for its weights: names and sizes of its modules."""

    @abstractmethod
    def load(self, device: str) -> Scorer:
        """Return the base with its examples; raises ParisError if they do not fit."""

    def check(self, wanted: Base) -> None:
        """Raise ProtocolError unless this is the base that an adapter is for."""
        if self.base() != wanted:
            what = "model" if wanted.expert is None else f"expert {wanted.expert}, or router,"
            raise ProtocolError(f"base: the adapter is for another {what} than yours")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PictureSubject(Subject):
    """An expert of a bundle, and captioned pictures.

    Attributes:
        bundle: Where it is.
        expert: Its number; None: that of an adapter which is for no expert.
        pictures: `(n, S, S, 3)` uint8.
        captions: One a picture.
        noise: Levels in [0, 1], at which losses are compared.

    Raises:
        ConfigError: if a level is not within [0, 1].
        ProtocolError: if the bundle has no such expert.
    """

    bundle: str
    expert: int | None
    pictures: NDArray[np.uint8] | None = None
    captions: Sequence[str] = ()
    noise: Sequence[float] = LEVELS

    def __post_init__(self) -> None:
        for level in self.noise:
            if not 0 <= level <= 1:
                raise ConfigError(f"levels={level} is not allowed: noise levels between 0 and 1")

    @property
    def num_examples(self) -> int:
        """Number of pictures."""
        return len(self.captions)

    @property
    def levels(self) -> tuple[str, ...]:
        """Each noise level."""
        return tuple(f"noise {level}" for level in self.noise)

    @property
    def example(self) -> str:
        """A picture, at all levels."""
        return f"a picture at {len(self.noise)} noise levels"

    def base(self) -> Base:
        """Return the expert's digest and the router's."""
        bundle = load_bundle(self.bundle)
        expert = self._number(bundle.num_experts)
        digest = bundle.weights_digest(f"expert_{expert}")
        router_digest = bundle.weights_digest("router")
        return Base(digest=digest, expert=expert, router_digest=router_digest)

    def _number(self, found: int) -> int:
        if self.expert is None or not 0 <= self.expert < found:
            raise ProtocolError(f"base.expert={self.expert} is not allowed: the bundle has {found}")
        return self.expert

    def plan(self) -> dict[str, Any]:
        """Return pictures, captions and levels."""
        pictures = b"" if self.pictures is None else self.pictures.tobytes()
        digest, captions = sha256_hex(pictures), list(self.captions)
        return {"pictures": digest, "captions": captions, "levels": list(self.noise)}

    def skeleton(self) -> nn.Module:
        """Return the expert on the meta device."""
        configs = load_bundle(self.bundle).expert_configs
        with torch.device("meta"):
            return Expert(configs[self._number(len(configs))])

    def load(self, device: str) -> Scorer:
        """Return the expert, each picture with a noise of its own, at all levels in one batch."""
        bundle, pictures = load_bundle(self.bundle, device=device), self.pictures
        expert = bundle.expert(self._number(bundle.num_experts))
        assert pictures is not None
        latents, text = bundle.codec.encode(pictures), bundle.encode_text(self.captions)

        def losses(model: Any, number: int) -> Tensor:
            one = slice(number, number + 1)
            return denoising_losses(
                model, latents[one], text.rows(one), self.noise, seed=SEED + number
            )

        return Scorer(expert, losses, 0)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class TextSubject(Subject):
    """A causal language model, and texts.

    Attributes:
        folder: Its own, as transformers writes it, with safetensors and `tokenizer.json`.
        texts: Each is an example.
    """

    folder: Path
    texts: Sequence[str] = ()
    levels: ClassVar[tuple[str, ...]] = ("nats a token",)  # the mean over a text's
    example: ClassVar[str] = "the longest text"

    @property
    def num_examples(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def base(self) -> Base:
        """Return the digest of the weights."""
        return language.base_of_model(self.folder)

    def plan(self) -> dict[str, Any]:
        """Return the texts."""
        return {"texts": list(self.texts)}

    def skeleton(self) -> nn.Module:
        """Return the model on the meta device."""
        return language.skeleton(self.folder)

    def load(self, device: str) -> Scorer:
        """Return the model; a text is one pass, and a token a row of every module."""
        ids = language.tokenise(self.folder, self.texts)
        model = language.load_model(self.folder, device)
        language.check_lengths(model, ids)

        def losses(view: Any, number: int) -> Tensor:
            return language.token_loss(view, ids[number], device)

        return Scorer(model, losses, max(range(len(ids)), key=lambda number: len(ids[number])))


def read_pictures(path: str, bundle: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return the first pictures of a folder, as the bundle's experts see them, and captions.

    The folder has a `metadata.jsonl`. Rows that are bad are counted and left out.

    Returns:
        `(n, S, S, 3)` pictures and n captions.

    Raises:
        ConfigError: if there is no usable picture.
        CorpusError: if it is no such folder.
    """
    size = load_bundle(bundle).facts.picture_size
    config = CorpusConfig(kind="image_folder", path=path, image_size=size)
    corpus = open_corpus(config)
    pictures: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    bad = 0
    for shard in corpus.shards():
        for raw in corpus.read(shard):
            row = decode_row(raw, config)
            if not isinstance(row, DecodedRow):
                bad += 1
            elif len(pictures) < MAX_EXAMPLES:
                pictures.append(row.image)
                captions.append(row.caption)
    if bad:
        logger.warning("pictures: %d of %s are unusable and left out", bad, path)
    if not pictures:
        raise ConfigError(f"pictures={path!r} has no usable picture")
    return np.stack(pictures), tuple(captions)


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the first lines of a file in UTF-8 that are not empty: each is a text.

    Raises:
        ConfigError: if it cannot be read, is too large, or has none.
    """
    try:
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise ConfigError(f"texts={path} has {size} bytes, allowed: {MAX_TEXT_BYTES}")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"texts={path} cannot be read: {error}") from None
    texts = tuple(line.strip() for line in lines if line.strip())[:MAX_EXAMPLES]
    if not texts:
        raise ConfigError(f"texts={path} has no text: one a line is expected")
    return texts
