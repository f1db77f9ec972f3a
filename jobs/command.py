"""What all jobs share: arguments, logging, a Ray to run on, and errors that a person can read."""

import argparse
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.local_cluster import LOOPBACK_ONLY
from paris_ray.config import (
    Config,
    check_place,
    load,
    local_paths,
    packaged_configs,
    packaged_recipes,
    with_absolute_paths,
)
from paris_ray.errors import ArtifactError, ConfigError, ParisError, SpendingCapError
from paris_ray.storage import disk_is_full, is_uri, reach

EXIT_USER_ERROR = 2
EXIT_CAP_REACHED = 3  # of what a training may spend: it is saved, and may go on
RAY_DATA_ADDS = "\nFailed to apply UDF"
# Ray's job manager sets this for the drivers that it starts.
SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def run_job(description: str, verb: str) -> None:
    """Parse the command line, connect to Ray, run a verb of the pipeline; or only show the plan.

    Args:
        description: The job's docstring, shown by `--help`.
        verb: What to do, a name that `paris_ray.pipeline.stages.run` knows.
    """
    arguments = parser(description).parse_intermixed_args()
    log_to_stdout()
    with reported():
        refuse_absent_config(arguments.config)
        config = load(arguments.config, arguments.overrides)
        refuse_relative_paths(local_paths(config))
        if arguments.dry_run:
            _print_plan(config, verb)
            return
        config = with_absolute_paths(config)
        refuse_unreachable(local_paths(config))
        with ray_session(arguments.address):
            # Imported only now: ray reads RAY_AUTH_MODE when it is imported, and --help is quick.
            from paris_ray.pipeline.stages import run

            run(config, verb)


def parser(description: str, *, dry_run: bool = True) -> argparse.ArgumentParser:
    """Return the argument parser that all jobs share; `--dry-run` is for those that start much."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names, recipes = ", ".join(packaged_configs()), ", ".join(packaged_recipes())
    told = f"a YAML file, or one of: {names}; +NAME adds a recipe, as quickstart+muon: {recipes}"
    result.add_argument("--config", default="quickstart", help=told)
    result.add_argument(
        "--address", help="Ray cluster; default: RAY_ADDRESS, else a Ray of its own"
    )
    if dry_run:
        result.add_argument(
            "--dry-run",
            action="store_true",
            help="print what the whole run will take (memory, disk, steps, days, dollars) and stop",
        )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    return result


def log_to_stdout() -> None:
    """Show progress as plain lines, which `ray job logs` also keeps."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("paris_ray").setLevel(logging.INFO)


@contextmanager
def reported() -> Iterator[None]:
    """End the process with one line for an error that the user can mend; others pass.

    Raises:
        SystemExit: with the code that `fail` returns.
    """
    try:
        yield
    except Exception as error:
        told = mendable(error)
        if told is None:
            raise
        sys.exit(fail(told))


def mendable(error: BaseException) -> ParisError | None:
    """Return what of an error its reader can mend, however deep in its causes; None: nothing.

    Ray hands over what a task raised as an error of Ray's and of the same type, whose text is a
    traceback; its attribute `cause` is the original. Behind that text Ray Data tells of retries.
    """
    each: BaseException | None = error
    while each is not None:
        original = getattr(each, "cause", None)
        if isinstance(original, BaseException):
            each = original
            continue
        if isinstance(each, ParisError):
            told, ray_data, _ = str(each).partition(RAY_DATA_ADDS)
            return ParisError(told) if ray_data else each
        if disk_is_full(each):
            place = getattr(each, "filename", None) or f"{tempfile.gettempdir()} (TMPDIR)"
            return ParisError(f"{each}: make room in {place}, on every node, and run again")
        each = each.__cause__
    return None


def fail(error: ParisError) -> int:
    """Print an error that the user can mend; return the exit code."""
    if isinstance(error, SpendingCapError):
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return EXIT_CAP_REACHED
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _print_plan(config: Config, verb: str) -> None:
    # Imported only now: they import torch, and --help is quick.
    from paris_ray.planning import plan, render
    from paris_ray.sampling_options import parse_routing

    num_experts = config.cluster.num_clusters
    routing = parse_routing(config.sampling.routing, num_experts)
    asked = routing.top_k or num_experts  # the other strategies may ask all
    print(render(plan(config, distilled_from=asked if verb == "distil" else None)))


def refuse_relative_paths(paths: Mapping[str, str]) -> None:
    """Raise ConfigError if this is a submitted job and a path, given by its option, is relative.

    Such a job runs in a copy of the working folder: what it writes there would vanish with it.
    """
    if SUBMITTED_JOB_VARIABLE not in os.environ:
        return
    for field, path in paths.items():
        if not is_uri(path) and not Path(path).is_absolute():
            raise ConfigError(
                f"{field}={path!r} is relative, but a submitted job runs in a copy of the working "
                f"folder: give an absolute path or a URI, for example {field}=$PWD/{path}"
            )


def refuse_absent_config(config: str) -> None:
    """Raise ConfigError if this is a submitted job, and its `--config` was not sent along."""
    if SUBMITTED_JOB_VARIABLE not in os.environ or Path(config).suffix != ".yaml":
        return
    if not Path(config).is_file():
        raise ConfigError(
            f"config={config!r} is not in the copy of the working folder that a submitted job runs "
            "in: that has the .yaml files of the folder itself, and nothing that .gitignore or "
            ".rayignore names; put it there, or give an absolute path on the head node"
        )


def refuse_unreachable(paths: Mapping[str, str]) -> None:
    """Raise ConfigError, before anything is started, if an `s3://` place of a job does not answer.

    Nor may any place hold keys of its store.

    Args:
        paths: By the option that gives each.
    """
    for field, path in paths.items():
        check_place(field, path)
        if not path.startswith("s3://"):
            continue
        try:
            reach(path)
        except ArtifactError as error:
            raise ConfigError(f"{field}: {error}") from None


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to the given cluster, or to RAY_ADDRESS, or start and stop a Ray of our own."""
    if address is None and "RAY_ADDRESS" not in os.environ:
        # Whoever reaches a Ray cluster can run code on it, so even a private one gets a token.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= token | LOOPBACK_ONLY
        address = "local"
    import ray

    # Tasks keep their own logs, one an expert, in the dashboard; the terminal shows the driver's.
    dashboard = False if address == "local" else None
    ray.init(address=address, log_to_driver=False, include_dashboard=dashboard)
    try:
        yield
    finally:
        ray.shutdown()
