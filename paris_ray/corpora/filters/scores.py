"""`min_clip_score`, `min_aesthetic_score`, `max_nsfw_score`: what models said of a row.

The models are in `encoders/scores/`; here is what follows from their numbers.
"""

from collections.abc import Mapping

from paris_ray.config import FiltersConfig


def score_name(reason: str) -> str:
    """Return what the score is called that a filter looks at: `clip_score` of `min_clip_score`."""
    return reason.partition("_")[2]


def judge_scores(scores: Mapping[str, float], filters: FiltersConfig) -> tuple[str, str] | None:
    """Return the filter that takes a row, and why; None if none does.

    Args:
        scores: Of the row, by name; one that is no number is out of every limit.
        filters: Of these `scores` are looked at, in their order.
    """
    for reason in filters.scores:
        name, limit = score_name(reason), getattr(filters, reason)
        score = scores[name]
        inside = score >= limit if reason.startswith("min_") else score <= limit
        if not inside:
            return reason, f"{name} {score:.3f}, corpus.filters.{reason}={limit}"
    return None
