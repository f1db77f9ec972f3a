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

from jobs.command import log_to_stdout, reported
from jobs.comparison import comparing, comparison_parser, read_comparison, told_command
from paris_ray.config import packaged_recipes
from paris_ray.errors import ConfigError

RUN_DIR = "runs/ablation"


def main() -> None:
    """Parse the command line and run the ablation, or only list its arms."""
    options = comparison_parser(__doc__ or "", page="--write")
    told = "names with commas between them, several at once joined by +; default: each alone"
    options.add_argument("--recipes", default=",".join(packaged_recipes()), help=told)
    options.add_argument("--steps", type=int, default=2048, help="of the longest trainings")
    options.add_argument("--seeds", type=int, default=3, help="runs of every arm")
    arguments = options.parse_intermixed_args()
    log_to_stdout()
    with reported():
        _ablate(arguments)


def _ablate(arguments: argparse.Namespace) -> None:
    # Imported only now: it imports torch, and --help is quick.
    from paris_ray.study.ablation import AblationForm, ablation_arms, ablation_config, compare
    from paris_ray.study.ablation_page import ablation_table, verdict

    for option, value in (("--steps", arguments.steps), ("--seeds", arguments.seeds)):
        if value < 1:
            raise ConfigError(f"{option}={value} is not allowed: at least 1")
    config, known = read_comparison(arguments, [f"run_dir={RUN_DIR}"])
    form = AblationForm(total_steps=arguments.steps, seeds=arguments.seeds)
    recipes = arguments.recipes.split(",")
    arms = ablation_arms(ablation_config(config), form, recipes)
    if arguments.dry_run:
        for arm in arms:
            print(f"{arm.folder:32} {arm.total_steps:6,} steps")
        return
    with comparing(config, arguments.address) as placed:
        # Imported only now: ray reads RAY_AUTH_MODE when it is imported.
        from paris_ray.pipeline.ablation import run_ablation

        ablation = run_ablation(
            placed,
            form,
            recipes,
            command=told_command("jobs.ablate"),
            output=None if arguments.page is None else arguments.page.resolve(),
            known=known,
        )
    compared = compare(ablation["arms"])
    print(f"{ablation_table(compared)}\n\n{verdict(compared)}")


if __name__ == "__main__":
    main()
