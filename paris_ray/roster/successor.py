"""The bundle after a change: what is new of it, beside all that stays as it is."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import Bundle, BundleFacts
from paris_ray.cluster_facts import write_clusters
from paris_ray.errors import ConfigError
from paris_ray.export import middle_caption
from paris_ray.folders import Folder
from paris_ray.model_card import with_roster
from paris_ray.model_folder.admissions import ADMISSIONS, verdict_name
from paris_ray.model_folder.history import Entry, Rows
from paris_ray.roster.newcomer import Newcomer, describe
from paris_ray.roster.present import Present
from paris_ray.roster.refit import Method, Refitted, refit, with_outputs, write_router
from paris_ray.roster.sample import SAMPLE_SHARE, Sample, draw_sample
from paris_ray.run import CLUSTERS, ROUTER_WEIGHTS
from paris_ray.seeding import derive_seed
from paris_ray.signatures import Signer
from paris_ray.training.text import text_reader

logger = logging.getLogger("paris_ray")


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


class Successor:
    """What becomes of a bundle.

    Args:
        present: The bundle as it is.
        change: What changes.
        options: How.
    """

    def __init__(self, present: Present, change: Change, options: Options) -> None:
        self.present, self.change, self.options = present, change, options
        self.bundle = present.bundle

    def make(self, staging: Folder) -> tuple[Bundle, str, dict[str, Any]]:
        """Return the bundle, its card and facts; what is new of it is written to `staging`.

        Raises:
            ArtifactError: if rows are not found.
            ConfigError: if the router cannot read them.
        """
        refitted = self._refit()
        bundle = self._staged(refitted, staging)
        quality = None if refitted is None else refitted.quality
        card = with_roster(self.present.card(), bundle.history, bundle.admissions, quality)
        rows = 0 if refitted is None else refitted.rows
        return bundle, card, {"refit": self.options.method, "rows": rows, "router": quality}

    def _refit(self) -> Refitted | None:
        """Return the router for the new experts; None: the one that there is fits them."""
        change, options, count = self.change, self.options, range(self.bundle.num_experts)
        # In the place of another, a newcomer begins with the row of that one.
        outputs = change.applied(count, change.index if change.event == "replaced" else None)
        router, config = self.bundle.router, self.present.config.router_training
        if options.method == "none":
            if outputs == list(count):
                return None
            return Refitted(with_outputs(router, outputs), rows=0, temperature=None, quality=None)
        sample = self._sample()
        refitted = refit(
            router,
            outputs,
            sample,
            method=options.method,
            config=config,
            encode=text_reader(sample.fitted, self.present.folder, self.bundle.device),
            seed=derive_seed(self.present.config.seed, "roster"),
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

    def _sample(self) -> Sample:
        present, change, newcomer = self.present, self.change, self.change.newcomer
        numbered = change.applied(
            list(enumerate(present.shards)), (change.index, newcomer and newcomer.shard)
        )
        shards = [present.found(k, shard) for k, shard in numbered]
        sample = draw_sample(
            shards, self.options.sample_share, derive_seed(present.config.seed, "roster")
        )
        self._check_sample(sample)
        total = sum(shard.count for shard in shards)
        logger.info(
            "roster: router (%s) from %d of %d rows", self.options.method, len(sample), total
        )
        return sample

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

    def _staged(self, refitted: Refitted | None, staging: Folder) -> Bundle:
        """Return the bundle; what is new of it is written to `staging`."""
        change, signer = self.change, self.options.signer
        parts, newcomer = dict(self.bundle.parts), change.newcomer
        experts = [parts.pop(f"expert_{k}") for k in range(self.bundle.num_experts)]
        experts = change.applied(experts, newcomer and newcomer.part)
        parts |= {f"expert_{k}": part for k, part in enumerate(experts)}
        if refitted is not None:
            dtype = self.bundle.router.pos_embed.dtype
            write_router(refitted.router, dtype, staging / "router")
            parts["router"] = VerifiedFolder(staging / "router", None)
        if CLUSTERS in parts:
            others = [shard for shard in change.applied(self.present.shards, None) if shard]
            told = newcomer and describe(newcomer.shard, others)
            write_clusters(staging / CLUSTERS, change.applied(self.bundle.clusters, told))
            parts[CLUSTERS] = VerifiedFolder(staging / CLUSTERS, None)
        parts |= self._staged_verdicts(parts.pop(ADMISSIONS, None), staging / ADMISSIONS)
        channels, size, _ = self.bundle.latent_shape
        entry = self._entry(parts["router"])
        bundle = Bundle(
            parts,
            self._facts(refitted),
            history=(*self.bundle.history, entry if signer is None else entry.sign(signer)),
            defaults={"input_size": size, "in_channels": channels, "num_experts": len(experts)},
        )
        _ = bundle.clusters  # a stranger's words and pictures may be none that are read again
        return bundle

    def _staged_verdicts(
        self, part: VerifiedFolder | None, folder: Folder
    ) -> dict[str, VerifiedFolder]:
        """Return the verdicts on the experts after a change as a part, if there are any."""
        known = self.bundle.admissions if part is not None else {}
        present = [
            part.read(verdict_name(k)) if part is not None and k in known else None
            for k in range(self.bundle.num_experts)
        ]
        newcomer = self.change.newcomer
        verdicts = self.change.applied(present, None if newcomer is None else newcomer.verdict)
        for k, payload in enumerate(verdicts):
            if payload is not None:
                folder.write(verdict_name(k), payload)
        return {ADMISSIONS: VerifiedFolder(folder, None)} if any(verdicts) else {}

    def _facts(self, refitted: Refitted | None) -> BundleFacts:
        facts, count, change = self.bundle.facts, self.bundle.num_experts, self.change
        sampling, prompts = facts.sampling, facts.example_prompts
        if refitted is not None and refitted.temperature is not None:
            sampling = replace(sampling, router_temperature=refitted.temperature)
        if len(prompts) == count:  # one of each cluster, as export writes them
            prompt = change.newcomer and middle_caption(change.newcomer.shard.folder)
            prompts = tuple(change.applied(prompts, prompt))
        return replace(facts, sampling=sampling, example_prompts=prompts)

    def _entry(self, router: VerifiedFolder) -> Entry:
        change, newcomer = self.change, self.change.newcomer
        name = f"expert_{change.index}"
        return Entry(
            event=change.event,
            expert=change.index,
            at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            parent=self.present.digest,
            weights_before=None if change.event == "added" else self.bundle.weights_digest(name),
            weights_after=None if newcomer is None else newcomer.weights,
            rows_before=self.rows_that_leave(),
            rows_after=None if newcomer is None else newcomer.shard.told(change.whose),
            router=router.folder.sha256(ROUTER_WEIGHTS),
        )

    def rows_that_leave(self) -> Rows | None:
        """Return what is known of the rows of an expert that leaves; None: none does, or nothing.

        Raises:
            ConfigError: as `Present.known_rows`.
        """
        change = self.change
        if change.event == "added":
            return None
        whose = change.whose if change.event == "retired" else None
        return self.present.known_rows(change.index, whose)
