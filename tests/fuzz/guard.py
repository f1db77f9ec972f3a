"""What reading a stranger's file must not do: open other files, unpickle, take long or much memory.

An audit hook sees what Python opens, moves, links, starts and unpickles. It remembers what it saw
and raises nothing: readers that catch every exception would hide that.
"""

import faulthandler
import os
import resource
import signal
import site
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_S = 30.0  # of a processor, for a case; the slowest takes a few
ENDLESS_S = 900.0  # of a case that waits, for whatever; a busy machine may pause us for minutes
LIMIT_BYTES = 512 << 20  # of resident memory that a case adds
ADDRESS_SPACE = 12 << 30  # protects the machine: what it refuses is counted as a fault of memory

# What a process reads on its own account; /etc for time zones, resolvers and the like.
SYSTEM = ("/usr", "/lib", "/lib64", "/opt", "/proc", "/sys", "/dev", "/etc")
SECRETS = ("/etc/passwd", "/etc/shadow")
_CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
_NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "ftplib.connect"),
    "shutil.unpack_archive",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Guard:
    """Watches this process from its creation on.

    Args:
        inside: Folders that may be read and written.
        outside: A folder inside of those that hostile names point to, and nobody may touch.

    Attributes:
        seen: What was done since the case began and is not allowed.
    """

    def __init__(self, inside: Sequence[Path], outside: Path) -> None:
        code = [sys.prefix, sys.base_prefix, *site.getsitepackages(), *sys.path, *SYSTEM]
        self._writable = tuple(os.path.realpath(folder) for folder in inside)
        self._readable = (*self._writable, *{os.path.realpath(folder) for folder in code if folder})
        self._outside = (os.path.realpath(outside), *SECRETS)
        self.seen: list[str] = []
        faulthandler.register(signal.SIGPROF, chain=True)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & _WRITES)
            self._check(event, path, self._writable if writes else self._readable)
        elif event in _CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(event, path, self._writable)
        elif event in _NEVER:
            self.seen.append(f"{event}{arguments!r:.200}")

    def _check(self, event: str, path: Any, allowed: Sequence[str]) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor that is open already
        real = os.path.realpath(os.fsdecode(path))
        if not _is_in(real, allowed) or _is_in(real, self._outside):
            self.seen.append(f"{event} {real}")

    @contextmanager
    def case(self, faults: list[str]) -> Iterator[None]:
        """Run a case; what it must not do is added to `faults`, and no case runs on for ever."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is there now
        before = _memory("VmRSS")
        self.seen.clear()
        if "torch" in sys.modules:
            _watch_torch(self.seen)
        faulthandler.dump_traceback_later(ENDLESS_S, exit=True)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # which ends the process
        try:
            yield
        except MemoryError:
            faults.append("MemoryError")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            faults += self.seen
            taken = _memory("VmHWM") - before
            if taken > LIMIT_BYTES:
                faults.append(f"took {taken >> 20} MiB of memory")


def _is_in(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _memory(name: str) -> int:
    """Return a number of bytes that the kernel tells of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


def _watch_torch(seen: list[str]) -> None:
    """Remember every call of `torch.load` that would run what a pickle says."""
    torch = sys.modules["torch"]
    load = torch.load
    if load.__name__ == "watched":
        return

    def watched(*arguments: Any, **options: Any) -> Any:
        if options.get("weights_only") is not True:
            seen.append(f"torch.load without weights_only=True: {arguments!r:.200}")
        return load(*arguments, **options)

    torch.load = watched
