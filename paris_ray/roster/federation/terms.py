"""What all sites of a federation keep to: who trains what, and the shared part of their runs.

    federation.json        Terms, signed by the coordinator
    encoders/              text encoder, codec, empty string; the image encoder if it was trained
    centroids.safetensors  what decides of which cluster a row is
    router/                whose features the sites describe their clusters by
    [seed/]                the expert that all others start from

Nothing of it is a row of the coordinator's corpus, but encoders, centroids, router and seed were
fitted to that.
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from paris_ray.artifacts import VerifiedFolder, canonical_json
from paris_ray.clustering import WEIGHTS as CENTROIDS
from paris_ray.config import MAX_EXPERTS, Config, check, from_dict, identity
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.errors import ConfigError, FederationError
from paris_ray.export import public_name
from paris_ray.folders import Folder
from paris_ray.roster.federation.handover import (
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    Handover,
    Name,
    PublicKey,
    read_handover,
)
from paris_ray.roster.federation.parts import check_federation_parts
from paris_ray.run import (
    CODEC_FOLDERS,
    ENCODERS,
    EXPERT_WEIGHTS,
    FEDERATION,
    MODEL_CONFIG,
    ROUTER,
    ROUTER_WEIGHTS,
    SEED,
)

MAX_SITES = 1000
# Sections of a run that are alike at all sites; of the corpus, how its rows are read.
SHARED_SECTIONS = (
    "seed",
    "text",
    "features",
    "codec",
    "cluster",
    "expert",
    "training",
    "experts",
    "router",
    "router_training",
    "sampling",
)
SHARED_OF_CORPUS = (
    "image_size",
    "resize",
    "horizontal_flip",
    "captions_per_row",
    "caption_templates",
    "background",
)
# Names of models, which a site looks up: no paths on its machine.
NAMED_MODELS = (("text", "path"), ("codec", "path"), ("features", "checkpoint"))

_ENCODER_PARTS = "|".join([TEXT_ENCODER, TOKENIZER, "features", *CODEC_FOLDERS.values()])
_ENCODER_FILE = rf"{ENCODERS}/(({_ENCODER_PARTS})/)?[A-Za-z0-9][\w.-]{{0,63}}\."
_TEXT_FILE = re.compile(rf"{_ENCODER_FILE}(json|txt)")
_WEIGHTS_FILE = re.compile(rf"{_ENCODER_FILE}safetensors")
_CONFIGS = (f"{ROUTER}/{MODEL_CONFIG}", f"{SEED}/{MODEL_CONFIG}")
_WEIGHTS = (CENTROIDS, f"{ROUTER}/{ROUTER_WEIGHTS}", f"{SEED}/{EXPERT_WEIGHTS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Who takes part.

    Attributes:
        name: What the site is called.
        public_key: 32 bytes in hexadecimal, which sign what it submits.
        clusters: Whose experts it trains; None: any, of which it tells when it submits.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: Name
    public_key: PublicKey
    clusters: Annotated[list[int], Field(min_length=1, max_length=MAX_EXPERTS)] | None

    def may_train(self, cluster: int) -> bool:
        """Return whether the expert of a cluster may come from here."""
        return self.clusters is None or cluster in self.clusters


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What the coordinator signed.

    Attributes:
        format: Version of this document.
        name: What the federation's bundle is called.
        sites: Who is expected.
        first_site_wins: Whether of two experts of one cluster the one counts whose site stands
            first; else two are refused.
        run: The shared part of a run's configuration.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    name: Name
    sites: Annotated[list[Site], Field(min_length=1, max_length=MAX_SITES)]
    first_site_wins: bool = False
    run: dict[str, Any]

    def site_of(self, public_key: str) -> Site:
        """Return who signs with a key; raises FederationError if nobody of the federation does."""
        for site in self.sites:
            if site.public_key == public_key:
                return site
        names = ", ".join(site.name for site in self.sites)
        raise FederationError(f"{public_key} is the key of no site of {self.name} ({names})")

    def config(self, **own: Any) -> Config:
        """Return the configuration that is alike at all sites, completed by one's own sections.

        Raises:
            ConfigError: naming the field that is unknown, of a wrong type, or no site's to take
                from a stranger.
        """
        config = from_dict(Config, {**self.run, **own}, f"{FEDERATION}.json: run")
        if shared_part(config) != self.run:
            raise ConfigError(f"{FEDERATION}.json: run says what is no matter of a federation")
        check(config)
        refuse_private_names(config)
        return config

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        return asdict(self)


_TERMS = TypeAdapter(Terms)


def shared_part(config: Config) -> dict[str, Any]:
    """Return what of a configuration is alike at all sites: no places, no resources."""
    tree = identity(config)
    shared = {name: tree[name] for name in SHARED_SECTIONS}
    shared |= {"corpus": {name: tree["corpus"][name] for name in SHARED_OF_CORPUS}}
    signed: dict[str, Any] = json.loads(canonical_json(shared))  # which has lists for tuples
    return signed


def refuse_private_names(config: Config) -> None:
    """Raise ConfigError if a model is named by a path rather than by a hub's name or a tag."""
    for section, field in NAMED_MODELS:
        name = getattr(getattr(config, section), field)
        if name is not None and name != public_name(name):
            raise ConfigError(
                f"{section}.{field}={name!r} is not allowed in a federation: a hub's name or a "
                "tag, as other sites have no such file"
            )


