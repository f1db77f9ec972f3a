"""The job: an expert's folder in, a signed verdict and a page out, and an exit code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
from admission_panels import CAPTIONS, NUM_EXPERTS, ROWS, latents, specialist, write_expert

from jobs.admit_expert import EXIT_FLAGGED, PAGE, main, open_look
from jobs.command import EXIT_USER_ERROR
from paris_ray.artifacts import MANIFEST, Folder, VerifiedFolder, publish
from paris_ray.bundle import bundle_digest, load_bundle
from paris_ray.bundle.admissions import VERDICT, Admission, parse_admission, require_admitted
from paris_ray.config import load
from paris_ray.embeddings import to_table, write_part
from paris_ray.encoders.images import register_packaged_models, save_open_clip
from paris_ray.identity import Identity
from paris_ray.run import BUNDLE, Run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bundle of specialists, held-out rows and an image model; and a key."""
    root = tmp_path_factory.mktemp("admission")
    bundle = root / "bundle"
    shutil.copytree(tiny_bundle_path, bundle)
    for cluster in range(NUM_EXPERTS):
        write_expert(specialist(cluster), bundle / f"expert_{cluster}")
    (bundle / MANIFEST).unlink()
    publish(Folder(bundle), BUNDLE, config_digest="", parents={}, facts={})
    run = Run(load("quickstart", [f"run_dir={root}"]))
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
    assert main(list(arguments(place, tmp_path, 0))) == EXIT_FLAGGED
    assert stated(tmp_path).outcome == "flagged"
    outcomes = {check.name: check.outcome for check in stated(tmp_path).checks}
    assert outcomes["form"] == "passed"
    assert outcomes["held-out losses"] == "flagged"


def test_what_cannot_be_examined_is_told_and_nothing_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], replica_threads: None
) -> None:
    write_expert(specialist(0), tmp_path)
    assert main(list(arguments(place, tmp_path, 3))) == EXIT_USER_ERROR
    assert "index=3 is not allowed: no row of that cluster is held out" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 10**9}))
    assert main(list(arguments(place, tmp_path, 0))) == EXIT_USER_ERROR
    assert "hidden_size" in capsys.readouterr().err
    assert not (tmp_path / "verdict").exists()
