"""Corpora in stores that URIs name, and patterns of several paths."""

import io
import os
import re
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from paris_ray.config import CorpusConfig, load
from paris_ray.corpora import corpus_version, not_fetched, open_corpus
from paris_ray.corpora.paths import list_files
from paris_ray.corpora.places import RemotePath, place
from paris_ray.errors import ArtifactError, ConfigError, CorpusError
from paris_ray.folders import Folder
from paris_ray.storage import joined_uri
from tests.corpus_files import png, read_all, write_files, write_tar
from tests.small_corpora import LAYOUTS, rows_of


class _WithRanges(SimpleHTTPRequestHandler):
    """Serves files, and parts of them, as stores do."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def list_directory(self, path: Any) -> None:
        self.send_error(403)  # as most servers do

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        self.send_header("Accept-Ranges", "bytes")
        if path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address at which a web server shows the files of the test's folder."""
    handler = partial(_WithRanges, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_reads_the_same_from_a_store(kind: Any, tmp_path: Path) -> None:
    folder = LAYOUTS[kind](tmp_path / "a corpus #1", rows_of(5))
    here = CorpusConfig(kind=kind, path=str(folder), rows_per_shard=2)
    there = replace(here, path=f"file://{tmp_path}/a%20corpus%20%231/")
    rows = read_all(here)
    assert len(rows) == 5 and all(row.problem is None for row in rows)
    assert read_all(there) == rows
    before = corpus_version(open_corpus(there))
    assert before == corpus_version(open_corpus(there))
    for path in (path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, (0, 0))
    assert corpus_version(open_corpus(there)) != before


def test_a_damaged_tar_in_a_store_says_so_row_by_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.png": png() for i in range(9)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[: len(content) // 3])
    here = CorpusConfig(kind="webdataset", path=str(tmp_path))
    rows = read_all(here)
    assert {row.problem for row in rows} == {"missing_caption", "unreadable_shard"}
    assert read_all(replace(here, path=f"file://{tmp_path}")) == rows


def test_names_of_strangers_never_lead_out_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    names = ("../secret.png", "/secret.png", "a/../../secret.png", "file:///secret.png")
    lines = "".join(f'{{"file_name": "{name}", "text": "a"}}\n' for name in names)
    folder = write_files(tmp_path / "corpus", {"metadata.jsonl": lines})
    rows = read_all(CorpusConfig(kind="image_folder", path=f"file://{folder}"))
    assert [row.problem for row in rows] == ["missing_file"] * 4
    assert all(row.image is None for row in rows)


def test_tars_are_read_from_a_web_server(tmp_path: Path, web: str) -> None:
    for number in range(3):
        content = {"x.png": png(), "x.txt": f"picture {number}".encode()}
        write_tar(tmp_path / f"{number:02d}.tar", content)
    rows = read_all(CorpusConfig(kind="webdataset", path=f"{web}/{{00..02}}.tar"))
    assert [(row.key, row.caption) for row in rows] == [
        (f"{number:02d}.tar/x", f"picture {number}") for number in range(3)
    ]
    (alone,) = read_all(CorpusConfig(kind="webdataset", path=f"{web}/01.tar"))
    assert (alone.key, alone.caption) == ("01.tar/x", "picture 1")


def test_a_parquet_file_is_read_from_a_web_server(tmp_path: Path, web: str) -> None:
    LAYOUTS["parquet"](tmp_path / "table", rows_of(5))
    rows = read_all(CorpusConfig(kind="parquet", path=f"{web}/table/part.parquet"))
    assert [row.caption for row in rows] == [caption for _, caption in rows_of(5)]


def test_addresses_of_the_web_stay_as_they_are_written(tmp_path: Path, web: str) -> None:
    write_tar(tmp_path / "a #1.tar", {"x.png": png(), "x.txt": b"here"})
    config = CorpusConfig(kind="webdataset", path=f"{web}/a%20%231.tar?download=true")
    (row,) = read_all(config)
    assert (row.key, row.caption) == ("a #1.tar/x", "here")
    assert not_fetched(config) == {}


def test_a_file_of_the_web_that_changed_is_noticed(tmp_path: Path, web: str) -> None:
    config = CorpusConfig(kind="webdataset", path=f"{web}/a.tar")
    versions = set()
    for caption in (b"one", b"two"):  # of the same length
        write_tar(tmp_path / "a.tar", {"x.png": png(), "x.txt": caption})
        versions.add(corpus_version(open_corpus(config)))
    assert len(versions) == 2


def test_names_of_strangers_never_lead_out_of_the_web_folder(tmp_path: Path) -> None:
    root = RemotePath("http://127.0.0.1:1/corpus")
    for name in ("../x.png", "%2e%2e/x.png", "a/../../x.png", "/x.png", "//other/x.png"):
        path = root / name
        assert path.uri.startswith("http://127.0.0.1:1/")
        assert "/%2e" not in path.uri and not path.uri.endswith("1/%2e%2e/x.png")


def test_what_is_not_there_is_told(web: str) -> None:
    for path in (f"{web}/absent.tar", f"{web}/absent/*.tar", "file:///absent"):
        with pytest.raises(CorpusError, match=r"corpus\.path='.*absent.* does not exist"):
            open_corpus(CorpusConfig(kind="webdataset", path=path))
    with pytest.raises(ArtifactError, match="'nothing://x' names no store that can be opened"):
        open_corpus(CorpusConfig(kind="webdataset", path="nothing://x"))


def test_a_web_server_that_does_not_answer_is_out_of_reach() -> None:
    address = "http://127.0.0.1:1/a"  # nobody listens there
    for path in (address, f"{address}/*.tar", f"{address}/{{0..3}}.tar"):
        expected = re.escape(f"corpus.path={path!r} cannot be looked up: {path} is out of reach: ")
        with pytest.raises(CorpusError, match=expected):
            open_corpus(CorpusConfig(kind="webdataset", path=path))


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a web server that answers everything with one status."""

    class Failing(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.tar"
        server.shutdown()


@pytest.mark.parametrize("failing", [401, 403, 500, 503], indirect=True)
def test_a_web_server_that_refuses_is_out_of_reach(failing: str) -> None:
    with pytest.raises(CorpusError, match=r"is out of reach: ClientResponseError: [45]0"):
        open_corpus(CorpusConfig(kind="webdataset", path=failing))


def test_a_web_server_need_not_say_that_a_pattern_is_no_file(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket answers so to whoever may not list it."""

    def forbid(self: SimpleHTTPRequestHandler, *_: Any) -> None:
        SimpleHTTPRequestHandler.send_error(self, 403)

    monkeypatch.setattr(_WithRanges, "send_error", forbid)
    for name in "01":
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png(), f"{name}.txt": name.encode()})
    rows = read_all(CorpusConfig(kind="webdataset", path=f"{web}/{{0..1}}.tar"))
    assert [row.caption for row in rows] == ["0", "1"]
    with pytest.raises(CorpusError, match="is out of reach: ClientResponseError: 403"):
        open_corpus(CorpusConfig(kind="webdataset", path=f"{web}/2.tar"))
    assert (place(f"{web}/1.tar").is_file(), place(f"{web}/2.tar").is_file()) == (True, False)


