"""The command line of the jobs, as a user types it; nothing here starts Ray."""

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import RayTaskError

from jobs.command import mendable, parser, reported
from jobs.quickstart import why_it_failed
from paris_ray.config import load
from paris_ray.encoders.folders import TEXT_ENCODER_FILES, VAE_FILES, tokenizer_files
from paris_ray.encoders.images import TIMM_FILES
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder
from paris_ray.pipeline.stage import StageTimer
from paris_ray.planning import plan, render
from tests.small_corpora import rows_of, write_parquet

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = REPOSITORY / "docs" / "training.md"
VERBS = ("prepare", "train_experts", "train_router", "evaluate", "export", "pipeline")


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_job(verb: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", f"jobs.{verb}", *arguments], **environment)


def test_a_fleet_is_planned_for_people_and_for_machines(tmp_path: Path) -> None:
    told = tmp_path / "plan.json"
    command = ("plan", "--config", "paris_xl2", "--fleet", "docs/examples/fleet.yaml")
    result = run_job(*command, "--json", str(told))
    assert result.returncode == 0
    assert re.search(r"\nexpert 0 +H100 1 +bfloat16 ", result.stdout)
    assert re.search(r"\nthis plan +11,000,000 +14\.4 ", result.stdout)
    document = json.loads(told.read_text())
    assert len(document["assignments"]) == 9
    refused = run_job(*command, "--json", str(tmp_path / "none" / "plan.json"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: --json={tmp_path}/none/plan.json cannot be written")


def test_a_run_without_a_ledger_has_taken_nothing_that_is_known(tmp_path: Path) -> None:
    result = run_job("plan", f"run_dir={tmp_path}", "--ledger")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} has no ledger/: no stage of it has")


def test_a_ledger_is_not_planned(tmp_path: Path) -> None:
    result = run_job("plan", f"run_dir={tmp_path}", "--ledger", "--json", str(tmp_path / "it"))
    assert result.returncode == 2
    assert "--ledger tells of what is finished: not with --fleet" in result.stderr


def test_a_study_lists_its_arms() -> None:
    result = run_job("study", "--small", "--dry-run")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["dense.0", "256", "steps,", "drawn", "4", "x"]
    assert any(line.startswith("seeded-share-0.5.0 ") for line in lines)
    refused = run_job("study", "--small", "--dry-run", "--output", "study.txt")
    assert refused.returncode == 2
    assert "--output='study.txt' is not allowed: a name that ends in .md" in refused.stderr


def test_an_ablation_lists_its_arms() -> None:
    result = run_job("ablate", "--recipes", "muon", "--seeds", "1", "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    names = [line.split()[0] for line in result.stdout.splitlines()]
    lengths = ("-x0.5", "-x0.625", "")
    assert names == [f"{recipe}{length}.0" for recipe in ("base", "muon") for length in lengths]
    for option, value, allowed in (
        ("--recipes", "moon", "recipe='moon' is not allowed: one of alignment, "),
        ("--write", "ablation.txt", "--write='ablation.txt' is not allowed: a name that ends in"),
        ("--seeds", "0", "--seeds=0 is not allowed: at least 1"),
        ("--known", "no.json", "--known='no.json' is not allowed: a .json of this job and version"),
    ):
        refused = run_job("ablate", option, value, "--dry-run")
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {allowed}")


def test_a_corpus_is_inspected_without_ray(tmp_path: Path) -> None:
    path, page = write_parquet(tmp_path / "corpus", rows_of(5)), tmp_path / "page.html"
    result = run_job("inspect", f"corpus.path={path}", "--output", str(page))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("parquet: 5 of 5 rows read are good\n")
    assert str(page) in result.stdout.splitlines()[-1]
    assert page.read_bytes().startswith(b"<!doctype html>")
    absent = run_job("inspect", f"corpus.path={tmp_path / 'absent'}", "--output", str(page))
    assert absent.returncode == 2
    assert absent.stderr.startswith("error: ") and absent.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "verb", [*VERBS, "quickstart", "study", "ablate", "distil", "inspect", "roster"]
)
def test_help_shows_the_command(verb: str) -> None:
    result = run_job(verb, "--help")
    assert result.returncode == 0
    assert f"python -m jobs.{verb}" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_offers_a_dry_run(verb: str) -> None:
    assert "--dry-run" in run_job(verb, "--help").stdout


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    check = (
        "import resource, sys; from jobs.command import run_job;"
        "run_job('', 'pipeline');"
        "assert 'ray' not in sys.modules, 'ray was imported';"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run_dir = tmp_path / "run"
    arguments = ["--config", "paris_xl2", "seed=1", "--dry-run", f"run_dir={run_dir}"]
    result = run([sys.executable, "-c", check, *arguments])
    assert result.returncode == 0, result.stderr
    assert re.search(r"^expert 0-7 +605,970,448 ", result.stdout, re.MULTILINE)
    fits = r"^8 x A40, 48 GB\n  expert 0-7: fits, in bfloat16$"
    assert re.search(fits, result.stdout, re.MULTILINE)
    assert not run_dir.exists()
    peak_bytes = 1024 * int(result.stdout.splitlines()[-1])
    assert peak_bytes < 4 * 605_970_448, "one XL/2 expert in float32 would take as much"


@pytest.mark.parametrize(
    ("routing", "experts_asked"), [("top-3", 3), ("top-p:0.9", 8), ("agree:0.5", 2)]
)
def test_a_dry_run_of_distil_has_the_distillation_in_it(routing: str, experts_asked: int) -> None:
    override = f"sampling.routing={routing}"
    result = run_job("distil", "--dry-run", override)
    assert result.returncode == 0, result.stderr
    expected = render(plan(load("quickstart", [override]), distilled_from=experts_asked))
    assert result.stdout == f"{expected}\n"


def test_a_dry_run_of_distil_refuses_what_it_would_refuse() -> None:
    oracle = ("evaluation.name=oracle", "evaluation.oracle=true")
    result = run_job("distil", "--dry-run", *oracle)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: evaluation.oracle=True is not allowed: false")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.accumulation_steps=7", "error: training.accumulation_steps=7 is not allowed"),
        ("sampling.routing=top-9", "error: routing='top-9'"),
        ("experts.8.training.steps=1", "error: experts='8' is not allowed"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would_refuse(override: str, message: str) -> None:
    result = run_job("train_experts", "--config", "paris_b2", "--dry-run", override)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stdout == ""


def test_an_unknown_key_is_refused_with_the_allowed_ones() -> None:
    result = run_job("prepare", "training.stepz=5")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown key 'training.stepz'; allowed here: ")
    assert ", steps, " in result.stderr


def test_an_unknown_config_is_refused_with_the_packaged_names() -> None:
    result = run_job("pipeline", "--config", "nowhere")
    assert result.returncode == 2
    assert "quickstart" in result.stderr


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_submitted_job_refuses_a_relative_path(dry: list[str]) -> None:
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    result = run_job("pipeline", "run_dir=runs/mine", *dry, **submitted)
    assert result.returncode == 2
    assert "run_dir='runs/mine' is relative" in result.stderr
    assert "run_dir=$PWD/runs/mine" in result.stderr


def test_a_submitted_job_says_that_its_configuration_was_not_sent(tmp_path: Path) -> None:
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    result = run_job("pipeline", "--config", "runs/mine.yaml", "--dry-run", **submitted)
    assert result.returncode == 2
    assert "error: config='runs/mine.yaml' is not in the copy of the working" in result.stderr
    assert "absolute path" in result.stderr


def test_code_and_configurations_alone_are_sent_with_a_job(tmp_path: Path) -> None:
    """As Ray packs a folder, which may be a checkout with pictures and runs in it."""
    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    sent = ["jobs/prepare.py", "paris_ray/configs/quickstart.yaml", "serve/web/page.js", "my.yaml"]
    kept = ["data/000.tar", "d/x.tar", "pictures.tar", "data/0.yaml", "runs/mine.yaml", ".git/x"]
    for name in [*sent, *kept]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPOSITORY / name, checkout)
    create_package(str(checkout), package, include_gitignore=True, excludes=[])
    with ZipFile(package) as archive:
        assert sorted(name for name in archive.namelist() if name[-1] != "/") == sorted(sent)


def test_a_folder_too_large_to_send_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    traceback = "Traceback ...\nRuntimeError: Request failed with status code 413: Maximum request"
    message = why_it_failed(traceback)
    assert "more than the 100 MiB" in message
    assert ".rayignore" in message
    assert "its log is above" in why_it_failed("Job 'x' failed\n")
    assert capsys.readouterr().err == "Job 'x' failed\n"


def test_a_store_out_of_reach_is_refused_before_anything_starts() -> None:
    uri = "s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    result = run_job("prepare", f"run_dir={uri}", **keys)
    assert result.returncode == 2
    assert result.stderr.startswith("error: run_dir: s3://bucket/run cannot be reached (")
    assert len(result.stderr.splitlines()) == 1


# --- what of an error its reader can mend -------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
UNFINISHED = ArtifactError("no finished router at runs/x")


def from_task(cause: Exception) -> Exception:
    """The error as Ray raises it on the driver."""
    error: Exception = RayTaskError("task", "Traceback: long", cause, ip="127.0.0.1")
    return error.as_instanceof_cause()  # type: ignore[attr-defined, no-any-return]


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("around it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("wrap", [lambda e: e, from_task, caused_by])
def test_what_can_be_mended_is_found_in_the_chain_of_causes(wrap: Any) -> None:
    assert mendable(wrap(UNFINISHED)) is UNFINISHED
    assert mendable(from_task(wrap(UNFINISHED))) is UNFINISHED
    told = str(mendable(wrap(FULL)))
    assert "No space left on device" in told
    assert "make room in" in told
    assert "Traceback" not in told
    assert mendable(wrap(KeyError("a bug"))) is None


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(KeyError, match="a bug"), reported():
        raise KeyError("a bug")


def test_what_can_be_mended_ends_the_job_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, reported():
        raise from_task(OSError(errno.ENOSPC, "No space left on device", "/runs/x"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 28] No space left on device")
    assert "make room in /runs/x" in error
    assert error.count("\n") == 1


def test_where_a_stage_failed_its_time_may_fail_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load("quickstart", [f"run_dir={tmp_path}/file/run"])
    with pytest.raises(KeyError, match="why"), StageTimer(config, "prepare"):
        raise KeyError("why")
    with pytest.raises(ArtifactError, match="cannot be written"), StageTimer(config, "prepare"):
        pass


# --- docs/training.md ---------------------------------------------------------------------------


def code_lines(kind: str) -> list[str]:
    """Return the lines of all code blocks of a kind, continued ones joined."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def spans() -> list[str]:
    """Return what stands between single backticks."""
    prose = re.sub(r"^```.*?^```", "", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", prose)


def job_commands() -> list[list[str]]:
    """Return module and arguments of every `python -m jobs...` of the guide."""
    found = [line.partition("python -m ")[2] for line in code_lines("sh") + spans()]
    return [shlex.split(command) for command in found if command]


def test_every_job_of_the_guide_exists() -> None:
    commands = job_commands()
    assert {f"jobs.{verb}" for verb in VERBS} <= {module for module, *_ in commands}
    for module, *_ in commands:
        assert importlib.util.find_spec(module), f"docs/training.md: there is no {module}"


def test_every_command_of_the_guide_would_run() -> None:
    for module, *arguments in job_commands():
        if module.removeprefix("jobs.") in VERBS and arguments:
            parsed = parser("").parse_intermixed_args(arguments)
            load(parsed.config, parsed.overrides)


def test_every_override_of_the_guide_is_allowed() -> None:
    tokens = [token for text in code_lines("sh") + spans() for token in text_tokens(text)]
    overrides = [token for token in tokens if re.match(r"[a-z_]+(\.\w+)+=", token)]
    assert len(overrides) > 20
    for override in overrides:
        try:
            load("paris_xl2", [override])
        except ConfigError:  # some are of MiniLM, which only the quickstart has
            load("quickstart", [override])


def text_tokens(text: str) -> list[str]:
    return shlex.split(text) if text.count("'") % 2 == 0 else []


def test_the_guide_quotes_the_dry_run() -> None:
    printed = render(plan(load("paris_xl2"))).splitlines()
    quoted = code_lines("text")
    assert quoted
    assert set(quoted) <= set(printed)


def test_the_guide_fetches_the_files_that_are_read(tmp_path: Path) -> None:
    words = [shlex.split(line) for line in code_lines("sh") if line.startswith("hf download")]
    fetched = {name: set(files) for _, _, name, *files, _, _ in words}
    config = load("paris_xl2")
    assert fetched[str(config.codec.path)] == set(VAE_FILES)
    assert fetched[str(config.features.checkpoint)] == set(TIMM_FILES)
    assert fetched[str(config.text.path)] >= set(TEXT_ENCODER_FILES)
    for name in fetched[str(config.text.path)]:
        (tmp_path / name).touch()
    assert tokenizer_files(Folder(tmp_path))  # raises if they do not suffice


def options() -> list[tuple[str, str, str]]:
    """Return option, value of the paper's configurations and of the quickstart, as tabulated."""
    rows = [line.split("|") for line in GUIDE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 7]
    return [(c[2].strip("`"), c[3], c[4]) for c in cells if re.fullmatch(r"`[a-z_]+\.\w+`", c[2])]


packaged = cache(load)


def value_of(name: str, option: str) -> Any:
    section, key = option.split(".")
    value = getattr(getattr(packaged(name), section), key)
    return list(value) if isinstance(value, tuple) else value


def tabulated(text: str) -> Any:
    """Return a value as YAML reads it; 1e-4 too, which YAML takes for text."""
    value = yaml.safe_load(text)
    return float(value) if re.fullmatch(r"\d+e-\d+", text) else value


def test_the_table_of_options_says_what_the_configurations_say() -> None:
    assert len(options()) > 30
    for option, paper, quickstart in options():
        assert tabulated(quickstart) == value_of("quickstart", option), option
        xl2, _, b2 = paper.removesuffix(")").partition(" (B/2: ")
        assert tabulated(xl2) == value_of("paris_xl2", option), option
        assert tabulated(b2 or xl2) == value_of("paris_b2", option), option
