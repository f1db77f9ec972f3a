"""What trainings and encoders tell people while they run."""

import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from paris_ray.artifacts import PROGRESS
from paris_ray.config import load
from paris_ray.encoders.codec import PatchPCA
from paris_ray.folders import Folder
from paris_ray.pipeline.progress import ProgressFile
from paris_ray.pipeline.shards import ENDED, QUARANTINED, in_the_first
from paris_ray.run import Run
from paris_ray.training.loop import Progress

pytestmark = pytest.mark.ray
COUNTERS = ("ray_paris_prepare_busy_seconds_total", "ray_paris_prepare_rows_total")


@pytest.mark.parametrize(("mfu", "shown"), [(0.41, "MFU 0.41"), (None, "samples/s ETA")])
def test_the_mfu_is_told_where_it_is_known(
    ray_session: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mfu: float | None,
    shown: str,
) -> None:
    progress = Progress(
        step=5, num_steps=10, samples_seen=320, loss=0.5, samples_per_second=80, eta_s=4, mfu=mfu
    )
    ProgressFile(Folder(tmp_path), "expert-0")(progress)  # Ray refuses a gauge of None
    assert shown in capsys.readouterr().out
    assert Progress(**Folder(tmp_path).read_json(PROGRESS)) == progress


def test_encoders_and_writers_tell_ray_how_busy_they_are(ray_session: None, tmp_path: Path) -> None:
    import ray

    from paris_ray.pipeline.embedders import Encoders, LatentEmbedder
    from paris_ray.pipeline.shards import ShardWriter

    before = prepare_metrics()  # other tests share this Ray
    config = load("quickstart", [f"run_dir={tmp_path}"])
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    PatchPCA.fit(images, config.codec).save(Run(config).codec)
    batch = {
        "shard": np.full(3, "a-0"),
        "held_out": np.full(3, False),
        "row": np.arange(3),
        "key": np.array(["a", "b", "c"], dtype=object),
        "caption": np.array(["one", "two", "three"], dtype=object),
        "image": images,
        QUARANTINED: np.zeros(3, int),
        ENDED: in_the_first(1, 3),
    }
    encoders = ray.remote(Encoders).options(num_cpus=0.1).remote(config, [LatentEmbedder])
    writer = ray.remote(ShardWriter).options(num_cpus=0.1).remote(config)
    (piece,) = encoders.__call__.options(num_returns="streaming").remote(batch)
    ray.get(writer.__call__.remote(piece))
    deadline = time.monotonic() + 60  # processes report every second
    while True:
        found = Counter[str]()
        for labels, value in (prepare_metrics() - before).items():
            found[dict(labels).get("step", "rows")] += value
        if found["latents"] > 0 and found["rows"] >= 3:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def prepare_metrics() -> Counter[frozenset[tuple[str, str]]]:
    """Return what Prometheus would get of `prepare` now, by labels, which tell processes apart."""
    import ray

    found = Counter[frozenset[tuple[str, str]]]()
    for node in (node for node in ray.nodes() if node["Alive"]):
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for family in text_string_to_metric_families(httpx.get(url).text):
            for sample in family.samples:
                if sample.name in COUNTERS:
                    found[frozenset(sample.labels.items())] += sample.value
    return found
