"""Pictures and small self-contained HTML pages for people to look at."""

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
img { image-rendering: pixelated; max-width: 100%; border-radius: .4rem; background: #fff; }
section { margin: 2rem 0; }
figure { display: inline-block; width: 7rem; margin: .3rem; vertical-align: top; }
figcaption { font-size: .75rem; line-height: 1.2; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
td, th { padding: .15rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
svg { max-width: 40rem; width: 100%; background: #8881; border-radius: .4rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .2rem .6rem; }
.bars { max-width: 40rem; font-size: .9rem; align-items: center; }
.bars meter { width: 100%; }
footer { opacity: .7; font-size: .85rem; }
"""
MIN_WORD_LENGTH = 3
THUMBNAIL_SIZE = 32


def png_bytes(image: Image.Image) -> bytes:
    """Return a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def picture_grid(images: NDArray[np.uint8], columns: int, scale: int = 1) -> Image.Image:
    """Return pictures `(N, S, S, 3)` as one picture, row by row, on white."""
    side = images.shape[1]
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(images):
        canvas.paste(Image.fromarray(picture), (i % columns * side, i // columns * side))
    size = (canvas.width * scale, canvas.height * scale)
    return canvas.resize(size, Image.Resampling.NEAREST)


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture `(S, S, 3)` at 32x32."""
    if image.shape[0] == THUMBNAIL_SIZE:
        return image
    small = Image.fromarray(image).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return np.asarray(small)


def decode_thumbnails(encoded: Sequence[bytes]) -> NDArray[np.uint8]:
    """Return PNG thumbnails as one array `(N, 32, 32, 3)`."""
    return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in encoded])


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Return in how many of some captions each word is."""
    counter: Counter[str] = Counter()
    for caption in captions:
        counter.update({w for w in re.findall(r"\w+", caption) if len(w) >= MIN_WORD_LENGTH})
    return counter


def frequent_words(words: Counter[str], count: int) -> list[tuple[str, int]]:
    """Return the most frequent words with the number of captions they are in."""
    return sorted(words.items(), key=lambda item: (-item[1], item[0]))[:count]


def telling_words(
    clusters: Sequence[Counter[str]], sizes: Sequence[int], count: int
) -> list[list[str]]:
    """Return for each cluster the words that its captions have much more often than others do.

    Twice as often at least; the first are those of which the share of captions differs most.

    Args:
        clusters: In how many captions each word is, by cluster.
        sizes: How many captions each has; at least one.
        count: The most words of a cluster.
    """
    everywhere = sum(clusters, Counter[str]())
    total = sum(sizes)

    found = []
    for words, size in zip(clusters, sizes, strict=True):
        ranked = []
        for word, times in words.items():
            share = times / size
            elsewhere = (everywhere[word] - times) / max(1, total - size)
            if share >= 2 * elsewhere:
                ranked.append((elsewhere - share, word))
        found.append([word for _, word in sorted(ranked)[:count]])
    return found


def inline_image(image: Image.Image, alt: str, width: int | None = None) -> str:
    """Return an `<img>` that carries its own data."""
    data = base64.b64encode(png_bytes(image)).decode()
    size = "" if width is None else f' width="{width}"'
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"{size}>'


def figure(image: Image.Image | None, caption: str) -> str:
    """Return a picture with its caption under it; the caption alone if there is none."""
    picture = "" if image is None else inline_image(image, caption, width=96)
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def section(title: str, *parts: str) -> str:
    """Return a titled part of a page; `parts` are HTML already."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    """Return text as an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and what there is to say of each, as an HTML list."""
    lines = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs)
    return f"<dl>{''.join(lines)}</dl>"


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """Return counts by label as horizontal bars, the longest for the largest count."""
    most = max((count for _, count in rows), default=0) or 1
    cells = (
        f'<span>{html.escape(label)}</span><meter max="{most}" value="{count}"></meter>'
        f"<span>{count:,}</span>"
        for label, count in rows
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as an HTML table; the first row is its head."""
    tags = ["th", *["td"] * (len(rows) - 1)]
    lines = (
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(tags, rows, strict=True)
    )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def page(title: str, sections: Sequence[str], attribution: str | None) -> bytes:
    """Return a whole HTML page; `sections` are HTML already."""
    footer = f"<footer>{html.escape(attribution)}</footer>" if attribution else ""
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    style = f"<style>{STYLE}</style>"
    head = f'<meta charset="utf-8">{view}<title>{html.escape(title)}</title>{style}'
    body = f"<h1>{html.escape(title)}</h1>{''.join(sections)}{footer}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'.encode()
