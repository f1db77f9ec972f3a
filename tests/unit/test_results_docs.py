"""docs/results.md is written by a command: it has a place for each section, and no other."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "tests" / "benchmarks"
WRITE = """
import sys, pathlib, sections
sections.write_section(pathlib.Path(sys.argv[1]), sys.argv[2], "new")
"""
DOCUMENT = """before
<!-- bench: a -->
old
<!-- end -->
between
<!-- bench: b -->
<!-- end -->
after
"""


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)


def test_the_document_has_exactly_the_sections_of_the_command() -> None:
    listed = run("import results; print(*results.SECTIONS)").stdout.split()
    found = re.findall(r"<!-- bench: (.+) -->", (REPOSITORY / "docs" / "results.md").read_text())
    assert found == listed


def test_a_section_replaces_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT)
    for _ in range(2):
        assert run(WRITE, str(path), "a").returncode == 0
        assert path.read_text() == DOCUMENT.replace("old", "\nnew\n")


def test_a_section_without_a_place_is_refused_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT)
    refused = run(WRITE, str(path), "c")
    assert refused.returncode == 1
    assert "has no place for c" in refused.stderr
    assert path.read_text() == DOCUMENT
