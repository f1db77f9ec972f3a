"""What a run took: written by its stages, read from its folder, told beside the papers."""

from pathlib import Path

import pytest

from paris_ray.artifacts import LEDGER, publish
from paris_ray.config import Config, TrainingConfig, load, load_lora
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.ledger import Taken, read_ledger, taken_by_job, write_taken
from paris_ray.models.flops import training_flops_per_image
from paris_ray.pipeline.stage import Stage
from paris_ray.planning import ledger_of
from paris_ray.run import CLUSTERS, Run
from paris_ray.training.spending import taken_by_training

MOVED = {"read": {"shard": 3_000_000}, "written": {"weights": 2_000_000, "other experts": 0}}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("quickstart", [f"run_dir={tmp_path / 'run'}"])


def stage(config: Config, folder: Folder) -> Stage:
    return Stage("part", folder, config, sections=("seed",), parents={})


def trained(config: Config, **training: float) -> Taken:
    return taken_by_training(
        config.expert,
        TrainingConfig(device="cpu", **training),
        text_length=24,
        samples=1_000,
        seconds=7_200,
        moved=MOVED,
    )


def test_a_training_is_told_in_samples_flops_hours_and_dollars(config: Config) -> None:
    taken = trained(config, dollars_per_hour=1.5)
    assert (taken.device, taken.samples, taken.hours, taken.dollars) == ("CPU", 1_000, 2.0, 3.0)
    assert taken.flops == 1_000 * training_flops_per_image(config.expert, 24)
    assert trained(config).dollars is None


def test_every_stage_writes_what_it_took_before_it_counts_as_finished(config: Config) -> None:
    run = Run(config)
    for folder, taken in ((run.expert(3), trained(config)), (run.bundle, None)):
        folder.write("weights", b"1234")
        folder.write("deep/er/file", b"12")
        with stage(config, folder).locked():
            stage(config, folder).publish({}, taken=taken)
    ledger = read_ledger(run.folder)
    assert list(ledger) == ["bundle", "experts/expert_3"]
    assert ledger["experts/expert_3"] == trained(config)
    bundle = ledger["bundle"]
    assert bundle.device is None
    assert 0 < bundle.hours < 1
    own = {"deep": 2, "files of its own": 4 + len(run.bundle.read("resolved_config.yaml"))}
    assert bundle.bytes == {"written": own}


def test_what_it_took_is_in_no_digest(config: Config) -> None:
    run = Run(config)
    run.bundle.write("weights", b"1234")
    first = stage(config, run.bundle).publish({}, taken=trained(config))
    again = stage(config, run.bundle).publish({}, taken=trained(config, dollars_per_hour=9))
    assert first.digest == again.digest
    assert not (run.bundle / LEDGER).exists()


def test_a_lora_has_its_ledger_in_its_own_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("adapter", b"1")
    made = Stage("lora", folder, load_lora("lora", []), sections=("lora",), parents={})
    assert made.publish({}).files.keys() == {"adapter"}
    assert list(read_ledger(folder)) == ["lora"]


def test_a_folder_that_is_absent_has_nothing(tmp_path: Path) -> None:
    assert taken_by_job(Folder(tmp_path / "none"), 3_600).bytes == {"written": {}}
    assert read_ledger(Folder(tmp_path)) == {}


def test_the_ledger_is_told_by_artefact_by_device_and_beside_the_papers(config: Config) -> None:
    run = Run(config)
    with pytest.raises(ArtifactError, match="has no ledger/: no stage of it has finished"):
        ledger_of(config)
    write_taken(run.folder, "experts/expert_0", trained(config, dollars_per_hour=1.0))
    write_taken(run.folder, "experts/expert_1", trained(config, dollars_per_hour=1.0))
    write_taken(run.folder, "evaluation", Taken(hours=0.5, bytes={"written": {"pictures": 7}}))
    publish(run.clusters, CLUSTERS, config_digest="", parents={}, facts={"sizes": [60, 40]})
    lines = [line.split() for line in ledger_of(config).splitlines()]
    assert lines[2][:4] == ["experts/expert_0", "CPU", "2.000", "1,000"]
    assert lines[2][-3:] == ["3.0", "2.0", "2.00"]
    assert ["CPU", "4.000", "4.00"] in lines
    (own,) = (line for line in lines if line[:2] == ["this", "run"])
    assert own[2:4] == ["100", "1,580,000"]
    (paris,) = (line for line in lines if line[:1] == ["Paris"])
    assert paris == ["Paris", "11,000,000", "14.4", "72.0", "16.3"]


@pytest.mark.parametrize("told", ["[]", "{}", '{"hours": "two"}', '{"hours": 1, "more": 2}'])
def test_a_damaged_entry_is_named(config: Config, told: str) -> None:
    folder = Run(config).folder
    folder.write(f"{LEDGER}/router.json", told.encode())
    with pytest.raises(ArtifactError, match=r"ledger/router\.json is damaged"):
        read_ledger(folder)
