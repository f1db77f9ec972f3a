"""An inspection as lines of text and as a page, from the same facts."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image

from paris_ray.config import FILTERS
from paris_ray.corpora import REASONS
from paris_ray.corpora.filters import filters_of_rows
from paris_ray.reports import (
    bars,
    count_words,
    definitions,
    figure,
    frequent_words,
    page,
    paragraph,
    section,
)
from paris_ray.survey.distributions import Bars, Distribution, distributions
from paris_ray.survey.inspection import Inspection
from paris_ray.survey.sample import SampledRow, examples, spread

ROWS_SHOWN = 10
BAD_ROWS_SHOWN = 6  # of a reason
FILTERED_ROWS_SHOWN = 24  # of a filter: whether its limit is right, pictures tell
WORDS_SHOWN = 24
BAR_WIDTH = 40  # characters
LABEL_WIDTH = 16
SHORT, LONG = 100, 300  # characters of a stranger's text that are shown


def headline(found: Inspection) -> str:
    """Return the outcome in one line."""
    bad, filtered = sum(found.quarantined.values()), sum(found.filtered.values())
    return (
        f"{found.config.corpus.kind}: {len(found.good)} of {len(found.rows)} rows read are good"
        + (f", {bad} would be quarantined" if bad else "")
        + (f", {filtered} would be filtered" if filtered else "")
    )


def facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """Yield what was recognised, as pairs of a name and a text."""
    corpus = found.config.corpus
    yield "layout", f"corpus.kind={corpus.kind}"
    if found.other_kinds:
        kinds = ", ".join(f"corpus.kind={kind}" for kind in found.other_kinds)
        yield "also readable", f"{kinds}; say which one is meant"
    if corpus.path is not None:
        yield "path", shorten(corpus.path, LONG)
        yield "files", _files(found)
    if found.fields is not None:
        yield "picture from", shorten(found.fields.picture, SHORT)
        yield "caption from", shorten(found.fields.caption, SHORT)
        if found.fields.others:
            yield "not taken", shorten(", ".join(found.fields.others), LONG)
    elif corpus.path is not None:
        yield "picture, caption", "cannot be told: no row of the first ones has both"
    listed = f"{found.num_shards} shards" + ("" if found.is_whole else " of the first rows alone")
    yield "sample", f"{len(found.rows)} rows of {listed}, in {found.seconds:.1f} s"
    yield "good", _share(len(found.good), len(found.rows))
    yield "quarantined", _quarantined(found)
    if corpus.filters.on:
        yield "filtered", _filtered(found)
    yield "held out", _held_out(found)


def _files(found: Inspection) -> str:
    files = found.files
    size = "" if files.num_bytes is None else f", {_readable(files.num_bytes)}"
    more = ", ..." if files.count > len(files.first) else ""
    return shorten(f"{files.count}{size}: {', '.join(files.first)}", LONG * 2) + more


def _readable(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / max(1, total):.1%})"


def _quarantined(found: Inspection) -> str:
    bad, allowed = sum(found.quarantined.values()), found.config.corpus.max_bad_share
    text = _share(bad, len(found.rows))
    if bad > allowed * len(found.rows):
        text += f": more than corpus.max_bad_share={allowed}, which prepare refuses"
    return text


def _filtered(found: Inspection) -> str:
    text, filters = _share(found.filtered.total(), len(found.rows)), found.config.corpus.filters
    later = [name for name in filters.on if name not in filters_of_rows(filters)]
    return text + (f"; only prepare can tell of {', '.join(later)}" if later else "")


def _held_out(found: Inspection) -> str:
    rule = found.held_out
    if rule.share == 0:
        return "none (corpus.held_out_share=0)"
    held = sum(row.is_held_out for row in found.good)
    of = "rows" if rule.key is None else f"groups by {shorten(rule.key, SHORT)}"
    return f"{_share(held, len(found.good))} of the good ones; the rule is {rule.share:.1%} of {of}"


def shorten(text: str, length: int) -> str:
    """Return printable text of at most so many characters."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= length else printable[: length - 3] + "..."


def words_of(captions: Sequence[str]) -> str:
    """Return the most frequent words of captions, with how many have them."""
    frequent = frequent_words(count_words(captions), WORDS_SHOWN)
    return ", ".join(f"{shorten(word, SHORT)} ({count})" for word, count in frequent)


