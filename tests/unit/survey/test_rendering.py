"""What a person reads of a corpus: bars, words, reasons; captions are data, never markup."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paris_ray.corpora import REASONS
from paris_ray.reports import png_bytes
from paris_ray.survey.distributions import caption_lengths, distributions, size_distributions
from paris_ray.survey.inspection import Inspection, inspect_corpus
from paris_ray.survey.listing import recognise
from paris_ray.survey.map import drawn_map, principal_plane
from paris_ray.survey.prepared import ClusterSample, Prepared, prepared_page
from paris_ray.survey.rendering import inspection_page, inspection_text
from paris_ray.survey.sample import SampledRow
from tests.small_corpora import jpeg, rows_of, write_image_folder

EVIL = "<script>alert(1)</script>"
PICTURE = np.zeros((8, 8, 3), np.uint8)
BAD = SampledRow("bad.jpg", "", "truncated_image", f"{EVIL} at byte 7", False, None, None)

SMALL = SampledRow("small.jpg", "", "min_size", "8 x 9 pixels", False, (8, 9), PICTURE)


class Tags(HTMLParser):
    """Collects the names of all tags and the text."""

    def __init__(self, document: bytes) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.feed(document.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    rows = rows_of(20)
    rows[3] = (rows[3][0][:400], "cut off")
    rows[5] = (jpeg((400, 100)), EVIL)
    rows[4] = (rows[4][0], "  ")
    path = write_image_folder(tmp_path_factory.mktemp("survey") / "corpus", rows)
    return inspect_corpus(recognise("quickstart", [f"corpus.path={path}"]))


def test_the_text_tells_what_was_recognised_and_what_is_bad(found: Inspection) -> None:
    text = inspection_text(found)
    assert text.startswith("image_folder: 18 of 20 rows read are good, 2 would be quarantined")
    for part in ("corpus.kind=image_folder", "metadata.jsonl", "file_name", "not taken", "source"):
        assert part in text
    assert f"1 empty_caption: {REASONS['empty_caption']}\n  such as 004.jpg: " in text
    assert "1 truncated_image: " in text
    assert "of the good ones; the rule is 10.0% of rows" in text
    assert text.count(" x ") == 10  # sizes of the rows that are shown


def test_a_corpus_that_prepare_would_refuse_is_called_so(found: Inspection) -> None:
    config = replace(found.config, corpus=replace(found.config.corpus, max_bad_share=0.05))
    assert "more than corpus.max_bad_share=0.05, which prepare refuses" in inspection_text(
        replace(found, config=config)
    )


def test_the_page_shows_pictures_and_no_markup_of_strangers(found: Inspection) -> None:
    page = Tags(inspection_page(found))
    assert "script" not in page.names
    assert page.names.count("img") == 10 + 1  # and that of the row without a caption
    assert "meter" in page.names
    assert "004.jpg: the caption is '  '" in page.text


def test_what_a_terminal_would_obey_is_not_printed(found: Inspection) -> None:
    row = replace(found.good[0], caption="\x1b[31mred\x07")
    text = inspection_text(replace(found, rows=[row]))
    assert "\x1b" not in text and "\x07" not in text and "?[31mred?" in text


def test_an_empty_sample_has_a_page() -> None:
    assert [each.bars for each in distributions([BAD], 64)] == [[]]


def test_sizes_and_shapes_are_counted_in_ranges() -> None:
    sides, shapes = size_distributions([(64, 300), (63, 63), (3000, 1000)], image_size=64)
    assert sides.bars[:2] == [("below 64", 1), ("64 to 127", 1)]
    assert sides.bars[-1] == ("512 to 1023", 1)
    assert sides.note == "1 of 3 are enlarged to corpus.image_size=64."
    assert shapes.bars == [
        ("taller than 1:2", 1),
        ("1:2 to 4:5", 0),
        ("about square", 1),
        ("5:4 to 2:1", 0),
        ("wider than 2:1", 1),
    ]


def test_captions_that_repeat_are_noticed() -> None:
    lengths = caption_lengths(["one", "a cat", "a cat", "a cat", "w " * 70])
    assert lengths.bars[0] == ("1", 1)
    assert lengths.bars[1] == ("2 to 4", 3)
    assert lengths.bars[-1] == ("65 or more", 1)
    assert lengths.note == "3 of 5 captions differ; 3 are 'a cat'."


def test_the_map_keeps_the_two_widest_directions() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    rows *= np.array([1, 9, 1, 1, 3, 1], np.float32)
    plane = principal_plane(rows)
    for axis, column in enumerate((1, 4)):
        assert abs(np.corrcoef(plane[:, axis], rows[:, column])[0, 1]) > 0.95
    np.testing.assert_array_equal(plane, principal_plane(rows))
    drawn = drawn_map(rows, np.arange(200) % 3, num_clusters=3)
    assert drawn.count("<circle") == 200 and drawn.count("<text") == 3
    assert drawn_map(rows[:1, :1], np.array([0]), num_clusters=1).count("<circle") == 1


def cluster(captions: list[str], nearness: float | None = None) -> ClusterSample:
    count = len(captions)
    measured = None if nearness is None else np.full(count, nearness, np.float32)
    return ClusterSample(
        rows=900,
        words=["told"],
        captions=captions,
        thumbnails=[png_bytes(Image.new("RGB", (32, 32)))] * count,
        features=np.eye(count, 4, dtype=np.float32),
        second=None if nearness is None else np.ones(count, np.int64),
        nearness=measured,
    )


PREPARED = Prepared(
    counts={
        "rows": 1800,
        "held_out": 150,
        "quarantined": {"truncated_image": 30},
        "filtered": {"min_size": 20},
    },
    bad_rows={"truncated_image": [BAD], "min_size": [SMALL]},
    sizes=[(640, 480)],
    image_size=64,
    clusters=[cluster([EVIL, "a cat"], 0.95), cluster(["a dog"], 0.2)],
    seconds={"embeddings": 40.0},
    note="",
    attribution=None,
)


def test_the_page_of_prepare_tells_rows_clusters_and_time() -> None:
    page = Tags(prepared_page(PREPARED))
    assert "script" not in page.names
    assert page.names.count("circle") == 3
    for part in ("1,800 (90.00%)", "150 (7.50%)", "30 truncated_image", "bad.jpg: "):
        assert part in page.text
    for part in ("filtered20 (1.00%)", "Filtered20 min_size: ", "small.jpg: 8 x 9 pixels"):
        assert part in page.text
    for part in ("Cluster 1: 900 pictures, 50.0%", "100.0%1", "50.0", "Overlap"):
        assert part in page.text


def test_what_filters_would_take_is_told_apart(tmp_path: Path) -> None:
    rows = rows_of(20)  # of 40 x 20 to 40 x 39
    rows[3] = (rows[3][0][:400], "cut off in the middle")
    path = write_image_folder(tmp_path / "corpus", rows)
    given = ["min_size=26", "max_caption_length=23", "picture_distance=0"]
    listing = recognise(
        "quickstart", [f"corpus.path={path}", *(f"corpus.filters.{each}" for each in given)]
    )
    found = inspect_corpus(listing)
    assert found.filtered == {"min_size": 5, "max_caption_length": 10}
    assert found.quarantined == {"truncated_image": 1}
    text = inspection_text(found)
    assert "4 of 20 rows read are good, 1 would be quarantined, 15 would be filtered" in text
    assert "15 (75.0%); only prepare can tell of picture_distance" in text
    assert f"5 min_size: {REASONS['min_size']}\n  such as 000.jpg: 40 x 20 pixels" in text
    page = Tags(inspection_page(found))
    assert "Filtered10 max_caption_length: " in page.text
    assert "Quarantined1 truncated_image: " in page.text
    assert page.names.count("img") == 4 + 15  # the good rows, and the filtered ones


def test_random_clusters_have_no_overlap_and_a_lost_corpus_is_named() -> None:
    clusters = [cluster(["a cat"]), cluster(["a dog"])]
    lost = replace(PREPARED, clusters=clusters, sizes=[], note="it is gone", seconds={})
    page = Tags(prepared_page(lost))
    assert "it is gone" in page.text
    assert "Overlap" not in page.text and "Shorter side" not in page.text
