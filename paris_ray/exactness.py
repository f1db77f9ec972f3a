"""Does a sample get the same bits in any batch? Asked of the machine, since it decides.

`models.layers` computes every sample as rows of products whose sums do not depend on the number of
rows, as far as the library underneath keeps to that; text encoders, which are others' models, get
captions padded to such a number of rows. This is tried before it is relied on, with batches of
several sizes up to the largest that is made: of experts with and without each kind of adapter, of
text encoders for each length of captions.

Activations are tried apart. Torch computes most of a tensor in vectors, but by itself what is left
over of each thread's part, and so gives equal numbers unequal results; where that happens depends
on the size of the batch. It is a trial and no proof.
"""

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_ray.encoders.text import TextEncoder
from paris_ray.models import EncodedText, Expert, Router, TextConditioning
from paris_ray.models.lora import adapted_samples, share, updates_of
from paris_ray.seeding import torch_generator
from paris_ray.trials import outcome

MOST_TRIED = 16  # samples of a pass; those that rely on the answer make no larger ones
BATCH_SIZES = (2, 3, 5, 8, MOST_TRIED)
NUM_TOKENS = 77  # of the text that it is tried with
NUMBERS = torch.linspace(-6, 6, 1001)  # some of which vectors and single numbers disagree on
VECTOR = 64  # more than are computed at a time
ACTIVATIONS = "transformers.activations"  # where text encoders have theirs from
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # a token each, to the encoders that there are

_found: dict[Hashable, bool] = {}  # weights do not matter, so models of one kind are tried once


def rows_are_independent(model: Expert | Router) -> bool:
    """Return whether a model computes the same bits of a sample alone and beside others.

    One block is tried of those that are alike; it has the sizes of products that the model has.

    Args:
        model: On its device, with its threads; with adapters, by `models.lora.attach_all`.
    """
    where = (model.pos_embed.device, model.pos_embed.dtype, torch.get_num_threads())
    kind = (type(model), model.config, *sorted(set(updates_of(model).values())), *where)
    if kind not in _found:
        _found[kind] = outcome(repr(kind), lambda: _try(model))
    return _found[kind]


@torch.inference_mode()
def _try(model: Expert | Router) -> bool:
    shallow = share(model)
    shallow.layers = _unlike(shallow.layers)
    samples = _Samples(shallow)
    with _watched_activations(shallow) as activations:
        together = samples.ask(slice(0, MOST_TRIED))
    if not all(_is_alike(*activation) for activation in activations):
        return False
    alone = samples.each()
    fewer = (samples.ask(slice(0, n)) for n in BATCH_SIZES if n < MOST_TRIED)
    if not all(torch.equal(batch, alone[: len(batch)]) for batch in (together, *fewer)):
        return False
    unlike_adapters = {updates: name for name, updates in updates_of(shallow).items()}
    return all(_try_adapter(samples, name, alone) for name in unlike_adapters.values())


def _unlike(layers: nn.ModuleList) -> nn.ModuleList:
    """Return the first of the layers, and of those that have other adapters than it."""
    unlike = {tuple(updates_of(layer).items()): layer for layer in reversed(layers)}
    return nn.ModuleList(reversed(unlike.values()))


def _try_adapter(samples: "_Samples", name: str, plain: Tensor) -> bool:
    """Return whether a batch of which a part has an adapter gives each sample what it gets alone.

    Args:
        samples: What to ask.
        name: The adapter.
        plain: What each sample gets without it.
    """
    adapted = samples.each(name)
    return all(
        torch.equal(
            samples.ask(slice(0, MOST_TRIED), name, size), torch.cat([adapted[:size], plain[size:]])
        )
        for size in (1, *BATCH_SIZES)
    )


