"""What a whole session of a language model's LoRA costs both parties, from the offer to the proofs.

Contributor and user are processes of their own, with a Ray of its own for the former. No base is
run: rows are random, and cost what others do. Of four modules of a layer three share their inputs,
as queries, keys and values do.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

LAYER = ("q_proj", "k_proj", "v_proj", "o_proj")
TOGETHER = 3  # of them share their inputs
EXPONENT = 9


def module_names(count: int) -> list[str]:
    """Return the names of so many modules, layer by layer."""
    return [f"layers.{i // len(LAYER)}.{LAYER[i % len(LAYER)]}" for i in range(count)]


def peak_bytes(process: int) -> int:
    """Return the peak resident memory of a process (Linux alone)."""
    status = Path(f"/proc/{process}/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def measure_session(modules: int, d: int, r: int, rows: int) -> dict[str, dict[str, float]]:
    """Return CPU seconds, peak memory and traffic of both parties.

    Args:
        modules: How many there are.
        d: Their width.
        r: Their rank.
        rows: Of each.
    """
    sizes = [modules, d, r, rows]
    with tempfile.TemporaryDirectory() as folder:
        from paris_ray.identity import Identity

        for party in ("contributor", "user"):
            Identity.create(Path(folder) / party)
        with _party("contributor", folder, sizes) as contributor:
            address = _read(contributor)
            with _party("user", folder, [*sizes, address]) as user:
                of_user = _read(user)
            assert contributor.stdin is not None
            contributor.stdin.write("done\n")
            contributor.stdin.flush()
            return {"user": of_user, "contributor": _read(contributor)}


@contextmanager
def _party(name: str, folder: str, what: list[Any]) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, __file__, name, folder, json.dumps(what)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process


def _read(process: "subprocess.Popen[str]") -> Any:
    """Return what a party reports: the next of its lines that is marked."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("report "):
            return json.loads(line.removeprefix("report "))
    raise RuntimeError("a party has ended without a report")


def _report(values: Any) -> None:
    print("report " + json.dumps(values), flush=True)


def _family() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _cpu_seconds() -> float:
    """Return what this process and its descendants have used, those that have ended too."""
    times = [process.cpu_times() for process in _family()]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def contribute(folder: Path, modules: int, d: int, r: int, rows: int) -> None:
    """Make an offer, serve it until a line comes, and report."""
    from jobs.command import ray_session
    from paris_ray.config import LoRAConfig
    from paris_ray.identity import Identity
    from paris_ray.zklora.adapter import PeftAdapter
    from paris_ray.zklora.manifest import Base
    from paris_ray.zklora.offer import AskedTerms, open_offer

    names, random = module_names(modules), np.random.default_rng(0)
    factors = {
        name: tuple(random.standard_normal(size, np.float32) for size in ((d, r), (r, d)))
        for name in names
    }
    identity = Identity.load(folder / "contributor")
    with ray_session(None):
        from paris_ray.zklora.parties.contributor import Contribution, Service

        before, wall = _cpu_seconds(), time.perf_counter()
        config = LoRAConfig(r=r, lora_alpha=r, target_modules=tuple(names))
        terms = AskedTerms(
            base=Base(digest="c" * 64, expert=None, router_digest=None),
            name="language",
            budget_rows=rows,
        )
        open_offer(folder / "offer", identity, PeftAdapter(config, factors), terms)
        committed = _cpu_seconds()
        contribution = Contribution(
            Service(
                folder=folder / "offer",
                identity=identity.folder,
                host="127.0.0.1",
                port=0,
                clients=(Identity.load(folder / "user").certificate,),
            )
        )
        _report(contribution.address)
        sys.stdin.readline()
        _report(
            {
                "cpu": _cpu_seconds() - before,
                "commit": committed - before,
                "wall": time.perf_counter() - wall,
                "peak": max(peak_bytes(process.pid) for process in _family()),
            }
        )
        contribution.close()


def use(folder: Path, modules: int, d: int, r: int, rows: int, address: list[Any]) -> None:
    """Ask for rows of every module, verify all proofs, and report."""
    from paris_ray.identity import Identity
    from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
    from paris_ray.zklora.parties.channel import Channel
    from paris_ray.zklora.parties.session import Session

    random, before = np.random.default_rng(1), time.process_time()
    manifest = AdapterManifest.read(folder / "offer" / MANIFEST)
    names, requests = module_names(modules), 0
    host, port = address
    where = (host, port), manifest.contributor_certificate
    with Channel(Identity.load(folder / "user"), *where) as channel:
        session = Session(channel, Identity.load(folder / "user"), manifest)
        for layer in range(0, len(names), len(LAYER)):
            for start, stop in ((0, TOGETHER), (TOGETHER, len(LAYER))):
                x = random.integers(-(2**14), 2**14, (rows, d), np.int16)
                session.evaluate_all(names[layer + start : layer + stop], x, EXPONENT)
                requests += 1
        asked = time.process_time()
        evidence = session.verify()
        traffic = channel.traffic
    _report(
        {
            "cpu": time.process_time() - before,
            "asking": asked - before,
            "requests": requests,
            "peak": peak_bytes(psutil.Process().pid),
            "bytes": traffic.bytes_sent + traffic.bytes_received,
            "proof_bytes": sum(map(len, evidence.proofs.values())),
        }
    )


if __name__ == "__main__":
    party, place, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    {"contributor": contribute, "user": use}[party](place, *given)
