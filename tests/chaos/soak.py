"""Train small experts again and again while they are killed and their storage fails: what is left?

    python -m tests.chaos.soak [--minutes 60]

A driver on a Ray of its own trains two experts from their beginning, over and over: in turn in a
folder on a small disk that others fill at times, and in an object store that fails at times.
Meanwhile workers get SIGKILL, and SIGTERM as from a machine that is pre-empted. Whenever the job
ends with an error it is run again, as a user would. Every round must end with the same experts and
metrics. What the driver and Ray hold after the first rounds is compared with what they hold in the
end. The exit code is 1 if anything is missed.
"""

import argparse
import ctypes
import fcntl
import gc
import itertools
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from jobs.command import ray_session
from paris_ray.artifacts import METRICS
from paris_ray.config import Config, load
from paris_ray.errors import ParisError
from paris_ray.folders import Folder
from paris_ray.run import CLUSTERS, Run
from tests.chaos.runs import NUM_EXPERTS, OPTIONS, digests, workers
from tests.faulty_store import Fault, FaultyStore, faulty_store, folder_at
from tests.ray.conftest import overrides, write_shapes
from tests.s3_server import BUCKET, KEY, SECRET, S3Server, s3_server

DISK_MB, FILLED_S = 32, 0.3
FAULTS: tuple[Fault, ...] = ("500", "503", "reset", "cut")
ATTEMPTS = 50  # of a round
FIRST_ROUNDS = 5  # until everything has been imported, and every buffer been made
FLAT = 1.05
SWEPT_AFTER_S = 61  # paris_ray.storage: what is younger may have a maker who has not locked it yet
MEMORY = "memory, MB"


@dataclass
class Trouble:
    """What is done to trainings, at random moments, while `going_on`.

    Attributes:
        disk: The small disk.
        store: The store that fails.
        done: What was done, and how often.
    """

    disk: Path
    store: FaultyStore
    done: Counter[str] = field(default_factory=Counter)
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Make trouble in a thread."""
        ended = threading.Event()

        def act() -> None:
            while not ended.wait(self._chance.uniform(2, 12)):
                self._chance.choice([self._kill, self._preempt, self._fill, self._fail])()

        thread = threading.Thread(target=act)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.store.never()

    def _kill(self) -> None:
        self._send(signal.SIGKILL)

    def _preempt(self) -> None:
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        at_work = workers(*(f"expert-{k}" for k in range(NUM_EXPERTS)))
        if at_work:
            with suppress(psutil.NoSuchProcess):
                self._chance.choice(at_work).send_signal(number)
                self.done[number.name] += 1

    def _fill(self) -> None:
        """Leave no room for a moment."""
        filler = self.disk / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        time.sleep(FILLED_S)
        filler.unlink(missing_ok=True)
        self.done["full disk"] += 1

    def _fail(self) -> None:
        """Let some of the store's answers be faults for a while."""
        fault = self._chance.choice(FAULTS)
        self.store.every(self._chance.randint(2, 20), fault)
        time.sleep(self._chance.uniform(0.2, 2))
        self.store.never()
        self.done[f"store: {fault}"] += 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a round's run folder is.

    Attributes:
        name: For people.
        folder: The run folder, as the job is told.
        direct: The same, around all faults.
        upload: Brings the shards there.
        clear: Removes all that is there.
    """

    name: str
    folder: Folder
    direct: Folder
    upload: Callable[[], None]
    clear: Callable[[], None]


def on_disk(disk: Path, prepared: Path) -> Place:
    """The place on the small disk."""
    run = disk / "run"

    def copy() -> None:
        shutil.copytree(prepared / CLUSTERS, run / CLUSTERS)

    def clear() -> None:
        Folder(run).clear()
        run.mkdir(exist_ok=True)

    return Place("disk", Folder(run), Folder(run), copy, clear)


def in_store(server: S3Server, store: FaultyStore, prepared: Path) -> Place:
    """The place in the store: the job goes by way of the proxy that fails."""

    def upload() -> None:
        server.upload(prepared / CLUSTERS, f"run/{CLUSTERS}")

    def clear() -> None:
        server.store.delete_dir_contents(f"{BUCKET}/run", missing_dir_ok=True)

    return Place(
        "store", folder_at(store.port, "run"), folder_at(server.port, "run"), upload, clear
    )


def outcome(config: Config, folder: Folder) -> list[object]:
    """Return what has to be the same in every round: digests and metrics of the experts."""
    run = Run(replace(config, run_dir=folder.uri))
    return [digests(run), [run.expert(k).read(METRICS) for k in range(NUM_EXPERTS)]]


def train(config: Config, trouble: Trouble, failures: Counter[str]) -> int:
    """Run the job until it succeeds; return how often that was."""
    from paris_ray.pipeline.stages import run

    for attempt in itertools.count(1):
        try:
            with trouble.going_on():
                run(config, "train_experts")
        except ParisError as error:  # anything else is a defect
            failures[type(error).__name__] += 1
            if attempt == ATTEMPTS:
                raise
        else:
            return attempt
    raise AssertionError


def held() -> dict[str, dict[str, float]]:
    """Return what this process, and Ray's own that last, hold."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, and kept by the allocator, nobody holds
    us = psutil.Process()
    lasting = {"driver": us}
    for process in us.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            name = next((n for n in ("raylet", "gcs_server") if n in process.name()), None)
            lasting |= {name: process} if name else {}
    return {
        name: {
            MEMORY: process.memory_info().rss / 1e6,
            "handles": process.num_fds(),
            "threads": process.num_threads(),
        }
        for name, process in lasting.items()
    }


