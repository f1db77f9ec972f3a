"""What part of an adapter's worth a thief has, who never pays but for the rows of the budget.

Measured as the thief would: it solves for every module by least squares, puts what it found in
place of the adapter, and draws with it. Its share is the part of the adapter's gain in held-out
loss that it has so: what a buyer would lose by not paying.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from paris_ray.errors import ConfigError
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.models import Expert, TextConditioning
from paris_ray.seeding import numpy_generator
from paris_ray.zklora.fixed_point import Int16, Int64, QuantisedModule, evaluate
from paris_ray.zklora.inference import adapt
from paris_ray.zklora.leakage import Span, chosen_rows, predicted_error, stolen

KNOWN_SEED, HELD_OUT_SEED = 0, 1  # of the noise

Inputs = Mapping[str, Int16]
"""Real inputs of every module, `(rows, d_in)` each."""


class Thief(NamedTuple):
    """What one thief has.

    Attributes:
        share: Of the adapter's gain in held-out loss; above 1 by chance.
        error: Predicted relative error of its updates, mean over the modules.
    """

    share: float
    error: float


class Worth:
    """An adapter on its base, with pictures on which it can be measured.

    Args:
        expert: The base.
        modules: The adapter.
        scale: Of its updates.
        latents: `(B, C, H, W)` of pictures that it is for; half of them are known to thieves.
        text: Their captions.
        levels: Noise levels in [0, 1].

    Attributes:
        inputs: Of the modules, on the known half.
        gain: By how much the adapter lowers the loss of the other half; perhaps not at all.

    Raises:
        ConfigError: if there are fewer than two pictures.
    """

    def __init__(
        self,
        expert: Expert,
        modules: Mapping[str, QuantisedModule],
        scale: float,
        latents: Tensor,
        text: TextConditioning,
        levels: Sequence[float],
    ) -> None:
        if (known := len(latents) // 2) < 1:
            raise ConfigError(f"pictures: {len(latents)} are not allowed: at least 2")
        self._expert, self._modules, self._scale = expert, modules, scale
        self._held_out = latents[known:], text.rows(slice(known, len(latents))), levels
        recorded: dict[str, list[Int16]] = {name: [] for name in modules}

        def record(name: str, x: Int16, exponent: int) -> Int64:
            recorded[name].append(x)
            return evaluate(modules[name], x)

        view = adapt(expert, modules, scale, record)
        denoising_losses(view, latents[:known], text.rows(slice(0, known)), levels, seed=KNOWN_SEED)
        self.inputs: Inputs = {name: np.concatenate(rows) for name, rows in recorded.items()}
        self._without = self._loss(None)
        self.gain = self._without - self._loss(modules)

    def thief(self, rows: int, *, chooses: bool) -> Thief:
        """Return what a thief has who saw so many rows of every module answered; gain is above 0.

        Args:
            rows: How many; fewer where there are no more inputs.
            chooses: It asks for the rows that teach most, instead of inputs at random.
        """
        random = numpy_generator(KNOWN_SEED, "rows of a thief")
        theirs, errors = {}, []
        for name, module in self._modules.items():
            inputs = self.inputs[name]
            asked = (
                chosen_rows(inputs, rows) if chooses else random.permutation(inputs, axis=0)[:rows]
            )
            span = Span.of(module.d_in, [asked])
            theirs[name] = stolen(module, span)
            errors.append(predicted_error(span, inputs, module))
        share = (self._without - self._loss(theirs)) / self.gain
        return Thief(share, float(np.mean(errors)))

    def _loss(self, modules: Mapping[str, QuantisedModule] | None) -> float:
        view = self._expert
        if modules is not None:
            view = adapt(
                view, modules, self._scale, lambda name, x, exponent: evaluate(modules[name], x)
            )
        return float(denoising_losses(view, *self._held_out, seed=HELD_OUT_SEED).double().mean())
