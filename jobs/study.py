r"""One dense model against isolated experts: many small runs, and the page that compares them.

    python -m jobs.study --config quickstart            # hours
    python -m jobs.study --config quickstart --small    # minutes; says little, tries everything

Writes docs/study.md, study.json beside it and charts in images/ (`--output`), and the runs to
run_dir (runs/study, or runs/study_small). Every arm is a run of its own, on encoders and embeddings
of one: arms that are finished are kept, an interrupted one continues. `--known docs/study.json`
takes the numbers of arms that are configured as they were then from that file. `--dry-run` lists
them. What
arms decide (experts, steps, clusters, shares, routing) is not taken from the configuration.
docs/training.md says more.
"""

import argparse
import shlex
import sys
from pathlib import Path

from jobs.command import (
    earlier_arms,
    log_to_stdout,
    parser,
    ray_session,
    refuse_absent_config,
    refuse_relative_paths,
    refuse_unreachable,
    reported,
)
from paris_ray.config import load, local_paths, with_absolute_paths
from paris_ray.errors import ConfigError


def main() -> None:
    """Parse the command line and run the study, or only list its arms."""
    options = parser(__doc__ or "")
    options.add_argument("--small", action="store_true", help="the small form")
    options.add_argument("--known", type=Path, help="a study.json: what it has is not run again")
    options.add_argument("--output", type=Path, default=Path("docs/study.md"), help="the page")
    arguments = options.parse_intermixed_args()
    log_to_stdout()
    with reported():
        _study(arguments)


def _study(arguments: argparse.Namespace) -> None:
    # Imported only now: it imports torch, and --help is quick.
    from paris_ray.study.forms import FULL_FORM, SMALL_FORM
    from paris_ray.study.plan import study_arms, study_config

    form, output = SMALL_FORM if arguments.small else FULL_FORM, arguments.output
    refuse_absent_config(arguments.config)
    config = load(arguments.config, [*form.overrides, *arguments.overrides])
    places = {"--output": str(output)}
    if arguments.known is not None:
        places["--known"] = str(arguments.known)
    refuse_relative_paths(local_paths(config) | places)
    known = earlier_arms(arguments.known)
    if output.suffix != ".md":
        raise ConfigError(f"--output={str(output)!r} is not allowed: a name that ends in .md")
    if arguments.dry_run:
        for arm in study_arms(study_config(config), form):
            print(f"{arm.folder:32} {arm.total_steps:6,} steps, drawn {len(arm.drawings) + 1} x")
        return
    refuse_unreachable(local_paths(config))
    with ray_session(arguments.address):
        # Imported only now: ray reads RAY_AUTH_MODE when it is imported.
        from paris_ray.pipeline.study import run_study

        # Where the runs are is this machine's affair, and changes no number.
        told = [given for given in sys.argv[1:] if not given.startswith("run_dir=")]
        command = shlex.join(["python", "-m", "jobs.study", *told])
        run_study(with_absolute_paths(config), form, output.resolve(), command=command, known=known)


if __name__ == "__main__":
    main()
