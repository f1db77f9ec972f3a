"""Report pages: captions are data, never markup."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from paris_ray.reports import (
    bars,
    count_words,
    decode_thumbnails,
    definitions,
    figure,
    frequent_words,
    page,
    paragraph,
    picture_grid,
    png_bytes,
    section,
    telling_words,
    thumbnail,
)

EVIL = """<script>alert('x')</script> "quoted" & <img src=x onerror="alert(1)">"""


class Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_captions_are_escaped_everywhere() -> None:
    picture = Image.new("RGB", (2, 2))
    content = [section(EVIL, figure(picture, EVIL), paragraph(EVIL))]
    document = page(EVIL, content, attribution=EVIL).decode()
    reader = Reader()
    reader.feed(document)
    assert "script" not in reader.tags
    assert reader.tags.count("img") == 1
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert ("alt", EVIL) in reader.attributes
    assert reader.text.count(EVIL) == 6  # title, h1, h2, figcaption, p, footer


def test_no_attribution_means_no_footer() -> None:
    assert b"<footer>" not in page("title", [], attribution=None)


def test_a_grid_keeps_order_on_white() -> None:
    pictures = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = np.asarray(picture_grid(pictures, columns=2, scale=3))
    assert grid.shape == (12, 12, 3)
    assert [grid[i, j, 0] for i, j in ((0, 0), (0, 11), (11, 0), (11, 11))] == [10, 20, 30, 255]


@pytest.mark.parametrize("size", [32, 64])
def test_thumbnails_survive_png(size: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    small = thumbnail(picture)
    assert small.shape == (32, 32, 3)
    encoded = png_bytes(Image.fromarray(small))
    assert Image.open(io.BytesIO(encoded)).format == "PNG"
    assert np.array_equal(decode_thumbnails([encoded])[0], small)


def test_words_are_counted_once_a_caption() -> None:
    captions = ["red red cat", "red dog", "a cat"]
    assert frequent_words(count_words(captions), 2) == [("cat", 2), ("red", 2)]


def test_telling_words_are_those_that_others_do_not_say() -> None:
    clusters = [
        ["red cat and sky", "blue cat", "red lion", "one hat"],
        ["red dog and sky", "blue dog"],
    ]
    counts = [count_words(captions) for captions in clusters]
    assert telling_words(counts, [4, 2], 3) == [["cat", "hat", "lion"], ["dog", "and", "blue"]]
    assert telling_words([count_words(["a red cat"])], [1], 1) == [["cat"]]  # nobody else


def test_the_longest_bar_is_the_largest_count() -> None:
    drawn = bars([("<b>", 3), ("more", 1200)])
    assert drawn.count('<meter max="1200"') == 2
    assert "&lt;b&gt;" in drawn and "1,200" in drawn
    assert "meter" not in bars([])


def test_a_figure_without_a_picture_is_its_caption() -> None:
    assert figure(None, "a & b") == "<figure><figcaption>a &amp; b</figcaption></figure>"
    assert definitions([("<", ">")]) == "<dl><dt>&lt;</dt><dd>&gt;</dd></dl>"
