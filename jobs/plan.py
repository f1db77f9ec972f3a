"""What a run will take on a fleet of unlike machines, and what it took.

    python -m jobs.plan --config paris_xl2 --fleet docs/examples/fleet.yaml
    python -m jobs.plan --config paris_xl2 --fleet fleet.yaml --json plan.json
    python -m jobs.plan --config paris_xl2 --fleet fleet.yaml --probe --address auto
    python -m jobs.plan --config quickstart run_dir=runs/quickstart --ledger

Prints which machine trains which expert and when, with what memory and precision, the days,
dollars and kWh, and all of it beside what the papers tell of DDM and Paris. Without --fleet the
section `fleet` of the configuration is planned with; docs/scale.md says how to write one. --probe
trains on noise for a minute on every node of a Ray cluster, to know how fast they are. --ledger
prints what a run really took, from its folder alone.
"""

import json
from dataclasses import replace
from pathlib import Path

from jobs.command import (
    log_to_stdout,
    parser,
    ray_session,
    refuse_absent_config,
    refuse_unreachable,
    reported,
)
from paris_ray.config import Config, load, to_yaml, with_fleet
from paris_ray.errors import ArtifactError


def main() -> None:
    """Plan a run, or tell what it took."""
    options = parser(__doc__ or "", dry_run=False)
    options.add_argument("--fleet", metavar="FILE", help="a YAML file; default: section fleet")
    options.add_argument("--probe", action="store_true", help="measure the nodes of a cluster")
    options.add_argument("--json", metavar="FILE", help="write the plan there, for machines")
    options.add_argument("--ledger", action="store_true", help="what the run of run_dir took")
    arguments = options.parse_intermixed_args()
    if arguments.ledger and (arguments.fleet or arguments.probe or arguments.json):
        options.error("--ledger tells of what is finished: not with --fleet, --probe or --json")
    log_to_stdout()
    with reported():
        refuse_absent_config(arguments.config)
        config = load(arguments.config, arguments.overrides)
        # paris_ray.planning is imported only now: it imports torch, and --help is quick.
        if arguments.ledger:
            from paris_ray.planning import ledger_of

            refuse_unreachable({"run_dir": config.run_dir})
            print(ledger_of(config))
            return
        if arguments.fleet is not None:
            config = with_fleet(config, arguments.fleet)
        if arguments.probe:
            config = _probed(config, arguments.address)
        from paris_ray.planning import document, plan, render

        planned = plan(config)
        if arguments.json is not None:
            _write(Path(arguments.json), json.dumps(document(planned), indent=2))
        print(render(planned))


def _probed(config: Config, address: str | None) -> Config:
    with ray_session(address):
        from paris_ray.pipeline.probe import probed_fleet

        config = replace(config, fleet=probed_fleet(config))
    print(f"# Of this cluster, for --fleet:\n{to_yaml(config.fleet)}")
    return config


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"--json={path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
