"""A new bundle from an old one: an expert is added, replaced or retired, the router refitted.

Nothing else changes: all other files are copied byte by byte, and compared with their digests on
the way.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paris_ray.artifacts import (
    IN_PROGRESS,
    Manifest,
    canonical_json,
    find_finished,
    publish,
    sha256_hex,
)
from paris_ray.config import MAX_EXPERTS, Config, identity
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.export import write_bundle
from paris_ray.folders import LOCKS, Folder
from paris_ray.model_folder.admissions import VERDICT, parse_admission
from paris_ray.model_folder.history import check_whose
from paris_ray.roster.newcomer import Newcomer
from paris_ray.roster.present import Present
from paris_ray.roster.sample import check_share
from paris_ray.roster.split import split
from paris_ray.roster.successor import Change, Options, Successor
from paris_ray.run import BUNDLE, Run
from paris_ray.run_lock import locked
from paris_ray.sampling_options import parse_routing
from paris_ray.storage import temporary_folder

logger = logging.getLogger("paris_ray")


class Roster:
    """A bundle whose experts may change, and where their rows are.

    Args:
        path: Path or URI of the bundle.
        config: A run that has trained some of its experts, with the same encoders.
        more: Shards of experts that came from elsewhere.

    Attributes:
        present: The bundle as it is.

    Raises:
        BundleError: if it is no finished bundle, or the run has other encoders.
        ArtifactError: if an artefact is damaged.
    """

    def __init__(self, path: str, config: Config, more: Sequence[str] = ()) -> None:
        self.config, self.present = config, Present(path, config, more)

    def add(self, newcomer: Newcomer, whose: str | None = None) -> Change:
        """Return the change by which an expert joins, after all others."""
        count = self.present.bundle.num_experts
        if count == MAX_EXPERTS:
            raise BundleError(f"num_experts={count + 1} is not allowed: at most {MAX_EXPERTS}")
        return Change(event="added", index=count, newcomer=newcomer, whose=whose)

    def replace(self, index: int, newcomer: Newcomer, whose: str | None = None) -> Change:
        """Return the change by which an expert takes the place of another.

        Raises:
            ConfigError: if there is no such expert.
        """
        self._check_index(index)
        return Change(event="replaced", index=index, newcomer=newcomer, whose=whose)

    def retire(self, index: int, whose: str | None = None) -> Change:
        """Return the change by which an expert leaves; those above it move down by one.

        Raises:
            ConfigError: if there is no such expert, or no other.
        """
        self._check_index(index)
        if self.present.bundle.num_experts == 1:
            raise ConfigError(f"index={index} is not allowed: a bundle needs an expert")
        return Change(event="retired", index=index, whose=whose)

    def split(self, index: int, output: str) -> None:
        """Write the rows of an expert's cluster as a run of two clusters; the bundle stays.

        Raises:
            ConfigError: if there is no such expert, or its rows cannot be split.
            ArtifactError: if its rows are not found, or there are other shards at the place.
        """
        self._check_index(index)
        target = Run(replace(self.config, run_dir=Folder(output).uri))
        split(self.present.shard(index), self.config, target)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.present.bundle.num_experts:
            last = self.present.bundle.num_experts - 1
            raise ConfigError(f"index={index} is not allowed: the bundle has experts 0 to {last}")

    def write(self, change: Change, output: str, options: Options) -> Manifest:
        """Write the bundle as it is after a change, and return its manifest.

        Args:
            change: What changes.
            output: A new folder; or one that this very change has written, or begun to.
            options: How.

        Raises:
            ConfigError: if an option is not allowed.
            BundleError: if the expert that comes does not fit.
            ArtifactError: if there is something else in the folder, or rows are not found.
            RoutingError: if fewer experts do not allow the routing that is the default.
            LockError: if another job writes there.
        """
        self._check(change, options)
        config_digest, parents = self._identity(change, options)
        made_of: dict[str, Any] = {"config_digest": config_digest, "parents": parents}
        folder = Folder(output)
        with locked(folder / LOCKS, folder.uri) as held:
            made = find_finished(folder, BUNDLE, **made_of)
            if made is not None:
                logger.info("roster: already finished, kept (%s)", folder.uri)
                return made
            _check_place(folder, made_of)
            with temporary_folder() as staging:
                bundle, card, facts = Successor(self.present, change, options).make(Folder(staging))
                held.check()
                folder.clear()
                folder.write_json(IN_PROGRESS, made_of)
                write_bundle(bundle, folder, model_card=card)
            held.check()
            made = publish(folder, BUNDLE, facts=facts, **made_of)
        logger.info("roster: finished (%s)", folder.uri)
        return made

    def _check(self, change: Change, options: Options) -> None:
        """Refuse what is not allowed, before anything takes time."""
        check_share(options.sample_share)
        check_whose(change.whose)
        if change.event == "added" and options.method == "none":
            raise ConfigError("refit='none' is not allowed: nothing would be routed to it")
        Successor(self.present, change, options).rows_that_leave()
        count = len(change.applied(self.present.shards, None))
        parse_routing(self.present.bundle.facts.sampling.routing, count)
        if change.newcomer is not None:
            change.newcomer.check_fits(self.present.bundle)
            self._check_verdict(change.newcomer, change.index)

    def _check_verdict(self, newcomer: Newcomer, index: int) -> None:
        """Refuse a verdict of an examination beside another bundle, or for another cluster."""
        if newcomer.verdict is None:
            return
        admission = parse_admission(newcomer.verdict, VERDICT).admission
        wanted = {"bundle": self.present.digest, "cluster": index}
        for field, value in wanted.items():
            found = getattr(admission, field)
            if found != value:
                raise BundleError(f"{VERDICT}: {field}={found!r} is not allowed here: {value!r}")

    def _identity(self, change: Change, options: Options) -> tuple[str, dict[str, str]]:
        """Return what decides the new bundle: digest of the settings, digests of what is read."""
        signer = options.signer
        settings = {
            "event": change.event,
            "index": change.index,
            "whose": change.whose,
            "method": options.method,
            "sample_share": options.sample_share,
            "signer": None if signer is None else signer.public_key,
            "seed": self.config.seed,
            "router_training": identity(self.config.router_training),
        }
        parents = {"bundle": self.present.digest}
        known = change.applied(self.present.shards, change.newcomer and change.newcomer.shard)
        parents |= {f"shard_{k}": shard.digest for k, shard in enumerate(known) if shard}
        if change.newcomer is not None:
            parents["expert"] = change.newcomer.weights
            if change.newcomer.verdict is not None:
                parents["verdict"] = sha256_hex(change.newcomer.verdict)
        return sha256_hex(canonical_json(settings)), parents


def _check_place(folder: Folder, made_of: dict[str, Any]) -> None:
    """Raise ArtifactError unless a folder is new, or holds what this very change had begun."""
    others = [name for name in folder.files() if not name.startswith(f"{LOCKS}/")]
    if others and not (folder.exists(IN_PROGRESS) and folder.read_json(IN_PROGRESS) == made_of):
        raise ArtifactError(f"{folder.uri} is not empty: choose another folder for a bundle")
