"""Let the Serve application run under everything at once, and see what is left of it.

    python tests/benchmarks/soak.py --bundle RUN/bundle [--minutes 30]

A storm: clients that draw, that hang up and that cancel, bad requests, half-sent bodies, adapters
that come and go, experts and Samplers that are killed. Then calm: what 1,000 requests have left
over what 100 have, in memory, handles, threads, tasks and objects. The exit code is 1 if anything
is missed. A Ray of its own on this machine, loopback only.
"""

import argparse
import asyncio
import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench_engine import report
from serving_load import IMAGES, Load, ask, shoot

from jobs.command import ray_session
from jobs.local_cluster import LOOPBACK, SERVE_EDGE, free_port

CLIENTS = 4
KILL_PERIOD_S = 20.0
DEPLOY_PERIOD_S = 60.0
BETWEEN = (100, 1000)  # requests
FLAT = 1.05
IDLE_WITHIN_S = 120.0
READINGS, BETWEEN_READINGS_S = 5, 2.0
# In the storm a request is answered, or refused for a reason of its own.
EXPECTED = {200, 400, 404, 408, 429, 499}
BAD = (
    {},
    {"prompt": "a cat", "n": 11},
    {"prompt": "a cat", "num_inference_steps": "many"},
    {"prompt": "a cat", "routing": "best"},
    {"prompt": "a cat", "lora": "unknown"},
    {"prompt": "a\0cat"},
)


