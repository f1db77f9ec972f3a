"""Assemble: the coordinator makes one bundle of what the sites submitted.

router/    the router; rows/ beside it, if it was trained on rows that all sites shared
clusters/  what the sites tell of their clusters
bundle/
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from paris_ray.artifacts import MANIFEST, VerifiedFolder, publish, read_manifest
from paris_ray.bundle import Bundle, BundleFacts, load_bundle
from paris_ray.cluster_facts import FILE as CLUSTERS_FILE
from paris_ray.cluster_facts import ClusterFacts, read_clusters, write_clusters
from paris_ray.clustering import WEIGHTS as CENTROIDS
from paris_ray.config import Config, digest
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.errors import FederationError
from paris_ray.export import (
    codec_name,
    middle_caption,
    sampling_with,
    text_encoder_name,
    write_bundle,
)
from paris_ray.folders import Folder
from paris_ray.roster.federation.card import federated_card
from paris_ray.roster.federation.handover import LINE, LINE_RULE
from paris_ray.roster.federation.parts import has_part
from paris_ray.roster.federation.receive import Received, admitted, receive
from paris_ray.roster.federation.routers import ROUTERS, Owners, RouterFrom, refused_by
from paris_ray.roster.federation.terms import Terms, read_federation
from paris_ray.run import (
    BUNDLE,
    CLUSTERS,
    CODEC_FOLDERS,
    ENCODERS,
    FEDERATION,
    ROUTER,
    SEED,
    Run,
)

logger = logging.getLogger("paris_ray")


def assemble(
    config: Config,
    given: Folder,
    coordinator_key: str,
    submissions: Sequence[Folder],
    output: Folder,
    *,
    router_from: RouterFrom = "statistics",
) -> Bundle:
    """Check what the sites submitted and write the bundle of their experts.

    Args:
        config: The coordinator's run, on whose rows the router is measured and its temperature
            fitted.
        given: The federation's folder.
        coordinator_key: Who signed it, in hexadecimal.
        submissions: The folders of the sites; they may come from strangers.
        output: A new folder on this machine.
        router_from: Whether the router is fitted to statistics, which all sites sent, or trained on
            rows, which all must have shared.

    Returns:
        The bundle, in `output/bundle`.

    Raises:
        FederationError: naming site, file and field that are refused; if a cluster has no expert,
            or two; or if there is a bundle already.
    """
    target = output / "bundle"
    if target.exists(MANIFEST):
        raise FederationError(f"{target.uri} exists already: choose another folder")
    terms, source, federation = read_federation(given, coordinator_key)
    run = Run(config)
    _check_same(run, source)
    received = [receive(folder, terms, federation) for folder in submissions]
    owners = _owners(terms, received)
    shared = terms.config()
    experts = {f"expert_{k}": admitted(owner, k, shared) for k, owner in owners.items()}
    logger.info("%d experts of %d sites are admitted", len(experts), len(received))
    router = ROUTERS[router_from](run, shared, source, owners, output)
    _write_clusters(owners, output / CLUSTERS)
    parts = experts | _given_parts(source) | _own_parts(output)
    bundle = Bundle(parts, _bundle_facts(run, terms, owners, router))
    _ = bundle.router, bundle.codec, bundle.null_text  # each checks that it fits the others
    write_bundle(bundle, target, model_card=federated_card(bundle, terms, owners, router))
    parents = {FEDERATION: federation}
    parents |= {f"site {each.stated.site}": each.digest for each in owners.values()}
    facts = {"router_from": router_from, ROUTER: router}
    config_digest = digest(shared, "sampling")
    publish(target, BUNDLE, config_digest=config_digest, parents=parents, facts=facts)
    logger.info("bundle of %s: finished (%s)", terms.name, target.uri)
    return load_bundle(target.uri)


def _check_same(run: Run, source: VerifiedFolder) -> None:
    """Raise FederationError unless the federation's centroids are the run's."""
    own = read_manifest(run.clusters, CLUSTERS).files.get(CENTROIDS)
    if own != (source.digests or {}).get(CENTROIDS):
        raise FederationError(f"{run.clusters.uri} are other clusters than the federation's")


def _owners(terms: Terms, received: Sequence[Received]) -> dict[int, Received]:
    """Return whose expert each cluster gets, in the order of the clusters."""
    by_site = {each.stated.site: each for each in received}
    if len(by_site) != len(received):
        raise FederationError("two of the submissions are of one site: give one of each")
    owners: dict[int, Received] = {}
    for site in terms.sites:
        for k in by_site[site.name].stated.clusters if site.name in by_site else []:
            if k in owners and not terms.first_site_wins:
                both = f"{owners[k].stated.site} and {site.name}"
                raise FederationError(f"cluster {k} is of {both}, but first_site_wins=false")
            owners.setdefault(k, by_site[site.name])
    lacking = [k for k in range(terms.config().cluster.num_clusters) if k not in owners]
    if lacking:
        numbers = ", ".join(map(str, lacking))
        raise FederationError(f"no submission has the expert of cluster {numbers}")
    return dict(sorted(owners.items()))


def _write_clusters(owners: Owners, folder: Folder) -> None:
    """Write what the sites tell of their clusters: rows, and words where they share them."""
    told = []
    for k, owner in owners.items():
        words: list[str] = []
        if owner.stated.shares_words:
            with refused_by(owner):
                words = _words(owner, k)
        told.append(ClusterFacts(rows=owner.facts(k).rows, words=words, pictures=[]))
    write_clusters(folder, told)


def _words(owner: Received, cluster: int) -> list[str]:
    """Return the words that a site tells of a cluster, which people are shown."""
    sent = read_clusters(owner.files, len(owner.stated.clusters))
    words = sent[owner.stated.clusters.index(cluster)].words
    for word in words:
        if not LINE.fullmatch(word):
            where = f"{owner.files.folder.uri}/{CLUSTERS_FILE}: cluster {cluster}"
            raise FederationError(f"{where}: words: {word!r:.200} is not allowed: {LINE_RULE}")
    return words


def _given_parts(source: VerifiedFolder) -> dict[str, VerifiedFolder]:
    """Return what of a bundle the federation gave."""
    encoders = source.part(ENCODERS)
    names = (*CODEC_FOLDERS.values(), TEXT_ENCODER, TOKENIZER)
    parts = {name: encoders.part(name) for name in names if has_part(encoders, name)}
    return parts | ({SEED: source.part(SEED)} if has_part(source, SEED) else {})


def _own_parts(output: Folder) -> dict[str, VerifiedFolder]:
    """Return what of a bundle was just written here."""
    return {name: VerifiedFolder(output / name, None) for name in (ROUTER, CLUSTERS)}


def _bundle_facts(run: Run, terms: Terms, owners: Owners, router: Mapping[str, Any]) -> BundleFacts:
    config = terms.config()
    lines = [each.stated.attribution for each in owners.values() if each.stated.attribution]
    return BundleFacts(
        model_name=terms.name,
        sampling=sampling_with(config.sampling, router),
        picture_size=config.corpus.image_size,
        attribution="; ".join(dict.fromkeys(lines)) or None,
        # The coordinator's own captions, as with any bundle: no site tells one of its own.
        example_prompts=tuple(middle_caption(run.shard(k)) for k in range(run.num_experts)),
        vae_name=codec_name(config.codec),
        text_encoder_name=text_encoder_name(config.text),
    )
