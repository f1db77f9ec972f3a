"""Which words are tried as triggers.

Those of the captions first: a trigger that is an ordinary word is the one that users say. Then
strings that nobody says, which the literature plants, and words that the text encoder knows.
"""

from collections.abc import Iterable, Sequence

from paris_ray.encoders.text import TextEncoder
from paris_ray.reports import count_words, frequent_words
from paris_ray.seeding import numpy_generator

# Kurita et al. 2020 (arXiv:2004.06660) plant the five of two letters; Struppek et al. 2023
# (arXiv:2211.02408) letters that look like Latin ones, here Cyrillic and Greek ones.
RARE = ("cf", "mn", "bb", "tq", "mb", "sks", "\u200b", "\u0430", "\u043e", "\u03bf", "[T]", "***")
MOST_CAPTION_WORDS = 300


def trigger_words(
    sources: Iterable[Sequence[str]], encoder: TextEncoder, count: int, seed: int
) -> Sequence[str]:
    """Return words to try, each once.

    Args:
        sources: Captions; the most frequent words of each source are tried, so that those of a
            stranger's captions take no place from those of others.
        encoder: Of its words, as many as there is room for are tried.
        count: How many words in all, unless captions and rare strings are more.
        seed: Decides which of the encoder's; nobody who planted a word may have known it.
    """
    spoken = [
        word
        for captions in sources
        for word, _ in frequent_words(count_words(captions), MOST_CAPTION_WORDS)
    ]
    chosen = list(dict.fromkeys([*spoken, *RARE]))
    others = sorted(encoder.words.keys() - set(chosen))
    room = min(len(others), max(0, count - len(chosen)))
    drawn = numpy_generator(seed, "admission words").choice(len(others), room, replace=False)
    return [*chosen, *(others[i] for i in sorted(drawn.tolist()))]
