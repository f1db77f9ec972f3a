"""Folders that are handed over between parties: files, and a signed document that lists them.

    KIND.json   the document and its signature: of every other file the SHA-256 and the size

Nothing of a folder is read before the document's signature, and nothing that it does not list.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from paris_ray.artifacts import VerifiedFolder, canonical_json, sha256_hex
from paris_ray.errors import ArtifactError, BundleError, FederationError, SignatureError
from paris_ray.folders import Folder, parse_json
from paris_ray.model_folder.links import check_links
from paris_ray.signatures import KEY, SignedDocument, Signer

MAX_DOCUMENT_BYTES = 1 << 20
MAX_FILES = 10_000
MAX_TEXT_BYTES = 16 << 20  # of a JSON or text file; CLIP's vocabulary has 2 MiB
MAX_WEIGHTS_BYTES = 64 << 30  # of a safetensors file

Name = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
# Free text that the model card tells: one line, nothing in it ends a cell, or begins a tag, a link,
# code, a heading or a list. (`\u2028` and `\u2029` end lines, too.)
LINE = re.compile(
    r"^[^\s\x00-\x1f\x7f-\x9f|<>\[\]`#*+=~-][^\x00-\x1f\x7f-\x9f\u2028\u2029|<>\[\]`]*$"
)
LINE_RULE = "one line without control characters and |<>[]`, beginning with none of #*+=~-"
PublicKey = Annotated[str, Field(pattern=rf"^{KEY.pattern}$")]
Document = TypeVar("Document")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """What a document says of a file: its SHA-256 in hexadecimal, and its size."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    num_bytes: Annotated[int, Field(ge=0)]


_FILES = TypeAdapter(dict[str, ListedFile])


@dataclass(frozen=True, slots=True)
class Handover:
    """A folder whose document was signed by whom it should be.

    Attributes:
        folder: Where it is.
        kind: What is handed over; the document is the file `KIND.json`.
        document: What it says, without `files`.
        digest: The SHA-256 of the signed file, in hexadecimal.
        files: What it says of each file, by name.
        public_key: Who signed it.
    """

    folder: Folder
    kind: str
    document: dict[str, Any]
    digest: str
    files: dict[str, ListedFile]
    public_key: str

    @property
    def where(self) -> str:
        """The document's place, for errors."""
        return f"{self.folder.uri}/{self.kind}.json"

    def parse(self, adapter: TypeAdapter[Document]) -> Document:
        """Return the document as what it must be; raises FederationError, naming the field."""
        return _validated(adapter, self.document, self.where)

    def checked(self, most_bytes: Callable[[str], int | None]) -> VerifiedFolder:
        """Return the files, all of which are there, as long as listed, and unchanged.

        Args:
            most_bytes: The greatest size that a file of this name may have; None: it may not be
                there.

        Raises:
            FederationError: naming the file that is missing, too many, too large or changed.
        """
        for name, listed in self.files.items():
            most = most_bytes(name)
            if most is None:
                raise FederationError(f"{self.where}: files: {name!r:.200} is not allowed")
            if listed.num_bytes > most:
                size = f"{listed.num_bytes} bytes, at most {most} are allowed"
                raise FederationError(f"{self.where}: files: {name!r} has {size}")
        found = set(self.folder.files()) - {f"{self.kind}.json"}
        for name in sorted(found ^ self.files.keys()):
            what = "is not listed in" if name in found else "is missing, but listed in"
            raise FederationError(f"{self.folder.uri}/{name} {what} {self.kind}.json")
        digests = {name: listed.sha256 for name, listed in self.files.items()}
        source = VerifiedFolder(self.folder, digests)
        for name, listed in self.files.items():
            found_bytes = (self.folder.local_path / name).stat().st_size
            if found_bytes != listed.num_bytes:
                sizes = f"{found_bytes} bytes, {self.kind}.json says {listed.num_bytes}"
                raise FederationError(f"{self.folder.uri}/{name} has {sizes}")
            _verify(source, name, self.kind)
        return source