class _Samples:
    """Samples that a model is asked about.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        config, count, device = model.config, MOST_TRIED, model.pos_embed.device
        self._model = model
        size = config.input_size
        self._latents = _noise(count, config.in_channels, size, size).to(device)
        self._times = 1000 * torch.linspace(0, 1, count, device=device)
        lengths = 1 + torch.arange(count) * NUM_TOKENS // count
        width = config.text_embed_dim
        text = TextConditioning(
            _noise(count, NUM_TOKENS, width),
            _noise(count, width),
            torch.arange(NUM_TOKENS) < lengths[:, None],
        )
        self._text = text.to(device)

    def each(self, adapter: str | None = None) -> Tensor:
        """Return what each sample gets alone."""
        return torch.cat([self.ask(slice(i, i + 1), adapter, 1) for i in range(MOST_TRIED)])

    def ask(self, rows: slice, adapter: str | None = None, num_adapted: int = 0) -> Tensor:
        """Return what some samples get together, the first of them with an adapter."""
        if not isinstance(self._model, Expert):
            pooled = self._text.pooled_text[rows] if self._model.config.text_embed_dim else None
            return self._model(self._latents[rows], self._times[rows], pooled)
        chosen = self._text.rows(rows)
        # Captions are encoded alone, whatever the batch: see `TextCache`.
        encoded = [
            self._model.encode_text(chosen.rows(slice(i, i + 1))) for i in range(len(chosen))
        ]
        adapters = [adapter if i < num_adapted else None for i in range(len(chosen))]
        with adapted_samples(adapters):
            text = EncodedText.concatenate(encoded)
            return self._model(self._latents[rows], self._times[rows], text)


def texts_are_independent(encoder: TextEncoder, length: int) -> bool:
    """Return whether an encoder computes the same bits of a caption alone and beside others.

    One layer is tried, since all are alike.

    Args:
        encoder: On its device, with its threads.
        length: Tokens that the captions are padded to: one of its `lengths`.
    """
    model = encoder.model
    where = sorted({f"{weight.device} {weight.dtype}" for weight in model.parameters()})
    what = (type(encoder), model, getattr(model, "config", None), length)
    kind = repr((*what, where, torch.get_num_threads()))
    return outcome(kind, lambda: _try_texts(encoder, length))


@torch.inference_mode()
def _try_texts(encoder: TextEncoder, length: int) -> bool:
    rows = _rows_of_letters(encoder, length)
    if not rows:  # it makes something else of letters, so nothing is known of it
        return False
    # Evenly spread from the longest, which has no padding.
    tokens = np.stack([rows[-1 - i * len(rows) // MOST_TRIED] for i in range(MOST_TRIED)])
    shallow = _shallow(encoder)
    with _watched_activations(shallow.model) as activations:
        shallow.encode_tokens(tokens)
    if not all(_is_alike(*activation) for activation in activations):
        return False
    alone = [shallow.encode_tokens(row[None]) for row in tokens]
    return all(
        _are_equal(shallow.encode_tokens(tokens[:n]), TextConditioning.concatenate(alone[:n]))
        for n in BATCH_SIZES
    )


def _rows_of_letters(encoder: TextEncoder, length: int) -> list[NDArray[Any]]:
    """Return the token ids of texts that are padded to a length, the shortest text first."""
    generator = torch_generator(0, "texts are independent")
    letters = torch.randint(len(LETTERS), (length + 1, length), generator=generator).tolist()
    texts = [" ".join(LETTERS[i] for i in row[:n]) for n, row in enumerate(letters)]
    return [row for row in encoder.tokenize(texts) if len(row) == length]


def _shallow(encoder: TextEncoder) -> TextEncoder:
    """Return an encoder of the first layer alone, around the same weights."""
    shallow = copy.copy(encoder)
    shallow.model = share(encoder.model)
    for part in list(shallow.model.modules()):
        if isinstance(part, nn.ModuleList):
            del part[1:]
    return shallow


def _are_equal(one: TextConditioning, other: TextConditioning) -> bool:
    return torch.equal(one.text_embeddings, other.text_embeddings) and torch.equal(
        one.pooled_text, other.pooled_text
    )


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "rows are independent"))


@contextmanager
def _watched_activations(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Note the activations that a model computes inside, and their inputs."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
        for module in model.modules()
        if isinstance(module, nn.GELU | nn.SiLU) or type(module).__module__ == ACTIVATIONS
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def _is_alike(activation: nn.Module, batch: Tensor) -> bool:
    """Return whether an activation gives equal numbers equal results in a batch of any size.

    Args:
        activation: The activation.
        batch: `(MOST_TRIED, ...)` of the kind that it is given.
    """
    numbers = NUMBERS.to(batch)
    in_vectors = activation(numbers.repeat_interleave(2 * VECTOR))[VECTOR :: 2 * VECTOR]
    alone = torch.cat([activation(number) for number in numbers.split(1)])
    disputed = numbers[in_vectors != alone]
    if not len(disputed):
        return True
    filled = torch.full_like(batch, float(disputed[0]))
    answers = (activation(filled[:size]) for size in range(1, len(batch) + 1))
    return all(bool((answer == answer.flatten()[0]).all()) for answer in answers)
