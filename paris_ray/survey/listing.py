"""Which layout a corpus has, and its shards, in bounded time."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from paris_ray.config import PATH_KINDS, Config, load
from paris_ray.corpora import Corpus, Shard, open_corpus
from paris_ray.errors import CorpusError

LISTING_S = 20.0  # a corpus that takes longer to list is known by its first rows
FIRST_ROWS = 512

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Listing:
    """A corpus that can be read, and its shards.

    Attributes:
        config: The run; its `corpus.kind` is what can read it.
        corpus: The reader.
        shards: All shards, or those of the first rows; at least one.
        is_whole: Whether they are all.
        other_kinds: Further values of `corpus.kind` that can read it.
    """

    config: Config
    corpus: Corpus
    shards: Sequence[Shard]
    is_whole: bool = True
    other_kinds: tuple[str, ...] = ()


def recognise(name_or_path: str, overrides: Sequence[str]) -> Listing:
    """Return the corpus of a configuration; its layout is tried out if only the path is given.

    Args:
        name_or_path: A configuration, as `config.load` takes it.
        overrides: Likewise.

    Raises:
        ConfigError: for a value that is not allowed.
        CorpusError: if there is nothing to read, or nothing that any layout explains.
    """
    given = {override.partition("=")[0] for override in overrides}
    if "corpus.path" not in given or "corpus.kind" in given:
        return list_corpus(load(name_or_path, overrides))
    readable = list(
        by_kind(
            lambda kind: list_corpus(load(name_or_path, [*overrides, f"corpus.kind={kind}"]))
        ).values()
    )
    others = tuple(listing.config.corpus.kind for listing in readable[1:])
    return replace(readable[0], other_kinds=others)


def by_kind(read: Callable[[Any], Result]) -> dict[str, Result]:
    """Return what comes of each layout that can read a corpus, by `corpus.kind`; one at least.

    Args:
        read: Reads it as one of `PATH_KINDS`.

    Raises:
        CorpusError: if each raises that, with the reasons of all.
    """
    found, refusals = {}, {}
    for kind in PATH_KINDS:
        try:
            found[kind] = read(kind)
        except CorpusError as error:
            refusals[kind] = str(error)
    if not found:
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in refusals.items())
        raise CorpusError(f"no layout of captioned pictures was recognised: {reasons}")
    return found


def list_corpus(config: Config, seconds: float = LISTING_S) -> Listing:
    """Return a corpus with all its shards; with those of the first rows if listing takes too long.

    Raises:
        CorpusError: if there is nothing to read.
    """
    corpus = open_corpus(config.corpus)
    try:
        return Listing(config, corpus, _within(seconds, corpus.shards))
    except TimeoutError:
        rows = min(config.corpus.limit or FIRST_ROWS, FIRST_ROWS)
        first = open_corpus(replace(config.corpus, limit=rows))
        return Listing(config, first, first.shards(), is_whole=False)
    except OSError as error:
        raise CorpusError(f"corpus.path={config.corpus.path!r} cannot be read: {error}") from None


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what a call returns, or raise what it raises; its thread is left behind if it is late.

    Raises:
        TimeoutError: after so many seconds.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError
    result: Result = outcome["result"]
    return result
