"""What img2dataset writes beside the pictures that it fetched: how many, and why others are not.

Its output is read as any other: tars (`webdataset`), files (`sidecars`) or Parquet (`parquet`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from paris_ray.corpora.places import Place
from paris_ray.json_documents import load_json

SUCCESS = "success"  # in the column `status`; anything else is why a picture is missing
_STATISTICS = "_stats.json"
_MAX_BYTES = 1 << 20
_AT_ONCE = 16
_FAILURES = ("failed_to_download", "failed_to_resize")


def status_column(columns: Sequence[str]) -> str | None:
    """Return the column that says what became of a link, if a table is one of img2dataset's."""
    return "status" if {"url", "status", "error_message"} <= set(columns) else None


def not_fetched(shards: Iterable[Place]) -> dict[str, int]:
    """Return how many pictures were not fetched, by reason, as told beside tars or folders."""
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a store that is far away takes its time for each
        for found in pool.map(_statistics, map(_beside, shards)):
            counts.update({reason: found.get(reason, 0) for reason in _FAILURES})
    return {reason: count for reason, count in counts.items() if count}


def num_fetched(path: Place) -> int | None:
    """Return how many samples a tar had when it was written; None if that is not known."""
    return _statistics(_beside(path)).get("successes")


def _beside(shard: Place) -> Place:
    return shard.with_name(shard.name.partition(".")[0] + _STATISTICS)


def _statistics(path: Place) -> dict[str, int]:
    """Return the counts of one shard; none of a file that is not one of img2dataset's."""
    try:
        with path.open("rb") as stream:
            found = load_json(stream.read(_MAX_BYTES))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    names = ("successes", *_FAILURES)
    # bool is an int to Python, not to us.
    return {n: found[n] for n in names if type(found.get(n)) is int and found[n] >= 0}
