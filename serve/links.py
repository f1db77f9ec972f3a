"""Links to pictures: `/v1/images/files/TOKEN.png`, good for an hour and without a key.

A link holds, encrypted and signed, the request for its picture. Any Ingress replica can answer it,
after a restart too, by drawing the picture again; a little memory spares that as a rule. So nothing
is stored, nothing can be guessed or changed, and no log of addresses shows a prompt.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import Context

from cryptography.fernet import Fernet, InvalidToken
from pydantic import BaseModel, ConfigDict
from ray.experimental import internal_kv

from paris_ray.errors import ParisError
from serve.schemas import ImagesRequest
from serve.source import Origin

LIFETIME_S = 3600  # as OpenAI's
MAX_CACHE_BYTES = 64 * 2**20
NAMESPACE, SECRET_KEY = "paris_ray", "link_secret"


class LinkError(ParisError):
    """A link that has expired, or is not one of ours."""


class LinkTarget(BaseModel):
    """What a link holds.

    Attributes:
        request: The request for its picture.
        client: Who asked for it: drawing it again counts against its quotas.
        origin: What drew it: nothing else may draw it again.
        is_degraded: Whether an expert was missing: then nothing can.
    """

    model_config = ConfigDict(frozen=True)

    request: ImagesRequest
    client: str
    origin: Origin
    is_degraded: bool = False

    @property
    def name(self) -> str:
        """What names its file; a link may be written in more ways than one."""
        return self.model_dump_json(exclude_none=True)


class Links:
    """Makes and reads links.

    Args:
        secret: A key of `Fernet`, the same for all replicas.
        clock: Unix time, in seconds; a parameter for tests.
    """

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._fernet, self._clock = Fernet(secret), clock

    def sign(self, target: LinkTarget) -> str:
        """Return the token of a link, fit for a path."""
        return self._fernet.encrypt_at_time(target.name.encode(), int(self._clock())).decode()

    def read(self, token: str) -> LinkTarget:
        """Return what a token holds.

        Raises:
            LinkError: if it has expired, or we did not make it.
        """
        try:
            payload = self._fernet.decrypt_at_time(token, LIFETIME_S, int(self._clock()))
            return LinkTarget.model_validate_json(payload)
        except (InvalidToken, ValueError):  # the latter: no ASCII, or made by another version
            raise LinkError("The link has expired, or is not one of this server's") from None


class FileCache:
    """The files of the last links, by name; the oldest is forgotten first.

    Args:
        max_bytes: Memory of all files.
    """

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._making: dict[str, asyncio.Task[bytes]] = {}

    async def fetch(self, name: str, make: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return a file; make one that is forgotten, once for all who ask for it meanwhile.

        It is made to its end even if nobody waits any more: somebody may come back.
        """
        if name in self._files:
            return self._files[name]
        if name not in self._making:
            # Not in the context of the request that comes first: Ray would cancel it with that.
            making = asyncio.create_task(self._make(name, make), context=Context())
            self._making[name] = making
        return await asyncio.shield(self._making[name])

    async def _make(self, name: str, make: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            file = await make()
        finally:
            del self._making[name]
        self.put(name, file)
        return file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def put(self, name: str, file: bytes) -> None:
        """Keep a file."""
        self._num_bytes += len(file) - len(self._files.pop(name, b""))
        self._files[name] = file
        while self._num_bytes > self._max_bytes:
            _, oldest = self._files.popitem(last=False)
            self._num_bytes -= len(oldest)


def cluster_secret() -> bytes:
    """Return the secret that the replicas of this Ray cluster share, made by the first to ask."""
    # Where Ray Serve keeps its own state: it outlives replicas, and needs no file on every node.
    fresh = Fernet.generate_key()
    internal_kv._internal_kv_put(SECRET_KEY, fresh, overwrite=False, namespace=NAMESPACE)
    secret: bytes = internal_kv._internal_kv_get(SECRET_KEY, namespace=NAMESPACE)
    return secret