def parse_terms(handover: Handover) -> Terms:
    """Return what a coordinator signed; of the files nothing is read or checked yet.

    Raises:
        FederationError: naming the field that is not allowed.
    """
    terms = handover.parse(_TERMS)
    try:
        num_experts = terms.config().cluster.num_clusters
    except ConfigError as error:
        raise FederationError(f"{handover.where}: {error}") from None
    _check_sites(terms, num_experts, handover.where)
    return terms


def read_federation(folder: Folder, public_key: str) -> tuple[Terms, VerifiedFolder, str]:
    """Return what a coordinator signed, all files, checked, and the digest of the document.

    Args:
        folder: The federation's folder; may come from a stranger.
        public_key: The coordinator's, in hexadecimal.

    Raises:
        FederationError: if somebody else signed it; naming the field that is not allowed, or the
            file that is missing, too many, changed, or does not fit the configuration.
    """
    handover = read_handover(folder, FEDERATION, public_key)
    terms = parse_terms(handover)
    source = handover.checked(_most_bytes)
    check_federation_parts(source, terms.config())
    return terms, source, handover.digest


def _most_bytes(name: str) -> int | None:
    if name in _CONFIGS or _TEXT_FILE.fullmatch(name):
        return MAX_TEXT_BYTES
    return MAX_WEIGHTS_BYTES if name in _WEIGHTS or _WEIGHTS_FILE.fullmatch(name) else None


def _check_sites(terms: Terms, num_experts: int, where: str) -> None:
    for field in ("name", "public_key"):
        values = [getattr(site, field) for site in terms.sites]
        if len(set(values)) != len(values):
            raise FederationError(f"{where}: sites: two have the same {field}")
    for site in terms.sites:
        outside = [k for k in site.clusters or [] if not 0 <= k < num_experts]
        if outside:
            raise FederationError(
                f"{where}: sites: {site.name}: clusters={outside}, allowed: 0 to {num_experts - 1}"
            )
    _check_nobody_twice(terms, where)


def _check_nobody_twice(terms: Terms, where: str) -> None:
    owners: dict[int, str] = {}
    for site in terms.sites:
        for k in site.clusters or []:
            if k in owners and not terms.first_site_wins:
                raise FederationError(
                    f"{where}: sites: cluster {k} is of {owners[k]} and of {site.name}, but "
                    "first_site_wins=false"
                )
            owners[k] = site.name
