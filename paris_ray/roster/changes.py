"""A new bundle from an old one: an expert is added, replaced or retired, the router refitted.

Nothing else changes: all other files are copied byte by byte, and compared with their digests on
the way.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from paris_ray.artifacts import (
    IN_PROGRESS,
    Manifest,
    VerifiedFolder,
    canonical_json,
    find_finished,
    open_finished,
    publish,
    sha256_hex,
)
from paris_ray.bundle import Bundle, BundleFacts, bundle_digest, load_bundle
from paris_ray.cluster_facts import write_clusters
from paris_ray.config import MAX_EXPERTS, Config, identity
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.export import MODEL_CARD, middle_caption, write_bundle
from paris_ray.folders import LOCKS, Folder
from paris_ray.model_card import with_roster
from paris_ray.model_folder.admissions import ADMISSIONS, VERDICT, parse_admission, verdict_name
from paris_ray.model_folder.history import Entry, Rows, check_whose, origins
from paris_ray.roster.newcomer import Newcomer, check_encoders, describe
from paris_ray.roster.refit import Method, Refitted, refit, with_outputs, write_router
from paris_ray.roster.sample import (
    SAMPLE_SHARE,
    Sample,
    Shard,
    check_share,
    draw_sample,
    find_shards,
)
from paris_ray.roster.split import split
from paris_ray.run import BUNDLE, CLUSTERS, ROUTER_WEIGHTS, Run
from paris_ray.run_lock import locked
from paris_ray.sampling_options import parse_routing
from paris_ray.seeding import derive_seed
from paris_ray.signatures import Signer
from paris_ray.storage import temporary_folder
from paris_ray.training.text import text_reader

logger = logging.getLogger("paris_ray")

MAX_CARD_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What becomes of one expert.

    Attributes:
        event: As in the history.
        index: Number of the expert: the one that it has, or will have.
        newcomer: The expert that comes, if one does.
        whose: Whose data its rows are; where it leaves, whose they were.
    """

    event: Literal["added", "replaced", "retired"]
    index: int
    newcomer: Newcomer | None = None
    whose: str | None = None

    def applied(self, present: Sequence[Any], new: Any) -> list[Any]:
        """Return what there is one of an expert, after the change; `new` is the newcomer's."""
        left = 0 if self.event == "added" else 1
        came = [] if self.event == "retired" else [new]
        return [*present[: self.index], *came, *present[self.index + left :]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a change is made.

    Attributes:
        method: What of the router is fitted; `none` only takes rows from its last layer.
        sample_share: Share of the rows of each cluster that it is fitted to.
        signer: Who signs the entry in the history; None: nobody.
    """

    method: Method | Literal["none"] = "head"
    sample_share: float = SAMPLE_SHARE
    signer: Signer | None = None


class Roster:
    """A bundle whose experts may change, and where their rows are.

    Args:
        path: Path or URI of the bundle.
        config: A run that has trained some of its experts, with the same encoders.
        more: Shards of experts that came from elsewhere.

    Raises:
        BundleError: if it is no finished bundle, or the run has other encoders.
        ArtifactError: if an artefact is damaged.
    """

    def __init__(self, path: str, config: Config, more: Sequence[str] = ()) -> None:
        self.folder, self.config = Folder(path), config
        digest = bundle_digest(path)
        if digest is None:
            raise BundleError(f"{self.folder.uri} has no manifest.json: export writes one")
        self.digest: str = digest
        self.bundle = load_bundle(path, digest, device=config.router_training.device)
        run = Run(config)
        check_encoders(self.bundle, run.encoders)
        self.shards = find_shards(self.bundle, run, [Folder(each) for each in more])

    def add(self, newcomer: Newcomer, whose: str | None = None) -> Change:
        """Return the change by which an expert joins, after all others."""
        count = self.bundle.num_experts
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
        if self.bundle.num_experts == 1:
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
        split(self._shard(index, self.shards[index]), self.config, target)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.bundle.num_experts:
            last = self.bundle.num_experts - 1
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
                bundle, card, facts = self._changed(change, options, Folder(staging))
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
        self._rows_that_leave(change)
        count = len(change.applied(self.shards, None))
        parse_routing(self.bundle.facts.sampling.routing, count)
        if change.newcomer is not None:
            change.newcomer.check_fits(self.bundle)
            self._check_verdict(change.newcomer, change.index)

    def _check_verdict(self, newcomer: Newcomer, index: int) -> None:
        """Refuse a verdict of an examination beside another bundle, or for another cluster."""
        if newcomer.verdict is None:
            return
        admission = parse_admission(newcomer.verdict, VERDICT).admission
        wanted = {"bundle": self.digest, "cluster": index}
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
        parents = {"bundle": self.digest}
        known = change.applied(self.shards, change.newcomer and change.newcomer.shard)
        parents |= {f"shard_{k}": shard.digest for k, shard in enumerate(known) if shard}
        if change.newcomer is not None:
            parents["expert"] = change.newcomer.weights
            if change.newcomer.verdict is not None:
                parents["verdict"] = sha256_hex(change.newcomer.verdict)
        return sha256_hex(canonical_json(settings)), parents

    def _changed(
        self, change: Change, options: Options, staging: Folder
    ) -> tuple[Bundle, str, dict[str, Any]]:
        """Return the bundle after a change, its card and facts; what is new of it is staged."""
        refitted = self._refit(change, options)
        bundle = self._staged(change, refitted, staging, options.signer)
        quality = None if refitted is None else refitted.quality
        card = with_roster(self._card(), bundle.history, bundle.admissions, quality)
        rows = 0 if refitted is None else refitted.rows
        return bundle, card, {"refit": options.method, "rows": rows, "router": quality}

    def _refit(self, change: Change, options: Options) -> Refitted | None:
        """Return the router for the new experts; None: the one that there is fits them."""
        count = range(self.bundle.num_experts)
        # In the place of another, a newcomer begins with the row of that one.
        outputs = change.applied(count, change.index if change.event == "replaced" else None)
        router, config = self.bundle.router, self.config.router_training
        if options.method == "none":
            if outputs == list(count):
                return None
            return Refitted(with_outputs(router, outputs), rows=0, temperature=None, quality=None)
        sample = self._sample(change, options)
        refitted = refit(
            router,
            outputs,
            sample,
            method=options.method,
            config=config,
            encode=text_reader(sample.fitted, self.folder, self.bundle.device),
            seed=derive_seed(self.config.seed, "roster"),
        )
        assert refitted.quality is not None
        shares = [level["accuracy"] for level in refitted.quality["levels"].values()]
        logger.info(
            "roster: of %d rows that were not fitted to, %.3f to %.3f are routed to their own "
            "cluster over the noise levels",
            refitted.quality["rows"],
            min(shares),
            max(shares),
        )
        return refitted

    def _sample(self, change: Change, options: Options) -> Sample:
        newcomer = change.newcomer
        numbered = change.applied(
            list(enumerate(self.shards)), (change.index, newcomer and newcomer.shard)
        )
        shards = [self._shard(k, shard) for k, shard in numbered]
        sample = draw_sample(shards, options.sample_share, derive_seed(self.config.seed, "roster"))
        self._check_sample(sample)
        total = sum(shard.count for shard in shards)
        logger.info("roster: router (%s) from %d of %d rows", options.method, len(sample), total)
        return sample

    def _shard(self, index: int, shard: Shard | None) -> Shard:
        """Return a shard; raises ArtifactError if it was not found."""
        if shard is None:
            raise ArtifactError(
                f"the rows of expert {index} are not found: run_dir={self.config.run_dir!r} has "
                "not trained these weights, and no shard of --more-rows is the one that "
                "history.json names"
            )
        return shard

    def _check_sample(self, sample: Sample) -> None:
        """Raise ConfigError if the router cannot read the rows."""
        rows, width = sample.fitted, self.bundle.router_config.text_embed_dim
        shape = rows.latents.shape[1:]
        if shape != self.bundle.latent_shape:
            raise ConfigError(
                f"rows with latents of shape {shape} are not allowed: {self.bundle.latent_shape}"
            )
        found = rows.null_text.shape[-1]
        if width and not rows.has_token_ids and found != width:
            raise ConfigError(f"rows with text of width {found} are not allowed: {width}")

    def _staged(
        self, change: Change, refitted: Refitted | None, staging: Folder, signer: Signer | None
    ) -> Bundle:
        """Return the bundle after the change; what is new of it is written to `staging`."""
        parts, newcomer = dict(self.bundle.parts), change.newcomer
        experts = [parts.pop(f"expert_{k}") for k in range(self.bundle.num_experts)]
        experts = change.applied(experts, newcomer and newcomer.part)
        parts |= {f"expert_{k}": part for k, part in enumerate(experts)}
        if refitted is not None:
            dtype = self.bundle.router.pos_embed.dtype
            write_router(refitted.router, dtype, staging / "router")
            parts["router"] = VerifiedFolder(staging / "router", None)
        if CLUSTERS in parts:
            others = [shard for shard in change.applied(self.shards, None) if shard]
            told = newcomer and describe(newcomer.shard, others)
            write_clusters(staging / CLUSTERS, change.applied(self.bundle.clusters, told))
            parts[CLUSTERS] = VerifiedFolder(staging / CLUSTERS, None)
        parts |= self._staged_verdicts(parts.pop(ADMISSIONS, None), change, staging / ADMISSIONS)
        channels, size, _ = self.bundle.latent_shape
        entry = self._entry(change, parts["router"])
        bundle = Bundle(
            parts,
            self._facts(change, refitted),
            history=(*self.bundle.history, entry if signer is None else entry.sign(signer)),
            defaults={"input_size": size, "in_channels": channels, "num_experts": len(experts)},
        )
        _ = bundle.clusters  # a stranger's words and pictures may be none that are read again
        return bundle

    def _staged_verdicts(
        self, part: VerifiedFolder | None, change: Change, folder: Folder
    ) -> dict[str, VerifiedFolder]:
        """Return the verdicts on the experts after a change as a part, if there are any."""
        known = self.bundle.admissions if part is not None else {}
        present = [
            part.read(verdict_name(k)) if part is not None and k in known else None
            for k in range(self.bundle.num_experts)
        ]
        newcomer = change.newcomer
        verdicts = change.applied(present, None if newcomer is None else newcomer.verdict)
        for k, payload in enumerate(verdicts):
            if payload is not None:
                folder.write(verdict_name(k), payload)
        return {ADMISSIONS: VerifiedFolder(folder, None)} if any(verdicts) else {}

    def _facts(self, change: Change, refitted: Refitted | None) -> BundleFacts:
        facts, count = self.bundle.facts, self.bundle.num_experts
        sampling, prompts = facts.sampling, facts.example_prompts
        if refitted is not None and refitted.temperature is not None:
            sampling = replace(sampling, router_temperature=refitted.temperature)
        if len(prompts) == count:  # one of each cluster, as export writes them
            prompt = change.newcomer and middle_caption(change.newcomer.shard.folder)
            prompts = tuple(change.applied(prompts, prompt))
        return replace(facts, sampling=sampling, example_prompts=prompts)

    def _entry(self, change: Change, router: VerifiedFolder) -> Entry:
        newcomer, name = change.newcomer, f"expert_{change.index}"
        return Entry(
            event=change.event,
            expert=change.index,
            at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            parent=self.digest,
            weights_before=None if change.event == "added" else self.bundle.weights_digest(name),
            weights_after=None if newcomer is None else newcomer.weights,
            rows_before=self._rows_that_leave(change),
            rows_after=None if newcomer is None else newcomer.shard.told(change.whose),
            router=router.folder.sha256(ROUTER_WEIGHTS),
        )

    def _rows_that_leave(self, change: Change) -> Rows | None:
        """Return what is known of the rows of an expert that leaves.

        Raises:
            ConfigError: if it is said whose they are, but not known which, or another is named.
        """
        if change.event == "added":
            return None
        whose = change.whose if change.event == "retired" else None
        origin = origins(self.bundle.history, self.bundle.num_experts)[change.index]
        shard = self.shards[change.index]
        known = None if shard is None else shard.told(whose)
        if origin is not None:
            known = origin.rows_after
        if whose is not None and (known is None or known.whose != whose):
            told = "its rows are not known" if known is None else f"they are of {known.whose!r}"
            raise ConfigError(f"data_of={whose!r} is not allowed: {told}")
        return known

    def _card(self) -> str:
        """Return the model card of the bundle as it is."""
        source = open_finished(self.folder, BUNDLE)
        if not self.folder.exists(MODEL_CARD):
            return f"# {self.bundle.facts.model_name}\n"
        with self.folder.open(MODEL_CARD) as file:
            if file.size() > MAX_CARD_BYTES:
                raise BundleError(
                    f"{self.folder.uri}/{MODEL_CARD} has {file.size()} bytes, allowed: "
                    f"{MAX_CARD_BYTES}"
                )
        return source.read(MODEL_CARD).decode(errors="replace")


def _check_place(folder: Folder, made_of: dict[str, Any]) -> None:
    """Raise ArtifactError unless a folder is new, or holds what this very change had begun."""
    others = [name for name in folder.files() if not name.startswith(f"{LOCKS}/")]
    if others and not (folder.exists(IN_PROGRESS) and folder.read_json(IN_PROGRESS) == made_of):
        raise ArtifactError(f"{folder.uri} is not empty: choose another folder for a bundle")
