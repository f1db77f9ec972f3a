"""Two sites, each with a Ray of its own and pictures that the other never sees, make one bundle.

With CHAOS=1, as `make chaos` does; tests/unit/roster has what needs no Ray.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.local_cluster import LocalCluster
from paris_ray.artifacts import read_manifest
from paris_ray.bundle import load_bundle
from paris_ray.config import Config, load
from paris_ray.embeddings import read_table
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.run import BUNDLE, CLUSTERS, ENCODERS, EXPERT_WEIGHTS, Run
from paris_ray.sampling import generate
from tests.long_tests import chaos

pytestmark = [pytest.mark.ray, chaos]

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds of a command
SITES = {"east": 0, "west": 1}  # and the one cluster of which it has rows


def job(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=environment or dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def federate(*arguments: str) -> str:
    return job("jobs.federate", *arguments)


def write_corpus(coordinator: Run, cluster: int, source: Path, target: Path) -> None:
    """Write the pictures of one cluster, held-out ones too, as a corpus of their own."""
    folders = (coordinator.shard(cluster), coordinator.held_out_shard(cluster))
    tables = [read_table(folder, ["key"]) for folder in folders if folder.exists()]
    keys = {key for table in tables for key in table["key"].to_pylist()}
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    target.mkdir()
    with (target / "metadata.jsonl").open("w") as metadata:
        for row in rows:
            if row["file_name"] in keys:
                shutil.copy(source / row["file_name"], target)
                metadata.write(json.dumps(row) + "\n")


@pytest.fixture
def rays(tmp_path: Path) -> Iterator[dict[str, LocalCluster]]:
    """A Ray for each site; started one after the other, since each looks for free ports."""
    clusters = {name: LocalCluster(tmp_path / f"{name}-ray") for name in SITES}
    try:
        for cluster in clusters.values():
            cluster.start()
        yield clusters
    finally:
        for cluster in clusters.values():
            cluster.stop()


def train_site(cluster: LocalCluster, config: Path) -> None:
    """Prepare and train on a Ray of the site's own."""
    ray = str(Path(sys.executable).parent / "ray")
    for verb in ("prepare", "train_experts"):
        command = [ray, "job", "submit", "--working-dir", ".", "--", sys.executable]
        done = subprocess.run(
            [*command, "-m", f"jobs.{verb}", "--config", str(config)],
            cwd=REPOSITORY,
            env=cluster.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout[-5000:]


def test_two_sites_with_rays_of_their_own_make_one_bundle(
    prepared: Config, shapes_corpus: Path, rays: dict[str, LocalCluster], tmp_path: Path
) -> None:
    from paris_ray.pipeline.stages import run

    run(prepared, "train_router")
    me, mine = str(tmp_path / "me"), f"{prepared.run_dir}/router/resolved_config.yaml"
    keys = {name: Identity.create(tmp_path / f"{name}-key").public_key for name in SITES}
    coordinator = Identity.create(tmp_path / "me").public_key
    sites = [f"--site={name}={keys[name]}:{cluster}" for name, cluster in SITES.items()]
    given = str(tmp_path / "federation")
    own = ["--identity", me, "--config", mine]
    federate("init", *own, "--name", "ours", "--output", given, *sites)
    for name, cluster in SITES.items():
        corpus = tmp_path / f"{name}-pictures"
        write_corpus(Run(prepared), cluster, shapes_corpus, corpus)
        who = ["--identity", str(tmp_path / f"{name}-key"), "--run-dir", str(tmp_path / name)]
        options = ["corpus.kind=image_folder", f"corpus.path={corpus}", "corpus.rows_per_shard=16"]
        federate("join", *who, "--federation", given, "--coordinator", coordinator, *options)
    with ThreadPoolExecutor() as pool:
        configs = [tmp_path / name / "site.yaml" for name in SITES]
        list(pool.map(train_site, rays.values(), configs))
    submissions = []
    for name, cluster in SITES.items():
        site = Run(load(str(tmp_path / name / "site.yaml")))
        sizes = read_manifest(site.clusters, CLUSTERS).facts["sizes"]
        assert [k for k, size in enumerate(sizes) if size] == [cluster]
        given_files = read_manifest(Run(prepared).encoders, ENCODERS).files
        assert read_manifest(site.encoders, ENCODERS).files == given_files
        folder = str(tmp_path / f"{name}-submission")
        who = ["--identity", str(tmp_path / f"{name}-key")]
        config = ["--config", str(tmp_path / name / "site.yaml")]
        told = federate("submit", *who, *config, "--output", folder)
        assert f"{name} hands over: weights of expert {cluster}; row counts" in told
        submissions += ["--submission", folder]
    output = tmp_path / "ours"
    federate("assemble", *own, "--federation", given, *submissions, "--output", str(output))
    bundle = load_bundle(str(output / "bundle"))
    pictures = generate(bundle, ["a red square", "a blue circle"], num_inference_steps=3)
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert read_manifest(Folder(output) / "bundle", BUNDLE).facts["router_from"] == "statistics"
    for name, cluster in SITES.items():
        trained = Run(load(str(tmp_path / name / "site.yaml"))).expert(cluster)
        part = bundle.parts[f"expert_{cluster}"]
        assert part.read(EXPERT_WEIGHTS) == trained.read(EXPERT_WEIGHTS)
