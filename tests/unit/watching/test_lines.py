"""Files of lines that somebody else writes: read once, never half, anew when they begin anew."""

import json
from pathlib import Path
from typing import Any

import pytest

from paris_ray.folders import Folder
from paris_ray.traffic import recorded
from paris_ray.watching import lines
from paris_ray.watching.lines import GrowingRows, number

NAME = "metrics.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def text(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def look(rows: GrowingRows) -> bool:
    return rows.look(rows.folder.stamp(NAME))


def test_new_lines_are_added_to_those_that_are_known(folder: Folder) -> None:
    rows = GrowingRows(folder, NAME)
    assert not look(rows) and rows.rows == []
    folder.write(NAME, text({"a": 1}))
    assert look(rows) and rows.rows == [{"a": 1}]
    first = rows.rows[0]
    folder.write(NAME, text({"a": 1}, {"a": 2}))
    assert look(rows) and rows.rows == [{"a": 1}, {"a": 2}]
    assert rows.rows[0] is first  # it was not read again


def test_a_file_that_did_not_change_is_not_opened(folder: Folder) -> None:
    folder.write(NAME, text({"a": 1}))
    rows = GrowingRows(folder, NAME)
    look(rows)
    with recorded() as traffic:
        assert not look(rows)
    assert not traffic.read


def test_a_last_line_without_its_end_waits(folder: Folder) -> None:
    rows = GrowingRows(folder, NAME)
    whole = text({"a": 1}, {"a": 2})
    folder.write(NAME, whole[:-1])  # even if it could be parsed
    look(rows)
    assert rows.rows == [{"a": 1}]
    folder.write(NAME, whole)
    look(rows)
    assert rows.rows == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("later", [3, 30])
def test_a_training_that_went_back_is_read_anew(folder: Folder, later: int) -> None:
    rows = GrowingRows(folder, NAME)
    folder.write(NAME, text(*({"n": i, "try": 1} for i in range(10))))
    look(rows)
    expected = [{"n": 0, "try": 1}, *({"n": i, "try": 2} for i in range(1, later))]
    folder.write(NAME, text(*expected))
    assert look(rows) and rows.rows == expected
    folder.delete(NAME)
    assert look(rows) and rows.rows == []


def test_the_version_changes_with_rows_of_the_same_number(folder: Folder) -> None:
    rows, versions = GrowingRows(folder, NAME), []
    for n in (1, 2, 2):
        folder.write(NAME, text({"n": n}))
        look(rows)
        versions.append(rows.version)
    assert versions[0] != versions[1] == versions[2]


def test_damaged_lines_are_left_out(folder: Folder) -> None:
    deep = b"[" * 100_000
    folder.write(NAME, b"\xff\n" + deep + b"\nnull\n[1]\n\n" + text({"a": 1}))
    rows = GrowingRows(folder, NAME)
    look(rows)
    assert rows.rows == [{"a": 1}]


def test_a_long_file_is_read_in_parts(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_BYTES_PER_LOOK", 64)
    expected = [{"n": i} for i in range(40)]
    folder.write(NAME, text(*expected))
    rows, looks = GrowingRows(folder, NAME), 0
    while look(rows):
        looks += 1
    assert rows.rows == expected and looks > 4


def test_an_endless_line_is_skipped(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_BYTES_PER_LOOK", 64)
    folder.write(NAME, b"x" * 1000 + b"\n" + text({"a": 1}))
    rows = GrowingRows(folder, NAME)
    for _ in range(30):
        look(rows)
    assert rows.rows == [{"a": 1}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), (0.5, 0.5), (True, None), ("1", None), (None, None), (10**400, None), (-1e16, None)]
    + [(float(word), None) for word in ("nan", "inf", "-inf")],
)
def test_a_number_is_finite_and_not_too_large(value: object, expected: float | None) -> None:
    assert number(value) == expected