def begin_handover(folder: Folder, kind: str, names: Collection[str]) -> None:
    """Check that a folder may be written: it is new, or holds what an interrupted call left.

    Args:
        folder: Where to.
        kind: What is to be handed over.
        names: The files that there will be.

    Raises:
        FederationError: if it is not on this machine, or holds anything else.
    """
    _require_local(folder)
    if folder.exists(f"{kind}.json"):
        raise FederationError(f"{folder.uri} holds a {kind} already: choose another folder")
    others = [name for name in folder.files() if name not in names]
    if others:
        raise FederationError(f"{folder.uri} holds {others[0]!r:.200}: choose a new folder")


def hand_over(folder: Folder, kind: str, document: dict[str, Any], signer: Signer) -> Handover:
    """Sign a document with the digests of all files of a folder; it is written last.

    Args:
        folder: On this machine; its files are complete.
        kind: What is handed over.
        document: What is said about it: JSON values alone.
        signer: Who says it.
    """
    files = {
        name: {
            "sha256": folder.sha256(name),
            "num_bytes": (folder.local_path / name).stat().st_size,
        }
        for name in folder.files()
        if name != f"{kind}.json"
    }
    signed = SignedDocument.sign(kind, {**document, "files": files}, signer)
    folder.write_json(f"{kind}.json", signed.to_json())
    return read_handover(folder, kind, signer.public_key)


def read_handover(folder: Folder, kind: str, public_key: str | None) -> Handover:
    """Return a folder that was handed over; of its files nothing is read or checked yet.

    Args:
        folder: On this machine; may come from a stranger.
        kind: What it must be.
        public_key: Who must have signed it; None: whoever it names, which is then to be checked.

    Raises:
        FederationError: if there is no document of this kind, signed by this key, or links lead
            out of the folder.
    """
    _require_local(folder)
    path = folder.local_path / f"{kind}.json"
    if not path.is_file():
        raise FederationError(f"no {kind} at {folder.uri}: it has no {kind}.json")
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        raise FederationError(f"{path} has {size} bytes, at most {MAX_DOCUMENT_BYTES} are allowed")
    try:
        check_links(folder)
    except BundleError as error:
        raise FederationError(str(error)) from None
    return read_document(VerifiedFolder(folder, None), kind, public_key)


def read_document(source: VerifiedFolder, kind: str, public_key: str | None) -> Handover:
    """Return what was handed over, of a folder of one's own, which may be in a store.

    Raises:
        FederationError: if there is no document of this kind, signed by this key.
    """
    payload, where = source.read(f"{kind}.json"), f"{source.folder.uri}/{kind}.json"
    try:
        signed = SignedDocument.from_json(parse_json(payload, where))
        document = dict(signed.check(kind, public_key))
    except (ArtifactError, SignatureError) as error:
        raise FederationError(f"{where}: {error}") from None
    files = _validated(_FILES, document.pop("files", None), f"{where}: files")
    if len(files) > MAX_FILES:
        raise FederationError(f"{where}: files: {len(files)}, at most {MAX_FILES} are allowed")
    digest = sha256_hex(payload)
    return Handover(source.folder, kind, document, digest, files, signed.public_key)


def _require_local(folder: Folder) -> None:
    if not folder.is_local:
        raise FederationError(f"{folder.uri} is not on this machine: give a folder that is")


def _validated(adapter: TypeAdapter[Document], value: Any, where: str) -> Document:
    try:
        return adapter.validate_json(canonical_json(value))  # strict ones take JSON alone
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise FederationError(f"{where}: {field:.200}: {first['msg']:.200}") from None


def _verify(source: VerifiedFolder, name: str, kind: str) -> None:
    try:
        source.verified_file(name)
    except ArtifactError:
        where = f"{source.folder.uri}/{name}"
        raise FederationError(f"{where} does not have the digest of {kind}.json") from None
