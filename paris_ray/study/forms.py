"""How large a study is: the full form, and a small one."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How large a study is.

    Attributes:
        name: What it is called.
        overrides: Of the configuration that it is given, before a user's own.
        total_steps: Optimiser steps of an arm: of the seed and all experts, not of the router.
        num_experts: K of all tables but the first.
        expert_counts: Other K of the first table, from scratch and from a seed.
        seed_share: Share of the samples that the seed has, in arms that have one.
        seed_shares: Others.
        rate_factors: Multiples of the experts' learning rate, after a seed.
        ema_decays: Of the experts' averages, after a seed; 0 averages nothing.
        features: What else may be clustered than the configuration has it.
        removed_directions: Principal directions that image features are clustered without.
        imbalances: How many times the mean a cluster may have, beside the configuration's.
        temperatures: Of the router, in place of the fitted one.
        shared_shares: Shares of rows of the whole corpus.
        totals: Multiples of `total_steps` that the curve has beside 1.
        seeds: Runs of every arm.
    """

    name: str
    overrides: tuple[str, ...]
    total_steps: int
    num_experts: int
    expert_counts: tuple[int, ...]
    seed_share: Fraction
    seed_shares: tuple[Fraction, ...]
    rate_factors: tuple[float, ...]
    ema_decays: tuple[float, ...]
    features: tuple[str, ...]
    removed_directions: int
    imbalances: tuple[float, ...]
    temperatures: tuple[float, ...]
    shared_shares: tuple[float, ...]
    totals: tuple[Fraction, ...]
    seeds: int


SMALL_PICTURES = ("corpus.image_size=32", "codec.patch_size=8")  # as many latents
FULL_FORM = Form(
    name="full",
    overrides=("run_dir=runs/study", *SMALL_PICTURES),
    total_steps=2048,  # the curve ends at three times as many: what the quickstart trains
    num_experts=8,
    expert_counts=(2, 4, 16),
    seed_share=Fraction(1, 4),
    seed_shares=(Fraction(1, 8), Fraction(1, 2)),
    rate_factors=(0.5, 0.25),
    ema_decays=(0.0, 0.9),  # averages of so few steps never reach the configuration's 0.995
    features=("image", "caption", "both"),
    removed_directions=4,
    imbalances=(1.0, 4.0),
    temperatures=(0.25, 1.0, 4.0, 16.0),
    shared_shares=(0.05, 0.1, 0.25),
    totals=(Fraction(1, 2), Fraction(3)),
    seeds=3,
)
SMALL_FORM = Form(
    name="small",
    overrides=(
        "run_dir=runs/study_small",
        *SMALL_PICTURES,
        "corpus.limit=1024",
        "features.steps=30",
        "expert.num_layers=2",
        "expert.hidden_size=64",
        "router.hidden_size=48",
        "router_training.steps=60",
        "evaluation.max_captions=64",
        "evaluation.max_gallery=512",
        "evaluation.num_tasks=1",
    ),
    total_steps=256,
    num_experts=4,
    expert_counts=(2,),
    seed_share=Fraction(1, 4),
    seed_shares=(Fraction(1, 2),),
    rate_factors=(0.5,),
    ema_decays=(0.0,),
    features=("image",),
    removed_directions=4,
    imbalances=(4.0,),
    temperatures=(4.0,),
    shared_shares=(0.1,),
    totals=(Fraction(1, 2),),
    seeds=1,
)
