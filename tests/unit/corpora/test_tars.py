"""Tars as different programs write them: compression, headers, links, and damage."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paris_ray.config import CorpusConfig
from paris_ray.corpora import RawRow, open_corpus
from paris_ray.corpora.rows import Shard
from paris_ray.corpora.tars import MAX_RECENT_BYTES, _Kept, _Recent
from tests.corpus_files import problems, read_all, write_tar


def read(path: Path, **options: Any) -> list[RawRow]:
    return read_all(CorpusConfig(kind="webdataset", path=str(path), **options))


def pairs(count: int) -> list[tuple[str, bytes]]:
    names = [f"{i:03}" for i in range(count)]
    return [m for n in names for m in ((f"{n}.png", bytes(512)), (f"{n}.txt", n.encode()))]


def write_links(path: Path, *links: tuple[str, str, bytes]) -> None:
    """Write one sample, a/0, and then links as `(name, target, type)`."""
    write_tar(path, {"a/0.png": b"png", "a/0.txt": b"txt"})
    with tarfile.open(path, "a") as tar:
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_gzipped_tars(tmp_path: Path, name: str) -> None:
    plain, zipped = tmp_path / "plain" / "a.tar", tmp_path / "zipped" / name
    plain.parent.mkdir()
    zipped.parent.mkdir()
    write_tar(plain, pairs(5))
    write_tar(zipped, pairs(5), "w:gz")
    found = [(row.key.removeprefix(name), row.image, row.caption) for row in read(zipped.parent)]
    assert found == [(r.key.removeprefix("a.tar"), r.image, r.caption) for r in read(plain.parent)]
    assert len(read(zipped.parent, limit=3)) == 3


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_headers(tmp_path: Path, form: int, mode: str) -> None:
    folder = "/".join(["long folder"] * 12)  # does not fit into one field of the header
    members = {f"{folder}/\u00fc #1.png": b"png", f"{folder}/\u00fc #1.txt": b"txt"}
    write_tar(tmp_path / "a.tar", members, mode, format=form)
    assert read(tmp_path) == [RawRow(f"a.tar/{folder}/\u00fc #1", b"png", "txt")]


def test_links_are_followed_within_the_tar(tmp_path: Path) -> None:
    write_links(
        tmp_path / "a.tar",
        ("1.png", "a/0.png", tarfile.LNKTYPE),
        ("1.txt", "./a/0.txt", tarfile.LNKTYPE),
        ("b/2.png", "../a/0.png", tarfile.SYMTYPE),
        ("b/2.txt", "../1.txt", tarfile.SYMTYPE),  # a link to a link
    )
    assert read(tmp_path) == [RawRow(f"a.tar/{key}", b"png", "txt") for key in ("a/0", "1", "b/2")]


def test_links_that_lead_nowhere_are_counted(tmp_path: Path) -> None:
    write_links(
        tmp_path / "a.tar",
        ("1.png", "2.png", tarfile.LNKTYPE),  # after it
        ("2.png", "/etc/passwd", tarfile.SYMTYPE),
        ("3.png", "../../etc/passwd", tarfile.SYMTYPE),
        ("4.png", "4.png", tarfile.SYMTYPE),
        ("5.png", "", tarfile.FIFOTYPE),
        ("6.png", "", tarfile.GNUTYPE_SPARSE),
    )
    rows = read(tmp_path)
    assert problems(rows[1:]) == {f"a.tar/{i}": "missing_file" for i in range(1, 7)}
    assert "'1.png' is a link to '2.png', which is not before it in the tar" in rows[1].detail


def test_links_in_a_gzipped_tar_are_followed_to_what_was_lately_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_links(
        tmp_path / "a.tar",
        ("1.png", "a/0.png", tarfile.LNKTYPE),
        ("1.txt", "a/0.txt", tarfile.SYMTYPE),
        ("2.png", "1.png", tarfile.LNKTYPE),
        ("2.txt", "1.txt", tarfile.LNKTYPE),
        ("3.png", "4.png", tarfile.LNKTYPE),
    )
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "a.tar").unlink()
    rows = read(tmp_path)
    assert rows[:3] == [RawRow(f"b.tar.gz/{key}", b"png", "txt") for key in ("a/0", "1", "2")]
    assert problems(rows[3:]) == {"b.tar.gz/3": "missing_file"}
    assert "'4.png', which is not before it in the tar, or more than 64 MiB" in rows[3].detail
    monkeypatch.setattr("paris_ray.corpora.tars.MAX_RECENT_BYTES", 600)
    assert read(tmp_path)[1].problem == "missing_file"  # of a/0 the text alone is still there


def test_what_links_may_find_in_a_gzipped_tar_is_bounded(tmp_path: Path) -> None:
    kept = _Recent()
    for i in range(200_000):
        kept[f"{i % 150_000:06}"] = _Kept(b"", 0)
    assert len(kept) == MAX_RECENT_BYTES // (tarfile.BLOCKSIZE + 6)
    kept["large"] = _Kept(bytes(MAX_RECENT_BYTES // 2), 0)
    assert len(kept) == 1 + (MAX_RECENT_BYTES // 2 - 517) // (tarfile.BLOCKSIZE + 6)


def test_what_only_links_still_name_counts_until_the_last_of_them_is_gone() -> None:
    kept = _Recent()
    kept["file"] = kept["link"] = large = _Kept(bytes(MAX_RECENT_BYTES // 2), 0)
    kept["another"] = _Kept(bytes(MAX_RECENT_BYTES // 4), 0)
    assert kept["link"] is large
    kept["large"] = _Kept(bytes(MAX_RECENT_BYTES // 2), 0)
    assert list(kept) == ["another", "large"]


def write_gzipped(folder: Path, members: dict[str, bytes | str]) -> None:
    """Write files of some content, and hard links to a name."""
    with tarfile.open(folder / "a.tgz", "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_links_of_a_gzipped_tar_share_the_picture_that_they_lead_to(tmp_path: Path) -> None:
    picture = bytes(1 << 20)
    links = {f"{i}.png": "first.png" for i in range(100)}
    write_gzipped(tmp_path, {"first.png": picture, **links})
    assert [len(row.image or b"") for row in read(tmp_path)] == [len(picture)] * 101


def test_a_link_keeps_its_target_among_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_ray.corpora.tars.MAX_RECENT_BYTES", 5000)
    write_gzipped(
        tmp_path,
        {
            "first.png": bytes(1000),
            "second.png": bytes(2000),
            "1.png": "first.png",
            "third.png": bytes(1500),  # takes the place of the second
            "2.png": "first.png",
            "3.png": "second.png",
        },
    )
    found = {row.key: len(row.image or b"") for row in read(tmp_path)}
    assert (found["a.tgz/2"], found["a.tgz/3"]) == (1000, 0)


def test_a_link_to_what_a_gzipped_tar_passed_over_is_told(tmp_path: Path) -> None:
    write_gzipped(tmp_path, {"a.dat": b"png", "1.png": "a.dat", "2.png": "absent.png"})
    first, second = read(tmp_path)[1:]
    assert "'a.dat' was passed over, by its extension or size" in first.detail
    assert "'absent.png', which is not before it in the tar" in second.detail


def damage_tar(content: bytes, kept: float) -> bytes:
    return content[: int(kept * len(content))]


def flip(content: bytes, place: float) -> bytes:
    position = int(place * len(content))
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize("change", [damage_tar, flip])
@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.9])
def test_damaged_gzip_keeps_what_is_before(
    tmp_path: Path, change: Callable[[bytes, float], bytes], place: float
) -> None:
    path = tmp_path / "a.tgz"
    content = [(name, bytes(range(256)) * (1 + i % 5)) for i, (name, _) in enumerate(pairs(40))]
    write_tar(path, content, "w:gz")
    path.write_bytes(change(path.read_bytes(), place))
    corpus = open_corpus(CorpusConfig(kind="webdataset", path=str(path)))
    shard = Shard(0, str(path), 0, 10_000)
    rows = list(corpus.read(shard))
    assert [row.key for row in rows] == list(corpus.keys(shard))
    assert rows[-1].problem == "unreadable_shard"


def test_what_inflates_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paris_ray.corpora.webdataset.MAX_KEPT_BYTES", 1000)
    members = {"0.png": bytes(100_000), "0.txt": b"a", "1.png": b"x", "1.txt": b"b"}
    for name, mode in (("a.tar", "w"), ("b.tgz", "w:gz")):
        write_tar(tmp_path / name, members, mode)
        config = CorpusConfig(kind="webdataset", path=str(tmp_path / name), max_image_bytes=1000)
        rows = read_all(config)
        assert problems(rows) == {f"{name}/0": "too_many_bytes", f"{name}/1": None}
        assert "it has 100000 bytes, at most 1000 are read" in rows[0].detail


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_inflates_is_damage(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tgz"
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 24
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("0.png", "0.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        members = buffer.getvalue()[: tar.offset]
    path.write_bytes(gzip.compress(members + header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    rows = read(path)
    assert rows[0] == RawRow("a.tgz/0", b"x", "x")
    assert rows[1].problem == "unreadable_shard" and "a header of 16777216 bytes" in rows[1].detail


def test_a_sample_of_many_members_that_inflate_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_ray.corpora.webdataset.MAX_KEPT_BYTES", 1000)
    members = {"0.txt": b"a", "0.png": b"x", "0.jpg": bytes(990), "1.jpg": bytes(990)}
    write_tar(tmp_path / "a.tgz", members | {"1.png": bytes(990), "1.txt": b"b"}, "w:gz")
    rows = read(tmp_path)
    assert problems(rows) == {"a.tgz/0": None, "a.tgz/1": None}
    assert [len(row.image or b"") for row in rows] == [990, 990]
