"""Low-rank adapters (LoRA) for the linear modules of an expert.

The weight of a targeted linear becomes `W + scale * B A`. An adapter is attached to a view of the
model, which shares every weight with it, or merged into a copy of the targeted weights.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), eq. 3; rank-stabilised scale (Kalajdzievski 2023,
arXiv 2312.03732).
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain, groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paris_ray.config import LoRAConfig
from paris_ray.config.lora import require
from paris_ray.models.layers import apply_linear
from paris_ray.seeding import torch_generator

Model = TypeVar("Model", bound=nn.Module)


class LowRankUpdate(nn.Module):
    """The trainable `scale * B A` of one linear.

    Args:
        a: `(r, in_features)`, float32.
        b: `(out_features, r)`, float32.
        scale: Multiplies the product.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale

    def weight(self) -> Tensor:
        """What is added to the linear's weight, `(out_features, in_features)`."""
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """`(..., in_features) -> (..., stop - start)`, in the precision of `x`."""
        narrow = self.scale * apply_linear(x, self.A.to(x.dtype))  # (..., r)
        return apply_linear(narrow, self.B[start:stop].to(x.dtype))


class _AdaptedLinear(nn.Linear):
    """A stand-in with the weight and bias of the linear that it replaces, which is left as it is.

    Also stands in for the fused projection of an attention, whose rows are applied separately.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        return self.rows(x, 0, None)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Return output features `start` to `stop` only: `(..., stop - start)`."""
        bias = None if self.bias is None else self.bias[start:stop]
        return apply_linear(x, self.weight[start:stop], bias)


class LoRALinear(_AdaptedLinear):
    """A linear with a low-rank update.

    Args:
        linear: The linear to replace.
        lora: The update.
    """

    def __init__(self, linear: nn.Linear, lora: LowRankUpdate) -> None:
        super().__init__(linear)
        self.lora = lora

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Return output features `start` to `stop` only: `(..., stop - start)`."""
        return super().rows(x, start, stop) + self.lora(x, start, stop)


class MixedLoRALinear(_AdaptedLinear):
    """A linear with the updates of several adapters, each for its own samples of a batch.

    Which those are, `adapted_samples` says around the call of the model.

    Args:
        linear: The linear to replace.
        loras: The update of each adapter that has one here, by the adapter's name.
    """

    def __init__(self, linear: nn.Linear, loras: Mapping[str, LowRankUpdate]) -> None:
        super().__init__(linear)
        self._loras = dict(loras)

    def ranks(self) -> dict[str, int]:
        """Return the rank of each adapter that has an update here."""
        return {name: len(update.A) for name, update in self._loras.items()}

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Return output features `start` to `stop` only: `(..., stop - start)`."""
        y = super().rows(x, start, stop)
        for name, samples in _RUNS.get():
            if name in self._loras:
                y[samples] += self._loras[name](x[samples], start, stop)
        return y


_RUNS: ContextVar[Sequence[tuple[str, slice]]] = ContextVar(
    "samples beside each other that share an adapter", default=()
)


@contextmanager
def adapted_samples(adapters: Iterable[str | None]) -> Iterator[None]:
    """Say which adapter of a model of `attach_all` each sample of the batch is for.

    Samples of an adapter that are beside each other are computed together.

    Args:
        adapters: The name of each one's adapter; None: it is drawn without one.
    """
    runs, start = [], 0
    for name, samples in groupby(adapters):
        stop = start + len(list(samples))
        if name is not None:
            runs.append((name, slice(start, stop)))
        start = stop
    token = _RUNS.set(runs)
    try:
        yield
    finally:
        _RUNS.reset(token)


