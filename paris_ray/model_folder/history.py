"""What became of a bundle's experts: what changed, when, by whom, and whose data is in it.

    history.json

The export of a run writes no such file: the history of its bundle is the one entry `exported`. Each
change of the roster adds an entry. It names the digest of the bundle that was changed, which covers
the history until then: who signs an entry vouches for that bundle, too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import MAX_EXPERTS
from paris_ray.errors import BundleError, ConfigError, SignatureError
from paris_ray.signatures import SignedDocument, Signer

FILE = "history.json"
KIND = "roster entry"  # of signed documents
MAX_ENTRIES = 1000
MAX_BYTES = 4_000_000  # of the file; an entry of ours has about 1,000

Event = Literal["exported", "added", "replaced", "retired"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
DATE, TIME = "[0-9]{4}-[01][0-9]-[0-3][0-9]", "[0-2][0-9]:[0-5][0-9]:[0-5][0-9]"
Moment = Annotated[str, Field(pattern=f"^{DATE}T{TIME}Z$")]
# One line, which stands in a table of the model card: nothing in it ends a cell or begins a tag.
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f|<>]+$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What an expert was trained on.

    Attributes:
        shard: Digest of the manifest of the shard.
        count: How many rows it has.
        whose: Whose data it is, in the words of who changed the roster; None: not told.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    shard: Digest
    count: Annotated[int, Field(ge=1, le=10**15)]
    whose: Line | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One event.

    Attributes:
        event: What happened.
        expert: Number of the expert, at that time; those above a retired one moved down by one.
        at: When, in UTC: `2026-11-30T12:00:00Z`.
        parent: Digest of the manifest of the bundle that was changed.
        weights_before: SHA-256 of the weights of the expert that left.
        weights_after: That of the expert that came.
        rows_before: Rows of the expert that left, as far as they are known.
        rows_after: Rows of the expert that came.
        router: SHA-256 of the weights of the router since then.
        signed_by: Public key, in hexadecimal, of who did it; None: nobody signed.
        signature: Theirs, of all the other fields.
    """

    # Model folders come from strangers: no conversions, no fields that nobody knows.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    event: Event
    expert: Annotated[int, Field(ge=0, lt=MAX_EXPERTS)] | None = None
    at: Moment | None = None
    parent: Digest | None = None
    weights_before: Digest | None = None
    weights_after: Digest | None = None
    rows_before: Rows | None = None
    rows_after: Rows | None = None
    router: Digest | None = None
    signed_by: Digest | None = None
    signature: Signature | None = None

    def sign(self, signer: Signer) -> "Entry":
        """Return the entry, signed."""
        signed = SignedDocument.sign(KIND, self._statement(), signer)
        return replace(self, signed_by=signed.public_key, signature=signed.signature)

    def check_signature(self) -> None:
        """Raise SignatureError unless whoever is named has signed, or nobody is."""
        if self.signed_by is None and self.signature is None:
            return
        if self.signed_by is None or self.signature is None:
            raise SignatureError("signed_by and signature are not allowed without each other")
        SignedDocument(KIND, self._statement(), self.signed_by, self.signature).check(KIND)

    def _statement(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in ("signed_by", "signature")}


_LINE = TypeAdapter(Line)
_ENTRIES = TypeAdapter(Annotated[list[Entry], Field(min_length=1, max_length=MAX_ENTRIES)])
History = tuple[Entry, ...]
EXPORTED: History = (Entry(event="exported"),)
# Which fields an entry must have, and which others it may have.
CHANGE = {"expert", "at", "parent", "router"}
LEFT, CAME = {"weights_before"}, {"weights_after", "rows_after"}
NEEDED = {"added": CHANGE | CAME, "replaced": CHANGE | LEFT | CAME, "retired": CHANGE | LEFT}
OPTIONAL = {"added": set[str](), "replaced": {"rows_before"}, "retired": {"rows_before"}}
SIGNED = {"signed_by", "signature"}


def check_whose(whose: str | None) -> None:
    """Raise ConfigError unless a history can say so."""
    try:
        if whose is not None:
            _LINE.validate_python(whose)
    except ValidationError:
        allowed = "one line of at most 200 characters, without |, < and >"
        raise ConfigError(f"data_of={whose!r} is not allowed: {allowed}") from None


