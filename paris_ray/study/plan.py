"""What a study compares: its arms, as data.

An arm is one set of experts, trained as a run of its own; a drawing is one way to draw with them.
All arms of a study see equally many samples in training, those of the seed included, but for the
shorter and longer ones that a curve is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from paris_ray.config import Config, with_overrides
from paris_ray.errors import ConfigError
from paris_ray.models.flops import step_macs
from paris_ray.study.forms import Form

DENSE, SCRATCH, SEEDED, PAPER = "dense", "scratch", "seeded", "scratch-image"
# Every table has one dense model and the experts from scratch beside what it varies.
CONTROLS = ("experts", "clusters", "balance", "shared", "seed", "samples")
ONE_MODEL, TOP_1, TOP_2, FULL = "one model", "top-1", "top-2", "full"
ORACLE, THRESHOLD, ADAPTIVE, AGREE = "oracle", "threshold:0.1", "top-p:0.9", "agree:0.3"


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


def study_config(config: Config) -> Config:
    """Return what all arms of a study have in common, on one kind of task.

    Raises:
        ConfigError: if experts are not alike, or there is nothing to measure with.
    """
    if config.experts:
        raise ConfigError(f"experts={config.experts} is not allowed: a study compares like experts")
    _check_left_to_arms(config)
    for key, value in (
        ("corpus.attributes", config.corpus.attributes),
        ("corpus.held_out_share", config.corpus.held_out_share),
    ):
        if not value:
            raise ConfigError(f"{key}={value!r} is not allowed: a study measures with it")
    one_task = ("num_cpus=1", "threads=1")  # else tasks of two cores would wait for a gap
    trainings = ("seed_training", "training", "router_training")
    return with_overrides(
        config,
        [
            *(f"{training}.{part}" for training in trainings for part in one_task),
            "training.epochs=null",
            "seed_training.epochs=null",
            f"seed_training.batch_size={config.training.batch_size}",
            "cluster.remove_directions=0",
            "cluster.shared_share=0",
            "sampling.routing=top-1",
        ],
    )


def _check_left_to_arms(config: Config) -> None:
    """Refuse what would make an arm another one than its name says."""
    for key, value in (
        ("prepared_from", config.prepared_from),
        ("seed_training.init_from", config.seed_training.init_from),
        ("training.init_from", config.training.init_from),
        ("router_training.init_from", config.router_training.init_from),
        ("evaluation.name", config.evaluation.name),
    ):
        if value is not None:
            raise ConfigError(f"{key}={value!r} is not allowed: the arms of a study decide it")
    for key, given in (
        ("cluster.features=random", config.cluster.features == "random"),
        ("evaluation.oracle=true", config.evaluation.oracle),
    ):
        if given:
            raise ConfigError(f"{key} is not allowed: an arm of a study does it")


def study_arms(config: Config, form: Form) -> list[Arm]:
    """Return the arms of a study.

    Args:
        config: What `study_config` returned.
        form: How large it is.

    Raises:
        ConfigError: if the steps cannot be divided among the experts without a rest.
    """
    recipes = _Recipes(config, form)
    arms = [*_main_arms(recipes), *_curve_arms(recipes), *_count_arms(recipes)]
    arms += [*_cluster_arms(recipes), *_balance_arms(recipes)]
    return [*arms, *_shared_arms(recipes), *_seed_arms(recipes)]


@dataclass(frozen=True, slots=True)
class _Recipes:
    """Makes arms of one study, each for all its seeds."""

    config: Config
    form: Form

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


def _main_arms(recipes: _Recipes) -> list[Arm]:
    """One model, experts from scratch, from a seed, of random clusters, and as the paper's."""
    share, routings = recipes.form.seed_share, routing_drawings()
    # Routers of image clusters alone are in doubt: a temperature moves nothing of the others'.
    doubtful = [*routings, *temperature_drawings(recipes.form)]
    equal_flops = equal_flops_drawings(recipes.config, recipes.form.num_experts)
    random, image = ["cluster.features=random"], ["cluster.features=image"]
    return [
        *recipes.arms(DENSE, (*CONTROLS, "routing"), count=1, drawings=equal_flops),
        *recipes.arms(SCRATCH, (*CONTROLS, "routing"), drawings=routings),
        *recipes.arms(SEEDED, (*CONTROLS, "routing"), share=share, drawings=routings),
        *recipes.arms("scratch-random", ["clusters"], overrides=random),
        *recipes.arms("seeded-random", ["clusters"], share=share, overrides=random),
        *_unless_default(
            recipes, PAPER, ["clusters", "routing"], overrides=image, drawings=doubtful
        ),
    ]


def _unless_default(
    recipes: _Recipes,
    recipe: str,
    tables: Sequence[str],
    *,
    overrides: Sequence[str],
    share: Fraction = Fraction(0),
    drawings: Sequence[Drawing] = (),
) -> list[Arm]:
    """Return arms that cluster something else, or none if that is what all arms cluster."""
    if list(overrides) == [f"cluster.features={recipes.config.cluster.features}"]:
        return []
    return recipes.arms(recipe, tables, overrides=overrides, share=share, drawings=drawings)


