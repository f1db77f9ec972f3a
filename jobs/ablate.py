r"""What training recipes are worth: one model with each, beside one without, three seeds each.

    python -m jobs.ablate --config quickstart                                   # hours
    python -m jobs.ablate --config quickstart --recipes muon,muon+layersync --seeds 1 --steps 512

Prints a table: held-out accuracy at equal samples and at equal CPU-seconds, and when each recipe
comes to the quality of the plain one. `--write docs/ablation.md` writes it there, and a .json
beside it. The runs are in run_dir (runs/ablation): those that are finished are kept, an
interrupted one continues. `--known docs/ablation.json` takes the numbers of arms that are
configured as they were then from that file. `--dry-run` lists the arms. A training takes
training.num_cpus of the cluster, which may be a share of one. docs/training.md has the recipes.
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
from paris_ray.config import load, local_paths, packaged_recipes, with_absolute_paths
from paris_ray.errors import ConfigError

RUN_DIR = "runs/ablation"


def main() -> None:
    """Parse the command line and run the ablation, or only list its arms."""
    options = parser(__doc__ or "")
    told = "names with commas between them, several at once joined by +; default: each alone"
    options.add_argument("--recipes", default=",".join(packaged_recipes()), help=told)
    options.add_argument("--steps", type=int, default=2048, help="of the longest trainings")
    options.add_argument("--seeds", type=int, default=3, help="runs of every arm")
    options.add_argument("--known", type=Path, help="an ablation.json: its arms are not run again")
    options.add_argument("--write", type=Path, help="the page, such as docs/ablation.md")
    arguments = options.parse_intermixed_args()
    log_to_stdout()
    with reported():
        _ablate(arguments)


def _ablate(arguments: argparse.Namespace) -> None:
    # Imported only now: it imports torch, and --help is quick.
    from paris_ray.study.ablation import AblationForm, ablation_arms, ablation_config, compare
    from paris_ray.study.ablation_page import ablation_table, verdict

    _check(arguments)
    refuse_absent_config(arguments.config)
    config = load(arguments.config, [f"run_dir={RUN_DIR}", *arguments.overrides])
    given = {"--known": arguments.known, "--write": arguments.write}
    places = {option: str(path) for option, path in given.items() if path is not None}
    refuse_relative_paths(local_paths(config) | places)
    known = earlier_arms(arguments.known)
    form = AblationForm(total_steps=arguments.steps, seeds=arguments.seeds)
    recipes = arguments.recipes.split(",")
    arms = ablation_arms(ablation_config(config), form, recipes)
    if arguments.dry_run:
        for arm in arms:
            print(f"{arm.folder:32} {arm.total_steps:6,} steps")
        return
    refuse_unreachable(local_paths(config))
    with ray_session(arguments.address):
        # Imported only now: ray reads RAY_AUTH_MODE when it is imported.
        from paris_ray.pipeline.ablation import run_ablation

        # Where the runs are is this machine's affair, and changes no number.
        told = [each for each in sys.argv[1:] if not each.startswith("run_dir=")]
        ablation = run_ablation(
            with_absolute_paths(config),
            form,
            recipes,
            command=shlex.join(["python", "-m", "jobs.ablate", *told]),
            output=None if arguments.write is None else arguments.write.resolve(),
            known=known,
        )
    compared = compare(ablation["arms"])
    print(f"{ablation_table(compared)}\n\n{verdict(compared)}")


def _check(arguments: argparse.Namespace) -> None:
    for option, value in (("--steps", arguments.steps), ("--seeds", arguments.seeds)):
        if value < 1:
            raise ConfigError(f"{option}={value} is not allowed: at least 1")
    if arguments.write is not None and arguments.write.suffix != ".md":
        write = str(arguments.write)
        raise ConfigError(f"--write={write!r} is not allowed: a name that ends in .md")


if __name__ == "__main__":
    main()
