"""Receive: what a site submitted is taken only if it is what it was to send.

A stranger's expert enters a bundle through `admitted` alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import Config, expert_setup
from paris_ray.errors import FederationError, ParisError
from paris_ray.folders import Folder
from paris_ray.roster.federation.handover import read_handover
from paris_ray.roster.federation.parts import open_expert
from paris_ray.roster.federation.submit import (
    SUBMISSION,
    SUBMISSION_ADAPTER,
    ExpertFacts,
    Submission,
    most_bytes,
)
from paris_ray.roster.federation.terms import Site, Terms


@dataclass(frozen=True, slots=True)
class Received:
    """A submission whose signature, claims and files were checked; its models are not yet open.

    Attributes:
        stated: What the site signed.
        files: What it handed over.
        digest: Of the signed document.
    """

    stated: Submission
    files: VerifiedFolder
    digest: str

    def facts(self, cluster: int) -> ExpertFacts:
        """Return what the site says of one of its experts."""
        return next(each for each in self.stated.experts if each.cluster == cluster)


def receive(folder: Folder, terms: Terms, federation: str) -> Received:
    """Return a submission, if a site of the federation sent what it was to send.

    Args:
        folder: May come from a stranger.
        terms: The federation.
        federation: Digest of its document.

    Raises:
        FederationError: naming the site and the file or field that is refused.
    """
    handover = read_handover(folder, SUBMISSION, None)
    site = terms.site_of(handover.public_key)
    stated = handover.parse(SUBMISSION_ADAPTER)
    for problem in _problems(stated, site, terms, federation):
        raise FederationError(f"{site.name}: {handover.where}: {problem}")
    for name in sorted(handover.files.keys() ^ stated.file_names()):
        problem = "is too many" if name in handover.files else "is missing"
        raise FederationError(f"{site.name}: {handover.where}: files: {name!r:.200} {problem}")
    try:
        return Received(stated, handover.checked(most_bytes), handover.digest)
    except FederationError as error:
        raise FederationError(f"{site.name}: {error}") from None


def _problems(stated: Submission, site: Site, terms: Terms, federation: str) -> Iterator[str]:
    """Yield what a submission claims against the terms."""
    if stated.federation != federation:
        yield f"federation={stated.federation} is another one, expected {federation}"
    if stated.site != site.name:
        yield f"site={stated.site!r}, but its key is that of {site.name!r}"
    clusters, num_experts = stated.clusters, terms.config().cluster.num_clusters
    if len(set(clusters)) != len(clusters):
        yield f"experts: {clusters} has a cluster twice"
    refused = [k for k in clusters if k >= num_experts or not site.may_train(k)]
    if refused:
        allowed = site.clusters or f"0 to {num_experts - 1}"
        yield f"experts: {refused} are not this site's, allowed: {allowed}"


def admitted(received: Received, cluster: int, config: Config) -> VerifiedFolder:
    """Return the folder of an expert that may enter the bundle.

    This is the one place through which a stranger's expert comes, so whatever more is to be asked
    of it belongs here.

    Args:
        received: Who sent it.
        cluster: Its number.
        config: What all sites share.

    Raises:
        FederationError: if it is not of the architecture and objective that were agreed on, does
            not load strictly, or has a value that is not finite.
    """
    part = received.files.part(f"expert_{cluster}")
    try:
        open_expert(part, expert_setup(config, cluster).expert)
    except ParisError as error:
        raise FederationError(f"{received.stated.site}: {error}") from None
    return part
