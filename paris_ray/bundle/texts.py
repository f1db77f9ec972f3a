"""What a bundle's text encoder makes of prompts: together where that changes no byte, and once."""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock

import numpy as np
import torch

from paris_ray.encoders.text import TextEncoder
from paris_ray.exactness import MOST_TRIED, texts_are_independent
from paris_ray.models import TextConditioning

MAX_PROMPTS = 128  # whose encoding is kept: 30 MB of CLIP's

logger = logging.getLogger("paris_ray")


class Texts:
    """Encodes prompts; each gets what it gets alone, whatever it comes with. The last are kept.

    Prompts are encoded with those that are padded to as many tokens. Where a machine does not
    compute the rows of such a batch independently, they are encoded one by one.

    Args:
        encoder: The encoder, on its device.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: OrderedDict[str, TextConditioning] = OrderedDict()
        self._lock = Lock()
        self._tried: dict[tuple[int, int], bool] = {}  # by length and number of threads

    def encode(self, prompts: Sequence[str], *, exact: bool = True) -> TextConditioning:
        """Return the conditioning of some prompts, on the CPU.

        Args:
            prompts: The prompts.
            exact: False gives up equal bytes where they cost batches.
        """
        texts = self._find(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in texts]
        texts |= zip(new, self._encode(new, exact), strict=True)
        self._remember(texts)
        return TextConditioning.concatenate([texts[prompt] for prompt in prompts])

    def try_out(self) -> None:
        """Find out now what this machine can do, rather than when texts wait for it."""
        for length in self._encoder.lengths:
            self._are_independent(length)

    def _encode(self, prompts: Sequence[str], exact: bool) -> list[TextConditioning]:
        if not prompts:
            return []
        rows = list(self._encoder.tokenize(prompts))
        encoded: dict[int, TextConditioning] = {}
        for length in sorted({len(row) for row in rows}):
            alike = [i for i, row in enumerate(rows) if len(row) == length]
            together = len(alike) == 1 or not exact or self._are_independent(length)
            most = MOST_TRIED if together else 1
            for start in range(0, len(alike), most):
                some = alike[start : start + most]
                text = self._encoder.encode_tokens(np.stack([rows[i] for i in some])).to("cpu")
                encoded |= zip(some, _apart(text), strict=True)
        return [encoded[i] for i in range(len(rows))]

    def _are_independent(self, length: int) -> bool:
        key = (length, torch.get_num_threads())
        if key not in self._tried:
            self._tried[key] = texts_are_independent(self._encoder, length)
            if not self._tried[key]:
                logger.warning(
                    "On this machine the last bits of a text of %d tokens depend on its batch: "
                    "such texts are encoded one by one.",
                    length,
                )
        return self._tried[key]

    def _find(self, prompts: Iterable[str]) -> dict[str, TextConditioning]:
        with self._lock:
            found = {prompt: self._known[prompt] for prompt in prompts if prompt in self._known}
            for prompt in found:
                self._known.move_to_end(prompt)
        return found

    def _remember(self, texts: dict[str, TextConditioning]) -> None:
        with self._lock:
            self._known |= texts
            while len(self._known) > MAX_PROMPTS:
                self._known.popitem(last=False)


def _apart(text: TextConditioning) -> list[TextConditioning]:
    """Return each row, by itself in memory: one that is kept must not keep its batch."""
    return [text.rows(torch.tensor([i])) for i in range(len(text))]
