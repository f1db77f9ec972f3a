"""What part of an adapter's worth a thief has, who never pays but for the rows of the budget.

Measured as the thief would: it solves for every module by least squares, and puts what it found in
place of the adapter. Its share is the part of the adapter's gain in held-out loss that it has so:
what a buyer would lose by not paying.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from paris_ray.errors import ConfigError
from paris_ray.seeding import numpy_generator
from paris_ray.zklora.fixed_point import Int16, Int64, QuantisedModule, evaluate
from paris_ray.zklora.inference import adapt
from paris_ray.zklora.leakage import Span, chosen_rows, predicted_error, stolen
from paris_ray.zklora.subjects import Subject

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
    """An adapter on its base, with examples on which it can be measured.

    Args:
        subject: The base, and examples that the adapter was not trained on; half of them are known
            to thieves.
        modules: The adapter.
        scale: Of its updates.

    Attributes:
        inputs: Of the modules, on the known half.
        gain: By how much the adapter lowers the mean loss of the other half; perhaps not at all.

    Raises:
        ConfigError: if there are fewer than two examples.
        ParisError: if base and examples do not fit, or the adapter does not fit the base.
    """

    def __init__(
        self, subject: Subject, modules: Mapping[str, QuantisedModule], scale: float
    ) -> None:
        if (count := subject.num_examples) < 2:
            raise ConfigError(f"examples: {count} are not allowed: at least 2")
        self._scorer, self._modules, self._scale = subject.load("cpu"), modules, scale
        self._held_out = range(count // 2, count)
        recorded: dict[str, list[Int16]] = {name: [] for name in modules}

        def record(name: str, x: Int16, exponent: int) -> Int64:
            recorded[name].append(x)
            return evaluate(modules[name], x)

        view = adapt(self._scorer.model, modules, scale, record)
        for number in range(count // 2):
            self._scorer.losses(view, number)
        self.inputs: Inputs = {name: np.concatenate(rows) for name, rows in recorded.items()}
        self._without = self._loss(None)
        self.gain = self._without - self._loss(modules)

    def thief(self, rows: int, *, chooses: bool) -> Thief:
        """Return what a thief has who saw so many rows of every module answered; gain is above 0.

        They are fewer where there are no more inputs. One who chooses asks for the rows that teach
        most, instead of inputs at random.
        """
        random = numpy_generator(0, "rows of a thief")
        theirs, errors = {}, []
        for name, module in self._modules.items():
            inputs = self.inputs[name]
            asked = (
                chosen_rows(inputs, rows) if chooses else random.permutation(inputs, axis=0)[:rows]
            )
            span = Span(module.d_in, [asked])
            theirs[name] = stolen(module, span)
            errors.append(predicted_error(span, inputs, module))
        share = (self._without - self._loss(theirs)) / self.gain
        return Thief(share, float(np.mean(errors)))

    def _loss(self, modules: Mapping[str, QuantisedModule] | None) -> float:
        scorer = self._scorer
        view = scorer.model
        if modules is not None:
            view = adapt(
                view, modules, self._scale, lambda name, x, exponent: evaluate(modules[name], x)
            )
        losses = [scorer.losses(view, number) for number in self._held_out]
        return float(torch.cat(losses, 1).double().mean())
