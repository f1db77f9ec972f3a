"""Join a federation: a site takes what it was given into a run of its own."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from paris_ray.artifacts import VerifiedFolder, find_finished, publish
from paris_ray.config import Config, to_yaml, with_absolute_paths, with_overrides
from paris_ray.errors import ConfigError, FederationError
from paris_ray.folders import Folder
from paris_ray.roster.federation.parts import has_part
from paris_ray.roster.federation.terms import Terms, read_federation, shared_part
from paris_ray.run import FEDERATION, SEED

logger = logging.getLogger("paris_ray")

SITE_CONFIG = "site.yaml"  # of a site's run


def join(
    given: Folder,
    coordinator_key: str,
    site_key: str,
    run_dir: Folder,
    *,
    clusters: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Check a federation's folder, copy it into a site's run and write the run's configuration.

    Args:
        given: The folder; it may come from a stranger who says to be the coordinator.
        coordinator_key: Whose signature is expected, in hexadecimal.
        site_key: This site's own public key.
        run_dir: The site's run: `federation/` and `site.yaml` are written there.
        clusters: Whose experts are trained here; None: those that the federation names.
        overrides: `key=value` of the corpus and of resources.

    Returns:
        The configuration that `site.yaml` holds.

    Raises:
        FederationError: naming what of the folder is refused; if this site is not expected; or if
            the folder lies where it is to be copied to.
        ConfigError: if an override changes what all sites share.
        ArtifactError: if the run is already of another federation.
    """
    terms, source, digest = read_federation(given, coordinator_key)
    site = terms.site_of(site_key)
    chosen = _chosen_clusters(site.name, site.clusters, clusters)
    folder = run_dir / FEDERATION
    config = _site_config(terms, source, run_dir, chosen, overrides)
    parents = {FEDERATION: digest}
    if find_finished(folder, FEDERATION, config_digest="", parents=parents) is None:
        _check_apart(given, folder)
        folder.clear()  # of what an interrupted call left, perhaps of another federation
        for name in source.digests or ():
            folder.write(name, source.read(name))
        folder.write(f"{FEDERATION}.json", given.read(f"{FEDERATION}.json"))
        facts = {"coordinator": coordinator_key}
        publish(folder, FEDERATION, config_digest="", parents=parents, facts=facts)
    run_dir.write(SITE_CONFIG, to_yaml(config).encode())
    numbers = ", ".join(map(str, chosen))
    logger.info("%s of %s: trains expert %s (%s)", site.name, terms.name, numbers, run_dir.uri)
    return config


def _check_apart(given: Folder, folder: Folder) -> None:
    """Raise FederationError if clearing or writing the folder would change what was given."""
    one, other = (
        os.path.realpath(each.local_path) if each.is_local else each.uri for each in (given, folder)
    )
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise FederationError(
            f"{given.uri} is to be copied to {folder.uri}, but one lies in the other: "
            "choose another --run-dir"
        )


def _chosen_clusters(
    name: str, allowed: Sequence[int] | None, wanted: Sequence[int] | None
) -> list[int]:
    chosen = allowed if wanted is None else wanted
    if chosen is None:
        raise ConfigError(f"{name} may train any cluster: say which with --clusters")
    if allowed is not None and not set(chosen) <= set(allowed):
        outside = sorted(set(chosen) - set(allowed))
        raise ConfigError(f"--clusters: {outside} are not of {name}, allowed: {list(allowed)}")
    return list(chosen)


def _site_config(
    terms: Terms,
    source: VerifiedFolder,
    run_dir: Folder,
    clusters: Sequence[int],
    overrides: Sequence[str],
) -> Config:
    folder = run_dir / FEDERATION
    own: dict[str, Any] = {
        "run_dir": run_dir.uri,
        "federation": {"folder": folder.uri, "experts": list(clusters)},
    }
    if has_part(source, SEED):
        own["training"] = {**terms.run["training"], "init_from": (folder / SEED).uri}
    config = with_absolute_paths(with_overrides(terms.config(**own), overrides))
    _check_shared(config, terms)
    return config


def _check_shared(config: Config, terms: Terms) -> None:
    """Raise ConfigError if an override changed what must be alike at all sites."""
    own = shared_part(config)
    for section, values in terms.run.items():
        if own[section] == values:
            continue
        fields = values if isinstance(values, dict) else {}
        changed = [f"{section}.{name}" for name in fields if own[section].get(name) != fields[name]]
        names = ", ".join(changed) or section
        raise ConfigError(f"{names} cannot be changed: all sites of {terms.name} have it alike")
