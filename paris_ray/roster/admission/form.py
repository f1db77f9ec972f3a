"""The weights themselves: finite, and tensor by tensor about as large as those of the others.

Names, shapes and data types were compared with the architecture when the file was opened. Norms
find what is not a trained expert: noise, a tensor that is empty or scaled. They do not find a sign.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from paris_ray.models import Expert
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.readings import Check

NAME = "form"
FEWEST = 3  # experts of one architecture whose spread says something
# Median absolute deviation times this is the standard deviation of a normal distribution.
MAD_SCALE = 1.4826
LEAST_SPREAD = 0.05  # of log norms: experts that branched from one seed differ by less
TINIEST = 1e-12


def check_form(candidate: Expert, neighbours: Sequence[Expert], limits: Limits) -> Check:
    """Count values that are not finite, and compare the norm of each tensor with the others'.

    Args:
        candidate: The expert.
        neighbours: Those of another architecture are not compared with.
        limits: What is allowed.
    """
    state = candidate.state_dict()
    not_finite = sum(int((~torch.isfinite(tensor)).sum()) for tensor in state.values())
    readings = [limits.reading("not_finite", "weights that are not finite", not_finite)]
    alike = [expert for expert in neighbours if expert.config == candidate.config]
    if len(alike) < FEWEST:
        note = f"norms not compared: {len(alike)} experts of this architecture, {FEWEST} needed"
        return Check(NAME, tuple(readings), note)
    others = [_log_norms(expert) for expert in alike]
    deviations = {
        name: _deviation(norm, [other[name] for other in others])
        for name, norm in _log_norms(candidate).items()
    }
    worst = max(deviations, key=lambda name: (math.isnan(deviations[name]), deviations[name]))
    measure = "deviations of a tensor's log norm from the other experts' median"
    readings.append(limits.reading("tensor_norm", measure, deviations[worst], worst))
    return Check(NAME, tuple(readings), f"compared with {len(alike)} experts")


def _log_norms(expert: Expert) -> dict[str, float]:
    norms = {name: tensor.float().norm().item() for name, tensor in expert.state_dict().items()}
    # max would take the tiniest for NaN
    return {n: math.log(TINIEST if norm < TINIEST else norm) for n, norm in norms.items()}


def _deviation(value: float, others: Sequence[float]) -> float:
    median = float(np.median(others))
    spread = MAD_SCALE * float(np.median(np.abs(np.array(others) - median)))
    return abs(value - median) / max(spread, LEAST_SPREAD)
