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
from pathlib import Path

from jobs.command import log_to_stdout, reported
from jobs.comparison import comparing, comparison_parser, read_comparison, told_command

PAGE = Path("docs/study.md")


def main() -> None:
    """Parse the command line and run the study, or only list its arms."""
    options = comparison_parser(__doc__ or "", page="--output", default=PAGE)
    options.add_argument("--small", action="store_true", help="the small form")
    arguments = options.parse_intermixed_args()
    log_to_stdout()
    with reported():
        _study(arguments)


def _study(arguments: argparse.Namespace) -> None:
    # Imported only now: it imports torch, and --help is quick.
    from paris_ray.study.forms import FULL_FORM, SMALL_FORM
    from paris_ray.study.plan import study_arms, study_config

    form = SMALL_FORM if arguments.small else FULL_FORM
    config, known = read_comparison(arguments, form.overrides)
    if arguments.dry_run:
        for arm in study_arms(study_config(config), form):
            print(f"{arm.folder:32} {arm.total_steps:6,} steps, drawn {len(arm.drawings) + 1} x")
        return
    with comparing(config, arguments.address) as placed:
        # Imported only now: ray reads RAY_AUTH_MODE when it is imported.
        from paris_ray.pipeline.study import run_study

        command, output = told_command("jobs.study"), arguments.page.resolve()
        run_study(placed, form, output, command=command, known=known)


if __name__ == "__main__":
    main()