def routing_drawings() -> list[Drawing]:
    """Return the ways to draw with several experts beside top-2."""
    routings = {way: way for way in (TOP_1, FULL, THRESHOLD, ADAPTIVE, AGREE)} | {ORACLE: TOP_1}
    return [
        Drawing(
            name=name,
            overrides=(
                f"sampling.routing={routing}",
                f"evaluation.oracle={str(name == ORACLE).lower()}",
                f"evaluation.name={name.replace(':', '-')}",
            ),
        )
        for name, routing in routings.items()
    ]


def temperature_drawings(form: Form) -> list[Drawing]:
    """Return top-2 by routers of other temperatures than the fitted one."""
    return [
        Drawing(
            name=f"{TOP_2} at {temperature:g}",
            overrides=(
                f"sampling.routing={TOP_2}",
                f"sampling.router_temperature={temperature:g}",
                f"evaluation.name=temperature-{temperature:g}",
            ),
        )
        for temperature in form.temperatures
    ]


def equal_flops_drawings(config: Config, num_experts: int) -> list[Drawing]:
    """Return ways to draw with one model, in more steps, that cost as much as experts.

    As 1, 2 and all of them, each asked in every step, and the router.
    """
    alone = step_macs(replace(config, cluster=replace(config.cluster, num_clusters=1)), 1)
    drawings = []
    for name, asked in ((TOP_1, 1), (TOP_2, 2), (FULL, num_experts)):
        share = step_macs(config, asked) / alone
        steps = round(config.sampling.num_inference_steps * share)
        overrides = (f"sampling.num_inference_steps={steps}", f"evaluation.name=as-{name}")
        said = f"{ONE_MODEL}, {steps} steps, as {asked} of {num_experts}"
        drawings.append(Drawing(name=said, overrides=overrides))
    return drawings


def _curve_arms(recipes: _Recipes) -> list[Arm]:
    """Shorter and longer trainings, each with a whole schedule of its own."""
    arms = []
    for total in recipes.form.totals:
        arms += recipes.arms(DENSE, ["samples"], count=1, total=total)
        arms += recipes.arms(SCRATCH, ["samples"], total=total)
        arms += recipes.arms(SEEDED, ["samples"], total=total, share=recipes.form.seed_share)
    return arms


def _count_arms(recipes: _Recipes) -> list[Arm]:
    arms = []
    for count in recipes.form.expert_counts:
        arms += recipes.arms(f"scratch-k{count}", ["experts"], count=count)
        share = recipes.form.seed_share
        arms += recipes.arms(f"seeded-k{count}", ["experts"], count=count, share=share)
    return arms


def _cluster_arms(recipes: _Recipes) -> list[Arm]:
    removed = recipes.form.removed_directions
    kinds = {kind: [f"cluster.features={kind}"] for kind in recipes.form.features}
    kinds[f"image-minus-{removed}"] = [
        "cluster.features=image",
        f"cluster.remove_directions={removed}",
    ]
    arms = []
    for kind, overrides in kinds.items():
        if (scratch := f"scratch-{kind}") != PAPER:  # the paper's is a main arm
            arms += _unless_default(recipes, scratch, ["clusters"], overrides=overrides)
        share = recipes.form.seed_share
        arms += _unless_default(
            recipes, f"seeded-{kind}", ["clusters"], overrides=overrides, share=share
        )
    return arms


def _balance_arms(recipes: _Recipes) -> list[Arm]:
    arms, share = [], recipes.form.seed_share
    for most in recipes.form.imbalances:
        overrides = [f"cluster.max_imbalance={most:g}"]
        arms += recipes.arms(
            f"seeded-imbalance-{most:g}", ["balance"], share=share, overrides=overrides
        )
    return arms


def _shared_arms(recipes: _Recipes) -> list[Arm]:
    arms = []
    for shared in recipes.form.shared_shares:
        overrides = [f"cluster.shared_share={shared}"]
        arms += recipes.arms(f"scratch-shared-{shared:g}", ["shared"], overrides=overrides)
    return arms


def _seed_arms(recipes: _Recipes) -> list[Arm]:
    arms = []
    for share in recipes.form.seed_shares:
        arms += recipes.arms(f"seeded-share-{float(share):g}", ["seed"], share=share)
    rate, share = recipes.config.training.learning_rate, recipes.form.seed_share
    afterwards = {
        f"rate-x{factor:g}": f"learning_rate={rate * factor:g}"
        for factor in recipes.form.rate_factors
    } | {f"ema-{decay:g}": f"ema_decay={decay:g}" for decay in recipes.form.ema_decays}
    for name, training in afterwards.items():
        overrides = [f"training.{training}"]
        arms += recipes.arms(f"seeded-{name}", ["seed"], share=share, overrides=overrides)
    return arms