def write_history(history: History) -> bytes:
    """Return the file of a history.

    Raises:
        BundleError: if nobody could read it, for example because a line is too long.
    """
    payload = json.dumps([asdict(entry) for entry in history], indent=2, sort_keys=True).encode()
    parse_history(payload, FILE)
    return payload


def read_history(
    source: VerifiedFolder, weights: Sequence[str | None], router: str | None
) -> History:
    """Return the history of a bundle, which may come from a stranger.

    Args:
        source: The bundle's folder.
        weights: SHA-256 of the weights of each of its experts; None: not published.
        router: That of its router.

    Raises:
        BundleError: if the file is damaged, an entry is not what its event needs or is not signed
            by whom it names, or the entries do not lead to these experts and this router.
        ArtifactError: if the file is not the published one.
    """
    where = f"{source.folder.uri}/{FILE}"
    if not source.folder.exists(FILE):
        return EXPORTED
    with source.folder.open(FILE) as file:
        if file.size() > MAX_BYTES:
            raise BundleError(f"{where} has {file.size()} bytes, allowed: {MAX_BYTES}")
    history = parse_history(source.read(FILE), where)
    present = origins(history, len(weights), where)
    for k, (entry, found) in enumerate(zip(present, weights, strict=True)):
        if entry is not None and found not in (None, entry.weights_after):
            raise BundleError(f"{where} is not of these experts: expert {k} has other weights")
    if router is not None and history[-1].router not in (None, router):
        raise BundleError(f"{where} is not of this bundle: its router has other weights")
    return history


def parse_history(payload: bytes, where: str) -> History:
    """Return the entries of a file.

    Args:
        payload: The file.
        where: What to call it in an error.

    Raises:
        BundleError: naming the field that is not allowed.
    """
    try:
        entries = _ENTRIES.validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise BundleError(f"{where} is damaged: {field}: {first['msg']}") from None
    for number, entry in enumerate(entries):
        _check(entry, number, f"{where}: {number}")
    return tuple(entries)


def _check(entry: Entry, number: int, where: str) -> None:
    if (entry.event == "exported") != (number == 0):
        raise BundleError(f"{where}.event={entry.event!r} is not allowed: the first is 'exported'")
    told = {name for name, value in asdict(entry).items() if value is not None} - {"event"}
    needed = NEEDED.get(entry.event, set())
    for name in sorted(needed - told):
        raise BundleError(f"{where}.{name} is missing: {entry.event!r} needs it")
    for name in sorted(told - needed - SIGNED - OPTIONAL.get(entry.event, set())):
        raise BundleError(f"{where}.{name} is not allowed with {entry.event!r}")
    try:
        entry.check_signature()
    except SignatureError as error:
        raise BundleError(f"{where}.signature is not allowed: {error}") from None


def origins(history: History, num_experts: int, where: str = FILE) -> list[Entry | None]:
    """Return for each expert the entry with which it came; None: it was exported.

    Args:
        history: Of the bundle.
        num_experts: How many experts it has now.
        where: What to call the file in an error.

    Raises:
        BundleError: if the entries do not lead to so many experts, or contradict each other.
    """
    events = [entry.event for entry in history]
    first = num_experts - events.count("added") + events.count("retired")
    if not 0 <= first <= MAX_EXPERTS + MAX_ENTRIES:
        raise BundleError(f"{where} does not lead to {num_experts} experts, but from {first}")
    present: list[Entry | None] = [None] * first
    for number, entry in enumerate(history[1:], start=1):
        index = entry.expert
        assert index is not None  # `_check` has seen it
        if index > len(present) or (index == len(present)) != (entry.event == "added"):
            raise BundleError(
                f"{where}: {number}.expert={index} is not allowed: there were {len(present)}"
            )
        if entry.event == "added":
            present.append(entry)
            continue
        before = present[index]
        if before is not None and before.weights_after != entry.weights_before:
            raise BundleError(f"{where}: {number}.weights_before is not of expert {index}")
        present[index : index + 1] = [entry] if entry.event == "replaced" else []
    return present