@pytest.mark.parametrize("failing", [404, 410], indirect=True)
def test_what_a_web_server_calls_absent_does_not_exist(failing: str) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.path='.*' does not exist"):
        open_corpus(CorpusConfig(kind="webdataset", path=failing))


def test_a_web_server_that_is_mute_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paris_ray.storage.WEB_ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        path = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        with pytest.raises(CorpusError, match=r"is out of reach: .*[Tt]imeout"):
            open_corpus(CorpusConfig(kind="webdataset", path=path))


def test_a_web_server_that_hangs_up_is_out_of_reach() -> None:
    def hang_up(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(1 << 16)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        path = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        with pytest.raises(CorpusError, match="is out of reach: ServerDisconnectedError"):
            open_corpus(CorpusConfig(kind="webdataset", path=path))
        server.shutdown(socket.SHUT_RDWR)


FILES = ("a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar", "c/0.tar", "c/notes.txt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/0.tar", ["a/0.tar", "b/0.tar", "c/0.tar"]),
        ("{a,b}", ["a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar"]),
        ("{a,b}/*", ["a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar"]),
        ("b/*/*.tar", ["b/deep/2.tar"]),
        ("[a-c]/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "c/0.tar"]),
        ("[ac]/0.tar", ["a/0.tar", "c/0.tar"]),
        ("a/{0..1}.tar", ["0.tar", "1.tar"]),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_patterns_name_several_paths(
    pattern: str, expected: list[str], scheme: str, tmp_path: Path
) -> None:
    write_files(tmp_path, dict.fromkeys(FILES, ""))
    config = CorpusConfig(kind="webdataset", path=f"{scheme}{tmp_path}/{pattern}")
    root = place(f"{scheme}{tmp_path}/a" if pattern.startswith("a/") else f"{scheme}{tmp_path}")
    files = list_files(config, [".tar"])
    found = [path.relative_to(root).as_posix() for path in files]  # type: ignore[arg-type]
    assert found == expected


def test_a_folder_with_signs_of_patterns_in_its_name_is_that_folder(tmp_path: Path) -> None:
    write_files(tmp_path, {"run [1]/0.tar": "", "run 1/1.tar": ""})
    config = CorpusConfig(kind="webdataset", path=str(tmp_path / "run [1]"))
    assert [path.name for path in list_files(config, [".tar"])] == ["0.tar"]


def test_a_pattern_of_no_paths_or_too_many_is_refused_before_they_are_made(tmp_path: Path) -> None:
    """Of none the whole folder would be read."""
    for pattern in ("{0..9999999999}.tar", "{000..999}{000..999}.tar", "{9..1}.tar"):
        config = CorpusConfig(kind="webdataset", path=f"{tmp_path}/{pattern}")
        with pytest.raises(CorpusError, match=r"stands for \d+ paths: expected 1 to 100000"):
            open_corpus(config)


def test_a_path_that_stands_twice_in_a_pattern_is_read_once(tmp_path: Path) -> None:
    write_files(tmp_path, dict.fromkeys(FILES, ""))
    for pattern in ("{a,a}/0.tar", "{a,a/0.tar}"):
        config = CorpusConfig(kind="webdataset", path=f"{tmp_path}/{pattern}")
        found = [path.name for path in list_files(config, [".tar"])]
        assert sorted(set(found)) == sorted(found)


def test_a_pattern_that_matches_nothing_is_told(tmp_path: Path) -> None:
    write_files(tmp_path, dict.fromkeys(FILES, ""))
    for pattern in ("*.tar", "{d,e}"):
        config = CorpusConfig(kind="webdataset", path=f"{tmp_path}/{pattern}")
        with pytest.raises(CorpusError, match=r"corpus\.path=.* (holds no|does not exist)"):
            open_corpus(config).shards()


@pytest.mark.parametrize(
    "key",
    ["corpus.path", "run_dir", "training.init_from", "experts.1.training.init_from"],
)
@pytest.mark.parametrize(
    "uri", ["s3://name:se/cret@bucket/a", "https://bucket/a?X-Amz-Signature=secret"]
)
def test_keys_in_a_uri_are_refused_before_they_are_written_anywhere(key: str, uri: str) -> None:
    overrides = ["corpus.kind=webdataset", "corpus.path=/data", f"{key}={uri}"]
    with pytest.raises(ConfigError) as caught:
        load("quickstart", overrides)
    shown = f"{uri.partition(':')[0]}://...bucket/a"
    assert str(caught.value) == (
        f"{key}={shown!r} is not allowed: a URI without keys, which would be written into files of "
        "the run; stores find theirs in the environment (AWS_ACCESS_KEY_ID and others)"
    )


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account.dfs.core.windows.net/x",
        "gs://anonymous@bucket/x",
        "s3://bucket/a@b/c",
        "s3://bucket/x?endpoint_override=127.0.0.1:9000&scheme=http&region=eu",
        "/data/a:b@c?key=1",
    ],
)
def test_other_uris_are_allowed(uri: str) -> None:
    assert load("quickstart", ["corpus.kind=webdataset", f"corpus.path={uri}"]).corpus.path == uri


def test_a_uri_keeps_its_options_at_its_end() -> None:
    uri = "s3://bucket/corpus/?endpoint_override=127.0.0.1:9000&scheme=http"
    options = uri.partition("?")[2]
    assert joined_uri(uri, "a", "b.tar") == f"s3://bucket/corpus/a/b.tar?{options}"
    assert joined_uri("s3://bucket", "a") == "s3://bucket/a"
    assert (Folder("file:///tmp/run?x=1") / "experts").uri == "file:///tmp/run/experts?x=1"
    path = RemotePath("s3://bucket/corpus") / "50% #1?.png"
    assert (path.name, path.suffix) == ("50% #1?.png", ".png")
    assert path.parent == RemotePath("s3://bucket/corpus")
    assert path.relative_to(path.parent) == PurePosixPath("50% #1?.png")


def test_links_within_a_tar_of_a_store_are_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", png()), ("0.txt", b"first"), ("1.txt", b"second")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    rows = read_all(CorpusConfig(kind="webdataset", path=f"file://{tmp_path}/a.tar"))
    assert [(row.image, row.caption) for row in rows] == [(png(), "first"), (png(), "second")]
