"""One job at a time writes an artefact: a lock that works on any storage.

Whoever wants the lock first writes a claim of its own, and then lists all. Whoever sees the claim
of another that lives withdraws. Of two jobs the one that lists later sees the other's claim, so
they never both go on; where they start in the same moment, both may be refused. That needs no more
of a storage than that what was written is listed: file systems, S3 and its like keep to that, and
no locks of files nor conditional writes are needed, which pyarrow does not offer for stores.

An owner shows that it lives by renewing its claim. It is dead if its process is gone, which is
known on its machine alone; or if its claim is not renewed while it is watched, for minutes. No
clocks are compared, so it does no harm if they differ or jump. An owner that could not renew its
claim for so long, and comes back, finds in another's that it was taken over. It is told so whenever
it asks: no signal could reach it for certain, since Ray blocks SIGINT in the jobs that it starts.
"""

import getpass
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from paris_ray.errors import ArtifactError, LockError
from paris_ray.folders import Folder

logger = logging.getLogger("paris_ray")

HEARTBEAT_S = 10.0
DEAD_S = 60.0  # an owner that does not renew its claim for so long is dead
STORE_DEAD_S = 300.0  # in a store, of which one request may take 100 s to fail
POLL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Who holds a lock.

    Attributes:
        user: Whose job it is.
        host: Where it runs.
        pid: Its process.
        machine: What `_this_machine` is there.
        begun_at: Unix time in seconds, for people.
        started: When the process started, in the kernel's ticks since boot; None: not known.
        renewed: How often the claim was renewed.
        took_over: Names of the claims whose owners it found dead.
    """

    user: str
    host: str
    pid: int
    machine: str
    begun_at: float
    started: int | None = None
    renewed: int = 0
    took_over: list[str] = field(default_factory=list)

    @classmethod
    def own(cls) -> "Claim":
        """Return a new claim of this process."""
        seen = _process(os.getpid())
        return cls(
            user=_user(),
            host=platform.node(),
            pid=os.getpid(),
            machine=_this_machine(),
            begun_at=time.time(),
            started=None if seen is None else seen[1],
        )

    @classmethod
    def parse(cls, document: Any) -> "Claim":
        """Return the claim in a parsed document; what later versions add to it is passed over.

        Raises:
            ValueError: naming what is missing or of another type.
        """
        if not isinstance(document, dict):
            raise ValueError("it is no object")
        names = [each.name for each in fields(cls)]
        try:
            claim = cls(**{name: document[name] for name in names if name in document})
        except TypeError as error:
            raise ValueError(str(error)) from None
        for name in names:
            value = getattr(claim, name)
            if not _is_allowed(name, value):
                raise ValueError(f"{name}={str(value)[:50]!r} is not allowed")
        return claim

    def __str__(self) -> str:
        age = max(0, round(time.time() - self.begun_at))
        return f"{self.user} on {self.host} (process {self.pid}, begun {age} s ago)"

    def is_gone(self) -> bool:
        """Return whether the process is known to have ended; of other machines nothing is known."""
        if not self.machine or self.machine != _this_machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's, and lives
            pass
        seen = _process(self.pid)
        if seen is None:  # /proc may hide what others run
            return False
        state, started = seen
        return state == "Z" or self.started not in (None, started)


def _is_allowed(name: str, value: object) -> bool:
    match name:
        case "user" | "host" | "machine":
            return isinstance(value, str)
        case "begun_at":
            return isinstance(value, int | float) and abs(value) < 1e12
        case "pid":
            return isinstance(value, int) and 0 < value < 1 << 31
        case "started":
            return value is None or isinstance(value, int)
        case "took_over":
            return isinstance(value, list)
        case _:
            return isinstance(value, int)


def _process(pid: int) -> tuple[str, int] | None:
    """Return state and start, in ticks since boot, of a process; None if it cannot be seen."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return after_name[0], int(after_name[19])
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def locked(claims: Folder, uri: str) -> Iterator["HeldLock"]:
    """Hold a lock; while it is held, ask its `check` whether it still is.

    Args:
        claims: The folder of its claims, of no other use.
        uri: What is locked, for messages.

    Raises:
        LockError: if another job holds it, or took it over because this one seemed dead.
        ArtifactError: if the folder cannot be written.
    """
    held = HeldLock(claims, f"{secrets.token_hex(8)}.json", uri)
    held.start()
    try:
        held.take_over(_dead_others(claims, held.name, uri))
        yield held
    finally:
        held.stop()
    held.check()


