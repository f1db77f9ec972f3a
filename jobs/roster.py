r"""Change the experts of a finished bundle: one joins, takes the place of another, or leaves.

Writes a new bundle; the old one stays. No expert is trained: all others' files are copied byte by
byte, and the router is refitted to a few rows of each cluster. Those are found in the run that
--config and key=value name, which has trained experts of the bundle; experts are known by the
digests of their weights, whatever their numbers are by now. docs/roster.md has a walk through.

    python -m jobs.roster retire --bundle runs/quickstart/bundle --index 3 --output bundles/without
    python -m jobs.roster add --bundle bundles/without --expert runs/quickstart/experts/expert_3 \
        --rows runs/quickstart/clusters/shards/cluster=3 --output bundles/again
    python -m jobs.roster replace --bundle runs/quickstart/bundle --index 3 \
        --expert runs/other/experts/expert_0 --rows runs/other/clusters/shards/cluster=0 \
        --data-of "Museum of Cats, CC BY 4.0" --identity keys/me --output bundles/cats

split writes no bundle, but a run whose two shards are the halves of a cluster, to train two experts
on: one to replace the old one, the other to add.

    python -m jobs.roster split --bundle runs/quickstart/bundle --index 3 --output runs/halves
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import (
    log_to_stdout,
    refuse_absent_config,
    refuse_relative_paths,
    refuse_unreachable,
    reported,
)
from paris_ray.config import Config, load, local_paths, packaged_configs, with_absolute_paths
from paris_ray.folders import Folder
from paris_ray.identity import Identity

if TYPE_CHECKING:
    from paris_ray.roster.changes import Roster
    from paris_ray.roster.successor import Change

# What each verb needs; what another needs, it does not take.
NEEDED = {
    "add": ("expert", "rows"),
    "replace": ("index", "expert", "rows"),
    "retire": ("index",),
    "split": ("index",),
}


def main() -> None:
    """Write a bundle with other experts."""
    arguments = _arguments()
    log_to_stdout()
    with reported():
        config = _config(arguments)
        identity = None if arguments.identity is None else Identity.load(arguments.identity)
        # Imported only now: they import torch, and --help is quick.
        import torch

        from paris_ray.roster.changes import Roster
        from paris_ray.roster.successor import Options

        torch.set_num_threads(1)  # how many there are decides the last bits of the router
        roster = Roster(arguments.bundle, config, arguments.more_rows)
        if arguments.verb == "split":
            roster.split(arguments.index, arguments.output)
            return
        options = Options(
            method=arguments.refit, sample_share=arguments.sample_share, signer=identity
        )
        roster.write(_change(roster, arguments, identity), arguments.output, options)


def _config(arguments: argparse.Namespace) -> Config:
    refuse_absent_config(arguments.config)
    config = load(arguments.config, arguments.overrides)
    names = ("bundle", "expert", "rows", "verdict", "output")
    given = {f"--{name}": getattr(arguments, name) for name in names}
    given |= {f"--more-rows {i}": place for i, place in enumerate(arguments.more_rows, start=1)}
    places = local_paths(config) | {option: place for option, place in given.items() if place}
    refuse_relative_paths(places)
    refuse_unreachable(places)
    return with_absolute_paths(config)


def _change(roster: "Roster", arguments: argparse.Namespace, identity: Identity | None) -> "Change":
    if arguments.verb == "retire":
        return roster.retire(arguments.index, arguments.data_of)
    from paris_ray.roster.newcomer import Newcomer

    verdict = None if arguments.verdict is None else Folder(arguments.verdict)
    examiner = arguments.examiner or (identity.public_key if identity else "")
    newcomer = Newcomer.open(Folder(arguments.expert), Folder(arguments.rows), verdict, examiner)
    if arguments.verb == "add":
        return roster.add(newcomer, arguments.data_of)
    return roster.replace(arguments.index, newcomer, arguments.data_of)


def _arguments() -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_intermixed_args()
    for name in ("index", "expert", "rows"):
        is_needed = name in NEEDED[arguments.verb]
        if is_needed and getattr(arguments, name) is None:
            parser.error(f"{arguments.verb} needs --{name}")
        if not is_needed and getattr(arguments, name) is not None:
            parser.error(f"{arguments.verb} takes no --{name}")
    if arguments.verdict is not None and arguments.expert is None:
        parser.error(f"{arguments.verb} takes no --verdict")
    return arguments


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("verb", choices=NEEDED, help="what becomes of the expert")
    result.add_argument("--bundle", required=True, help="the bundle as it is: a path or a URI")
    result.add_argument("--output", required=True, help="a new folder, of a bundle or a run")
    result.add_argument("--index", type=int, help="number of the expert that changes")
    result.add_argument("--expert", help="folder of the expert that comes: config.json and weights")
    result.add_argument("--rows", help="folder of the shard that it was trained on")
    result.add_argument("--verdict", help="what jobs.admit_expert wrote of it, to be kept with it")
    result.add_argument(
        "--examiner", metavar="KEY", help="who signed that: a public key; default: --identity's"
    )
    result.add_argument(
        "--more-rows",
        nargs="+",
        default=[],
        metavar="SHARD",
        help="shards of experts that other runs have trained",
    )
    result.add_argument("--data-of", metavar="TEXT", help="whose the rows are, for the history")
    result.add_argument(
        "--identity", type=Path, metavar="DIR", help="who signs the history (jobs.identity)"
    )
    result.add_argument(
        "--refit",
        choices=("head", "all", "none"),
        default="head",
        help="what of the router is fitted to the sample; default: its head",
    )
    result.add_argument(
        "--sample-share",
        type=float,
        default=0.05,
        help="share of the rows of each cluster that is fitted to; default, and most: 0.05",
    )
    names = ", ".join(packaged_configs())
    result.add_argument("--config", default="quickstart", help=f"a YAML file, or one of: {names}")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as run_dir=runs/a")
    return result


if __name__ == "__main__":
    main()
