"""The job: an expert's folder in, a signed verdict and a page out, and an exit code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest

from jobs import admit_expert
from jobs.admit_expert import EXIT_FLAGGED, PAGE, main, open_look
from jobs.command import EXIT_USER_ERROR
from paris_ray.artifacts import MANIFEST, VerifiedFolder, publish
from paris_ray.bundle import bundle_digest, load_bundle
from paris_ray.config import load
from paris_ray.embeddings import to_table, write_part
from paris_ray.encoders.images import register_packaged_models, save_open_clip
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.model_folder.admissions import VERDICT, Admission, parse_admission, require_admitted
from paris_ray.roster.admission.panel import Panel, held_out_shards
from paris_ray.roster.admission.readings import Check
from paris_ray.roster.admission.verdict import Findings
from paris_ray.run import BUNDLE, ENCODERS, EXPERT, Run
from tests.admission_panels import CAPTIONS, NUM_EXPERTS, ROWS, latents, specialist, write_expert

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bundle of specialists, held-out rows and an image model; and a key."""
    root = tmp_path_factory.mktemp("admission")
    bundle, run = root / "bundle", Run(load("quickstart", [f"run_dir={root}"]))
    shutil.copytree(tiny_bundle_path, bundle)
    for cluster in range(NUM_EXPERTS):
        write_expert(specialist(cluster), bundle / f"expert_{cluster}")
        write_expert(specialist(cluster), Path(run.expert(cluster).local_path))
        publish(run.expert(cluster), EXPERT, config_digest="", parents={}, facts={})
    republish(bundle)
    register_packaged_models()
    model = open_clip.create_model("paris-tiny", load_weights=False)
    save_open_clip(model, "paris-tiny", run.encoders / "features")
    look, codec = open_look(run), load_bundle(str(bundle)).codec
    for cluster in range(NUM_EXPERTS):
        rows = latents(cluster)
        columns = {
            "caption": CAPTIONS[cluster * ROWS : (cluster + 1) * ROWS],
            "latents": rows.numpy().astype(np.float16),
            "features": look(codec.decode(rows)),
        }
        write_part(run.held_out_shard(cluster), "part-0.parquet", to_table(columns))
    Identity.create(root / "me")
    return root


def republish(bundle: Path, **facts: Any) -> None:
    (bundle / MANIFEST).unlink()
    publish(Folder(bundle), BUNDLE, config_digest="", parents={}, facts=facts)


def arguments(place: Path, expert: Path, index: int) -> Sequence[str]:
    options = {
        "--expert": expert,
        "--index": index,
        "--bundle": place / "bundle",
        "--identity": place / "me",
        "--output": expert / "verdict",
        "--words": 20,
        "--seed": 0,
    }
    return [str(part) for pair in options.items() for part in pair] + [f"run_dir={place}"]


def stated(expert: Path) -> Admission:
    return parse_admission((expert / "verdict" / VERDICT).read_bytes(), VERDICT).admission


def test_an_honest_expert_is_admitted(place: Path, tmp_path: Path) -> None:
    write_expert(specialist(0, seed=40), tmp_path)
    command = [sys.executable, "-m", "jobs.admit_expert", *arguments(place, tmp_path, 0)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "copies of training pictures: not checked" in result.stdout
    verdict = (tmp_path / "verdict" / VERDICT).read_bytes()
    found = parse_admission(verdict, VERDICT)
    assert found.public_key == Identity.load(place / "me").public_key
    assert found.admission.outcome == "admitted"
    assert found.admission.bundle == bundle_digest(str(place / "bundle"))
    assert found.admission.seed == 0
    assert "<img" in (tmp_path / "verdict" / PAGE).read_text()
    expert = VerifiedFolder(Folder(tmp_path), None)
    assert require_admitted(verdict, VERDICT, expert) == found


def test_another_clusters_expert_is_flagged(
    place: Path, tmp_path: Path, replica_threads: None
) -> None:
    write_expert(specialist(1, seed=40), tmp_path)
    assert main(list(arguments(place, tmp_path, 0))) == EXIT_FLAGGED == 3, "a crash has 1"
    assert stated(tmp_path).outcome == "flagged"
    outcomes = {check.name: check.outcome for check in stated(tmp_path).checks}
    assert outcomes["form"] == "passed"
    assert outcomes["held-out losses"] == "flagged"


def test_what_cannot_be_examined_is_told_and_nothing_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], replica_threads: None
) -> None:
    write_expert(specialist(0), tmp_path)
    assert main(list(arguments(place, tmp_path, 3))) == EXIT_USER_ERROR
    assert "cluster=3 is not allowed: no row of it is held out" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 10**9}))
    assert main(list(arguments(place, tmp_path, 0))) == EXIT_USER_ERROR
    assert "hidden_size" in capsys.readouterr().err
    assert not (tmp_path / "verdict").exists()