def _dead_others(claims: Folder, own: str, uri: str) -> list[str]:
    """Return the claims of the dead; raise LockError if there is one of the living."""
    dead = []
    for name in claims.files():
        claim = None if name == own else _read(claims, name)
        if claim is None:
            continue
        now = claim if claim.is_gone() else _watched(claims, name, claim)
        if now is None:
            continue
        if now != claim:
            raise LockError(
                f"{uri} is in use by {claim}: "
                "wait for the end of that job, or write to another folder"
            )
        logger.warning("%s: taking over the lock of %s, which is dead", uri, claim)
        dead.append(name)
    return dead


def _watched(claims: Folder, name: str, claim: Claim) -> Claim | None:
    """Return a claim as soon as it is renewed, or as it was if it is not for as long as the living.

    None if it was withdrawn.
    """
    dead_s = DEAD_S if claims.is_local else STORE_DEAD_S
    text = "%s is locked by %s: looking for at most %.0f s whether that lives ..."
    logger.info(text, claims.uri, claim, dead_s)
    deadline = time.monotonic() + dead_s
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = _read(claims, name)
        if now != claim:
            return now
    return claim


def _read(claims: Folder, name: str) -> Claim | None:
    """Return a claim; None if it is gone.

    Raises:
        ArtifactError: if it is none.
    """
    try:
        document = claims.read_json(name)
    except (ArtifactError, OSError):
        if not claims.exists(name):
            return None
        raise
    try:
        return Claim.parse(document)
    except ValueError as error:
        raise ArtifactError(
            f"{claims.uri}/{name} is not a lock ({error}): delete it if no job writes there"
        ) from None


class HeldLock:
    """A claim, and the thread that renews it.

    Args:
        claims: The folder of all claims.
        name: Its file there.
        uri: What is locked, for messages.
    """

    def __init__(self, claims: Folder, name: str, uri: str) -> None:
        self.claims, self.name, self.uri = claims, name, uri
        self._claim, self._ended, self._lost = Claim.own(), threading.Event(), threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="run lock", daemon=True)

    def check(self) -> None:
        """Raise LockError if another job took the lock over."""
        if self._lost.is_set():
            raise LockError(
                f"{self.uri}: this job did not renew its lock in time, and another one took it "
                "over; nothing is damaged: run again when that has ended"
            )

    def start(self) -> None:
        """Write the claim, and begin to renew it."""
        self._write()
        self._thread.start()

    def take_over(self, dead: list[str]) -> None:
        """Say that the owners of these claims are dead, in case they are not, and remove them."""
        if dead:
            self._renew(took_over=dead)
        for name in dead:
            with suppress(ArtifactError, FileNotFoundError):  # another one did it
                self.claims.delete(name)

    def stop(self) -> None:
        """End that, and withdraw the claim."""
        self._ended.set()
        self._thread.join()
        try:
            self.claims.delete(self.name)
        except Exception as error:  # fsspec's stores raise what they like
            logger.warning("the lock of %s was not withdrawn: %s", self.uri, error)

    def _write(self) -> None:
        self.claims.write_json(self.name, asdict(self._claim))

    def _renew(self, **changes: Any) -> None:
        with self._one_at_a_time:
            self._claim = replace(self._claim, renewed=self._claim.renewed + 1, **changes)
            self._write()

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if self._was_taken_over():
                    self._lost.set()
                    return
                self._renew()
            except Exception as error:  # as above; without this thread the lock would be lost
                logger.warning("the lock of %s was not renewed: %s", self.uri, error)

    def _was_taken_over(self) -> bool:
        if not self.claims.exists(self.name):
            return True
        for name in self.claims.files():
            with suppress(ArtifactError):  # what is no claim takes nothing over
                other = None if name == self.name else _read(self.claims, name)
                if other is not None and self.name in other.took_over:
                    return True
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        return str(os.getuid())


def _this_machine() -> str:
    """Return what tells machines, boots and containers apart, within which pids mean something.

    Empty where that is not known.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
