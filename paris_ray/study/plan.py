"""What a study compares: its arms, as data.

All arms of a study see equally many samples in training, those of the seed included, but for the
shorter and longer ones that a curve is made of.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from paris_ray.config import Config, with_overrides
from paris_ray.errors import ConfigError
from paris_ray.models.flops import step_macs
from paris_ray.study.arms import FULL, ONE_MODEL, TOP_1, TOP_2, Arm, ArmMaker, Drawing
from paris_ray.study.forms import Form

DENSE, SCRATCH, SEEDED, PAPER = "dense", "scratch", "seeded", "scratch-image"
# Every table has one dense model and the experts from scratch beside what it varies.
CONTROLS = ("experts", "clusters", "balance", "shared", "seed", "samples")
ORACLE, THRESHOLD, ADAPTIVE, AGREE = "oracle", "threshold:0.1", "top-p:0.9", "agree:0.3"


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
    maker = ArmMaker(config, form)
    arms = [*_main_arms(maker), *_curve_arms(maker), *_count_arms(maker)]
    arms += [*_cluster_arms(maker), *_balance_arms(maker)]
    return [*arms, *_shared_arms(maker), *_seed_arms(maker)]


def _main_arms(maker: ArmMaker[Form]) -> list[Arm]:
    """One model, experts from scratch, from a seed, of random clusters, and as the paper's."""
    share, routings = maker.form.seed_share, routing_drawings()
    # Routers of image clusters alone are in doubt: a temperature moves nothing of the others'.
    doubtful = [*routings, *temperature_drawings(maker.form)]
    equal_flops = equal_flops_drawings(maker.config, maker.form.num_experts)
    random, image = ["cluster.features=random"], ["cluster.features=image"]
    return [
        *maker.arms(DENSE, (*CONTROLS, "routing"), count=1, drawings=equal_flops),
        *maker.arms(SCRATCH, (*CONTROLS, "routing"), drawings=routings),
        *maker.arms(SEEDED, (*CONTROLS, "routing"), share=share, drawings=routings),
        *maker.arms("scratch-random", ["clusters"], overrides=random),
        *maker.arms("seeded-random", ["clusters"], share=share, overrides=random),
        *_unless_default(maker, PAPER, ["clusters", "routing"], overrides=image, drawings=doubtful),
    ]


def _unless_default(
    maker: ArmMaker[Form],
    recipe: str,
    tables: Sequence[str],
    *,
    overrides: Sequence[str],
    share: Fraction = Fraction(0),
    drawings: Sequence[Drawing] = (),
) -> list[Arm]:
    """Return arms that cluster something else, or none if that is what all arms cluster."""
    if list(overrides) == [f"cluster.features={maker.config.cluster.features}"]:
        return []
    return maker.arms(recipe, tables, overrides=overrides, share=share, drawings=drawings)


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


def _curve_arms(maker: ArmMaker[Form]) -> list[Arm]:
    """Shorter and longer trainings, each with a whole schedule of its own."""
    arms = []
    for total in maker.form.totals:
        arms += maker.arms(DENSE, ["samples"], count=1, total=total)
        arms += maker.arms(SCRATCH, ["samples"], total=total)
        arms += maker.arms(SEEDED, ["samples"], total=total, share=maker.form.seed_share)
    return arms


def _count_arms(maker: ArmMaker[Form]) -> list[Arm]:
    arms = []
    for count in maker.form.expert_counts:
        arms += maker.arms(f"scratch-k{count}", ["experts"], count=count)
        share = maker.form.seed_share
        arms += maker.arms(f"seeded-k{count}", ["experts"], count=count, share=share)
    return arms


def _cluster_arms(maker: ArmMaker[Form]) -> list[Arm]:
    removed = maker.form.removed_directions
    kinds = {kind: [f"cluster.features={kind}"] for kind in maker.form.features}
    kinds[f"image-minus-{removed}"] = [
        "cluster.features=image",
        f"cluster.remove_directions={removed}",
    ]
    arms = []
    for kind, overrides in kinds.items():
        if (scratch := f"scratch-{kind}") != PAPER:  # the paper's is a main arm
            arms += _unless_default(maker, scratch, ["clusters"], overrides=overrides)
        share = maker.form.seed_share
        arms += _unless_default(
            maker, f"seeded-{kind}", ["clusters"], overrides=overrides, share=share
        )
    return arms


def _balance_arms(maker: ArmMaker[Form]) -> list[Arm]:
    arms, share = [], maker.form.seed_share
    for most in maker.form.imbalances:
        overrides = [f"cluster.max_imbalance={most:g}"]
        arms += maker.arms(
            f"seeded-imbalance-{most:g}", ["balance"], share=share, overrides=overrides
        )
    return arms


def _shared_arms(maker: ArmMaker[Form]) -> list[Arm]:
    arms = []
    for shared in maker.form.shared_shares:
        overrides = [f"cluster.shared_share={shared}"]
        arms += maker.arms(f"scratch-shared-{shared:g}", ["shared"], overrides=overrides)
    return arms


def _seed_arms(maker: ArmMaker[Form]) -> list[Arm]:
    arms = []
    for share in maker.form.seed_shares:
        arms += maker.arms(f"seeded-share-{float(share):g}", ["seed"], share=share)
    rate, share = maker.config.training.learning_rate, maker.form.seed_share
    afterwards = {
        f"rate-x{factor:g}": f"learning_rate={rate * factor:g}"
        for factor in maker.form.rate_factors
    } | {f"ema-{decay:g}": f"ema_decay={decay:g}" for decay in maker.form.ema_decays}
    for name, training in afterwards.items():
        overrides = [f"training.{training}"]
        arms += maker.arms(f"seeded-{name}", ["seed"], share=share, overrides=overrides)
    return arms
