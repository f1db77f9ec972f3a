"""Submit: a site packs what it hands over, and says plainly what that is.

    submission.json                Submission, signed by the site
    expert_K/                      config.json and weights of each expert
    router_statistics.safetensors  mean and covariance of router features, a cluster
    [clusters.json]                words of the captions; only with share_words
    [rows.safetensors]             latents and text of some rows; only with share_rows

No picture, thumbnail, caption or key of a row is ever in it.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from paris_ray import cluster_facts
from paris_ray.artifacts import VerifiedFolder, open_finished, read_manifest
from paris_ray.config import MAX_EXPERTS, Config
from paris_ray.embeddings import num_rows, part_names
from paris_ray.errors import ArtifactError, FederationError
from paris_ray.folders import Folder
from paris_ray.roster.federation import shared_rows
from paris_ray.roster.federation import statistics as router_facts
from paris_ray.roster.federation.handover import (
    LINE,
    LINE_RULE,
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    Name,
    begin_handover,
    hand_over,
    read_document,
)
from paris_ray.roster.federation.parts import open_router
from paris_ray.roster.federation.statistics import router_statistics
from paris_ray.roster.federation.terms import parse_terms
from paris_ray.run import (
    CLUSTERS,
    EMBEDDINGS,
    EXPERT,
    EXPERT_WEIGHTS,
    FEDERATION,
    MODEL_CONFIG,
    ROUTER,
    SHARD,
    Run,
)
from paris_ray.seeding import derive_seed
from paris_ray.signatures import Signer
from paris_ray.training.data import load_dataset
from paris_ray.training.text import text_reader

logger = logging.getLogger("paris_ray")

SUBMISSION = "submission"
MAX_ROWS = 10**12
MAX_ATTRIBUTION = 2000
_EXPERT_FILE = re.compile(rf"expert_\d{{1,4}}/({MODEL_CONFIG}|{EXPERT_WEIGHTS})")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFacts:
    """What a site says of an expert.

    Attributes:
        cluster: Its number.
        rows: How many rows it was trained on.
        loss: Its last training loss.
        held_out_rows: How many rows of the cluster it was not trained on.
        held_out_loss: Its denoising loss on some of those; None if there are none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    cluster: Annotated[int, Field(ge=0, lt=MAX_EXPERTS)]
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    loss: Annotated[float, Field(ge=0)]
    held_out_rows: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    held_out_loss: Annotated[float, Field(ge=0)] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What a site signs.

    Attributes:
        format: Version of this document.
        federation: Digest of the federation's document.
        site: Name of the site there.
        experts: What is handed over.
        attribution: Licence line of the site's pictures, or None.
        shares_words: Whether words of its captions are among the files.
        shares_rows: Whether latents and text of some of its rows are.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    federation: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    site: Name
    experts: Annotated[list[ExpertFacts], Field(min_length=1, max_length=MAX_EXPERTS)]
    attribution: Annotated[str, Field(max_length=MAX_ATTRIBUTION, pattern=LINE.pattern)] | None
    shares_words: bool
    shares_rows: bool

    @property
    def clusters(self) -> list[int]:
        """Numbers of the clusters."""
        return [expert.cluster for expert in self.experts]

    def file_names(self) -> set[str]:
        """Return the names of the files that belong to it."""
        models = (MODEL_CONFIG, EXPERT_WEIGHTS)
        names = {f"expert_{k}/{name}" for k in self.clusters for name in models}
        names |= {cluster_facts.FILE} if self.shares_words else set()
        names |= {shared_rows.FILE} if self.shares_rows else set()
        return names | {router_facts.FILE}


SUBMISSION_ADAPTER = TypeAdapter(Submission)


def most_bytes(name: str) -> int | None:
    """Return the greatest size of a submission's file of this name; None: it may not be there."""
    if name == cluster_facts.FILE:
        return MAX_TEXT_BYTES
    if name in (router_facts.FILE, shared_rows.FILE):
        return MAX_WEIGHTS_BYTES
    if not _EXPERT_FILE.fullmatch(name):
        return None
    return MAX_TEXT_BYTES if name.endswith(MODEL_CONFIG) else MAX_WEIGHTS_BYTES


