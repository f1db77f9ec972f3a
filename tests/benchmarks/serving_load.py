"""Clients that load a Serve application: the load generator of the benchmarks.

They are real HTTP clients in this process, on loopback only, and stop after a time that is given.
"""

import asyncio
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from jobs.local_cluster import LOOPBACK, free_port

IMAGES = "v1/images/generations"
CLIENTS = 16
NUMBERS = itertools.count()  # of the requests of this run
Bodies = Callable[[int], dict[str, Any]]


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: Of each request.
        statuses: How many answers had each status; -1 where there was none.
        elapsed_s: Of all.
        not_json: How many answers were not JSON.
        failures: What answers of 500 and more said.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    not_json: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.statuses.get(200, 0) / self.elapsed_s

    def milliseconds(self, share: float) -> float:
        """The latency that a share of the requests did not exceed."""
        return (
            1000 * sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]
        )


async def load(
    url: str, bodies: Bodies, clients: int, seconds: float, over: asyncio.Event | None = None
) -> Load:
    """Let some clients ask one request after the other for some seconds, or until it is over."""
    result, over = Load(), over or asyncio.Event()
    began = time.perf_counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.perf_counter() - began < seconds and not over.is_set():
                await ask(http, bodies(next(NUMBERS)), result)

    await asyncio.gather(*(client() for _ in range(clients)))
    result.elapsed_s = time.perf_counter() - began
    return result


async def ask(http: httpx.AsyncClient, body: dict[str, Any], result: Load) -> None:
    """Send one request and note what came of it."""
    began = time.perf_counter()
    try:
        answer = await http.post(IMAGES, json=body)
        status = answer.status_code
        if status >= 500:
            result.failures.append(answer.text)
        result.not_json += not answer.headers["content-type"].startswith("application/json")
    except httpx.HTTPError:
        status = -1
    result.statuses[status] = result.statuses.get(status, 0) + 1
    result.seconds.append(time.perf_counter() - began)


class Bench:
    """One Serve of this run.

    Args:
        bundle: Path of a bundle.
        seconds: Of each measurement.
    """

    def __init__(self, bundle: str, seconds: float) -> None:
        from paris_ray.bundle import load_bundle

        self.bundle, self.seconds, self.port = bundle, seconds, free_port()
        self.prompts = load_bundle(bundle).facts.example_prompts

    def bodies(self, number: int) -> dict[str, Any]:
        """Requests for one picture, of captions that different experts draw.

        No two have the same prompt: what is remembered of a prompt must not flatter anything.
        """
        prompt = self.prompts[number % len(self.prompts)]
        return {"prompt": f"{prompt} {number}", "seed": number}

    @contextmanager
    def application(self, *, warm: int = CLIENTS, **args: Any) -> Iterator[str]:
        """Serve the bundle, warm by so many clients; give the URL."""
        from ray import serve

        from serve.app import AppArgs, build

        serve.run(build(AppArgs(bundle=self.bundle, **args)), name="bench", route_prefix="/bench")
        url = f"http://{LOOPBACK}:{self.port}/bench/"
        self.run(url, warm, 3)
        yield url
        serve.delete("bench")

    @contextmanager
    def growing(self, **args: Any) -> Iterator[str]:
        """Serve the bundle with replicas that follow the load, as `serve deploy` does."""
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": "bench",
            "route_prefix": "/bench",
            "import_path": "serve.app:build",
            "autoscaling_policy": {"policy_function": "serve.scaling:policy"},
            "args": {"bundle": str(Path(self.bundle).absolute()), **args},
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(schema)
        while (status := serve.status().applications["bench"].status) != "RUNNING":
            if status == "DEPLOY_FAILED":
                sys.exit("the application could not be deployed")
            time.sleep(0.5)
        yield f"http://{LOOPBACK}:{self.port}/bench/"
        serve.delete("bench")

    def run(self, url: str, clients: int, seconds: float | None = None) -> Load:
        """Let some clients ask for pictures of all captions."""
        return asyncio.run(load(url, self.bodies, clients, seconds or self.seconds))

    def in_process(self) -> float:
        """Pictures a second of `generate`, one after the other, in a process of its own."""
        code = f"""
import time, torch
torch.set_num_threads(1)
from paris_ray.bundle import load_bundle
from paris_ray.reports import png_bytes
from paris_ray.sampling import generate
bundle = load_bundle({self.bundle!r})
prompts, count = bundle.facts.example_prompts, 0
generate(bundle, prompts[:1], num_inference_steps=1, routing="full")
began = time.perf_counter()
while time.perf_counter() - began < {self.seconds}:
    prompt = prompts[count % len(prompts)]
    png_bytes(generate(bundle, [f"{{prompt}} {{count}}"], seed=count)[0])
    count += 1
print(count / (time.perf_counter() - began))
"""
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


async def shoot(deployments: Sequence[str], period_s: float) -> None:
    """Kill a replica of some deployments, by the beginning of their names, every so often."""
    import ray

    while True:
        await asyncio.sleep(period_s)
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        targets = [n for n in names if any(f"bench#{d}" in n for d in deployments)]
        if targets:
            ray.kill(ray.get_actor(random.choice(targets), namespace="serve"))
