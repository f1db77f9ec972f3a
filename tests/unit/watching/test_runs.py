"""A run folder as it is watched: real trainings, finished, interrupted and not begun."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from paris_ray.artifacts import METRICS, PROGRESS, RESOLVED_CONFIG, SPENT, TIMINGS
from paris_ray.config import load, to_yaml
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.traffic import recorded
from paris_ray.watching import runs
from paris_ray.watching.facts import differences, flattened, forecast, router_facts
from paris_ray.watching.places import places
from paris_ray.watching.runs import MAX_STAGES, WatchedRun
from tests.watched_runs import (
    DOLLARS_PER_HOUR,
    NUM_PICTURES,
    captions,
    grid_of,
    train_one,
    write_run,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watched") / "run"
    write_run(Folder(path))
    return path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Folder:
    """A copy of the run to write in."""
    shutil.copytree(written, tmp_path / "run")
    return Folder(tmp_path / "run")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(run: Folder) -> tuple[WatchedRun, Clock]:
    clock = Clock()
    return WatchedRun(run.uri, clock=clock), clock


def models_of(run: WatchedRun) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in run.overview()["models"]}


def test_it_tells_how_far_every_model_is(written: Path) -> None:
    run, _ = watch(Folder(written))
    models = models_of(run)
    assert list(models) == ["expert-0", "expert-1", "expert-2", "router"]
    first, second, third = (models[f"expert-{k}"] for k in range(3))
    assert (first["state"], first["step"], first["num_steps"]) == ("finished", 12, 12)
    assert (first["samples_seen"], first["batch_size"], first["resumes"]) == (48, 4, 1)
    assert first["loss"] > 0 and first["held_out_loss"] > 0 and first["memory_bytes"] > 10**7
    assert first["grids"] == ["4", "8", "final"]
    assert (second["state"], second["step"], second["num_steps"]) == ("training", 6, 12)
    assert second["eta_s"] > 0 and second["compute_s"] > 0
    assert (third["state"], third["step"], third["grids"]) == ("waiting", None, [])
    overview = run.overview()
    assert overview["dollars_per_hour"] == DOLLARS_PER_HOUR
    assert overview["stages"] == [{"stage": "prepare", "seconds": 12.5, "failed": False}]
    assert overview["problem"] is None
    assert json.dumps(overview, allow_nan=False)


def test_curves_are_the_metrics_and_what_was_told_since(written: Path) -> None:
    run, _ = watch(Folder(written))
    model = run.model("expert-0")
    drawn = run.curves(model)
    rows = [json.loads(line) for line in model.folder.read(METRICS).splitlines()]
    points = [[samples, value] for samples, _, value in drawn["series"]["loss"]]
    assert points == [[row["samples_seen"], row["loss"]] for row in rows]
    held_out = [row["samples_seen"] for row in rows if "held_out_loss" in row]
    assert [point[0] for point in drawn["series"]["held_out_loss"]] == held_out == [16, 32, 48]
    assert [samples for samples, _ in drawn["resumes"]] == [40]  # the checkpoint was at 32
    interrupted = run.curves(run.model("expert-1"))["series"]["loss"]
    assert [point[0] for point in interrupted] == [8, 16, 24]  # the last is not in the file
    assert interrupted[-1][1] is None


def test_a_federations_site_waits_for_its_own_experts_alone(run: Folder) -> None:
    (run / "clusters").write(RESOLVED_CONFIG, b"federation: {experts: [0, 1]}")
    assert list(models_of(watch(run)[0])) == ["expert-0", "expert-1", "router"]


def test_a_training_that_goes_on_is_seen(run: Folder) -> None:
    watched, clock = watch(run)
    before = models_of(watched)["expert-1"]
    train_one(run, 1)
    assert models_of(watched)["expert-1"] == before  # nobody looks more often than that
    clock.now += 10
    after = models_of(watched)["expert-1"]
    assert (after["state"], after["step"]) == ("finished", 12)
    assert after["version"] != before["version"]
    assert after["grids"] == ["4", "8", "final"]


def test_a_look_reads_small_files_that_changed_and_no_others(run: Folder) -> None:
    watched, clock = watch(run)
    with recorded() as first:
        watched.overview()
    names = {uri.rpartition("/")[2] for uri in first.read}
    known = {METRICS, TIMINGS, PROGRESS, SPENT, RESOLVED_CONFIG, "clusters.json", "manifest.json"}
    assert names <= known
    clock.now += 10
    with recorded() as second:
        watched.overview()
    assert not second.read


def test_clusters_router_captions_and_grids(written: Path) -> None:
    run, _ = watch(Folder(written))
    clusters = run.clusters()["clusters"]
    assert [cluster["rows"] for cluster in clusters] == [NUM_PICTURES] * 3
    router = run.router()
    assert router["right_cluster"] == {"0.1": 0.9, "1": 0.5}
    assert router["levels"]["1"]["reliability"]["counts"] == [1, 3]
    model = run.model("expert-1")
    assert run.captions(model.place) == captions(1)
    assert run.captions(run.model("router").place) == []
    assert run.grid(model, "4", small=False) == grid_of(4)
    assert run.grid(model, "4", small=True) == grid_of(4)  # small already
    assert run.grid(model, "../../ray_token", small=False) is None
    assert run.model("../ray_token") is None


def test_a_run_that_has_nothing_yet_is_watched(tmp_path: Path) -> None:
    run, clock = watch(Folder(tmp_path))
    overview = run.overview()
    assert (overview["models"], overview["problem"]) == ([], None)
    assert run.clusters() == {"clusters": []} and run.router() == {}
    train_folder = Folder(tmp_path) / "experts/expert_5"
    train_folder.write_json(PROGRESS, {"step": 1, "samples_seen": 4, "num_steps": 2, "loss": 1.0})
    clock.now += 10
    assert models_of(run)["expert-5"]["state"] == "training"


def test_an_adapters_folder_is_a_run_of_one_model(tmp_path: Path, run: Folder) -> None:
    adapter = Folder(tmp_path / "adapter")
    for name in (METRICS, TIMINGS, "samples/step-000004.png", "samples.png"):
        adapter.write(name, (run / "experts/expert_0").read(name))
    watched, _ = watch(adapter)
    (model,) = watched.overview()["models"]
    assert (model["name"], model["state"]) == ("adapter", "training")
    assert model["grids"] == ["4", "final"] and model["samples_seen"] == 48


def test_damage_is_told_and_hides_nothing_else(run: Folder) -> None:
    (run / "clusters").write("clusters.json", b"[{}]")
    (run / "experts/expert_1").write(PROGRESS, b"[1")
    (run / "experts/expert_0").write(RESOLVED_CONFIG, b"a: &a [*a, *a]\n- b")
    watched, clock = watch(run)
    overview = watched.overview()
    assert "clusters.json is damaged" in overview["problem"]
    assert models_of(watched)["expert-0"]["state"] == "finished"
    assert models_of(watched)["expert-1"]["eta_s"] is None
    (run / "clusters").delete("clusters.json")
    clock.now += 10
    assert watched.overview()["problem"] is None


def test_a_file_that_cannot_be_read_hides_no_other_model(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_others(folder: Folder, name: str) -> Any:
        if is_away and folder.uri.endswith("expert_0"):
            raise ArtifactError(f"{folder.uri}/{name} cannot be read")
        return opened(folder, name)

    opened, is_away = Folder.open, True
    monkeypatch.setattr(Folder, "open", open_others)
    watched, clock = watch(run)
    overview = watched.overview()
    assert "expert_0/metrics.jsonl cannot be read" in overview["problem"]
    assert models_of(watched)["expert-1"]["step"] == 6
    is_away = False
    clock.now += 10
    assert models_of(watched)["expert-0"]["step"] == 12
    assert watched.overview()["problem"] is None
    assert watched.model("expert-0").settings  # which were away too


def test_what_is_paid_for_is_what_all_processes_took(run: Folder) -> None:
    """Also what was trained since the checkpoint that a killed process left."""
    first, second = run / "experts/expert_0", run / "experts/expert_1"
    first.write_json(SPENT, {"seconds": 5000.0})
    second.delete(SPENT)  # of a version that had none
    watched, _ = watch(run)
    models = models_of(watched)
    assert models["expert-0"]["compute_s"] == 5000.0
    assert 0 < models["expert-1"]["compute_s"] < 5000.0
    assert watched.overview()["forecast"]["computed_s"] > 5000.0


def test_the_price_is_the_trainings_own_or_else_the_fleets(run: Folder) -> None:
    assert watch(run)[0].overview()["dollars_per_hour"] == DOLLARS_PER_HOUR
    own = to_yaml(load("quickstart", ["training.dollars_per_hour=7"]))
    (run / "experts/expert_0").write(RESOLVED_CONFIG, own.encode())
    assert watch(run)[0].overview()["dollars_per_hour"] == 7
    given = WatchedRun(run.uri, dollars_per_hour=0.0)
    assert given.overview()["dollars_per_hour"] == 0


def test_numbers_without_measure_leave_an_overview(run: Folder) -> None:
    folder = run / "experts/expert_1"
    folder.write_json(PROGRESS, {"step": 1e-300, "samples_seen": 1e9, "eta_s": 1e999})
    row = {"samples_seen": 1e9, "unix_time": 1.0, "samples_per_second": 1e-308}
    folder.write(TIMINGS, json.dumps(row).encode() + b"\n")
    watched, _ = watch(run)
    assert json.dumps(watched.overview(), allow_nan=False)
    assert json.dumps(watched.curves(watched.model("expert-1")), allow_nan=False)


def test_of_many_stages_the_last_are_told(run: Folder) -> None:
    rows = [{"stage": f"stage {i}", "seconds": 1.0} for i in range(MAX_STAGES + 5)]
    run.write(TIMINGS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    stages = watch(run)[0].overview()["stages"]
    assert len(stages) == MAX_STAGES and stages[-1]["stage"] == rows[-1]["stage"]


def test_captions_of_other_clusters_are_read_anew(run: Folder) -> None:
    watched, clock = watch(run)
    place = watched.model("expert-0").place
    assert watched.captions(place) == captions(0)
    shards = (run / "clusters/shards").local_path
    shutil.rmtree(shards / "cluster=0")
    shutil.copytree(shards / "cluster=1", shards / "cluster=0")
    assert watched.captions(place) == captions(0)  # nothing tells of it yet
    facts = (run / "clusters").read("clusters.json")
    (run / "clusters").write("clusters.json", facts + b" ")
    clock.now += 10
    watched.overview()
    assert watched.captions(place) == captions(1)


def test_one_preview_is_made_at_a_time(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most = [], []

    def slow(payload: bytes, _source: str) -> bytes:
        at_once.append(payload)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.remove(payload)
        return payload

    monkeypatch.setattr(runs, "preview", slow)
    watched, _ = watch(Folder(written))
    model = watched.model("expert-0")
    asked = [
        threading.Thread(target=watched.grid, args=(model, told), kwargs={"small": True})
        for told in [*model.grids] * 3
    ]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert most == [1] * len(model.grids)  # each once


def model_at(state: str, expert: int | None, compute_s: float, eta_s: float | None) -> Any:
    return {"state": state, "expert": expert, "compute_s": compute_s, "eta_s": eta_s}


def test_the_forecast_counts_those_that_have_not_begun() -> None:
    models = [
        model_at("finished", None, 5.0, 0.0),  # the seed, whose length is no expert's
        model_at("finished", 0, 100.0, 0.0),
        model_at("training", 1, 60.0, 40.0),
        model_at("training", 2, 50.0, 70.0),
        model_at("waiting", 3, 0.0, None),
        model_at("waiting", 4, 0.0, None),
    ]
    told = forecast(models)
    assert told["computed_s"] == 215.0
    assert told["left_s"] == 40 + 70 + 2 * 100
    assert told["eta_s"] == pytest.approx(310 / 2)


@pytest.mark.parametrize(
    ("models", "left"),
    [
        ([], 0.0),
        ([model_at("finished", 0, 1.0, 0.0)], 0.0),
        ([model_at("waiting", 0, 0.0, None)], None),
        ([model_at("training", 0, 1.0, None)], None),
    ],
)
def test_the_forecast_says_where_it_knows_nothing(models: Any, left: float | None) -> None:
    assert forecast(models)["left_s"] == left


def test_a_routers_facts_may_be_anything() -> None:
    assert router_facts({"right_cluster": 3, "held_out": [1]}) == {}
    odd = {
        "right_cluster": {"1": "x"},
        "held_out": {"levels": {"1": {"reliability": {"counts": 1}}}},
    }
    told = router_facts(odd)
    assert told["right_cluster"] == {"1": None}
    assert told["levels"]["1"]["reliability"] == {}


def test_settings_differ_by_their_keys() -> None:
    one, other = (
        flattened({"a": {"b": b}, "c": [1], "d": {}}) | extra
        for b, extra in ((1, {}), (2, {"e": "x"}))
    )
    assert differences(one, other) == [["a.b", "1", "2"], ["e", None, "x"]]


def test_all_kinds_of_models_are_in_the_order_of_training() -> None:
    files = [
        "distilled/few_step/expert_0/metrics.jsonl",
        "experts/expert_12/metrics.jsonl",
        "router/progress.json",
        "seed/metrics.jsonl",
        "distilled/student/expert_0/metrics.jsonl",
        "experts/other/metrics.jsonl",
    ]
    names = [place.name for place in places(files, range(2))]
    assert names == ["seed", "expert-0", "expert-1", "expert-12", "router", "student", "few-step"]