def submit(
    config: Config,
    site: Signer,
    output: Folder,
    *,
    share_words: bool = False,
    share_rows: bool = False,
) -> Submission:
    """Pack a site's experts and what the router needs; `submission.json` is written last.

    Args:
        config: The site's run: its experts are finished.
        site: Who signs.
        output: A new folder on this machine; what an interrupted call left in it is written anew.
        share_words: Hand over telling words of its captions, too.
        share_rows: Hand over latents and text of at most 5 % of its rows, too.

    Raises:
        FederationError: if the run or the key is of no federation, there is a submission, or the
            licence line may not stand in a model card.
        ArtifactError: if an expert is not finished.
    """
    run = Run(config)
    given = run.federation
    if given is None:
        raise FederationError("federation.folder=None: this run joined no federation")
    coordinator = read_manifest(given.folder, FEDERATION).facts["coordinator"]
    handover = read_document(given, FEDERATION, coordinator)
    name = parse_terms(handover).site_of(site.public_key).name
    clusters = sorted(run.trained_experts)
    document = Submission(
        federation=handover.digest,
        site=name,
        experts=[_expert_facts(run, k) for k in clusters],
        attribution=_attribution(run),
        shares_words=share_words,
        shares_rows=share_rows,
    )
    begin_handover(output, SUBMISSION, document.file_names())
    for k in clusters:
        _pack_expert(run, k, output)
    _pack_router_facts(run, given, clusters, output, share_rows=share_rows)
    if share_words:
        _pack_words(run, clusters, output)
    hand_over(output, SUBMISSION, asdict(document), site).parse(SUBMISSION_ADAPTER)
    logger.info("%s", told(document))
    logger.info("submission of %s: finished (%s)", name, output.uri)
    return document


def told(submission: Submission) -> str:
    """Return in words what a submission holds."""
    numbers = ", ".join(map(str, submission.clusters))
    parts = [
        f"weights of expert {numbers}",
        "row counts and losses",
        "mean and covariance of router features",
    ]
    parts += ["words of captions"] if submission.shares_words else []
    parts += ["LATENTS AND TEXT OF ROWS"] if submission.shares_rows else []
    return f"{submission.site} hands over: {'; '.join(parts)}"


def _attribution(run: Run) -> str | None:
    told = read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"]
    line = " ".join((told or "").split())
    if line and not (LINE.fullmatch(line) and len(line) <= MAX_ATTRIBUTION):
        raise FederationError(
            f"corpus.attribution={line!r:.200} is not allowed: {LINE_RULE}, "
            f"at most {MAX_ATTRIBUTION} characters"
        )
    return line or None


def _expert_facts(run: Run, k: int) -> ExpertFacts:
    manifest = read_manifest(run.expert(k), EXPERT)
    shard = read_manifest(run.shard(k), SHARD)
    if manifest.parents.get("shard") != shard.digest:
        raise ArtifactError(f"{run.expert(k).uri} was trained on another shard")
    held_out = run.held_out_shard(k)
    return ExpertFacts(
        cluster=k,
        rows=shard.facts["rows"],
        loss=manifest.facts["loss"],
        held_out_rows=sum(num_rows(held_out, name) for name in part_names(held_out)),
        held_out_loss=manifest.facts.get("held_out_loss"),
    )


def _pack_expert(run: Run, k: int, output: Folder) -> None:
    source = open_finished(run.expert(k), EXPERT)
    for name in (MODEL_CONFIG, EXPERT_WEIGHTS):
        output.write(f"expert_{k}/{name}", source.read(name))


def _pack_router_facts(
    run: Run, given: VerifiedFolder, clusters: Sequence[int], output: Folder, *, share_rows: bool
) -> None:
    config = run.config
    router = open_router(given.part(ROUTER), config.router)
    shards = {k: load_dataset([run.shard(k)]) for k in clusters}
    encode = text_reader(shards[clusters[0]], run.encoders, router.pos_embed.device)
    logger.info("router statistics of %d rows ...", sum(map(len, shards.values())))
    seed = derive_seed(config.seed, "federation")
    router_statistics(router, shards, config.router_training, encode, seed=seed).save(output)
    if share_rows:
        count = shared_rows.write_rows(output, shards, seed)
        logger.warning("%d rows leave this site: their latents are pictures", count)


def _pack_words(run: Run, clusters: Sequence[int], output: Folder) -> None:
    """Write words of clusters without the pictures that a run's own file has beside them."""
    facts = cluster_facts.read_clusters(open_finished(run.clusters, CLUSTERS), run.num_experts)
    shared = [replace(facts[k], pictures=[]) for k in clusters]
    cluster_facts.write_clusters(output, shared)
