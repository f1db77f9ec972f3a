"""What all jobs share: arguments, logging, a Ray to run on, and errors that a person can read."""

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.local_cluster import LOOPBACK_ONLY
from paris_ray.config import Config, load, local_paths, packaged_configs, with_absolute_paths
from paris_ray.errors import ConfigError, ParisError

EXIT_USER_ERROR = 2
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
    try:
        config = load(arguments.config, arguments.overrides)
        refuse_relative_paths(local_paths(config))
        if arguments.dry_run:
            _print_plan(config, verb)
            return
        config = with_absolute_paths(config)
        with ray_session(arguments.address):
            # Imported only now: ray reads RAY_AUTH_MODE when it is imported, and --help is quick.
            from paris_ray.pipeline.stages import run

            run(config, verb)
    except ParisError as error:
        # Ray hands an error of a task over together with its traceback; the cause says enough.
        sys.exit(fail(getattr(error, "cause", error)))


def parser(description: str) -> argparse.ArgumentParser:
    """Return the argument parser that all jobs share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(packaged_configs())
    result.add_argument("--config", default="quickstart", help=f"a YAML file, or one of: {names}")
    result.add_argument(
        "--address", help="Ray cluster; default: RAY_ADDRESS, else a Ray of its own"
    )
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


def fail(error: ParisError) -> int:
    """Print an error that the user can mend; return the exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _print_plan(config: Config, verb: str) -> None:
    # Imported only now: they import torch, and --help is quick.
    from paris_ray.planning import plan, render
    from paris_ray.sampling.routing import parse_routing

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
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{field}={path!r} is relative, but a submitted job runs in a copy of the working "
                f"folder: give an absolute path or a URI, for example {field}=$PWD/{path}"
            )


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
