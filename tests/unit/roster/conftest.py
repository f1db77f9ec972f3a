"""A run as training leaves it, of tiny random experts, and the bundle that was exported from it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from paris_ray.artifacts import publish, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.cluster_facts import ClusterFacts, write_clusters
from paris_ray.config import Config, load
from paris_ray.embeddings import to_table, write_null_text, write_part
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.roster.changes import Roster
from paris_ray.run import BUNDLE, ENCODERS, EXPERT, SHARD, Run
from tests.conftest import NUM_EXPERTS, open_parts

ROWS = 60
CAPTIONS = ("a red cat", "a blue dog", "a green circle", "a square cloud")


@dataclass(frozen=True)
class Made:
    """A run and its bundle."""

    config: Config
    bundle: str

    @property
    def run(self) -> Run:
        return Run(self.config)

    def roster(self, bundle: str | None = None, more: tuple[str, ...] = ()) -> Roster:
        return Roster(bundle or self.bundle, self.config, more)


def write_shard(folder: Folder, cluster: int, *, seed: int = 0, null_text: float = 0.0) -> str:
    """Rows of a cluster, which text and latents tell; return the digest of their manifest."""
    generator = np.random.default_rng([seed, cluster])
    text = 0.1 * generator.standard_normal((ROWS, 1, 16))
    text[:, :, 2 * cluster] += 3
    latents = generator.standard_normal((ROWS, 8, 4, 4))
    latents[:, cluster] += 3
    columns = {
        "key": [f"{cluster}-{i}" for i in range(ROWS)],
        "caption": [f"{CAPTIONS[cluster]} {i}" for i in range(ROWS)],
        "thumbnail": [b"a picture"] * ROWS,
        "latents": latents.astype(np.float16),
        "text_embedding": text.astype(np.float16),
    }
    for name, rows in (("part-0.parquet", slice(40)), ("part-1.parquet", slice(40, None))):
        write_part(folder, name, to_table({key: values[rows] for key, values in columns.items()}))
    write_null_text(folder, np.full(16, null_text, np.float32))
    facts = {"rows": ROWS}
    return publish(folder, SHARD, config_digest="", parents={}, facts=facts).digest


def publish_expert(folder: Folder, shard: str) -> None:
    publish(folder, EXPERT, config_digest="", parents={"shard": shard}, facts={})


def write_run(parts: Path, root: Path, *, seed: int = 0) -> Made:
    """Write a run of the tiny parts, and its bundle."""
    counts = (f"cluster.num_clusters={NUM_EXPERTS}", f"router.num_experts={NUM_EXPERTS}")
    config = load("quickstart", [f"run_dir={root}", *counts])
    run = Run(config)
    for k in range(NUM_EXPERTS):
        shutil.copytree(parts / f"expert_{k}", run.expert(k).local_path)
        publish_expert(run.expert(k), write_shard(run.shard(k), k, seed=seed))
    for name in ("codec", "text_encoder"):
        shutil.copytree(parts / name, run.encoders.local_path / name)
    publish(run.encoders, ENCODERS, config_digest="", parents={}, facts={})
    _export(parts, run)
    return Made(config, run.bundle.uri)


def _export(parts: Path, run: Run) -> None:
    loose = open_parts(parts)
    sampling = replace(loose.facts.sampling, routing="top-1")
    facts = replace(loose.facts, sampling=sampling, example_prompts=CAPTIONS[:NUM_EXPERTS])
    told = [ClusterFacts(rows=ROWS, words=[f"word{k}"], pictures=[]) for k in range(NUM_EXPERTS)]
    write_clusters(run.bundle / "clusters", told)
    write_bundle(Bundle(loose.parts, facts), run.bundle, model_card="# tiny\n\n## Use\n")
    publish(run.bundle, BUNDLE, config_digest="", parents={}, facts={"evaluation": 1})
    assert "history.json" not in read_manifest(run.bundle, BUNDLE).files


@pytest.fixture(scope="session")
def made(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run and its bundle; tests must not change them."""
    return write_run(tiny_parts, tmp_path_factory.mktemp("roster") / "run")


@pytest.fixture
def other_run(tiny_parts: Path, tmp_path: Path) -> Callable[[int], Made]:
    """A function that writes a run of the same experts, on rows of another seed."""
    return lambda seed: write_run(tiny_parts, tmp_path / f"run-{seed}", seed=seed)
