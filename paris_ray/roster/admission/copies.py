"""Does the candidate give its training pictures back?

Pictures drawn from training captions are compared with the shard they are from, held-out pictures
of the same cluster saying how close pictures come by chance (`evaluation/memorisation.py`).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.embeddings import read_rows, tensor_column
from paris_ray.errors import ArtifactError
from paris_ray.evaluation.memorisation import memorisation
from paris_ray.folders import Folder
from paris_ray.roster.admission.drawings import Look, draw
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.panel import Panel, spread_rows
from paris_ray.roster.admission.readings import Check, quoted

NAME = "copies of training pictures"
NUM_DRAWN, MAX_ROWS = 48, 5_000


@dataclass(frozen=True, slots=True)
class Shard:
    """What the candidate says that it was trained on.

    Attributes:
        captions: N captions.
        features: `(N, D)` of the run's image model.
    """

    captions: tuple[str, ...]
    features: NDArray[np.float32]


def read_shard(folder: Folder) -> Shard:
    """Read evenly spread rows of a stranger's shard, MAX_ROWS at most.

    Raises:
        ArtifactError: if a file is missing or damaged, lacks a column, or there are no rows or rows
            without a caption.
    """
    table = read_rows(folder, spread_rows(folder, MAX_ROWS), ["caption", "features"])
    if not len(table):
        raise ArtifactError(f"{folder.uri} has no rows")
    captions = tuple(table["caption"].to_pylist())
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            where = f"{folder.uri}: caption {row} of those that were read"
            raise ArtifactError(f"{where} is {caption!r:.40}, not a string")
    return Shard(captions, tensor_column(table, "features").astype(np.float32))


def check_copies(panel: Panel, shard: Shard | None, look: Look, limits: Limits) -> Check:
    """Draw training captions and look for the pictures that come nearest.

    Args:
        panel: The candidate.
        shard: Its training data; None if they were not shown.
        look: The run's image model.
        limits: What is allowed.

    Raises:
        EvaluationError: if the shard's features are of another image model.
    """
    if shard is None:
        return Check(NAME, (), "its training pictures were not shown: give its --shard")
    count = min(NUM_DRAWN, len(shard.captions))
    rows = np.arange(count) * len(shard.captions) // count
    captions = [shard.captions[i] for i in rows]
    drawn = draw(panel.bundle, panel.candidate, captions, panel.seed)
    if drawn.not_finite:
        measure = "drawings of training captions that are not finite"
        reading = limits.reading("not_finite", measure, drawn.not_finite)
        return Check(NAME, (reading,), f"{count} captions; no drawing was compared")
    held_out = panel.held_out.features[panel.held_out.of(panel.index).numpy()]
    found = memorisation(look(drawn.pictures), held_out, shard.features)
    usual, own = (float(np.median(d)) for d in (found.held_out_distances, found.distances))
    close = "share of drawings that are closer to a training picture than 95 % of held-out ones"
    copied = "middle distance to the nearest training picture: held-out over drawn"
    nearest = int(found.nearest[found.distances.argmin()])
    return Check(
        NAME,
        (
            limits.reading("close", close, float(found.shares[0])),
            limits.reading(
                "copied",
                copied,
                usual / own if own else math.inf,
                f"the nearest is {quoted(shard.captions[nearest])}",
            ),
        ),
        f"{count} captions of a shard of {len(shard.captions)} rows",
    )
