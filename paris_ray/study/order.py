"""Which relations of the paper's order of one model, top-1, top-2 and full a study reproduces."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paris_ray.study.arms import FULL, ONE_MODEL, TOP_1, TOP_2
from paris_ray.study.numbers import accuracy, mean_if_known
from paris_ray.study.plan import DENSE, PAPER, SCRATCH, SEEDED

# FID-50K of B/2, lower is better: Paris, arXiv 2510.03434.
PUBLISHED = {ONE_MODEL: 29.64, TOP_1: 30.60, TOP_2: 22.60, FULL: 47.89}
REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
THE_SAME, NOT_MEASURED = "the same", "not measured"

Drawn = Mapping[str, Any]


def _error(drawn: Drawn) -> float | None:
    return 1 - accuracy(drawn, "held_out")


def _frechet(split: str) -> Callable[[Drawn], float | None]:
    return lambda drawn: drawn[split].get("frechet")


# Less is better; None if it was not taken.
MEASURES: dict[str, Callable[[Drawn], float | None]] = {
    "held-out error": _error,
    "held-out Frechet": _frechet("held_out"),
    "shown Frechet": _frechet("shown"),
}


def published_relations() -> list[tuple[str, str]]:
    """Return all pairs of ways to draw of which the paper has the first better than the second."""
    order = sorted(PUBLISHED, key=PUBLISHED.__getitem__)
    return [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]


def paris_order(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, of arms that are drawn in all four ways, which published relations hold.

    A relation is reproduced if it holds in every seed, not reproduced if the opposite does, the
    same if both ways are equal in every seed, else undecided.
    """
    found = []
    for name in (PAPER, SCRATCH, SEEDED):
        ways = _published_ways(arms, name)
        for measure, value in MEASURES.items():
            seeds = [{way: value(drawn) for way, drawn in seed.items()} for seed in ways]
            if seeds:
                found.append({"arm": name, "measure": measure, **_order(seeds)})
    return found


def _published_ways(arms: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Drawn]]:
    """Return of every seed what was drawn in the four ways that the paper compares."""
    dense = {arm["seed"]: arm for arm in arms if arm["name"] == DENSE}
    experts = [arm for arm in arms if arm["name"] == name and arm["seed"] in dense]
    return [
        {ONE_MODEL: dense[arm["seed"]]["drawn"][ONE_MODEL]}
        | {way: arm["drawn"][way] for way in PUBLISHED if way != ONE_MODEL}
        for arm in experts
    ]


def _order(seeds: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    relations = []
    for better, worse in published_relations():
        pairs = [(seed[better], seed[worse]) for seed in seeds]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        holds = sum(a < b for a, b in known)
        opposite = sum(a > b for a, b in known)
        relations.append(
            {
                "better": better,
                "worse": worse,
                "holds": holds,
                "opposite": opposite,
                "seeds": len(known),
                "verdict": _verdict(holds, opposite, len(known)),
            }
        )
    means = {way: mean_if_known([seed[way] for seed in seeds]) for way in PUBLISHED}
    return {"means": means, "relations": relations}


def _verdict(holds: int, opposite: int, count: int) -> str:
    if count == 0:
        return NOT_MEASURED
    if holds == opposite == 0:
        return THE_SAME
    if holds == count:
        return REPRODUCED
    return NOT_REPRODUCED if opposite == count else UNDECIDED
