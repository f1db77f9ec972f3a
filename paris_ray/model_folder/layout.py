"""From a folder to a bundle: what must be there, what must not, and what must agree."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from paris_ray import cluster_facts
from paris_ray.artifacts import IN_PROGRESS, MANIFEST, VerifiedFolder, open_finished, read_manifest
from paris_ray.config import MAX_EXPERTS, MODEL_LIMITS
from paris_ray.encoders.folders import (
    CODEC_FILES,
    TEXT_ENCODER,
    TEXT_ENCODER_FILES,
    TOKENIZER,
    VAE_FILES,
)
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.model_folder.admissions import ADMISSIONS, admission_names
from paris_ray.model_folder.description import BundleDescription
from paris_ray.model_folder.facts import CONFIG, MODEL_INDEX, read_facts, read_integer
from paris_ray.model_folder.history import History, read_history
from paris_ray.model_folder.links import check_links
from paris_ray.run import BUNDLE, CLUSTERS, EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS, SEED

CODECS = {"vae": VAE_FILES, "codec": CODEC_FILES}
Described = TypeVar("Described", bound=BundleDescription)


def describe_bundle(
    path: str, digest: str | None = None, *, loras: Mapping[str, int] = MappingProxyType({})
) -> BundleDescription:
    """Return what a bundle tells of itself, without what computes; see `read_model_folder`.

    Args:
        path: A path or a pyarrow.fs URI.
        digest: Digest of the manifest of the only bundle that is wanted; None takes any.
        loras: Number of the expert of each adapter that is used with it, by its name.
    """
    return read_model_folder(path, digest, partial(BundleDescription, loras=loras))


def read_model_folder(path: str, digest: str | None, make: Callable[..., Described]) -> Described:
    """Open a model folder in the layout of the public Paris release; no weights are read.

    Args:
        path: A path or a pyarrow.fs URI. Links that leave a local folder are refused, which the
            cache of the Hugging Face hub consists of: copy it with `cp -rL`.
        digest: Digest of the manifest of the only bundle that is wanted; None takes any.
        make: What to make of the arguments of `BundleDescription`, such as a bundle that computes.

    Raises:
        BundleError: if a file is missing or left over, a value is not allowed, or whoever writes
            the bundle has not finished.
        ArtifactError: if a file does not have the digest that the folder's manifest gives.
    """
    folder = Folder(path)
    if not folder.exists(CONFIG):
        raise BundleError(f"no model folder at {folder.uri}: it has no {CONFIG}")
    if folder.is_local:
        check_links(folder)
    source = _open(folder, digest)
    document = _read_mapping(source, CONFIG)
    where = f"{folder.uri}/{CONFIG}"
    defaults = _read_defaults(document, where)
    names = _check_files(folder, defaults["num_experts"])
    _check_index(source, defaults["num_experts"])
    parts = {name: source.part(name) for name in names}
    _check_tokenizer(source, parts)
    made = make(
        parts,
        read_facts(document, parts.get("vae"), where),
        history=_read_history(source, parts, defaults["num_experts"]),
        defaults=defaults,
    )
    _check_models(made, document, where)
    return made


def bundle_digest(path: str) -> str | None:
    """Return the digest of a bundle's manifest; None if it has none, as the public release.

    Raises:
        ArtifactError: if the manifest is damaged.
    """
    folder = Folder(path)
    return read_manifest(folder, BUNDLE).digest if folder.exists(MANIFEST) else None


def _open(folder: Folder, digest: str | None) -> VerifiedFolder:
    if digest is not None and read_manifest(folder, BUNDLE).digest != digest:
        raise BundleError(f"{folder.uri} is another bundle than the one of digest {digest}")
    if folder.exists(MANIFEST):
        return open_finished(folder, BUNDLE)
    if folder.exists(IN_PROGRESS):
        raise BundleError(f"{folder.uri} is not finished: run what writes it again")
    return VerifiedFolder(folder, None)


def _read_history(
    source: VerifiedFolder, parts: Mapping[str, VerifiedFolder], num_experts: int
) -> History:
    experts = (parts[f"expert_{k}"].digests or {} for k in range(num_experts))
    weights = [digests.get(EXPERT_WEIGHTS) for digests in experts]
    return read_history(source, weights, (parts["router"].digests or {}).get(ROUTER_WEIGHTS))


def _read_mapping(source: VerifiedFolder, name: str) -> Mapping[str, Any]:
    document = source.read_json(name)
    if not isinstance(document, dict):
        raise BundleError(f"{source.folder.uri}/{name} does not hold a mapping")
    return document


def _read_defaults(document: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return what the bundle tells of its models, whose own documents may leave it out."""
    limits = {
        "num_experts": ("num_experts", MAX_EXPERTS),
        "input_size": ("image_size", MODEL_LIMITS["input_size"]),
        "in_channels": ("num_channels", MODEL_LIMITS["in_channels"]),
    }
    return {
        field: read_integer(document, name, most, where) for field, (name, most) in limits.items()
    }


