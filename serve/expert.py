"""One expert behind a handle: a stateless function from noisy latents to velocities.

Tensors travel as contiguous numpy arrays by value. Texts travel once: later calls name them by
digest, and a replica that does not know one says so.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from grpc.aio import AioRpcError
from numpy.typing import NDArray
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from paris_ray.models import TextConditioning
from paris_ray.sampling.calls import ExpertCall
from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.local import LocalModels
from serve import metrics
from serve.coalescing import Coalescer
from serve.drawing import ExpertUnavailableError, OtherVersionError
from serve.measuring import compute
from serve.opening import open_bundle
from serve.source import BundleSource

Floats = NDArray[np.float32]
MAX_TEXTS = 256  # that a replica keeps, and that a client takes for known


class TextArrays(NamedTuple):
    """The text of one caption on its way between processes.

    Attributes:
        text_embeddings: `(1, L, D)`.
        pooled_text: `(1, D)`.
        text_mask: `(1, L)`, or None.
    """

    text_embeddings: Floats
    pooled_text: Floats
    text_mask: NDArray[np.bool_] | None

    @classmethod
    def pack(cls, text: TextConditioning) -> "TextArrays":
        """Return the arrays of a conditioning of one caption."""
        mask = None if text.text_mask is None else text.text_mask.numpy()
        return cls(to_array(text.text_embeddings), to_array(text.pooled_text), mask)

    def unpack(self) -> TextConditioning:
        """Return the conditioning of the arrays."""
        mask = None if self.text_mask is None else torch.tensor(self.text_mask)
        embeddings, pooled = torch.tensor(self.text_embeddings), torch.tensor(self.pooled_text)
        return TextConditioning(embeddings, pooled, mask)


class Question(NamedTuple):
    """Calls of one expert on their way between processes, one picture each.

    Attributes:
        latents: `(B, C, H, W)`.
        t: `(B,)` float64: what a Python number is.
        guidance_scale: `(B,)` float64.
        version: `BundleSource.version` of the expert that is asked.
        texts: The digest of each one's text.
        null_texts: The digest of the text that guidance subtracts, or None.
        loras: The name of each one's adapter, or None.
        new_texts: Texts that the replica may not know, by digest.
    """

    latents: Floats
    t: NDArray[np.float64]
    guidance_scale: NDArray[np.float64]
    version: str
    texts: tuple[bytes, ...]
    null_texts: tuple[bytes | None, ...]
    loras: tuple[str | None, ...]
    new_texts: dict[bytes, TextArrays]


class MissingTexts(NamedTuple):
    """What a replica answers that does not know some texts."""

    keys: tuple[bytes, ...]


def to_array(tensor: torch.Tensor) -> Floats:
    """Return a tensor as contiguous float32."""
    array: Floats = tensor.float().contiguous().numpy()
    return array


class ExpertServer:
    """A deployment that holds one expert; any replica can answer any call.

    Everything that has come while it computed is computed together, whoever asked.

    Args:
        source: Where the bundle is; only this expert and its adapters are read.
        index: Which expert.
        threads: Torch threads of this process.
        max_rows: Samples of one forward pass, however many Samplers ask.
    """

    def __init__(self, source: BundleSource, index: int, *, threads: int, max_rows: int) -> None:
        torch.set_num_threads(threads)
        self._index, self._bundle, self._version = index, open_bundle(source), source.version
        self._models = LocalModels(self._bundle, exact=source.exact)
        self._texts: OrderedDict[bytes, TextConditioning] = OrderedDict()
        self._asked = Coalescer(self._answer, size=_num_rows, most=max_rows)
        self._load()

    def _load(self) -> None:
        """Load now what calls will need."""
        self._models.most_rows(self._index)
        for name in self._bundle.loras:
            self._bundle.expert(self._index, name)

    async def velocity(self, question: Question) -> Floats | MissingTexts:
        """Return the guided velocities `(B, C, H, W)` of the calls, or which texts to send along.

        Raises:
            OtherVersionError: if the question is for an expert of another bundle.
        """
        if question.version != self._version:
            raise OtherVersionError(f"expert {self._index} is of another version")
        named = {*question.texts, *(key for key in question.null_texts if key is not None)}
        self._learn(question.new_texts, named)
        missing = tuple(key for key in named if key not in self._texts)
        if missing:
            return MissingTexts(missing)
        with metrics.CALLS.time(model=str(self._index), part="served"):
            return to_array(torch.cat(await self._asked.ask(self._calls(question))))

    def check_health(self) -> None:
        """Raise if the device has failed: CUDA errors stick, so the process must be replaced."""
        torch.ones((), device=self._bundle.device).item()

    def _learn(self, texts: dict[bytes, TextArrays], named: Collection[bytes]) -> None:
        for key, arrays in texts.items():
            self._texts[key] = arrays.unpack()
        for key in self._texts.keys() & named:  # they are not what makes room for the others
            self._texts.move_to_end(key)
        while len(self._texts) > max(MAX_TEXTS, len(named)):
            self._texts.popitem(last=False)

    def _calls(self, question: Question) -> list[ExpertCall]:
        latents = torch.tensor(question.latents)
        return [
            ExpertCall(
                expert=self._index,
                lora=question.loras[i],
                latents=latents[i : i + 1],
                t=float(question.t[i]),
                text=self._keyed(question.texts[i]),
                null_text=None if null is None else self._keyed(null),
                guidance_scale=float(question.guidance_scale[i]),
            )
            for i, null in enumerate(question.null_texts)
        ]

    def _keyed(self, key: bytes) -> KeyedText:
        return KeyedText(self._texts[key], (key,))

    async def _answer(self, asked: list[list[ExpertCall]]) -> list[list[Tensor]]:
        """Answer the calls of some questions together."""
        calls = [call for calls in asked for call in calls]
        answers = iter(await asyncio.to_thread(compute, self._models.answer, calls))
        return [[next(answers) for _ in calls] for calls in asked]


class ExpertClient:
    """Asks one expert through its handle.

    Args:
        handle: The deployment's.
        version: Of the expert that is meant.
    """

    def __init__(self, handle: DeploymentHandle[Any], version: str) -> None:
        self._version = version
        # By value over gRPC: by reference, arrays of a batch would go through the object store.
        self._handle = handle.options(_by_reference=False)
        self._known: OrderedDict[bytes, None] = OrderedDict()  # texts that were sent

    async def ask(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Return the velocity `(1, C, H, W)` of each call, which is about one picture.

        Raises:
            RayActorError: if the replica died meanwhile.
            ExpertUnavailableError: if it is being replaced.
            OtherVersionError: if it has been replaced, by one of another bundle.
        """
        texts = {key: text.text for text in _texts(calls) for key in text.keys}
        new = {key: text for key, text in texts.items() if key not in self._known}
        answer = await self._send(_question(calls, new, self._version))
        if isinstance(answer, MissingTexts):  # a replica that has not seen them, or forgot
            missing = {key: texts[key] for key in answer.keys}
            answer = await self._send(_question(calls, missing, self._version))
        if isinstance(answer, MissingTexts):  # another replica than before
            answer = await self._send(_question(calls, texts, self._version))
        assert not isinstance(answer, MissingTexts), "all texts were sent"
        self._remember(texts)
        return list(torch.tensor(answer).split(1))

    async def _send(self, question: Question) -> Floats | MissingTexts:
        try:
            answer: Floats | MissingTexts = await self._handle.velocity.remote(question)
        except (AioRpcError, DeploymentUnavailableError) as error:
            # What Ray lets through of a replica that is shutting down.
            raise ExpertUnavailableError("a replica is being replaced") from error
        return answer

    def _remember(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > MAX_TEXTS:
            self._known.popitem(last=False)


def _num_rows(calls: Sequence[ExpertCall]) -> int:
    return sum(call.num_rows for call in calls)


def _texts(calls: Sequence[ExpertCall]) -> list[KeyedText]:
    nulls = (call.null_text for call in calls if call.null_text is not None)
    return [*(call.text for call in calls), *nulls]


def _question(
    calls: Sequence[ExpertCall], texts: dict[bytes, TextConditioning], version: str
) -> Question:
    return Question(
        latents=to_array(torch.cat([call.latents for call in calls])),
        t=np.array([call.t for call in calls]),
        guidance_scale=np.array([call.guidance_scale for call in calls]),
        version=version,
        texts=tuple(call.text.keys[0] for call in calls),
        null_texts=tuple(None if c.null_text is None else c.null_text.keys[0] for c in calls),
        loras=tuple(call.lora for call in calls),
        new_texts={key: TextArrays.pack(text) for key, text in texts.items()},
    )
