"""What storage does beneath artefacts: files that appear whole, full disks, places out of reach."""

import errno
import fcntl
import glob
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import fsspec
import pyarrow as pa
from pyarrow import fs
from safetensors import SafetensorError

from paris_ray.errors import ArtifactError

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of the first touch alone: from then on pyarrow waits and retries as it always does.
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
ATTEMPTS = 2
WEB_ANSWER_TIMEOUT_S = 30.0  # without a byte from a web server; fsspec would wait for minutes
_COPIES = "paris_ray_copies-"
_LOCKED_WITHIN_S = 60.0  # of its making: what is younger may have a maker who has not yet
_SECRETS = ("sig", "token", "secret", "key", "credential", "password")  # in names of options


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a path beside a local file to a writer; when it is done, rename that to the file.

    It is in a folder of its own, since writers may have temporary files beside theirs, as
    safetensors has: those of one that was killed are found and deleted by the next.
    """
    for stale in target.parent.glob(f"{glob.escape(target.name)}.tmp-*"):
        _remove(stale)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        temporary = folder / target.name
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(stale: Path) -> None:
    """Remove what a writer left: a folder or, by an earlier version, a file."""
    if stale.is_dir() and not stale.is_symlink():
        shutil.rmtree(stale, ignore_errors=True)
    else:
        stale.unlink(missing_ok=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder for copies on this machine's disk, which is gone afterwards.

    If the process is killed meanwhile, the folder stays until another process makes one.
    """
    _sweep(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=_COPIES))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # where there are no locks, nobody sweeps
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # as long as this process lives
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@cache
def _sweep(root: str) -> None:
    """Remove what processes left that were killed, once in the life of this one."""
    for folder in Path(root).glob(f"{_COPIES}*"):
        with suppress(OSError):  # somebody else's, in use, or gone meanwhile
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > _LOCKED_WITHIN_S:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error says that there is no room, or no more within a quota."""
    if isinstance(error, OSError):
        return error.errno in DISK_IS_FULL
    # The Rust that writes safetensors tells it in words only.
    told = (f"(os error {number})" in str(error) for number in DISK_IS_FULL)
    return isinstance(error, SafetensorError) and any(told)


def is_uri(location: str) -> bool:
    """Return whether a location is a URI, and not a path."""
    return "://" in location


def holds_keys(location: str) -> bool:
    """Return whether a location is a URI with a password in it, or with a signature or the like."""
    place, _, options = location.partition("://")[2].partition("?")
    names = " ".join(parse_qs(options, keep_blank_values=True)).lower()
    return ":" in place.rpartition("@")[0] or any(word in names for word in _SECRETS)


def without_keys(location: str) -> str:
    """Return a location as it may be shown."""
    if not holds_keys(location):
        return location
    scheme, _, rest = location.partition("://")
    return f"{scheme}://...{rest.partition('?')[0].rpartition('@')[2]}"


def joined_uri(uri: str, *names: str) -> str:
    """Return the URI of what lies in a folder; options after a question mark stay at the end."""
    parts = urlsplit(uri)
    path = posixpath.normpath(posixpath.join(parts.path or "/", *names)) if names else parts.path
    return urlunsplit(parts._replace(path="" if path in ("/", ".") else path))


def open_store(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the store that a URI names, and the path in it: by pyarrow, or else by fsspec.

    Raises:
        ArtifactError: if neither knows it.
    """
    shown = without_keys(uri)
    try:
        return fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem" not in str(error):
            raise ArtifactError(f"{shown!r} cannot be opened: {error}") from None
    options = {"client_kwargs": _patience()} if is_web(uri) else {}
    try:  # without a cache of listings: files come and go
        store, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise ArtifactError(
            f"{shown!r} names no store that can be opened here ({error}): expected a path, s3://, "
            "gs://, hf://, http:// or another scheme of pyarrow or fsspec"
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(store)), str(path)


class StoreFile:
    """A file of a store, opened for reading, whose failures are told where they happen.

    Further up, pyarrow has one class of error for them and for damage of what was read.

    Args:
        file: The file.
        told: Returns a context that turns an OSError into what is to be told.
    """

    def __init__(
        self, file: pa.NativeFile, told: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._file, self._told = file, told

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return bool(self._file.closed)

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        """Return some bytes, from where it is; by default all."""
        with self._told():
            return bytes(self._file.read(None if size < 0 else size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place; return it, from the beginning."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return where it is."""
        return int(self._file.tell())


def is_web(uri: str) -> bool:
    """Return whether a web server is asked."""
    return urlsplit(uri).scheme in ("http", "https")


def _patience() -> dict[str, Any]:
    """Return options of a web client: how long to wait for bytes, however long a file takes."""
    from aiohttp import ClientTimeout  # only a corpus of the web needs it

    wait = WEB_ANSWER_TIMEOUT_S
    return {"timeout": ClientTimeout(total=None, sock_connect=wait, sock_read=wait)}


def _endpoint_of_environment() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def reach(uri: str) -> None:
    """Ask the store of an `s3://` URI for anything, once and with little patience.

    pyarrow itself gives up on a store that does not answer after about 100 seconds, each time that
    it is asked. Any answer will do here, also that something is not there or not allowed.

    Raises:
        ArtifactError: if nobody answers.
    """
    parts = urlsplit(uri)
    place = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    try:
        store = fs.S3FileSystem(
            access_key=unquote(parts.username or "") or None,
            secret_key=unquote(parts.password or "") or None,
            region=options.get("region"),
            scheme=options.get("scheme"),
            # Only stores that a URI opens look at the environment by themselves.
            endpoint_override=options.get("endpoint_override") or _endpoint_of_environment(),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=ANSWER_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )
        store.get_file_info(place)
    except OSError as error:
        if "NETWORK_CONNECTION" not in str(error):
            return
        reason = str(error).rpartition("Details: ")[2]
        raise ArtifactError(
            f"s3://{place} cannot be reached ({reason}): check the name of the bucket, region and "
            "endpoint (AWS_REGION, AWS_ENDPOINT_URL), and the network"
        ) from None