class Adapter(nn.Module):
    """The low-rank updates of a model's linears: all that is trained and stored of a LoRA.

    Args:
        config: What it is.
        updates: The update of each targeted linear, by the name of the linear.
    """

    def __init__(self, config: LoRAConfig, updates: Mapping[str, LowRankUpdate]) -> None:
        super().__init__()
        self.config = config
        # The name of a child cannot have dots.
        self.targets: Any = nn.ModuleDict({k.replace(".", "/"): v for k, v in updates.items()})

    @classmethod
    def create(cls, model: nn.Module, config: LoRAConfig, seed: int) -> "Adapter":
        """Return a new adapter, which changes nothing yet: A is random, B zero.

        Args:
            model: The model to adapt; each update is put on the device of its linear.
            config: Rank, scale and targets.
            seed: Decides A; that of a linear does not depend on the other targets.

        Raises:
            ConfigError: if a target is no linear of the model, or the rank does not fit.
        """
        updates = {}
        for name, linear in find_targets(model, config).items():
            a = torch.empty(config.r, linear.in_features, dtype=torch.float32)
            b = torch.zeros(linear.out_features, config.r, dtype=torch.float32)
            generator = torch_generator(seed, f"lora {name}")
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            updates[name] = LowRankUpdate(a, b, config.scale).to(linear.weight.device)
        return cls(config, updates)

    def updates(self) -> dict[str, LowRankUpdate]:
        """Return the updates by the name of their linear."""
        return {name.replace("/", "."): update for name, update in self.targets.items()}


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    """Return the linears of a model that a configuration targets, by name.

    Raises:
        ConfigError: if an entry of `target_modules` fits no linear, or `r` exceeds a side of one.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    endings = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in linears}))
    targets = {}
    for entry in dict.fromkeys(config.target_modules):
        found = [name for name in linears if name == entry or name.endswith(f".{entry}")]
        require(bool(found), "target_modules", entry, f"names or endings of linears, as {endings}")
        targets.update({name: linears[name] for name in found})
    for name, linear in targets.items():
        most = min(linear.weight.shape)
        require(config.r <= most, "r", config.r, f"1 to {most} for {name}")
    return targets


def attach(model: Model, adapter: Adapter) -> Model:
    """Return a view of a model with an adapter at work.

    The view shares every parameter with the model and the adapter, and the model is left as it
    is: any number of adapters can be attached to one model at once.

    Args:
        model: The model that the adapter was created or loaded for, with none attached.
        adapter: The adapter.
    """
    view = share(model)
    for name, linear, update in _pairs(view, adapter):
        view.set_submodule(name, LoRALinear(linear, update))
    return view


def attach_all(model: Model, adapters: Mapping[str, Adapter]) -> Model:
    """Return a view of a model as `attach` does, with several adapters for different samples.

    Args:
        model: The model that the adapters were created or loaded for, with none attached.
        adapters: The adapters, by a name for `adapted_samples`.
    """
    view = share(model)
    linears: dict[str, nn.Linear] = {}
    loras: dict[str, dict[str, LowRankUpdate]] = {}
    for adapter_name, adapter in adapters.items():
        for name, linear, update in _pairs(model, adapter):
            linears[name] = linear
            loras.setdefault(name, {})[adapter_name] = update
    for name, updates in loras.items():
        view.set_submodule(name, MixedLoRALinear(linears[name], updates))
    return view


def updates_of(model: nn.Module) -> dict[str, tuple[tuple[str, int], ...]]:
    """Return which linears each adapter of a model of `attach_all` updates, and by what rank."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MixedLoRALinear):
            for adapter, rank in module.ranks().items():
                found.setdefault(adapter, []).append((name, rank))
    return {adapter: tuple(updates) for adapter, updates in found.items()}


@torch.no_grad()
def merge(model: Model, adapter: Adapter) -> Model:
    """Return a model whose targeted weights are `W + scale * B A`; it shares all others.

    The sum is computed in float32 and stored in the dtype of `W`.

    Args:
        model: The model that the adapter was created or loaded for, with none attached.
        adapter: The adapter.
    """
    merged = share(model)
    for _, linear, update in _pairs(merged, adapter):
        weight = linear.weight
        total = (weight.float() + update.weight()).to(weight.dtype)
        linear.weight = nn.Parameter(total, requires_grad=weight.requires_grad)
    return merged


def share(model: Model) -> Model:
    """Return new modules around the very parameters and buffers of a model."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _pairs(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Linear, LowRankUpdate]]:
    for name, update in adapter.updates().items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        if isinstance(linear, _AdaptedLinear):
            raise ValueError(f"{name} has an adapter already")
        if linear.weight.shape != (size := (len(update.B), update.A.shape[1])):
            raise ValueError(f"{name} has shape {tuple(linear.weight.shape)}, its adapter {size}")
        yield name, linear, update
