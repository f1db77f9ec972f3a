"""A bundle's router and experts in this process: batches of calls in, answers out."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from paris_ray.bundle import Bundle
from paris_ray.devices import memory_bytes
from paris_ray.diffusion import router_logits
from paris_ray.exactness import MOST_TRIED, rows_are_independent
from paris_ray.models import EncodedText, Expert, Router, TextConditioning
from paris_ray.models.lora import adapted_samples
from paris_ray.sampling.calls import ROUTER, Call, ExpertCall, RouterCall
from paris_ray.sampling.guidance import MAX_CACHE_BYTES, KeyedText, TextCache, guided_velocity

logger = logging.getLogger("paris_ray")


class LocalModels:
    """Answers calls with a bundle's models in this process, from any thread.

    Args:
        bundle: Its models load when they are first asked.
        exact: What a sample gets must not depend on the batch that it is in. Where a machine does
            not compute rows of a batch independently, samples are computed one by one.
    """

    def __init__(self, bundle: Bundle, *, exact: bool = True) -> None:
        self._bundle, self._exact = bundle, exact
        # One an expert. All together have a quarter of the device's memory at most.
        share = memory_bytes(bundle.device) // (4 * bundle.num_models)
        self._texts = [TextCache(min(share, MAX_CACHE_BYTES)) for _ in range(bundle.num_models)]
        self._most_rows: dict[int, int] = {}  # of a pass, by model
        # An expert in use cannot leave the device: only one at a time, if there is little room.
        self._turn: AbstractContextManager[Any] = Lock() if bundle.offload else nullcontext()

    def answer_all(self, calls: Sequence[Call]) -> list[Tensor]:
        """Answer calls of any models, the loaded experts first, so that none loads twice."""
        models = dict.fromkeys(call.model for call in calls)
        answers: dict[int, Tensor] = {}
        for model in sorted(models, key=lambda model: not self._bundle.holds(model)):
            asked = [i for i, call in enumerate(calls) if call.model == model]
            answers |= zip(asked, self.answer([calls[i] for i in asked]), strict=True)
        return [answers[i] for i in range(len(calls))]

    @torch.inference_mode()
    def answer(self, calls: Sequence[Call]) -> list[Tensor]:
        """Answer calls of one model, in as few forward passes as `most_rows` and adapters allow.

        Returns:
            `(b, K)` router logits or `(b, C, H, W)` velocities of each call.
        """
        if len({call.model for call in calls}) != 1:
            raise ValueError("a batch is for one model")
        most = self.most_rows(calls[0].model)
        if sum(call.num_rows for call in calls) <= most:
            return self._ask(calls)
        rows = [call.row(i) for call in calls for i in range(len(call.latents))]
        answers = [answer for part in _passes(rows, most) for answer in self._ask(part)]
        return _split(torch.cat(answers), calls)

    def most_rows(self, model: int) -> int:
        """Return how many samples of a model are computed together; loads it.

        If bytes must not depend on the batch, as many as that was tried with: one where they do.
        """
        if model not in self._most_rows:
            with self._turn:
                tried = self._bundle.router if model == ROUTER else self._bundle.mixed_expert(model)
                self._most_rows[model] = self._try(tried)
        return self._most_rows[model]

    def _try(self, model: Expert | Router) -> int:
        if not self._exact:
            return sys.maxsize
        if rows_are_independent(model):
            return MOST_TRIED
        logger.warning(
            "On this machine the last bits of a sample depend on its batch: samples are computed "
            "one by one. exact=false gives up equal bytes, and is faster."
        )
        return 1

    def _ask(self, calls: Sequence[Call]) -> list[Tensor]:
        router_calls = [call for call in calls if isinstance(call, RouterCall)]
        if router_calls:
            return self._ask_router(router_calls)
        answers: dict[int, Tensor] = {}
        expert_calls = [call for call in calls if isinstance(call, ExpertCall)]
        for lora in dict.fromkeys(map(self._apart, expert_calls)):
            batch = [i for i, call in enumerate(expert_calls) if self._apart(call) == lora]
            batch.sort(key=lambda i: expert_calls[i].lora or "")  # each adapter's beside each other
            given = self._ask_expert([expert_calls[i] for i in batch], lora)
            answers |= zip(batch, given, strict=True)
        return [answers[i] for i in range(len(calls))]

    def _apart(self, call: ExpertCall) -> str | None:
        """Return the adapter of a call if it cannot share a forward pass with others."""
        return None if self._bundle.mixes(call.lora) else call.lora

    def _ask_router(self, calls: list[RouterCall]) -> list[Tensor]:
        router = self._bundle.router
        device = router.pos_embed.device
        latents = torch.cat([call.latents for call in calls])
        text = TextConditioning.concatenate([call.text.text for call in calls])
        logits = router_logits(
            router, latents.to(device), _times(calls).to(device), text.to(device)
        )
        return _split(logits.to(latents.device), calls)

    def _ask_expert(self, calls: list[ExpertCall], lora: str | None) -> list[Tensor]:
        with self._turn:
            index = calls[0].expert
            expert = self._bundle.expert(index, lora) if lora else self._bundle.mixed_expert(index)
            rows = _Rows(calls)
            with adapted_samples(rows.loras):
                velocity = guided_velocity(
                    expert,
                    torch.cat([call.latents for call in calls]),
                    _times(calls),
                    self._encode([(call.lora, call.text) for call in calls], index),
                    self._encode(rows.null_texts, index) if rows.null_texts else None,
                    rows.scales,
                    rows.guided,
                )
        return _split(velocity, calls)

    def _encode(self, texts: list[tuple[str | None, KeyedText]], index: int) -> EncodedText:
        """Encode each text with its own adapter, once: a row's keys and values are its own."""
        return EncodedText.concatenate(
            [
                self._texts[index].encode(self._bundle.expert(index, lora), text, owner=lora)
                for lora, text in texts
            ]
        )


class _Rows:
    """Which rows of a forward pass, guided ones twice, have which scale, null text and adapter."""

    def __init__(self, calls: list[ExpertCall]) -> None:
        owners = list(chain.from_iterable([call] * len(call.latents) for call in calls))
        guided = [i for i, call in enumerate(owners) if call.null_text is not None]
        self.loras = [call.lora for call in (*owners, *(owners[i] for i in guided))]
        self.guided = torch.tensor(guided, dtype=torch.long)
        self.scales = torch.tensor([call.guidance_scale for call in owners])
        self.null_texts = [
            (call.lora, call.null_text)
            for call in (owners[i] for i in guided)
            if call.null_text is not None
        ]


def _passes(calls: Sequence[Call], most_rows: int) -> Iterator[list[Call]]:
    """Yield the calls in groups of at most so many rows; a call of more is alone."""
    group: list[Call] = []
    for call in calls:
        if group and sum(one.num_rows for one in (*group, call)) > most_rows:
            yield group
            group = []
        group.append(call)
    if group:
        yield group


def _times(calls: Sequence[Call]) -> Tensor:
    return torch.tensor([call.t for call in calls for _ in range(len(call.latents))])


def _split(answers: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    return list(answers.split([len(call.latents) for call in calls]))
