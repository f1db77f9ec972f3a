"""What a bundle keeps of the examination of experts from strangers.

    admissions/expert_K.json    a signed document of the kind `admission`

Such a verdict says who examined which weights, beside which bundle, what was found, and what was
not looked at (docs/admission.md). Its signature says that the key's holder said so; whether they
are to be believed, only who knows the key can tell. The public release has no such files.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from paris_ray.artifacts import VerifiedFolder, canonical_json, file_sha256
from paris_ray.config import MAX_EXPERTS
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.json_documents import load_json
from paris_ray.model_folder.history import DATE, TIME
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.signatures import SignedDocument

ADMISSIONS, VERDICT = "admissions", "verdict.json"  # in a bundle; what an examination writes
KIND = "admission"
MAX_BYTES = 65_536  # of a verdict's file; ours have about 5,000
MAX_CHECKS, MAX_READINGS = 16, 16
NAME = re.compile(r"expert_(0|[1-9][0-9]{0,3})\.json")

Text = Annotated[str, Field(max_length=300)]
# These two are shown in model cards.
CheckName = Annotated[str, Field(pattern="^[a-z][a-z -]{0,40}$")]
Moment = Annotated[str, Field(pattern=f"^{DATE}T{TIME}Z$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Files come from strangers: no conversions, no fields that nobody knows.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionReading:
    """A number that a check found; larger is worse, and None is none at all: NaN or infinity."""

    __pydantic_config__ = STRICT

    name: Text
    measure: Text
    value: float | None
    limit: float
    detail: Text


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionCheck:
    """What one check found; without readings it was not made, and `note` says why."""

    __pydantic_config__ = STRICT

    name: CheckName
    outcome: Literal["passed", "flagged", "not checked"]
    note: Text
    readings: Annotated[list[AdmissionReading], Field(max_length=MAX_READINGS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A verdict on an expert.

    Attributes:
        outcome: `flagged` if one of the checks is.
        cluster: For which cluster it was examined; an expert's number may change later.
        config_sha256: Digest of its `config.json`.
        weights_sha256: Digest of its weights.
        bundle: Digest of the manifest of the bundle beside whose experts it was examined; None if
            that has none, as the public release.
        checks: What was found.
        seed: Decided all that was drawn.
        software: Program and versions.
        made_at: When, in UTC.
    """

    __pydantic_config__ = STRICT

    outcome: Literal["admitted", "flagged"]
    cluster: Annotated[int, Field(ge=0, lt=MAX_EXPERTS)]
    config_sha256: Digest
    weights_sha256: Digest
    bundle: Digest | None
    checks: Annotated[list[AdmissionCheck], Field(min_length=1, max_length=MAX_CHECKS)]
    seed: Annotated[int, Field(ge=0)]
    software: Text
    made_at: Moment


class SignedAdmission(NamedTuple):
    """A verdict, and the public key, in hexadecimal, of who signed it."""

    admission: Admission
    public_key: str


_ADMISSION = TypeAdapter(Admission)


def admission_document(admission: Admission) -> dict[str, Any]:
    """Return a verdict as the document that is signed."""
    document: dict[str, Any] = _ADMISSION.dump_python(admission, mode="json")
    return document


def parse_admission(payload: bytes, where: str) -> SignedAdmission:
    """Return the verdict in a file that a stranger may have made.

    Raises:
        BundleError: naming `where`, if it is too long, not signed by the key that it names, or not
            a verdict.
    """
    if len(payload) > MAX_BYTES:
        raise BundleError(f"{where} has {len(payload)} bytes, at most {MAX_BYTES}")
    try:
        signed = SignedDocument.from_json(load_json(payload))
        admission = _ADMISSION.validate_json(canonical_json(signed.check(KIND)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise BundleError(f"{where} is no verdict: {field}: {first['msg']}") from None
    except ValueError as error:  # no JSON, or a SignatureError
        raise BundleError(f"{where} is no verdict: {error}") from None
    is_flagged = any(check.outcome == "flagged" for check in admission.checks)
    if is_flagged != (admission.outcome == "flagged"):
        raise BundleError(f"{where}: outcome={admission.outcome!r}, but its checks say otherwise")
    return SignedAdmission(admission, signed.public_key)


def read_verdict(part: VerifiedFolder, name: str) -> bytes:
    """Return the bytes of a verdict's file, whose size is looked at before it is read.

    Raises:
        BundleError: if it is too long.
        ArtifactError: if it is missing, or its bytes are not the published ones.
    """
    with part.folder.open(name) as file:
        if file.size() > MAX_BYTES:
            where = f"{part.folder.uri}/{name}"
            raise BundleError(f"{where} has {file.size()} bytes, at most {MAX_BYTES}")
    return part.read(name)


def read_admission(payload: bytes, where: str, expert: VerifiedFolder) -> SignedAdmission:
    """Return the verdict on an expert.

    Args:
        payload: The bytes of its file.
        where: What to call the file in an error.
        expert: The folder of the expert that it should be of.

    Raises:
        BundleError: if it is no verdict, or one of other weights than this expert's.
    """
    found = parse_admission(payload, where)
    for name, stated in (
        (MODEL_CONFIG, found.admission.config_sha256),
        (EXPERT_WEIGHTS, found.admission.weights_sha256),
    ):
        own = (expert.digests or {}).get(name) or file_sha256(expert.folder, name)
        if own != stated:
            raise BundleError(
                f"{where} is the verdict on another expert: its {name} has the digest {stated}, "
                f"{expert.folder.uri}/{name} has {own}"
            )
    return found


def verdict_name(index: int) -> str:
    """Return what a bundle's verdict on an expert is called in `admissions/`."""
    return f"expert_{index}.json"


def admission_names(folder: Folder, num_experts: int) -> tuple[str, ...]:
    """Return the files of a bundle's folder `admissions/`.

    Raises:
        BundleError: if one is not named after an expert that there is.
    """
    names = tuple(folder.files())
    for name in names:
        match = NAME.fullmatch(name)
        if match is None or int(match[1]) >= num_experts:
            allowed = f"expert_K.json with K from 0 to {num_experts - 1}"
            raise BundleError(f"{folder.uri}/{name} is not allowed: {allowed}")
    return names


def require_admitted(payload: bytes, where: str, expert: VerifiedFolder) -> SignedAdmission:
    """Return the verdict on an expert that is to enter a bundle; arguments as of `read_admission`.

    Raises:
        BundleError: if it is no verdict, one of other weights, or the expert was flagged.
    """
    found = read_admission(payload, where, expert)
    flagged = [check.name for check in found.admission.checks if check.outcome == "flagged"]
    if flagged:
        raise BundleError(f"{where}: the expert may not enter: flagged by {', '.join(flagged)}")
    return found