def files_left(temporary: Path) -> list[str]:
    """Return what of killed workers is there when another process has begun, a while after."""
    time.sleep(SWEPT_AFTER_S)
    code = "from paris_ray.storage import temporary_folder\nwith temporary_folder(): pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    found = [path for path in temporary.iterdir() if path.name.startswith("paris_ray")]
    return [path.name for path in found if not is_used(path)]


def is_used(folder: Path) -> bool:
    """Return whether a process that lives has locked a folder, as paris_ray.storage does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def report(what: str, value: float, bar: float) -> bool:
    """Print a measurement beside its bar, which it must not pass; return whether it does not."""
    met = value <= bar
    print(f"- {what}: {value:.2f} (bar <= {bar}: {'met' if met else 'MISSED'})", flush=True)
    return met


def compare(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> bool:
    """Print what grew; return whether nothing grew too much."""
    flat = True
    for process, amounts in before.items():
        for kind, amount in amounts.items():
            now = after[process][kind]
            what = f"{kind} of {process}: {amount:.0f}, in the end {now:.0f}; ratio"
            flat &= report(what, now / amount, FLAT)
    return flat


def prepare(root: Path) -> Config:
    """Make a run whose experts are not trained, on a disk where nothing happens to it."""
    from paris_ray.pipeline.stages import run

    options = [*overrides(write_shapes(root)), *OPTIONS, "training.max_retries=3"]
    config = load("quickstart", [f"run_dir={root}/prepared", *options])
    for verb in ("prepare", "train_experts"):
        run(config, verb)
    return config


def soak(minutes: float, root: Path, disk: Path, temporary: Path) -> bool:
    """Run it all; return whether nothing is missed."""
    (root / "corpus").mkdir()
    config = prepare(root / "corpus")
    prepared = Path(str(config.run_dir))
    wanted = outcome(config, Folder(prepared))
    failures: Counter[str] = Counter()
    attempts, rounds, other = [], Counter[str](), 0
    before: dict[str, dict[str, float]] = {}
    with s3_server() as server, faulty_store(server.port) as store:
        trouble = Trouble(disk, store)
        places = [on_disk(disk, prepared), in_store(server, store, prepared)]
        until = time.monotonic() + 60 * minutes
        for place in itertools.cycle(places):
            if time.monotonic() > until:
                break
            place.clear()
            place.upload()
            here = replace(config, run_dir=place.folder.uri, prepared_from=str(prepared))
            attempts.append(train(here, trouble, failures))
            rounds[place.name] += 1
            other += outcome(config, place.direct) != wanted
            now = held()
            told = f"{attempts[-1]} runs, driver of {now['driver'][MEMORY]:.0f} MB"
            print(f"- round {rounds.total()}, {place.name}: {told}", flush=True)
            if rounds.total() == FIRST_ROUNDS * len(places):
                before = now
    print(f"- {minutes:g} minutes: rounds {dict(rounds)}, {sum(attempts)} runs of the job, at most")
    print(
        f"  {max(attempts)} a round (median {statistics.median(attempts):g}); {dict(trouble.done)}"
    )
    print(f"  the job's own errors: {dict(failures)}", flush=True)
    fine = report("rounds whose experts or metrics are others", other, 0)
    left = files_left(temporary)
    fine &= report(f"temporary files of jobs that nobody uses {left[:3]}", len(left), 0)
    if not before:
        print(f"- fewer than {FIRST_ROUNDS * len(places)} rounds: nothing to compare")
        return fine
    return compare(before, held()) and fine


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """Mount a disk in memory, which takes root."""
    path.mkdir()
    options = f"size={DISK_MB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def main() -> int:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    logging.getLogger("paris_ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "disk") as disk:
        temporary = Path(name) / "tmp"
        temporary.mkdir()
        # Workers inherit it all.
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        with ray_session(None):
            return 0 if soak(minutes, Path(name), disk, temporary) else 1


if __name__ == "__main__":
    sys.exit(main())
