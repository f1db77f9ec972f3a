r"""Train one bundle together with others, none of whom shows its pictures: docs/federation.md.

    init       coordinator: from a finished run of its own, a folder to give to all sites
    join       site: from that folder, a run with its own corpus
    submit     site: pack its experts; a line says what leaves the site
    assemble   coordinator: check what the sites submitted, write the bundle

    python -m jobs.federate init --identity runs/me --name ours --output federation \
        --site east=KEY:0,1,2,3 --site west=KEY:4,5,6,7 --config quickstart run_dir=runs/mine
    python -m jobs.federate join --identity runs/me --federation federation --coordinator KEY \
        --run-dir runs/east corpus.kind=image_folder corpus.path=PICTURES
    python -m jobs.prepare --config runs/east/site.yaml
    python -m jobs.train_experts --config runs/east/site.yaml
    python -m jobs.federate submit --identity runs/me --output submission \
        --config runs/east/site.yaml
    python -m jobs.federate assemble --identity runs/me --federation federation \
        --submission east --submission west --output runs/ours \
        --config quickstart run_dir=runs/mine

KEY is a certificate.pem, or the key that `python -m jobs.identity DIR` prints. `init`, `join`,
`submit` and `assemble` need no Ray. `python -m jobs.federate VERB --help` tells the options.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from jobs.command import log_to_stdout, reported
from jobs.parties import certificate
from paris_ray.config import Config, load, packaged_configs, with_absolute_paths
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.identity import Identity, public_key_of
from paris_ray.signatures import KEY

# paris_ray.roster is imported by the verbs: it brings torch, and --help is quick.


def main() -> None:
    """Do what the verb says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see VERB --help")
    arguments = parser.parse_args()
    verb = VERBS[arguments.verb]
    own = argparse.ArgumentParser(
        prog=f"{parser.prog} {arguments.verb}", description=verb.__doc__, allow_abbrev=False
    )
    own.add_argument(
        "--identity", type=Path, required=True, metavar="DIR", help="your key, of jobs.identity"
    )
    run = verb(own)
    log_to_stdout()
    with reported():
        run(own.parse_intermixed_args(arguments.options))


Run = Callable[[argparse.Namespace], object]


def _init(options: argparse.ArgumentParser) -> Run:
    """Write a folder to give to all sites, from a run with encoders, clusters and a router."""
    _add_config(options)
    options.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    options.add_argument("--name", required=True, help="what the bundle is to be called")
    options.add_argument(
        "--site",
        action="append",
        required=True,
        metavar="NAME=KEY[:0,1,...]",
        help="a site, its key or certificate, and whose clusters' experts it trains; none: any",
    )
    options.add_argument(
        "--first-site-wins",
        action="store_true",
        help="of two experts of a cluster take that of the site named first; else two are refused",
    )

    def run(arguments: argparse.Namespace) -> None:
        from paris_ray.roster.federation import Site, found

        sites = []
        for text in arguments.site:
            name, key, clusters = _parse_site(text)
            sites.append(Site(name=name, public_key=key, clusters=clusters))
        found(
            _load(arguments),
            Identity.load(arguments.identity),
            Folder(arguments.output),
            name=arguments.name,
            sites=sites,
            first_site_wins=arguments.first_site_wins,
        )

    return run


def _join(options: argparse.ArgumentParser) -> Run:
    """Make a run of a site from a federation's folder; then jobs.prepare and train_experts."""
    _add_federation(options)
    options.add_argument(
        "--coordinator", required=True, metavar="KEY", help="whose federation it must be"
    )
    options.add_argument("--run-dir", required=True, metavar="DIR", help="the site's run")
    options.add_argument(
        "--clusters", metavar="0,1,...", help="whose experts to train; default: all of this site's"
    )
    options.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as corpus.path=PICTURES"
    )

    def run(arguments: argparse.Namespace) -> None:
        from paris_ray.roster.federation import SITE_CONFIG, join

        clusters = arguments.clusters
        run_dir = Folder(arguments.run_dir)
        join(
            Folder(arguments.federation),
            _key("--coordinator", arguments.coordinator),
            Identity.load(arguments.identity).public_key,
            run_dir,
            clusters=None if clusters is None else _numbers("--clusters", clusters),
            overrides=arguments.overrides,
        )
        print(f"next: python -m jobs.prepare --config {run_dir.uri}/{SITE_CONFIG}")

    return run


def _submit(options: argparse.ArgumentParser) -> Run:
    """Pack a site's experts, and what the coordinator's router needs to know of its clusters."""
    _add_config(options)
    options.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    options.add_argument(
        "--share-words", action="store_true", help="also give telling words of the captions"
    )
    options.add_argument(
        "--share-rows",
        action="store_true",
        help="also give latents and text of 5 %% of the rows, to train the router on: whoever has "
        "them sees the pictures, as the codec keeps them",
    )

    def run(arguments: argparse.Namespace) -> None:
        from paris_ray.roster.federation import submit

        submit(
            _load(arguments),
            Identity.load(arguments.identity),
            Folder(arguments.output),
            share_words=arguments.share_words,
            share_rows=arguments.share_rows,
        )

    return run


def _assemble(options: argparse.ArgumentParser) -> Run:
    """Check what the sites submitted, and write one bundle of their experts."""
    _add_config(options)
    _add_federation(options)
    options.add_argument(
        "--submission", action="append", required=True, metavar="DIR", help="of a site; one of each"
    )
    options.add_argument(
        "--output", required=True, metavar="DIR", help="a new folder; the bundle is DIR/bundle"
    )
    options.add_argument(
        "--router-from",
        choices=("statistics", "rows"),
        default="statistics",
        help="rows: those that all sites shared; default: %(default)s",
    )

    def run(arguments: argparse.Namespace) -> None:
        from paris_ray.roster.federation import assemble

        assemble(
            _load(arguments),
            Folder(arguments.federation),
            Identity.load(arguments.identity).public_key,
            [Folder(path) for path in arguments.submission],
            Folder(arguments.output),
            router_from=arguments.router_from,
        )

    return run


VERBS = {"init": _init, "join": _join, "submit": _submit, "assemble": _assemble}


def _add_config(options: argparse.ArgumentParser) -> None:
    names = ", ".join(packaged_configs())
    options.add_argument("--config", required=True, help=f"your run: a YAML file, or of {names}")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="such as run_dir=DIR")


def _add_federation(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--federation", required=True, metavar="DIR", help="the folder that `init` wrote"
    )


def _load(arguments: argparse.Namespace) -> Config:
    return with_absolute_paths(load(arguments.config, arguments.overrides))


def _parse_site(text: str) -> tuple[str, str, list[int] | None]:
    """Return name, key and clusters of a site; raises ConfigError, with the form, if it is none."""
    name, _, rest = text.partition("=")
    key, _, numbers = rest.partition(":")
    if not name or not key:
        raise ConfigError(f"--site={text!r} is not allowed: NAME=KEY or NAME=KEY:0,1,2")
    return name, _key("--site", key), _numbers("--site", numbers) if numbers else None


def _key(option: str, text: str) -> str:
    """Return a key that is given in hexadecimal, or as the certificate that has it."""
    return text if KEY.fullmatch(text) else public_key_of(certificate(option, Path(text)))


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{option}: {text!r} is not allowed: numbers such as 0,1,2")
    return [int(part) for part in parts]


if __name__ == "__main__":
    main()
