"""Multi-party inference: a model whose low-rank updates are computed by somebody else.

Each adapted module keeps its own product with the weights, and asks for the update of its inputs
in exact integers. Any tree of torch modules will do: the experts, or a language model.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from paris_ray.errors import BundleError, ProtocolError, naming
from paris_ray.models.lora import share
from paris_ray.zklora.fixed_point import (
    Floats,
    Int16,
    Int64,
    QuantisedModule,
    dequantise,
    quantise_rows,
)
from paris_ray.zklora.manifest import ModuleTerms

# Above this, 16 bits are too few for small inputs: the relative error of an update may exceed 5e-4,
# or 1e-3 where the last bit of the inputs is drawn.
PEAK_TO_RMS = 16.0

# Mean square of what drawing the last bit changes, in units of it: each is another in half of the
# cases.
DRAWN_BIT = 0.5

Model = TypeVar("Model", bound=nn.Module)

Evaluate = Callable[[str, Int16, int], Int64]
"""Asked with the name of a module, its inputs `(rows, d_in)` and their exponent: the inputs are
the integers * 2^-exponent. Returns the integers `(rows, d_out)` of `x A B`."""

Terms = QuantisedModule | ModuleTerms
"""What says the dimensions and exponents of a module: its weights, or what is public of them."""


@dataclass(slots=True)
class ModuleNumerics:
    """What rounding to 16 bits meant for the inputs of one module.

    Attributes:
        peak_to_rms: Largest entry over root mean square, of the call where it was highest.
        input_error: Relative RMS error of the inputs that were answered, of the worst call.
    """

    peak_to_rms: float = 0.0
    input_error: float = 0.0


class NumericsLog:
    """What the receipt reports of the numbers, filled in by an adapted model.

    Args:
        last_bits_drawn: Whoever answers draws the last bit of every input, as the contributor of a
            session does: what is to be expected of that is part of the error.

    Attributes:
        modules: By the name of the module; those that were asked for nothing are missing.
    """

    def __init__(self, *, last_bits_drawn: bool = False) -> None:
        self._drawn = DRAWN_BIT if last_bits_drawn else 0.0
        self.modules: dict[str, ModuleNumerics] = {}

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return the log as JSON values."""
        return {name: asdict(seen) for name, seen in self.modules.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> "NumericsLog":
        """Return the log of which `to_json` gave these values."""
        log = cls()
        for name, seen in values.items():  # trials that were begun before have more fields
            log.modules[name] = ModuleNumerics(seen["peak_to_rms"], seen["input_error"])
        return log

    def record(self, name: str, x: Floats, rounded: Int16, exponent: int) -> None:
        """Note one call.

        Args:
            name: The module.
            x: `(rows, d_in)` float64, at least one row.
            rounded: The integers that were sent.
            exponent: Their exponent.
        """
        rms = _rms(x) or 1.0  # all zero: exact
        error = _rms(np.ldexp(rounded.astype(np.float64), -exponent) - x)
        error = float(np.hypot(error, np.ldexp(np.sqrt(self._drawn), -exponent)))
        seen = self.modules.setdefault(name, ModuleNumerics())
        seen.peak_to_rms = max(seen.peak_to_rms, float(np.abs(x).max()) / rms)
        seen.input_error = max(seen.input_error, error / rms)


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


class UpdatedLinear(nn.Module):
    """A linear module plus an update that is computed elsewhere.

    Also stands in for the fused projection of an attention, whose rows are applied separately.
    Code that reads the weights of a module instead of calling it fails, rather than do without the
    update.

    Args:
        base: The module.
        update: `(..., d_in)` to `(..., d_out)`, in any dtype, on the CPU. A plain function: those
            are not duplicated when the model is copied, as the session behind it must not be.
    """

    def __init__(self, base: nn.Module, update: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base: Any = base
        self._update = update

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_in) -> (..., d_out)`."""
        output = self.base(x)
        return output + self._update(x).to(output)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Return output features `start` to `stop` only; all of the update is asked for."""
        output = self.base.rows(x, start, stop)
        return output + self._update(x)[..., start:stop].to(output)


def adapt(
    model: Model,
    modules: Mapping[str, Terms],
    scale: float,
    evaluate: Evaluate,
    numerics: NumericsLog | None = None,
) -> Model:
    """Return a view of a model with the updates of an adapter that somebody else holds.

    The view shares every parameter with the model, which is left as it is; it can be adapted
    again, for other modules. It is for inference: no gradient passes through an update.

    Args:
        model: Any tree of modules.
        modules: The adapted ones by name, each an `nn.Linear` or transformers' `Conv1D`.
        scale: What the product of the factors is multiplied by, `lora_alpha / r`.
        evaluate: Asked once each time that a module is called, with all rows of the call; not
            asked for a call without rows. What it raises passes through the model.
        numerics: Is told about every call.

    Raises:
        BundleError: if no module is given, or the model has none of a name, or one of another
            kind or size.

    A call of the view raises ParisError if the inputs of a module are not finite, and ProtocolError
    if an answer has another shape or dtype.
    """
    view = share(model)
    for name, base in check_fits(view, modules).items():
        update = _update(name, modules[name], scale, evaluate, numerics or NumericsLog())
        view.set_submodule(name, UpdatedLinear(base, update))
    return view


def check_fits(model: nn.Module, modules: Mapping[str, Terms]) -> dict[str, nn.Module]:
    """Return the modules of a model, on any device, that an adapter is for.

    Raises:
        BundleError: as `adapt`.
    """
    if not modules:
        raise BundleError("the adapter has no modules")
    found = dict(model.named_modules())
    return {name: _check_linear(name, found.get(name), terms) for name, terms in modules.items()}


def _check_linear(name: str, module: nn.Module | None, terms: Terms) -> nn.Module:
    if module is None:
        raise BundleError(f"{name}: the model has no module of this name")
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        d_in, d_out = module.in_features, module.out_features
    elif kind == "Conv1D":  # of transformers, which need not be installed
        d_in, d_out = module.get_parameter("weight").shape
    else:
        raise BundleError(f"{name}: {kind} is not allowed: Linear or transformers' Conv1D")
    if (d_in, d_out) != (terms.d_in, terms.d_out):
        raise BundleError(
            f"{name}: the adapter has d_in={terms.d_in}, d_out={terms.d_out}, "
            f"the model d_in={d_in}, d_out={d_out}"
        )
    return module


def _update(
    name: str, terms: Terms, scale: float, evaluate: Evaluate, numerics: NumericsLog
) -> Callable[[Tensor], Tensor]:
    d_in, d_out = terms.d_in, terms.d_out

    def update(x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], d_out)
        if not x.numel():  # a mixture of experts may send a module nothing
            return torch.zeros(shape)
        rows = x.detach().to("cpu", torch.float64).reshape(-1, d_in).contiguous().numpy()
        with naming(name):
            integers, exponent = quantise_rows(rows)
        y = evaluate(name, integers, exponent)
        numerics.record(name, rows, integers, exponent)
        if y.dtype != np.int64 or y.shape != (len(rows), d_out):
            raise ProtocolError(
                f"{name}: the answer must be int64 with shape {(len(rows), d_out)}, "
                f"not {y.dtype} with shape {y.shape}"
            )
        exponent += terms.exponent_a + terms.exponent_b
        return torch.from_numpy(dequantise(y, exponent, scale)).reshape(shape)

    return update


class Together:
    """Asks for the updates of modules that share one input at once: by one question, not by many.

    Whoever runs a model has the inputs of the others when the first of them is called: queries,
    keys and values of an attention, or the gate and the values of a gated layer.

    Args:
        evaluate_all: Is asked with the names of some modules, their common inputs `(rows, d_in)`
            and the exponent; returns the integers of each.
        groups: Modules that share their inputs, as `trace_calls` found them.
    """

    def __init__(
        self,
        evaluate_all: Callable[[Sequence[str], Int16, int], Sequence[Int64]],
        groups: Iterable[Sequence[str]],
    ) -> None:
        self._evaluate_all = evaluate_all
        self._groups = {name: group for group in groups for name in group}
        self._early: dict[str, tuple[Int16, int, Int64]] = {}

    def __call__(self, name: str, x: Int16, exponent: int) -> Int64:
        """Return the update of a module, as `Evaluate` says; others of its group may follow."""
        if (early := self._early.pop(name, None)) is not None:
            asked, exponent_then, y = early
            if exponent_then == exponent and np.array_equal(asked, x):
                return y
        names = [name, *(other for other in self._groups.get(name, ()) if other != name)]
        y, *others = self._evaluate_all(names, x, exponent)
        for other, theirs in zip(names[1:], others, strict=True):
            self._early[other] = x, exponent, theirs
        return y


class Calls(NamedTuple):
    """What a computation asks for.

    Attributes:
        rows: How many rows of each module; zero if it is not asked.
        together: Modules that were asked with the same inputs throughout, in their order.
    """

    rows: dict[str, int]
    together: list[tuple[str, ...]]


def trace_calls(
    model: Model, modules: Mapping[str, Terms], run: Callable[[Model], object]
) -> Calls:
    """Return what a computation will ask for.

    Args:
        model: The model, with none of these modules adapted.
        modules: As in `adapt`.
        run: The computation; it is run on a view whose updates are all zero, so that it gives what
            it would without an adapter.

    Raises:
        BundleError: as `adapt`.
    """
    rows, inputs = dict.fromkeys(modules, 0), {name: hashlib.sha256() for name in modules}

    def trace(name: str, x: Int16, exponent: int) -> Int64:
        rows[name] += len(x)
        inputs[name].update(f"{exponent} {x.shape}\n".encode() + x.tobytes())
        return np.zeros((len(x), modules[name].d_out), np.int64)

    run(adapt(model, modules, 1.0, trace))
    groups: dict[bytes, list[str]] = {}
    for name in modules:
        if rows[name]:
            groups.setdefault(inputs[name].digest(), []).append(name)
    return Calls(rows, [tuple(group) for group in groups.values()])
