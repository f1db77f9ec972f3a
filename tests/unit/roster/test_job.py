"""`jobs.roster`, as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paris_ray.bundle import load_bundle
from paris_ray.identity import Identity
from tests.unit.roster.conftest import Made

REPOSITORY = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.roster", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def settings(made: Made) -> list[str]:
    return [
        "--config",
        "quickstart",
        f"run_dir={made.run.folder.uri}",
        "cluster.num_clusters=3",
        "router.num_experts=3",
    ]


def test_an_expert_leaves_and_another_comes(made: Made, tmp_path: Path) -> None:
    signer, without, again = Identity.create(tmp_path / "me"), tmp_path / "a", tmp_path / "b"
    done = run(
        *("retire", "--bundle", made.bundle, "--index", "1", "--output", str(without)),
        *("--data-of", "Museum of Cats", "--identity", str(tmp_path / "me"), *settings(made)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "roster: router (head) from 32 of 120 rows" in done.stdout
    assert f"roster: finished ({without})" in done.stdout
    expert, rows = made.run.expert(1).uri, made.run.shard(1).uri
    done = run(
        *("add", "--bundle", str(without), "--expert", expert, "--rows", rows),
        *("--output", str(again), "--refit", "all", *settings(made)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = load_bundle(str(again))
    assert [entry.event for entry in bundle.history] == ["exported", "retired", "added"]
    assert [entry.signed_by for entry in bundle.history] == [None, signer.public_key, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retire",), "retire needs --index"),
        (("add", "--expert", "e"), "add needs --rows"),
        (("add", "--index", "0", "--expert", "e", "--rows", "r"), "add takes no --index"),
        (("retire", "--index", "0", "--rows", "r"), "retire takes no --rows"),
        (("sell",), "invalid choice: 'sell'"),
    ],
)
def test_what_a_verb_lacks_is_said(arguments: tuple[str, ...], message: str) -> None:
    refused = run(*arguments, "--bundle", "absent", "--output", "new")
    assert refused.returncode == 2
    assert message in refused.stderr


def test_an_error_is_one_line(made: Made, tmp_path: Path) -> None:
    places = ("--bundle", made.bundle, "--output", str(tmp_path / "new"))
    refused = run("retire", "--index", "3", *places, *settings(made))
    assert refused.returncode == 2
    assert refused.stderr == "error: index=3 is not allowed: the bundle has experts 0 to 2\n"
