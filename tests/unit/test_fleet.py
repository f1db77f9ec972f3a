"""A fleet from a file: what it says, what is refused, and what is planned with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from paris_ray.config import Config, load, to_yaml, with_fleet
from paris_ray.errors import ConfigError
from paris_ray.planning import Plan, document, plan, render
from paris_ray.planning.accounting import A100_DAY_FLOPS, DDM, PARIS, compare, cost_of

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "fleet.yaml"


@pytest.fixture(scope="module")
def config() -> Config:
    return load("paris_xl2")


@pytest.fixture(scope="module")
def example(config: Config) -> Plan:
    return plan(with_fleet(config, str(EXAMPLE)))


def of(config: Config, tmp_path: Path, text: str) -> Config:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return with_fleet(config, str(path))


def gpu(**own: object) -> str:
    return f"gpus: [{json.dumps({'name': 'GPU', 'count': 1} | own)}]"


def test_a_file_replaces_what_it_gives_and_nothing_else(config: Config, tmp_path: Path) -> None:
    fleet = of(config, tmp_path, "deadline_days: 3").fleet
    assert fleet == replace(config.fleet, deadline_days=3.0)
    assert of(config, tmp_path, to_yaml(fleet)).fleet == fleet
    assert [kind.name for kind in of(config, tmp_path, gpu()).fleet.gpus] == ["GPU"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fleet: {}", "unknown key 'fleet'; allowed here: num_images, cluster_rows, deadline_days"),
        ("gpus: [{nam: A40}]", r"gpus\[0\]: unknown key 'nam'; allowed here: name, count"),
        ("gpus: [{memory_gb: much}]", r"gpus\[0\]: memory_gb: Value 'much'"),
        ("[]", "does not hold a mapping"),
        ("gpus: [", "fleet.yaml' is not YAML"),
        (gpu(count=0), r"fleet.gpus\[0\].count=0 is not allowed: > 0"),
        (gpu(mfu=3), r"fleet.gpus\[0\].mfu=3.0 is not allowed: 0 < x <= 1"),
        (gpu(watts=-1), r"fleet.gpus\[0\].watts=-1.0 is not allowed: at least 0"),
        (gpu(preemptions_per_day=-1), r"preemptions_per_day=-1.0 is not allowed: at least 0"),
        (gpu(start_s=float("inf")), r"start_s=inf is not allowed: at least 0"),
        (gpu(samples_per_second={"exprt": 1}), "='exprt' is not allowed: only seed, expert, rout"),
        (gpu(samples_per_second={"expert": 0}), r"samples_per_second.expert=0.0 is not allowed"),
        (gpu(samples_per_second={"router": 1}), "is not allowed: with `expert`"),
        ("cluster_rows: [1, 2]", r"as many numbers of rows as cluster.num_clusters=8"),
        ("deadline_days: 0", r"fleet.deadline_days=0.0 is not allowed: > 0, or null"),
    ],
)
def test_bad_files_are_refused_by_field_value_and_what_is_allowed(
    config: Config, tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        of(config, tmp_path, text)


def test_a_file_that_is_not_there_is_named(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"fleet='nowhere\.yaml' is no file"):
        with_fleet(config, "nowhere.yaml")


def test_the_example_uses_its_machines_by_their_speed(example: Plan) -> None:
    schedule = example.schedule
    assert schedule is not None
    assert schedule.unplaced == ()
    where = [a.gpu for a in schedule.assignments if a.name.startswith("expert")]
    assert {name: where.count(name) for name in set(where)} == {
        "H100 1": 5,
        "A100 1": 2,
        "L40S 1": 1,
    }
    preempted = {a.gpu for a in schedule.assignments if a.preemptions}
    assert preempted == {"A100 1"}
    assert schedule.kwh is not None


def test_what_was_measured_counts_and_others_are_reckoned_from_it(
    config: Config, tmp_path: Path
) -> None:
    measured = gpu(samples_per_second={"expert": 100.0, "router": 500.0})
    smaller = replace(config, experts={"3": {"expert": {"num_layers": 14}}})
    expert, *_, router = plan(of(smaller, tmp_path, measured)).trainings
    assert 86_400 * expert.durations[0].work == pytest.approx(expert.samples_seen / 100)
    assert 86_400 * router.durations[0].work == pytest.approx(router.samples_seen / 500)
    half = plan(of(smaller, tmp_path, measured)).trainings[3]
    share = half.flops_per_image / expert.flops_per_image
    assert half.durations[0].work == pytest.approx(share * expert.durations[0].work)


def test_clusters_of_unlike_size_take_unlike_epochs(config: Config, tmp_path: Path) -> None:
    rows = [1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000]
    by_epochs = replace(config, training=replace(config.training, epochs=256.0))
    result = plan(of(by_epochs, tmp_path, f"cluster_rows: {rows}"))
    assert result.num_rows == sum(rows)
    assert [t.num_rows for t in result.trainings[:8]] == rows
    assert [t.num_steps for t in result.trainings[:8]] == rows


def test_what_does_not_fit_is_not_put_there_and_the_reason_is_told(
    config: Config, tmp_path: Path
) -> None:
    text = "gpus: [{name: small, count: 9, memory_gb: 16}, {name: large, count: 1, memory_gb: 80}]"
    result = plan(of(config, tmp_path, text))
    assert result.schedule is not None
    assert {a.gpu for a in result.schedule.assignments if a.name != "router"} == {"large 1"}
    told = r"needs 17.8 GB in bfloat16; would with accumulation_steps=32"
    assert f"expert 0-7: does not fit: {told}" in render(result)


def test_without_bfloat16_in_hardware_auto_is_float32_and_takes_more(
    config: Config, tmp_path: Path
) -> None:
    old, new = (
        plan(of(config, tmp_path, gpu(memory_gb=80, bfloat16=has))) for has in (False, True)
    )
    fits = old.trainings[0].fits[0], new.trainings[0].fits[0]
    assert [fit.precision for fit in fits] == ["float32", "bfloat16"]
    assert fits[0].num_bytes > fits[1].num_bytes
    assert old.schedule is not None
    assert {a.precision for a in old.schedule.assignments} == {"float32"}
    wanted = replace(config, training=replace(config.training, precision="bfloat16"))
    (refused,) = plan(of(wanted, tmp_path, gpu(memory_gb=80, bfloat16=False))).trainings[0].fits
    assert (refused.fits, refused.advice.split(",")[0]) == (False, "precision=float32")


def test_what_is_taken_away_too_often_trains_nothing(config: Config, tmp_path: Path) -> None:
    result = plan(of(config, tmp_path, gpu(preemptions_per_day=500)))
    assert result.schedule is not None
    assert "expert 0" in result.schedule.unplaced
    assert result.schedule.days is result.schedule.dollars is None
    assert "never ends: a preemption costs" in render(result)


def test_a_deadline_is_kept_by_the_cheapest_or_said_to_be_missed(
    config: Config, tmp_path: Path
) -> None:
    kinds = "gpus: [{name: fast, count: 2, peak_tflops: 800, dollars_per_hour: 8}, "
    kinds += "{name: slow, count: 8, peak_tflops: 200, dollars_per_hour: 1}]"
    fastest = plan(of(config, tmp_path, kinds)).schedule
    late = plan(of(config, tmp_path, f"{kinds}\ndeadline_days: 40"))
    missed = plan(of(config, tmp_path, f"{kinds}\ndeadline_days: 0.1"))
    assert fastest is not None
    assert late.schedule is not None
    assert fastest.days is not None
    assert late.schedule.days is not None
    assert fastest.days < late.schedule.days <= 40
    assert (late.schedule.dollars or 0) < (fastest.dollars or 0)
    assert missed.schedule == fastest
    assert "Deadline: 40 days, the cheapest found that keeps it." in render(late)
    assert "Deadline: 0.1 days, missed; this is the earliest found." in render(missed)
    assert document(late)["deadline_kept"] is True
    assert document(missed)["deadline_kept"] is False


def test_a_plan_for_machines_says_what_the_one_for_people_says(example: Plan) -> None:
    told = json.loads(json.dumps(document(example)))
    assert example.schedule is not None
    assert told["days"] == example.schedule.days
    assert told["dollars"] == example.schedule.dollars
    assert [a["name"] for a in told["assignments"]] == [
        *(f"expert {k}" for k in range(8)),
        "router",
    ]
    expert = told["trainings"][0]
    assert [kind["gpu"] for kind in expert["gpus"]] == ["H100", "A100", "L40S", "A40"]
    assert all(kind["fits"] and kind["would_fit_with"] is None for kind in expert["gpus"])
    without = document(plan(load("quickstart")))
    assert without["assignments"] == []
    assert "days" not in without


def test_the_papers_accounting_is_what_they_say() -> None:
    assert DDM.pictures / PARIS.pictures == pytest.approx(14.4, abs=0.05)
    assert DDM.a100_days / PARIS.a100_days == pytest.approx(16.3, abs=0.05)
    a40_days = 120 * 86_400 * 0.3 * 149.7e12
    assert cost_of(0, a40_days).a100_days == pytest.approx(72)
    lines = compare("this run", cost_of(8_000, A100_DAY_FLOPS / 1000)).splitlines()
    assert lines[1].split() == ["DDM", "158,000,000", "1.0", "1,176", "1.0"]
    assert lines[3].split() == ["this", "run", "8,000", "19,750", "0.001", "1,176,000"]
