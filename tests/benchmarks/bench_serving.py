"""Measure the Serve application under load: what batching, hops, adapters and failures cost.

    python tests/benchmarks/bench_serving.py --bundle RUN/bundle [--seconds 8] [PART ...]

One Ray of its own on this machine, loopback only; the clients are real HTTP clients in this
process, which shares the cores. Every figure is a ratio within one run, its sides measured in
alternation. Nothing is asserted: a bar that is missed is printed as missed.
"""

import argparse
import asyncio
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
from bench_engine import report
from serving_load import CLIENTS, IMAGES, NUMBERS, Bench, Bodies, Load, ask, load, shoot

from jobs.command import ray_session
from jobs.local_cluster import LOOPBACK, SERVE_EDGE

ROUNDS = 3
PAPER_SECONDS = 20.0
CANCELS = 1000
KILL_PERIOD_S = 10.0
SCALING_S = 300.0


def batching(bench: Bench) -> None:
    """Sixteen clients against one, and one client against `generate`."""
    for colocated in (True, False):
        many, over, latency = [], [], []
        with bench.application(colocated=colocated) as url:
            for _ in range(ROUNDS):
                alone, one = bench.in_process(), bench.run(url, 1)
                sixteen = bench.run(url, CLIENTS)
                many.append(sixteen.rate / one.rate)
                over.append(alone / one.rate)
                latency.append(sixteen.milliseconds(0.95) / sixteen.milliseconds(0.5))
        name = "colocated" if colocated else "separate"
        report(f"{name}: {CLIENTS} clients over one", many, ">=", 3)
        report(f"{name}: one request over in-process generate", over, "<=", 1.2)
        report(f"{name}: p95 over p50 of {CLIENTS} clients", latency, "<=", 2)


def paper(bench: Bench) -> None:
    """One request over in-process `generate` where a step takes as long as the paper's."""
    with tempfile.TemporaryDirectory() as folder:
        large = copy.copy(bench)
        large.bundle, large.seconds = f"{folder}/bundle", PAPER_SECONDS
        write_paper_bundle(bench.bundle, Path(folder))
        for colocated, bar in ((True, 1.03), (False, 1.1)):
            over = []
            with large.application(warm=1, colocated=colocated, timeout_s=1000) as url:
                for _ in range(ROUNDS):
                    alone = large.in_process()
                    over.append(alone / large.run(url, 1).rate)
            name = "colocated" if colocated else "separate"
            report(f"{name}, B/2: one request over in-process generate", over, "<=", bar)


def write_paper_bundle(source: str, folder: Path) -> None:
    """Write `folder/bundle`: a B/2 router and two B/2 experts of random weights.

    Args:
        source: A bundle, whose text encoder it has.
        folder: An empty one.
    """
    import numpy as np
    import safetensors.torch

    from paris_ray.artifacts import VerifiedFolder, publish
    from paris_ray.bundle import Bundle, load_bundle
    from paris_ray.config import CodecConfig, ExpertConfig, RouterConfig, SamplingConfig
    from paris_ray.config.release import write_document
    from paris_ray.encoders.codec import PatchPCA
    from paris_ray.export import write_bundle
    from paris_ray.folders import Folder
    from paris_ray.models import Expert, Router
    from paris_ray.run import BUNDLE, EXPERT_WEIGHTS, ROUTER_WEIGHTS

    given = load_bundle(source)
    width = given.null_text.pooled_text.shape[1]
    parts = {k: v for k, v in given.parts.items() if k in ("text_encoder", "tokenizer")}
    experts = {
        f"expert_{k}": Expert(ExpertConfig.preset("B/2", text_embed_dim=width)) for k in (0, 1)
    }
    models = experts | {"router": Router(RouterConfig(num_experts=2, text_embed_dim=width))}
    for name, model in models.items():
        part = Folder(folder / name)
        part.write_json("config.json", write_document(model.config))
        weights = ROUTER_WEIGHTS if name == "router" else EXPERT_WEIGHTS
        part.write(weights, safetensors.torch.save(model.state_dict()))
    pictures = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), dtype=np.uint8)
    PatchPCA.fit(pictures, CodecConfig(num_components=4)).save(Folder(folder / "codec"))
    parts |= {name: VerifiedFolder(Folder(folder / name), None) for name in (*models, "codec")}
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=1.0, routing="top-1")
    facts = replace(given.facts, picture_size=256, sampling=sampling)
    write_bundle(Bundle(parts, facts), Folder(folder / "bundle"), model_card="# random\n")
    publish(Folder(folder / "bundle"), BUNDLE, config_digest="", parents={}, facts={})
    for name in models:
        shutil.rmtree(folder / name)


