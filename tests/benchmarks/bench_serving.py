"""Measure the Serve application under load: what batching, hops and failures cost.

    python tests/benchmarks/bench_serving.py --bundle RUN/bundle [--seconds 10] [PART ...]

One Ray of its own on this machine, loopback only; clients are real HTTP clients in this process.
Every figure is a ratio within one run, its sides measured in alternation. Nothing is asserted:
a bar that is missed is printed as missed.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from jobs.command import ray_session
from jobs.local_cluster import LOOPBACK, free_port
from paris_ray.bundle import load_bundle

IMAGES = "v1/images/generations"
CLIENTS = 16
ROUNDS = 3


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: Of each answered request.
        statuses: How many answers had each status; -1 where there was none.
        elapsed_s: Of all.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    elapsed_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return self.statuses.get(200, 0) / self.elapsed_s

    def quantile(self, share: float) -> float:
        """The latency that a share of the requests did not exceed."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


async def load(
    url: str, bodies: Callable[[int], dict[str, object]], clients: int, s: float
) -> Load:
    """Let some clients ask one request after the other for some seconds."""
    result, number = Load(), iter(range(10**9))
    began = time.perf_counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.perf_counter() - began < s:
                asked = time.perf_counter()
                try:
                    status = (await http.post(IMAGES, json=bodies(next(number)))).status_code
                except httpx.HTTPError:
                    status = -1
                result.statuses[status] = result.statuses.get(status, 0) + 1
                result.seconds.append(time.perf_counter() - asked)

    await asyncio.gather(*(client() for _ in range(clients)))
    result.elapsed_s = time.perf_counter() - began
    return result


@contextmanager
def application(bundle: str, **args: object) -> Iterator[str]:
    """Serve a bundle; give the URL."""
    from ray import serve

    from serve.app import AppArgs, build

    serve.run(build(AppArgs(**{"bundle": bundle} | args)), name="bench", route_prefix="/bench")
    yield f"http://{LOOPBACK}:{PORT}/bench/"
    serve.delete("bench")


PORT = free_port()


def prompts_of(bundle: str) -> Sequence[str]:
    """Captions of the bundle, which different experts draw."""
    return load_bundle(bundle).facts.example_prompts


def in_process(bundle: str, seconds: float) -> float:
    """Requests a second of `generate`, in a process of its own, one picture each."""
    code = f"""
import time, torch
torch.set_num_threads(1)
from paris_ray.bundle import load_bundle
from paris_ray.sampling import generate
from paris_ray.reports import png_bytes
bundle = load_bundle({bundle!r})
prompts, count = bundle.facts.example_prompts, 0
generate(bundle, list(prompts))
began = time.perf_counter()
while time.perf_counter() - began < {seconds}:
    png_bytes(generate(bundle, [prompts[count % len(prompts)]], seed=count)[0])
    count += 1
print(count / (time.perf_counter() - began))
"""
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True).stdout
    )


def throughput(bundle: str, seconds: float, colocated: bool) -> None:
    """Print what 16 clients get over one, and one client over `generate`."""
    prompts = prompts_of(bundle)
    bodies = lambda i: {"prompt": prompts[i % len(prompts)], "seed": i}  # noqa: E731
    rates: dict[str, list[float]] = {"generate": [], "one": [], "many": []}
    with application(bundle, colocated=colocated) as url:
        asyncio.run(load(url, bodies, CLIENTS, 3))
        for _ in range(ROUNDS):
            rates["generate"].append(in_process(bundle, seconds / 2))
            one = asyncio.run(load(url, bodies, 1, seconds))
            many = asyncio.run(load(url, bodies, CLIENTS, seconds))
            rates["one"].append(one.rate)
            rates["many"].append(many.rate)
            print(
                f"  one {one.rate:.1f}/s p50 {one.quantile(0.5) * 1e3:.0f} ms; many {many.rate:.1f}/s p50 {many.quantile(0.5) * 1e3:.0f} p95 {many.quantile(0.95) * 1e3:.0f} ms {many.statuses}; generate {rates['generate'][-1]:.1f}/s",
                flush=True,
            )
    middle = {name: statistics.median(each) for name, each in rates.items()}
    print(
        f"{'colocated' if colocated else 'separate'}: {middle['many'] / middle['one']:.2f} 16 clients over one (bar 3); {middle['generate'] / middle['one']:.2f} one client's time over generate's (bar 1.2)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    with ray_session(None):
        from ray import serve

        serve.start(http_options={"host": LOOPBACK, "port": PORT})
        for colocated in (True, False):
            throughput(arguments.bundle, arguments.seconds, colocated)
        serve.shutdown()


if __name__ == "__main__":
    main()
