"""`languages`: captions in other languages, as far as a few words can tell.

py3langid gives every language a probability; of a caption of one or two words often none is
likely, so that the likeliest is a poor guess. A caption is foreign only if another language is
`CERTAINTY` times as likely as every wanted one. `bench_filters.py languages` prints what that keeps
of names of emoji, which are about as short as captions get.
"""

from functools import cache
from typing import Any

from paris_ray.config import FiltersConfig
from paris_ray.errors import CorpusError

CERTAINTY = 20
_SHOWN = 40  # characters of a caption


def foreign(caption: str, filters: FiltersConfig) -> str | None:
    """Return which language a caption is in; None if that is wanted, or cannot be told.

    Raises:
        CorpusError: if py3langid does not know a language of `corpus.filters.languages`.
    """
    wanted = filters.languages
    if wanted is None:
        return None
    _require_known(tuple(wanted))
    ranked = _identifier().rank(caption)
    (language, likeliest), probabilities = ranked[0], dict(ranked)
    if likeliest < CERTAINTY * max(probabilities[each] for each in wanted):
        return None
    return f"{language}: {caption[:_SHOWN]!r}, corpus.filters.languages={wanted}"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # of the extra `filters`

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _require_known(languages: tuple[str, ...]) -> None:
    known = sorted(_identifier().labels)
    for language in languages:
        if language not in known:
            two_letters = ", ".join(each for each in known if len(each) == 2)
            raise CorpusError(
                f"corpus.filters.languages has {language!r}, which is not allowed: {two_letters}"
            )
