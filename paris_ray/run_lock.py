"""One job at a time writes to a run folder: a lock that works on any storage.

Whoever wants the lock first writes a claim of its own, and then lists all. Whoever sees the claim
of another that lives withdraws. Of two jobs the one that lists later sees the other's claim, so
they never both go on; where they start in the same moment, both may be refused. That needs no more
of a storage than that what was written is listed: file systems, S3 and its like keep to that, and
no locks of files nor conditional writes are needed, which pyarrow does not offer for stores.

An owner shows that it lives by renewing its claim. It is dead if its process is gone, which is
known on its machine alone; or if its claim is not renewed while it is watched, which takes a
minute. No clocks are compared, so it does no harm if they differ or jump. An owner that could not
renew its claim for so long, and comes back, finds in another's that it was taken over, and stops.
"""

import getpass
import logging
import os
import platform
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from paris_ray.artifacts import LOCKS, Folder
from paris_ray.errors import ArtifactError, LockError

logger = logging.getLogger("paris_ray")

HEARTBEAT_S = 10.0
DEAD_S = 60.0  # an owner that does not renew its claim for so long is dead
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
        renewed: How often the claim was renewed.
        took_over: Names of the claims whose owners it found dead.
    """

    user: str
    host: str
    pid: int
    machine: str
    begun_at: float
    renewed: int = 0
    took_over: list[str] = field(default_factory=list)

    @classmethod
    def own(cls) -> "Claim":
        """Return a new claim of this process."""
        return cls(
            user=_user(),
            host=platform.node(),
            pid=os.getpid(),
            machine=_this_machine(),
            begun_at=time.time(),
        )

    def __str__(self) -> str:
        age = max(0, round(time.time() - self.begun_at))
        return f"{self.user} on {self.host} (process {self.pid}, begun {age} s ago)"

    def is_gone(self) -> bool:
        """Return whether the process is known to have ended; of other machines nothing is known."""
        if not self.machine or self.machine != _this_machine():
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


@contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Hold the lock of a folder; only the main thread may.

    Raises:
        LockError: if another job holds it, or took it over because this one seemed dead.
        ArtifactError: if the folder cannot be written.
    """
    claims, name = folder / LOCKS, f"{secrets.token_hex(8)}.json"
    heartbeat = Heartbeat(claims, name)
    heartbeat.start()
    try:
        heartbeat.take_over(_dead_others(claims, name, folder.uri))
        yield
    except KeyboardInterrupt:
        if not heartbeat.lost:
            raise
    finally:
        heartbeat.stop()
    if heartbeat.lost:
        raise LockError(
            f"{folder.uri}: this job did not renew its lock in time, and another one took it over; "
            "nothing is damaged: run again when that has ended"
        )


def _dead_others(claims: Folder, own: str, uri: str) -> list[str]:
    """Return the claims of the dead; raise LockError if there is one of the living."""
    dead = []
    for name in claims.files():
        claim = None if name == own else _read(claims, name)
        if claim is None:
            continue
        if not claim.is_gone() and _is_renewed(claims, name, claim):
            raise LockError(
                f"{uri} is in use by {claim}: "
                "wait for the end of that job, or choose another folder"
            )
        logger.warning("%s: taking over the lock of %s, which is dead", uri, claim)
        dead.append(name)
    return dead


def _is_renewed(claims: Folder, name: str, claim: Claim) -> bool:
    """Watch a claim until it is renewed, and return True; or for so long that its owner is dead."""
    logger.info("%s is locked by %s: looking whether that lives ...", claims.uri, claim)
    deadline = time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = _read(claims, name)
        if now != claim:
            return now is not None
    return False


def _read(claims: Folder, name: str) -> Claim | None:
    """Return a claim; None if it is gone.

    Raises:
        ArtifactError: if it is none.
    """
    try:
        document = claims.read_json(name)
    except ArtifactError:
        if not claims.exists(name):
            return None
        raise
    try:
        return Claim(**document)
    except TypeError as error:
        raise ArtifactError(
            f"{claims.uri}/{name} is not a lock ({error}): delete it if no job writes there"
        ) from None


class Heartbeat:
    """Makes a claim and renews it in a thread; if it is lost, interrupts the main thread.

    Attributes:
        lost: Whether another job took the claim over.
    """

    def __init__(self, claims: Folder, name: str) -> None:
        self.claims, self.name, self.lost = claims, name, False
        self._claim, self._ended = Claim.own(), threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="run lock", daemon=True)

    def start(self) -> None:
        """Write the claim, and begin to renew it."""
        self._write()
        self._thread.start()

    def take_over(self, dead: list[str]) -> None:
        """Say that the owners of these claims are dead, in case they are not, and remove them."""
        if dead:
            self._renew(took_over=dead)
        for name in dead:
            with suppress(FileNotFoundError):  # another one did it
                self.claims.delete(name)

    def stop(self) -> None:
        """End that, and withdraw the claim."""
        self._ended.set()
        self._thread.join()
        with suppress(ArtifactError, OSError):  # out of reach: others will find it dead
            self.claims.delete(self.name)

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
                    self.lost = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._renew()
            except (ArtifactError, OSError) as error:
                logger.warning("the lock %s was not renewed: %s", self.claims.uri, error)

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