class Soak:
    """One application, and what is done to it.

    Args:
        bundle: Path of the bundle.
        adapters: Paths of two adapters of its expert 0.
        port: Where Serve listens.
    """

    def __init__(self, bundle: str, adapters: list[str], port: int) -> None:
        from paris_ray.bundle import load_bundle

        self._bundle, self._adapters, self._port = bundle, adapters, port
        self.url = f"http://{LOOPBACK}:{port}/bench/"
        self._prompts = load_bundle(bundle).facts.example_prompts
        self._chance, self.seen, self.number = random.Random(0), Load(), 0

    def deploy(self, adapter: int) -> None:
        """Serve the bundle with one of the adapters; the other one is forgotten."""
        from ray import serve

        from serve.app import AppArgs, build

        loras = {f"adapter-{adapter}": {"path": self._adapters[adapter], "expert": 0}}
        args = AppArgs(bundle=self._bundle, loras=loras, limits={"lost_after_s": 120})
        serve.run(build(args), name="bench", route_prefix="/bench")

    def body(self) -> dict[str, Any]:
        """Return any good request."""
        self.number += 1
        chance = self._chance
        return {
            "prompt": chance.choice(self._prompts),
            "seed": self.number,
            "n": chance.choice([1, 1, 2]),
            "num_inference_steps": chance.choice([1, 2, 4]),
            "routing": chance.choice(["top-1", "top-2", "full"]),
            "guidance_scale": chance.choice([1.0, 2.0]),
            "lora": chance.choice([None, None, "adapter-0", "adapter-1"]),
            "response_format": chance.choice(["b64_json", "url"]),
        }

    async def draw(self, http: httpx.AsyncClient) -> None:
        """Ask for pictures; sometimes as a stream."""
        body = self.body()
        if self._chance.random() < 0.8:
            await ask(http, body, self.seen)
            return
        async with http.stream("POST", IMAGES, json=body | {"stream": True}) as answer:
            await answer.aread()

    async def give_up(self, http: httpx.AsyncClient) -> None:
        """Ask for much, and cancel it or hang up."""
        body, name = self.body() | {"num_inference_steps": 100, "n": 4}, f"soak-{self.number}"
        asked = asyncio.create_task(http.post(IMAGES, json=body, headers={"X-Request-Id": name}))
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        if self._chance.random() < 0.5:
            await http.delete(f"{IMAGES}/{name}")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def be_bad(self, http: httpx.AsyncClient) -> None:
        """Send what is refused."""
        await ask(http, self._chance.choice(BAD), self.seen)

    async def be_slow(self, _: httpx.AsyncClient) -> None:
        """Send half of a body, and go."""
        _, writer = await asyncio.open_connection(LOOPBACK, self._port)
        head = f"POST /bench/{IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        await asyncio.sleep(self._chance.uniform(0, 1))
        writer.close()

    async def storm(self, seconds: float) -> None:
        """Do everything at once."""
        shooting = asyncio.create_task(shoot(("Expert-", "Sampler"), KILL_PERIOD_S))
        deploying = asyncio.create_task(self._change_adapters(min(DEPLOY_PERIOD_S, seconds / 3)))
        until = time.monotonic() + seconds
        kinds = [self.draw] * CLIENTS + [self.give_up, self.be_bad, self.be_slow]
        await self._repeat(kinds, lambda: time.monotonic() < until)
        for task in (shooting, deploying):
            task.cancel()
            with suppress(asyncio.CancelledError):  # whatever else ended it is told
                await task

    async def calm(self, num_requests: int) -> None:
        """Do all that clients do, until so many requests have been sent."""
        last = self.number + num_requests
        kinds = [self.draw] * CLIENTS + [self.give_up, self.be_bad, self.be_slow]
        await self._repeat(kinds, lambda: self.number < last)

    async def _repeat(
        self,
        kinds: list[Callable[[httpx.AsyncClient], Awaitable[None]]],
        goes_on: Callable[[], bool],
    ) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:

            async def client(act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
                while goes_on():
                    try:
                        await act(http)
                    except httpx.HTTPError:  # a status tells more; `ask` counts those
                        await asyncio.sleep(0.1)
                    await asyncio.sleep(0.02)

            await asyncio.gather(*map(client, kinds))

    async def _change_adapters(self, period_s: float) -> None:
        for number in count(1):
            await asyncio.sleep(period_s)
            await asyncio.to_thread(self.deploy, number % 2)


def watch_replicas() -> None:
    """Let replicas of this run tell what they hold; the application's classes stay as they are."""
    from serve import app

    class WatchedSampler(app.Sampler):
        async def held(self) -> dict[str, float]:
            """Return how much of everything there is in this process."""
            engine = self._engine
            left = len(self._requests) + len(engine._open) + len(engine._of_client)
            left += engine.num_active + engine.num_waiting + engine.num_left
            left += len(self._beginning)
            return held_here() | {"left in the engine": left}

    class WatchedIngress(app.Ingress):
        async def held(self) -> dict[str, float]:
            """Return how much of everything there is in this process."""
            left = len(self.samplers._errands) + len(self._files._making)
            return held_here() | {"left in the relay": left}

    class WatchedExpert(app.ExpertServer):
        async def held(self) -> dict[str, float]:
            """Return how much of everything there is in this process."""
            return held_here() | {"left to compute": len(self._asked)}

    app.Sampler, app.Ingress, app.ExpertServer = WatchedSampler, WatchedIngress, WatchedExpert


def held_here() -> dict[str, float]:
    """Return what this process holds."""
    gc.collect()
    process = psutil.Process()
    return {
        "memory, MB": process.memory_info().rss / 1e6,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "tasks": len(asyncio.all_tasks()),
        "objects": len(gc.get_objects()) + gc.get_freeze_count(),  # Ray freezes those of the start
    }


def held() -> dict[str, dict[str, float]]:
    """Return what the replicas hold, by deployment; replicas of one are added."""
    from ray import serve

    found: dict[str, dict[str, float]] = {}
    for deployment in serve.status().applications["bench"].deployments:
        handle = serve.get_deployment_handle(deployment, "bench")
        for answer in handle.broadcast("held").results(timeout_s=60):
            sums = found.setdefault(deployment, {})
            for name, value in answer.items():
                sums[name] = sums.get(name, 0) + value
    return found


def held_at_rest() -> dict[str, dict[str, float]]:
    """Return what the replicas hold for good: of each the least of some readings, a while apart."""
    readings = []
    for _ in range(READINGS):
        readings.append(held())
        time.sleep(BETWEEN_READINGS_S)
    return {
        name: {kind: min(reading[name][kind] for reading in readings) for kind in of}
        for name, of in readings[0].items()
    }


def left(state: dict[str, dict[str, float]]) -> float:
    """Return how much of any request is left."""
    return sum(v for of in state.values() for name, v in of.items() if name.startswith("left"))


def wait_until_idle() -> float:
    """Wait until nothing of any request is left; return how much is, in the end."""
    deadline = time.monotonic() + IDLE_WITHIN_S
    while (rest := left(held())) and time.monotonic() < deadline:
        time.sleep(1)
    return rest


def compare(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> bool:
    """Print what grew from one state to another; return whether nothing grew too much."""
    flat = True
    few, many = BETWEEN
    for kind in ("memory, MB", "handles", "threads", "tasks", "objects"):
        one, other = ({name: of[kind] for name, of in state.items()} for state in (before, after))
        worst = max(one, key=lambda name: other[name] / one[name])
        ratio = other[worst] / one[worst]
        where = f"{worst}: {one[worst]:.0f}, then {other[worst]:.0f}"
        flat &= report(f"{kind} after {many} requests over {few} ({where})", [ratio], "<=", FLAT)
    return flat


def random_adapters(bundle: str, folder: Path) -> list[str]:
    """Write two adapters of a bundle's expert 0; return their paths."""
    import torch

    from paris_ray.bundle import load_bundle
    from paris_ray.config import LoRAConfig
    from paris_ray.folders import Folder
    from paris_ray.models.lora import Adapter
    from paris_ray.models.peft_layout import save_adapter

    expert = load_bundle(bundle).expert(0)
    for seed in (0, 1):
        adapter = Adapter.create(expert, LoRAConfig(r=2 + seed, lora_alpha=4), seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.01 * torch.randn_like(parameter))
        save_adapter(adapter, Folder(folder / str(seed)))
    return [str(folder / "0"), str(folder / "1")]


def soak(bundle: str, minutes: float, folder: Path) -> bool:
    """Run it all; return whether nothing is missed."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": LOOPBACK, "port": port, "request_timeout_s": 300})
    watch_replicas()
    run = Soak(bundle, random_adapters(bundle, folder), port)
    run.deploy(0)
    asyncio.run(run.storm(60 * minutes))
    print(f"- the storm: {minutes:g} minutes, statuses {run.seen.statuses}", flush=True)
    for failure in sorted(set(run.seen.failures)):
        print(f"  {failure}")
    unexpected = sum(n for status, n in run.seen.statuses.items() if status not in EXPECTED)
    fine = report("answers that nobody expects", [unexpected], "<=", 0)
    fine &= report("answers that are not JSON", [run.seen.not_json], "<=", 0)
    run.deploy(0)
    fine &= report("left of requests after the storm", [wait_until_idle()], "<=", 0)
    asyncio.run(run.calm(BETWEEN[0]))
    wait_until_idle()
    before = held_at_rest()
    asyncio.run(run.calm(BETWEEN[1] - BETWEEN[0]))
    fine &= report("left of requests after the calm", [wait_until_idle()], "<=", 0)
    fine &= compare(before, held_at_rest())
    serve.shutdown()
    return fine


def main() -> int:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", default="runs/bench/quickstart/bundle")
    parser.add_argument("--minutes", type=float, default=30, help="of the storm")
    options = parser.parse_args()
    os.environ |= SERVE_EDGE
    with ray_session(None), tempfile.TemporaryDirectory() as folder:
        return 0 if soak(options.bundle, options.minutes, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
