"""A layout is recognised from its path alone, and listing a corpus takes bounded time."""

import threading
from pathlib import Path

import pytest

from paris_ray.config import load
from paris_ray.corpora.image_folder import ImageFolder
from paris_ray.errors import CorpusError
from paris_ray.survey.fields import Fields, taken_fields
from paris_ray.survey.listing import list_corpus, recognise
from tests.small_corpora import LAYOUTS, rows_of, write_image_folder, write_parquet

TAKEN = {
    "image_folder": Fields("file_name", "text", ("source",)),
    "parquet": Fields("image", "caption", ("url",)),
    "sidecars": Fields(".jpg", ".txt", ()),
    "webdataset": Fields(".jpg", "caption in .json", ("url in .json",)),
}


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_layout_and_what_became_picture_and_caption_are_recognised(
    kind: str, scheme: str, tmp_path: Path
) -> None:
    path = f"{scheme}{LAYOUTS[kind](tmp_path / 'corpus', rows_of(4))}"
    listing = recognise("quickstart", [f"corpus.path={path}"])
    assert listing.config.corpus.kind == kind
    assert listing.is_whole
    assert taken_fields(listing) == TAKEN[kind]


def test_a_kind_that_is_given_is_not_doubted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "corpus", rows_of(2))
    with pytest.raises(CorpusError, match="metadata"):
        recognise("quickstart", [f"corpus.path={path}", "corpus.kind=image_folder"])


def test_further_layouts_that_can_read_the_path_are_named(tmp_path: Path) -> None:
    path = write_image_folder(tmp_path / "corpus", rows_of(2))
    write_parquet(tmp_path / "parquet", rows_of(2))
    (tmp_path / "parquet" / "part.parquet").rename(path / "part.parquet")
    listing = recognise("quickstart", [f"corpus.path={path}"])
    assert listing.config.corpus.kind == "image_folder"
    assert "parquet" in listing.other_kinds


def test_what_no_layout_explains_is_refused_with_what_each_expects(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_text("nothing")
    with pytest.raises(CorpusError) as caught:
        recognise("quickstart", [f"corpus.path={tmp_path}"])
    message = str(caught.value)
    assert message.startswith("no layout of captioned pictures was recognised: ")
    assert all(f"{kind}: " in message for kind in LAYOUTS)
    assert "\n" not in message


def test_a_corpus_that_is_listed_too_slowly_is_known_by_its_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image_folder(tmp_path / "corpus", rows_of(3))
    config = load("quickstart", [f"corpus.path={path}", "corpus.kind=image_folder"])
    released, listed = threading.Event(), ImageFolder.shards

    def slow(corpus: ImageFolder) -> list:
        if corpus._config.limit is None:
            released.wait(30)
        return listed(corpus)

    monkeypatch.setattr(ImageFolder, "shards", slow)
    listing = list_corpus(config, seconds=0.05)
    released.set()
    assert not listing.is_whole
    assert len(list(listing.corpus.read(listing.shards[0]))) == 3