def skew(bench: Bench) -> None:
    """Nine of ten requests want the same expert."""
    spread = []
    with bench.application(colocated=False) as url:
        rng = random.Random(0)
        prompts = [
            bench.prompts[0] if rng.random() < 0.9 else rng.choice(bench.prompts)
            for _ in range(997)
        ]
        bodies = lambda i: {"prompt": f"{prompts[i % len(prompts)]} {i}", "seed": i}  # noqa: E731
        for _ in range(ROUNDS):
            seen = asyncio.run(load(url, bodies, CLIENTS, bench.seconds))
            spread.append(seen.milliseconds(0.95) / seen.milliseconds(0.5))
    report("separate: p95 over p50 where one expert has most of the work", spread, "<=", 2)


def cancelling(bench: Bench) -> None:
    """A thousand requests, each hung up on; afterwards the server is as idle as before."""
    with bench.application(colocated=True) as url:
        before = bench.run(url, 1).milliseconds(0.5)
        asyncio.run(hang_up(url, bench, CANCELS))
        after = bench.run(url, 1).milliseconds(0.5)
    report(f"latency after {CANCELS} hang-ups over before", [after / before], "<=", 1.05)


async def hang_up(url: str, bench: Bench, count: int) -> None:
    """Send requests of a hundred steps and close their connections after a while."""
    async with httpx.AsyncClient(base_url=url) as http:
        for i in range(count):
            try:
                body = bench.bodies(i) | {"num_inference_steps": 100, "n": 4}
                await http.post(IMAGES, json=body, timeout=0.02)
            except httpx.TimeoutException:
                continue


def overload(bench: Bench) -> None:
    """Two hundred requests at once, and the health check meanwhile."""
    limits = {"max_waiting_pictures": 64}
    with bench.application(colocated=True, limits=limits) as url, health_checks(url) as health:
        seen = asyncio.run(flood(url, bench, 200))
    print(f"- 200 at once: statuses {seen.statuses}, not JSON {seen.not_json}")
    report("slowest /healthz meanwhile, seconds", [max(health)], "<=", 1)


# A process of its own, as a load balancer is: in that of the clients it would wait for them.
HEALTH = """
import sys, threading, time, httpx
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
with httpx.Client(base_url=sys.argv[1], timeout=300) as http:
    while not over.wait(0.1):
        began = time.perf_counter()
        http.get("healthz").raise_for_status()
        print(time.perf_counter() - began, flush=True)
"""