def _check_files(folder: Folder, num_experts: int) -> list[str]:
    """Return the names of the parts; raises BundleError for a missing file or an extra expert."""
    found = folder.files()
    folders = {name.split("/")[0] for name in found if "/" in name}
    parts = _parts(folder, folders, num_experts)
    for name in sorted(folders - parts.keys()):
        if re.fullmatch(r"expert_\d+", name):
            where = f"{folder.uri}/{CONFIG}"
            raise BundleError(f"{where}: num_experts={num_experts}, but {name}/ exists")
    for name, files in parts.items():
        if name not in folders:
            raise BundleError(f"{folder.uri} lacks {name}/, which {CONFIG} calls for")
        for file in files:
            if f"{name}/{file}" not in found:
                raise BundleError(f"{folder.uri} lacks {name}/{file}")
    return list(parts)


def _parts(folder: Folder, folders: Set[str], num_experts: int) -> dict[str, Sequence[str]]:
    """Return the folders that must be there, and the files that must be in them."""
    codecs = sorted(folders & CODECS.keys())
    if len(codecs) != 1:
        problem = f"has both {' and '.join(codecs)}" if codecs else f"lacks {' or '.join(CODECS)}"
        raise BundleError(f"{folder.uri} {problem}: it must have one codec")
    parts: dict[str, Sequence[str]] = {
        **{f"expert_{k}": (MODEL_CONFIG, EXPERT_WEIGHTS) for k in range(num_experts)},
        "router": (MODEL_CONFIG, ROUTER_WEIGHTS),
        codecs[0]: CODECS[codecs[0]],
        TEXT_ENCODER: TEXT_ENCODER_FILES,
    }
    if TOKENIZER in folders:  # which files it needs, its reader knows
        parts[TOKENIZER] = ()
    if SEED in folders:
        parts[SEED] = (MODEL_CONFIG, EXPERT_WEIGHTS)
    if CLUSTERS in folders:
        parts[CLUSTERS] = (cluster_facts.FILE,)
    if ADMISSIONS in folders:
        parts[ADMISSIONS] = admission_names(folder / ADMISSIONS, num_experts)
    return parts


def _check_index(source: VerifiedFolder, num_experts: int) -> None:
    stated = _read_mapping(source, MODEL_INDEX).get("num_experts", num_experts)
    if stated != num_experts:
        where = f"{source.folder.uri}/{MODEL_INDEX}"
        raise BundleError(f"{where}: num_experts={stated!r}, but {CONFIG} has {num_experts}")


def _check_tokenizer(source: VerifiedFolder, parts: Mapping[str, VerifiedFolder]) -> None:
    """Refuse a CLIP without `tokenizer/`: only MiniLM has its tokenizer beside its weights."""
    if TOKENIZER in parts:
        return
    model_type = _read_mapping(parts[TEXT_ENCODER], MODEL_CONFIG).get("model_type")
    if model_type != "bert":
        where = f"{TEXT_ENCODER}/{MODEL_CONFIG} with model_type={model_type!r}"
        raise BundleError(f"{source.folder.uri} lacks {TOKENIZER}/, which {where} calls for")


def _check_models(bundle: BundleDescription, document: Mapping[str, Any], where: str) -> None:
    """Compare the fields that describe all models with the models' own."""
    if document.get("use_latents", True) is not True:
        raise BundleError(f"{where}: use_latents={document['use_latents']!r}, expected True")
    num_channels, size, _ = bundle.latent_shape
    for field, value in (("num_channels", num_channels), ("image_size", size)):
        if document.get(field) != value:
            found = document.get(field)
            raise BundleError(f"{where}: {field}={found!r}, but the router reads {value}")
    _ = bundle.expert_configs, bundle.admissions
