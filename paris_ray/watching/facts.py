"""What is told of a run beside its models: forecast, router, settings and stages, as JSON."""

from collections.abc import Mapping
from itertools import islice
from statistics import median
from typing import Any

from paris_ray.watching.lines import number


def forecast(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was computed and what is left, of what an overview tells of models.

    Experts that have not begun are taken to need as long as the others do, and as many to be
    trained at a time as are now.

    Returns:
        `computed_s`, and `left_s` of devices together and `eta_s` until all is trained; these two
        are None where nothing is known, and 0 where nothing is left.
    """
    computed = sum(model["compute_s"] for model in models)
    running = [m for m in models if m["state"] == "training"]
    waiting = [m for m in models if m["state"] == "waiting"]
    if not running and not waiting:
        return {"computed_s": computed, "left_s": 0.0, "eta_s": 0.0}
    known = [m["eta_s"] for m in running if m["eta_s"] is not None]
    lengths = [
        m["compute_s"] + (m["eta_s"] or 0)
        for m in models
        if m["expert"] is not None and (m["state"] == "finished" or m["eta_s"] is not None)
    ]
    if len(known) < len(running) or (waiting and not lengths):
        return {"computed_s": computed, "left_s": None, "eta_s": None}
    left = sum(known) + (len(waiting) * median(lengths) if waiting else 0.0)
    at_once = max(1, len(running))
    return {"computed_s": computed, "left_s": left, "eta_s": max([*known, left / at_once])}


def router_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a router's facts what is drawn: by noise level, and in bins of confidence."""
    held_out = facts.get("held_out")
    levels = held_out.get("levels") if isinstance(held_out, dict) else None
    right = facts.get("right_cluster")
    told: dict[str, Any] = {}
    if isinstance(right, dict):
        told["right_cluster"] = {t: number(share) for t, share in _by_level(right)}
    if isinstance(held_out, dict) and isinstance(levels, dict):
        told |= {key: number(held_out.get(key)) for key in ("rows", "temperature")}
        told["levels"] = {t: _level(row) for t, row in _by_level(levels) if isinstance(row, dict)}
    return told


def _by_level(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(t, value) for t, value in islice(values.items(), 32) if isinstance(t, str)]


def _level(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("accuracy", "prototype_accuracy", "ece", "ece_calibrated", "nll_calibrated")
    bins, told = row.get("reliability"), {name: number(row.get(name)) for name in names}
    if not isinstance(bins, dict):
        return told
    columns = ("counts", "confidence", "accuracy")
    lists = {c: bins[c][:64] for c in columns if isinstance(bins.get(c), list)}
    return told | {"reliability": {c: [number(v) for v in values] for c, values in lists.items()}}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `section.key: value`, values as text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"[:120]] = str(value)[:200]
    return flat


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[str | None]]:
    """Return `[key, value, value]` of every setting in which two runs differ; None: not there."""
    keys = sorted(one.keys() | other.keys())
    return [[key, one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)]


def stage_told(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how long a stage took, as JSON; None: the row does not tell."""
    name, seconds = row.get("stage"), number(row.get("seconds"))
    if not isinstance(name, str) or seconds is None:
        return None
    return {"stage": name[:80], "seconds": seconds, "failed": row.get("failed") is True}