@contextmanager
def health_checks(url: str) -> Iterator[list[float]]:
    """Ask whether the server is alive, again and again; how long it took is known at the end."""
    command = [sys.executable, "-c", HEALTH, url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        seconds = [float(process.stdout.readline())]  # it is there before the load is
        yield seconds
        seconds += map(float, process.communicate()[0].split())


async def flood(url: str, bench: Bench, count: int) -> Load:
    """Send many requests at once; return what came of them."""
    seen, limits = Load(), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        await asyncio.gather(*(ask(http, bench.bodies(i), seen) for i in range(count)))
    return seen


def capacity(bench: Bench) -> None:
    """Half as many requests more than can be drawn, whoever waits for them.

    A request is in time if it takes at most twice as long as it takes to draw a full queue.
    """
    limits = {"max_active_pictures": CLIENTS, "max_waiting_pictures": CLIENTS}
    with bench.application(colocated=True, limits=limits) as url:
        rate = bench.run(url, CLIENTS).rate
        seen = asyncio.run(arrive(url, bench, 1.5 * rate, 4 * bench.seconds))
    in_time_s = 2 * 2 * CLIENTS / rate
    drawn = [seconds for status, seconds in seen if status == 200]
    refused = [seconds for status, seconds in seen if status == 429]
    print(f"- at 1.5 of capacity: {len(drawn)} drawn, {len(refused)} refused, of {len(seen)}")
    share = sum(seconds <= in_time_s for seconds in drawn) / len(drawn)
    report(f"share of what was admitted that took at most {in_time_s:.1f} s", [share], ">=", 0.9)
    report("slowest refusal, seconds", [max(refused, default=0.0)], "<=", 1)


async def arrive(url: str, bench: Bench, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Send so many requests a second; return each one's status and seconds."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def one(number: int) -> tuple[int, float]:
            await asyncio.sleep(number / rate)
            began = time.perf_counter()
            answer = await http.post(IMAGES, json=bench.bodies(next(NUMBERS)))
            return answer.status_code, time.perf_counter() - began

        return await asyncio.gather(*(one(number) for number in range(round(rate * seconds))))


def clock(bench: Bench) -> None:
    """What the server says that clients felt, against their own clocks."""
    apart = []
    with bench.application(colocated=True) as url:
        counted, told = felt(expected=0)
        for clients in (1, CLIENTS, CLIENTS):
            seen = bench.run(url, clients)
            counted += len(seen.seconds)
            before, told = told, felt(counted)[1]
            apart.append(100 * abs(1 - (told - before) / sum(seen.seconds)))
    report(f"felt by 1, {CLIENTS}, {CLIENTS} clients, off by percent", apart, "<=", 5)


def felt(expected: float) -> tuple[float, float]:
    """Return the requests and seconds that Ray's endpoint tells of once it has so many requests.

    Processes report every ten seconds; with `expected=0`, wait until nothing new comes.
    """
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    name = "ray_paris_http_seconds"
    time.sleep(0 if expected else 25)
    deadline = time.monotonic() + 60
    while True:
        sums = {f"{name}_count": 0.0, f"{name}_exact_total": 0.0}
        for family in text_string_to_metric_families(httpx.get(address).text):
            for sample in family.samples:
                if sample.name in sums and sample.labels["route"].endswith(IMAGES):
                    sums[sample.name] += sample.value
        count, seconds = sums.values()
        if count >= expected or time.monotonic() > deadline:
            return count, seconds
        time.sleep(1)


def kills(bench: Bench) -> None:
    """A replica is killed every ten seconds under load; of each deployment others are left."""
    sizes = {"expert": {"num_replicas": 2}, "sampler": {"num_replicas": 3}}
    for deployment in ("Expert-", "Sampler"):
        with bench.application(colocated=False, **sizes) as url:
            for clients, more in ((4, {}), (CLIENTS, {"n": 2, "num_inference_steps": 50})):
                bodies = lambda i, more=more: bench.bodies(i) | more  # noqa: E731
                quiet = asyncio.run(load(url, bodies, clients, 2 * bench.seconds))
                seen = asyncio.run(under_fire(url, bodies, deployment, clients))
                length = "long" if more else "short"
                who = f"{deployment.strip('-')} killed every {KILL_PERIOD_S:.0f} s"
                print(f"- {who}, {clients} clients, {length} requests: {seen.statuses}")
                failed = sum(count for status, count in seen.statuses.items() if status != 200)
                report("requests that failed", [failed], "<=", 0)
                report("answers that are not JSON", [seen.not_json], "<=", 0)
                slower = seen.milliseconds(0.99) / quiet.milliseconds(0.99)
                report("p99 over that without kills", [slower], "<=", 3)


async def under_fire(url: str, bodies: Bodies, deployment: str, clients: int) -> Load:
    """Load some clients while replicas of a deployment are killed."""
    shooting = asyncio.create_task(shoot((deployment,), KILL_PERIOD_S))
    seen = await load(url, bodies, clients, 4.5 * KILL_PERIOD_S)
    shooting.cancel()
    return seen


def scaling(bench: Bench) -> None:
    """Samplers and an expert grow to three under load, and shrink to one under less."""
    policy = {"period_s": 1, "pictures_per_sampler": 4, "calls_per_expert": 1}
    sizes = {"sampler": {"max_replicas": 3}, "experts": {0: {"max_replicas": 3}}}
    bodies = lambda i: bench.bodies(i) | {"allowed_experts": [0]}  # noqa: E731
    with bench.growing(scaling=policy | {"downscale_delay_s": 3}, **sizes) as url:
        for clients, count in ((CLIENTS, 3), (1, 1)):
            seen, done = asyncio.run(until_there_are(count, url, bodies, clients))
            when = f"after {seen.elapsed_s:.0f} s" if done else "never"
            print(f"- {clients} clients, {count} replicas of each {when}: {seen.statuses}")
            failed = sum(number for status, number in seen.statuses.items() if status != 200)
            report("requests that failed", [failed], "<=", 0)
            report("answers that are not JSON", [seen.not_json], "<=", 0)


async def until_there_are(count: int, url: str, bodies: Bodies, clients: int) -> tuple[Load, bool]:
    """Load some clients until there are so many replicas; return whether that came in time."""
    from ray import serve

    def there() -> bool:
        deployments = serve.status().applications["bench"].deployments
        running = (deployments[name].replica_states for name in ("Sampler", "Expert-0"))
        return all(states.get("RUNNING", 0) == count for states in running)

    async def watch() -> None:
        while not await asyncio.to_thread(there):
            await asyncio.sleep(1)
        over.set()

    over = asyncio.Event()
    watching = asyncio.create_task(watch())
    seen = await load(url, bodies, clients, SCALING_S, over)
    watching.cancel()
    return seen, over.is_set()


READY = """
import time
began = time.perf_counter(), time.process_time()
from serve.expert import ExpertServer
from serve.source import BundleSource
imported = time.perf_counter(), time.process_time()
ExpertServer(BundleSource({bundle!r}).pinned(), 0, threads=1, max_rows=16)
ready = time.perf_counter(), time.process_time()
print(*(b - a for a, b in (*zip(began, imported), *zip(imported, ready))))
"""


def ready(bench: Bench) -> None:
    """How long a replica of a B/2 expert takes to load, and to be there beside a running one."""
    from ray import serve

    from serve.app import REPLICA_ENVIRONMENT
    from serve.expert import ExpertServer
    from serve.source import BundleSource

    with tempfile.TemporaryDirectory() as folder:
        write_paper_bundle(bench.bundle, Path(folder))
        path = f"{folder}/bundle"
        for _ in range(ROUNDS):
            command = [sys.executable, "-c", READY.format(bundle=path)]
            env = os.environ | REPLICA_ENVIRONMENT
            out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            imports, imports_cpu, loads, loads_cpu = map(float, out.stdout.split())
            print(
                f"- B/2: imports {imports:.2f} s ({imports_cpu:.2f} s of CPU), "
                f"load and trial of rows {loads:.2f} s ({loads_cpu:.2f} s of CPU)"
            )
        options = {"num_cpus": 0.1, "runtime_env": {"env_vars": REPLICA_ENVIRONMENT}}
        expert = serve.deployment(name="B2", ray_actor_options=options)(ExpertServer)
        app = expert.bind(BundleSource(path).pinned(), 0, threads=1, max_rows=16)
        seconds = []
        for number in range(ROUNDS + 1):  # an application each: another one's replicas stay
            began = time.perf_counter()
            serve.run(app, name=f"b2-{number}", route_prefix=None)
            seconds.append(time.perf_counter() - began)
        for number in range(ROUNDS + 1):
            serve.delete(f"b2-{number}")
    report("B/2 on CPU: seconds until another replica is ready", seconds[1:], "<=", 3)


def processes(bench: Bench) -> None:
    """What the processes of an application take until they are ready, one of each kind."""
    titles = ["ProxyActor", *(f"ServeReplica:bench:{name}" for name in ("Ingress", "Sampler"))]
    with bench.application(warm=0):
        running = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # Ray ends workers that are idle
                running[process] = "".join(process.cmdline())
        for title in [*titles, "ServeReplica:bench:Expert-0"]:
            process = next(p for p, line in running.items() if line.startswith(f"ray::{title}"))
            used, memory = process.cpu_times(), process.memory_full_info()
            print(
                f"- {title.rpartition(':')[2]}: {used.user + used.system:.1f} s of CPU, resident "
                f"{memory.rss / 1e6:.0f} MB, of which {memory.uss / 1e6:.0f} MB its own"
            )


PARTS = {
    "batching": batching,
    "paper": paper,
    "skew": skew,
    "cancelling": cancelling,
    "overload": overload,
    "capacity": capacity,
    "clock": clock,
    "kills": kills,
    "scaling": scaling,
    "ready": ready,
    "processes": processes,
}


def main() -> None:
    """Print the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--bundle", default="runs/bench/quickstart/bundle")
    parser.add_argument("--seconds", type=float, default=8)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ |= SERVE_EDGE
    with ray_session(None):
        from ray import serve

        bench = Bench(options.bundle, options.seconds)
        serve.start(http_options={"host": LOOPBACK, "port": bench.port})
        for name in options.parts or PARTS:
            PARTS[name](bench)
        serve.shutdown()


if __name__ == "__main__":
    main()