@pytest.fixture
def turned(place: Path, tmp_path: Path) -> Path:
    """A copy of the bundle in which expert 0 has the weights of cluster 2, and 2 those of 0."""
    bundle = tmp_path / "turned"
    shutil.copytree(place / "bundle", bundle)
    for index in (0, 2):
        write_expert(specialist(2 - index), bundle / f"expert_{index}")
    republish(bundle)
    return bundle


def test_held_out_rows_follow_the_weights_of_their_expert(place: Path, turned: Path) -> None:
    run, bundle = Run(load("quickstart", [f"run_dir={place}"])), load_bundle(str(turned))
    shards = held_out_shards(bundle, run, 0, 2)
    assert [(j, shard.uri) for j, shard in shards.items()] == [
        (j, run.held_out_shard(2 - j).uri) for j in range(NUM_EXPERTS)
    ]
    with pytest.raises(BundleError, match="expert_2 is of the run's cluster 0: give --cluster"):
        held_out_shards(bundle, run, 0)
    with pytest.raises(BundleError, match="cluster=1 is not allowed: expert_1 is of that cluster"):
        held_out_shards(bundle, run, 0, 1)
    with pytest.raises(BundleError, match="cluster=7 is not allowed: no row of it is held out"):
        held_out_shards(bundle, run, 0, 7)


def test_an_expert_that_the_run_has_not_trained_is_named(place: Path, turned: Path) -> None:
    write_expert(specialist(1, seed=9), turned / "expert_1")
    republish(turned)
    run, bundle = Run(load("quickstart", [f"run_dir={place}"])), load_bundle(str(turned))
    with pytest.raises(BundleError, match="expert_1 of the bundle was not trained by"):
        held_out_shards(bundle, run, 0, 2)
    assert list(held_out_shards(bundle, run, 1, 1)) == [0, 1, 2]


def test_a_candidate_is_examined_on_its_cluster_in_a_bundle_of_another_order(
    place: Path,
    turned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replica_threads: None,
) -> None:
    panels: list[Panel] = []

    def examine(panel: Panel, *arguments: Any, **options: Any) -> Findings:
        panels.append(panel)
        republish(turned, changed="meanwhile")
        return Findings((Check("form", (), "x" * notes.pop()),), np.empty((0, 1, 1, 3), np.uint8))

    notes = [301, 300]
    monkeypatch.setattr(admit_expert, "examine", examine)
    write_expert(specialist(2, seed=40), tmp_path / "it")
    options = [*arguments(place, tmp_path / "it", 0), "--bundle", str(turned), "--cluster", "2"]
    before = bundle_digest(str(turned))
    assert main(options) == 0
    assert stated(tmp_path / "it").bundle == before, "of the bundle that was examined"
    captions = panels[0].held_out.captions
    own = {captions[i] for i in panels[0].held_out.of(0)}
    assert own == set(CAPTIONS[2 * ROWS :])
    shutil.rmtree(tmp_path / "it" / "verdict")
    assert main(options) == EXIT_USER_ERROR, "a note that nobody could read again"
    assert not (tmp_path / "it" / "verdict").exists()


def test_the_runs_encoders_are_the_bundles(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], replica_threads: None
) -> None:
    write_expert(specialist(0), tmp_path)
    run = Run(load("quickstart", [f"run_dir={place}"]))
    publish(run.encoders, ENCODERS, config_digest="", parents={}, facts={})
    try:
        assert main(list(arguments(place, tmp_path, 0))) == EXIT_USER_ERROR
    finally:
        run.encoders.delete(MANIFEST)
    assert "is not the bundle's: experts of one bundle have one codec" in capsys.readouterr().err