def inspection_text(found: Inspection) -> str:
    """Return an inspection for a terminal."""
    lines = [headline(found), ""]
    for name, text in facts(found):
        lines += textwrap.wrap(
            text,
            initial_indent=f"{name:{LABEL_WIDTH}} ",
            subsequent_indent=" " * (LABEL_WIDTH + 1),
            width=100,
            break_long_words=False,
            break_on_hyphens=False,
        )
    for reason, bad in examples(found.rows, 1):
        lines += ["", f"{found.set_aside[reason]} {reason}: {REASONS[reason]}"]
        lines.append(f"  such as {shorten(bad[0].key, SHORT)}: {shorten(bad[0].detail, LONG)}")
    for each in distributions(found.rows, found.config.corpus.image_size):
        lines += ["", each.title, *_text_bars(each.bars)]
        lines += [each.note] if each.note else []
    lines += ["", "Most frequent words", words_of([row.caption for row in found.good])]
    lines += ["", "Some rows"]
    lines += [
        f"  {shorten(r.key, 40)}  {_size(r)}  {shorten(r.caption, SHORT)}" for r in shown(found)
    ]
    return "\n".join(lines)


def shown(found: Inspection) -> list[SampledRow]:
    """Return the good rows that are shown."""
    return spread(found.good, ROWS_SHOWN)


def _size(row: SampledRow) -> str:
    return "" if row.size is None else f"{row.size[0]} x {row.size[1]}"


def _text_bars(rows: Bars) -> list[str]:
    most = max((count for _, count in rows), default=1)
    return [
        f"  {label:{LABEL_WIDTH}} {'#' * round(BAR_WIDTH * count / most)} {count}"
        for label, count in rows
    ]


def inspection_page(found: Inspection) -> bytes:
    """Return an inspection as a self-contained HTML page."""
    pictures = "".join(row_figure(row, f"{row.caption} ({_size(row)})") for row in shown(found))
    sections = [
        section("What was recognised", definitions(facts(found))),
        section(
            "Some rows, cut as for training",
            pictures or paragraph("No row of the sample can be used."),
        ),
        *set_aside_sections(
            found.quarantined, found.filtered, dict(examples(found.rows, FILTERED_ROWS_SHOWN))
        ),
        *distribution_sections(distributions(found.rows, found.config.corpus.image_size)),
        section("Most frequent words", paragraph(words_of([row.caption for row in found.good]))),
    ]
    return page(headline(found), sections, found.attribution)


def row_figure(row: SampledRow, text: str) -> str:
    """Return a row's picture above a text; the text alone if it has none."""
    picture = None if row.picture is None else Image.fromarray(row.picture)
    return figure(picture, shorten(text, LONG))


def distribution_sections(found: Sequence[Distribution]) -> list[str]:
    """Return distributions as parts of a page."""
    return [
        section(each.title, bars(each.bars), paragraph(each.note) if each.note else "")
        for each in found
    ]


def rows_shown(reason: str) -> int:
    """Return how many rows are shown, at most, that were set aside for a reason."""
    return FILTERED_ROWS_SHOWN if reason in FILTERS else BAD_ROWS_SHOWN


def set_aside_sections(
    quarantined: Mapping[str, int],
    filtered: Mapping[str, int],
    rows: Mapping[str, Sequence[SampledRow]],
) -> list[str]:
    """Return how many rows are bad and how many filtered, by reason; nothing if none is.

    Args:
        quarantined: Number of bad rows of each reason.
        filtered: Number of filtered ones, likewise.
        rows: Some of both, likewise.
    """
    titled = {"Quarantined": quarantined, "Filtered": filtered}
    return [
        section(title, *(_reason(reason, count, rows.get(reason, ())) for reason, count in found))
        for title, counts in titled.items()
        if (found := sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    ]


def _reason(reason: str, count: int, rows: Sequence[SampledRow]) -> str:
    shown = rows[: rows_shown(reason)]
    figures = "".join(row_figure(row, f"{row.key}: {row.detail}") for row in shown)
    heading = paragraph(f"{count:,} {reason}: {REASONS.get(reason, 'another reason')}")
    elsewhere = paragraph("None of them is in the files that were looked at for this page.")
    return heading + (figures or elsewhere)
