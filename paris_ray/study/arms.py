"""What a comparison of runs is made of, as data.

An arm is one set of experts, trained as a run of its own; a drawing is one way to draw with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Protocol, TypeVar

from paris_ray.config import Config
from paris_ray.errors import ConfigError

ONE_MODEL, TOP_1, TOP_2, FULL = "one model", "top-1", "top-2", "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One way to draw with the experts of an arm, beside its default.

    Attributes:
        name: What it is called.
        overrides: Of the arm's configuration.
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One set of experts.

    Attributes:
        name: Its own among the arms of a seed.
        recipe: How it is trained; arms of one recipe are points of one curve.
        tables: Which tables it stands in.
        seed: Of its run.
        num_experts: K; 1 is the dense model.
        seed_steps: Steps of the model that all experts start from; 0: from scratch.
        expert_steps: Steps of every expert.
        overrides: Of the study's configuration.
        routing: Its default way to draw.
        drawings: The other ways.
    """

    name: str
    recipe: str
    tables: tuple[str, ...]
    seed: int
    num_experts: int
    seed_steps: int
    expert_steps: int
    overrides: tuple[str, ...]
    routing: str
    drawings: tuple[Drawing, ...]

    @property
    def folder(self) -> str:
        """Where its run is, in `arms/`."""
        return f"{self.name}.{self.seed}"

    @property
    def total_steps(self) -> int:
        """Steps of all its trainings but the router's."""
        return self.seed_steps + self.num_experts * self.expert_steps


class Size(Protocol):
    """What of a form every arm needs."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of an arm."""

    @property
    def num_experts(self) -> int:
        """Of arms that do not say how many they have."""

    @property
    def seeds(self) -> int:
        """Runs of every arm."""


AnyForm = TypeVar("AnyForm", bound=Size)


@dataclass(frozen=True, slots=True)
class ArmMaker(Generic[AnyForm]):
    """Makes arms of one comparison, each for all its seeds.

    Attributes:
        config: What they vary.
        form: How large they are.
    """

    config: Config
    form: AnyForm

    def arms(
        self,
        recipe: str,
        tables: Sequence[str],
        *,
        count: int | None = None,
        share: Fraction = Fraction(0),
        total: Fraction = Fraction(1),
        overrides: Sequence[str] = (),
        drawings: Sequence[Drawing] = (),
    ) -> list[Arm]:
        """Return an arm for each seed.

        Args:
            recipe: Its name, to which a `total` is added.
            tables: Which it stands in.
            count: K; None: the form's.
            share: Of its steps, which the seed that its experts start from has.
            total: Its steps, as a multiple of the form's.
            overrides: Of the configuration, beside those that the arguments make.
            drawings: Ways to draw beside the default.

        Raises:
            ConfigError: if steps cannot be divided without a rest.
        """
        count = count or self.form.num_experts
        name = recipe if total == 1 else f"{recipe}-x{float(total):g}"
        steps = self.form.total_steps * total
        seed_steps = _whole(name, steps * share)
        expert_steps = _whole(name, (steps - seed_steps) / count)
        routing = TOP_1 if count == 1 else TOP_2
        own = [
            f"cluster.num_clusters={count}",
            f"router.num_experts={count}",
            f"seed_training.steps={seed_steps}",
            f"training.steps={expert_steps}",
            f"sampling.routing={routing}",
        ]
        if count == 1:
            own.append("router_training.steps=1")  # there is nothing to choose
        return [
            Arm(
                name=name,
                recipe=recipe,
                tables=tuple(tables),
                seed=seed,
                num_experts=count,
                seed_steps=seed_steps,
                expert_steps=expert_steps,
                overrides=(f"seed={seed}", *own, *overrides),
                routing=ONE_MODEL if count == 1 else TOP_2,
                drawings=tuple(drawings),
            )
            for seed in range(self.config.seed, self.config.seed + self.form.seeds)
        ]


def _whole(name: str, steps: Fraction) -> int:
    if steps.denominator != 1:
        raise ConfigError(
            f"arm {name}: {float(steps):g} steps are not a whole number: shares and numbers of "
            "experts must divide the form's total_steps"
        )
    return int(steps)
