"""Who holds the API keys, and how much each may ask for; read again when their file changes.

What the file looks like: `paris_ray.api_keys`.
"""

import hmac
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paris_ray.api_keys import UNLIMITED, Quotas, Role, digest_of, read_keys
from paris_ray.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # how often the file's time is looked at
REQUESTS, STEPS = "requests", "picture steps"  # what is limited


@dataclass(frozen=True)
class Client:
    """Who sent a request; endpoints find it as `request.state.client`.

    Attributes:
        name: Name of its key, or `local` where there are no keys.
        role: `admin` may cancel requests of others.
        quotas: How much it may ask for.
    """

    name: str
    role: Role = "user"
    quotas: Quotas = UNLIMITED


LOCAL = Client("local", role="admin")


class KeyRing:
    """The keys in a file.

    A file that has become unreadable or wrong changes nothing and is logged: a slip of the keyboard
    must not lock everybody out. So revoke a key by removing its entry, not the file.

    Args:
        path: The file.
        clock: Seconds; a parameter for tests.

    Raises:
        ConfigError: if the file cannot be read now, or is wrong.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = Path(path), clock
        self._looked_at = clock()
        self._version = _version(self._path)
        self._keys = read_keys(self._path)
        self._limits = RateLimits()

    def find(self, secret: str) -> Client | None:
        """Return the client that holds a key, or None."""
        self._look()
        digest = digest_of(secret)
        found = None
        for key in self._keys:  # all of them, each in constant time: the delay tells nothing
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None else Client(found.name, found.role, found.quotas)

    def named(self, name: str) -> Client | None:
        """Return the client that has a key of some name, or None."""
        self._look()
        found = (key for key in self._keys if key.name == name)
        return next((Client(key.name, key.role, key.quotas) for key in found), None)

    def wait_s(self, client: Client) -> float:
        """Count one request; return 0 or, if it is one too many, the seconds until the next."""
        return self._take(client, REQUESTS, client.quotas.requests_per_minute, 1)

    def wait_for_steps_s(self, client: Client, picture_steps: int) -> float:
        """Count the steps of some pictures; return 0 or the seconds until there is room for them.

        Infinite if they are more than a whole minute's.
        """
        return self._take(client, STEPS, client.quotas.picture_steps_per_minute, picture_steps)

    def give_back_steps(self, client: Client, picture_steps: int) -> None:
        """Count no longer what `wait_for_steps_s` has counted."""
        self._limits.give_back((client.name, STEPS), picture_steps)

    def _take(self, client: Client, kind: str, rate: int | None, count: int) -> float:
        if rate is None:
            return 0.0
        return self._limits.take((client.name, kind), rate, count, self._clock())

    def _look(self) -> None:
        if self._clock() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = self._clock()
        try:
            version = _version(self._path)
            if version != self._version:
                self._version = version
                self._keys = read_keys(self._path)
                self._limits.keep({key.name for key in self._keys})
                logger.info("%s: %d keys", self._path, len(self._keys))
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)


class TokenBucket:
    """A rate limit: `rate` a minute on average, and as many at once after a minute of silence.

    Args:
        rate: How many a minute.
        now: The present time, in seconds of any clock.
    """

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._tokens, self._time = float(rate), now

    def take(self, count: int, now: float) -> float:
        """Take some and return 0 or, if there are too few, the seconds until there are enough."""
        passed = max(0.0, now - self._time)
        self._tokens = min(self.rate, self._tokens + passed * self.rate / 60)
        self._time = max(now, self._time)
        if count > self.rate:
            return math.inf
        if self._tokens < count:
            return (count - self._tokens) * 60 / self.rate
        self._tokens -= count
        return 0.0

    def give_back(self, count: int) -> None:
        """Return some that were taken."""
        self._tokens = min(self.rate, self._tokens + count)


class RateLimits:
    """One bucket a key and kind of limit: as many as there are keys, times two."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], TokenBucket] = {}

    def take(self, name: tuple[str, str], rate: int, count: int, now: float) -> float:
        """Take some from the bucket of a key and kind; see `TokenBucket.take`."""
        bucket = self._buckets.get(name)
        if bucket is None or bucket.rate != rate:
            bucket = self._buckets[name] = TokenBucket(rate, now)
        return bucket.take(count, now)

    def give_back(self, name: tuple[str, str], count: int) -> None:
        """Return some to a bucket, if it is still there; see `TokenBucket.give_back`."""
        if name in self._buckets:
            self._buckets[name].give_back(count)

    def keep(self, names: set[str]) -> None:
        """Forget the buckets of all other keys."""
        self._buckets = {name: b for name, b in self._buckets.items() if name[0] in names}


def _version(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written or replaced, by Kubernetes' links too."""
    try:
        status = os.stat(path)  # noqa: PTH116 - follows links
    except OSError as error:
        raise ConfigError(f"api_key_file={str(path)!r} cannot be read: {error}") from None
    return status.st_mtime_ns, status.st_ino, status.st_size
