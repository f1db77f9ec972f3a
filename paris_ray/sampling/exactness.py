"""Does a sample get the same bits in any batch? Asked of the machine, since it decides.

`models.layers` computes every sample as rows of products whose sums do not depend on the number of
rows, as far as the library underneath keeps to that. This is tried before it is relied on, with
batches of several sizes up to the largest that is made. It is a trial and no proof.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from paris_ray.models import EncodedText, Expert, Router, TextConditioning
from paris_ray.models.lora import share
from paris_ray.seeding import torch_generator

MOST_TRIED = 16  # samples of a pass; those that rely on the answer make no larger ones
BATCH_SIZES = (2, 3, 5, 8, MOST_TRIED)
NUM_TOKENS = 4  # of the text that it is tried with

_found: dict[Hashable, bool] = {}  # weights do not matter, so models of one kind are tried once


def rows_are_independent(model: Expert | Router) -> bool:
    """Return whether a model computes the same bits of a sample alone and beside others.

    One block is tried, since all are alike; it has the sizes of products that the model has.

    Args:
        model: On its device, with its threads.
    """
    where = (model.pos_embed.device, model.pos_embed.dtype, torch.get_num_threads())
    kind = (type(model), model.config, *where)
    if kind not in _found:
        _found[kind] = _try(model)
    return _found[kind]


@torch.inference_mode()
def _try(model: Expert | Router) -> bool:
    shallow = share(model)
    shallow.layers = shallow.layers[:1]
    config, count = model.config, MOST_TRIED
    latents = _noise(count, config.in_channels, config.input_size, config.input_size)
    times = 1000 * torch.linspace(0, 1, count)
    text = _text(count, config.text_embed_dim)
    ask = _ask_expert if isinstance(shallow, Expert) else _ask_router
    device = model.pos_embed.device
    arguments = (shallow, latents.to(device), times.to(device), text.to(device))
    alone = torch.cat([ask(*arguments, slice(i, i + 1)) for i in range(count)])
    return all(torch.equal(ask(*arguments, slice(0, size)), alone[:size]) for size in BATCH_SIZES)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "rows are independent"))


def _text(count: int, width: int) -> TextConditioning:
    return TextConditioning(_noise(count, NUM_TOKENS, width), _noise(count, width))


def _ask_expert(
    expert: Any, latents: Tensor, times: Tensor, text: TextConditioning, rows: slice
) -> Tensor:
    chosen = text.rows(rows)
    # Captions are encoded alone, whatever the batch: see `TextCache`.
    encoded = [expert.encode_text(chosen.rows(slice(i, i + 1))) for i in range(len(chosen))]
    velocity: Tensor = expert(latents[rows], times[rows], EncodedText.concatenate(encoded))
    return velocity


def _ask_router(
    router: Any, latents: Tensor, times: Tensor, text: TextConditioning, rows: slice
) -> Tensor:
    pooled_text = text.pooled_text[rows] if router.config.text_embed_dim else None
    logits: Tensor = router(latents[rows], times[rows], pooled_text)
    return logits
