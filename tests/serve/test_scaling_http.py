"""A real application while it grows, shrinks, gets another bundle or loses an expert for good.

`make chaos` runs all of it, without and with HAProxy, which is a matter of the environment; of what
takes minutes, `make test` runs a short form or nothing.
"""

import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from paris_ray.artifacts import VerifiedFolder, publish
from paris_ray.bundle import Bundle, bundle_digest, load_bundle
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.pictures import read_picture
from paris_ray.roster.refit import with_outputs, write_router
from paris_ray.run import BUNDLE
from paris_ray.sampling import generate
from tests.long_tests import CHAOS, chaos
from tests.serve.applications import end_applications
from tests.serve.waiting import WAIT_S, wait_until

pytestmark = [
    pytest.mark.serve,
    # Ray has no other way to report more often: the variables that it names are read nowhere.
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]

IMAGES = "v1/images/generations"
KEY = "s3cret"  # HAProxy mode is refused without one
HEADERS = {"Authorization": f"Bearer {KEY}"}
APP = "changing"
INGRESS = {"num_replicas": 2 if CHAOS else 1}
CLIENTS = 4 if CHAOS else 2  # so that rows of both bundles could be in a batch
COLOCATED = not CHAOS  # a process of its own for every expert, twice, takes minutes to start


class Load:
    """Clients that ask one request after the other.

    Args:
        url: Of the application.
        clients: How many.
        body: Of every request; the seeds are 0 to 3.
    """

    def __init__(self, url: str, clients: int, body: dict[str, Any]) -> None:
        self.answers: list[tuple[int, httpx.Response]] = []
        self._url, self._body = url, body
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, headers=HEADERS, timeout=120) as client:
            while not self._stopped.is_set():
                seed = len(self.answers) % 4
                answer = client.post(IMAGES, json=self._body | {"seed": seed})
                self.answers.append((seed, answer))

    @property
    def statuses(self) -> set[int]:
        return {answer.status_code for _, answer in self.answers}

    def wait_for_more(self, count: int) -> None:
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal)


def running(app: str, deployment: str) -> int:
    """How many replicas a deployment has that take requests."""
    return serve.status().applications[app].deployments[deployment].replica_states.get("RUNNING", 0)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("keys") / "key"
    path.write_text(KEY)
    return str(path)


@pytest.fixture(scope="module")
def deploy(serve_address: str, key_file: str) -> Iterator[Callable[..., str]]:
    """A function that deploys an application as `serve deploy` does, and returns its URL.

    What a test leaves is what the next one begins with, if it has the same name: Serve starts only
    what differs.
    """
    names = set()

    def apply(name: str, **args: Any) -> str:
        names.add(name)
        application = {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "serve.app:build",
            "autoscaling_policy": {"policy_function": "serve.scaling:policy"},
            "args": {"api_key_file": key_file, **args},
        }
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        return f"{serve_address}/{name}"

    yield apply
    end_applications(names)


def wait_for_application(name: str) -> None:
    wait_until(lambda: serve.status().applications[name].status == "RUNNING")


@chaos
def test_from_one_to_three_and_back_without_a_failure(
    deploy: Callable[..., str], tiny_bundle_path: Path
) -> None:
    url = deploy(
        "growing",
        bundle=str(tiny_bundle_path),
        ingress={"num_replicas": 1},
        sampler={"max_replicas": 3},
        experts={1: {"max_replicas": 3}},
        scaling={
            "period_s": 0.5,
            "pictures_per_sampler": 4,
            "calls_per_expert": 1,
            "downscale_delay_s": 3,
        },
    )
    wait_for_application("growing")
    assert running("growing", "Sampler") == running("growing", "Expert-1") == 1
    body = {"prompt": "a cat", "num_inference_steps": 20}
    with Load(url, 12, body) as load:
        wait_until(lambda: running("growing", "Sampler") == 3)
        wait_until(lambda: running("growing", "Expert-1") == 3)
        load.wait_for_more(24)
    assert running("growing", "Expert-0") == 1
    with Load(url, 1, body) as later:  # replicas end under it
        wait_until(lambda: running("growing", "Sampler") == running("growing", "Expert-1") == 1)
        later.wait_for_more(4)
    assert load.statuses | later.statuses == {200}
    pictures = {
        (seed, answer.json()["data"][0]["b64_json"])
        for seed, answer in load.answers + later.answers
    }
    assert len(pictures) == 4  # of each seed one, whoever drew it


@contextmanager
def kept_dead(
    kill_replicas: Callable[[str, str], int], app: str, deployment: str
) -> Iterator[None]:
    """Kill a deployment's replica, and each that Serve starts in its place."""
    stopped, began = threading.Event(), threading.Event()

    def kill() -> None:
        while not stopped.wait(0.05):
            if kill_replicas(app, deployment):
                began.set()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert began.wait(WAIT_S)
        yield
    finally:
        stopped.set()
        killer.join()


@chaos
def test_where_an_expert_stays_dead_the_seed_draws_and_the_answer_names_it(
    deploy: Callable[..., str],
    kill_replicas: Callable[[str, str], int],
    seeded_bundle_path: Path,
) -> None:
    url = deploy(APP, bundle=str(seeded_bundle_path), ingress=INGRESS, limits={"lost_after_s": 3})
    wait_for_application(APP)
    body = {"prompt": "a cat", "seed": 1, "routing": "full", "num_inference_steps": 5}

    def draw(**fields: Any) -> httpx.Response:
        return httpx.post(f"{url}/{IMAGES}", json=body | fields, headers=HEADERS, timeout=WAIT_S)

    whole = draw().json()
    assert (whole["paris"]["degraded"], whole["paris"]["missing_experts"]) == (False, [])
    with kept_dead(kill_replicas, APP, "Expert-2"):
        # A busy machine lets the first drawing end before the kill has reached its expert.
        wait_until(lambda: "x-paris-missing-experts" in draw().headers)
        answer, refused = draw(), draw(allow_degraded=False)
    assert answer.status_code == 200
    assert answer.headers["x-paris-missing-experts"] == "2"
    facts = answer.json()["paris"]
    assert (facts["degraded"], facts["missing_experts"]) == (True, [2])
    assert facts["last_resort"] is True
    assert facts["expert_weights"][0][-1][2] > 0
    assert sum(facts["expert_weights"][0][-1]) == pytest.approx(1, abs=1e-3)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "unavailable"
    wait_until(lambda: draw().json().get("data") == whole["data"])


@pytest.fixture(scope="module")
def smaller_bundle_path(seeded_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a seed, without its last expert: the seed has that one's number."""
    root, bundle = tmp_path_factory.mktemp("smaller"), load_bundle(str(seeded_bundle_path))
    last = f"expert_{bundle.num_experts - 1}"
    router = with_outputs(bundle.router, range(bundle.num_experts - 1))
    write_router(router, torch.float32, Folder(root / "router"))
    parts = {name: part for name, part in bundle.parts.items() if name != last}
    parts["router"] = VerifiedFolder(Folder(root / "router"), None)
    write_bundle(Bundle(parts, bundle.facts), Folder(root / "bundle"), model_card="")
    publish(Folder(root / "bundle"), BUNDLE, config_digest="", parents={}, facts={})
    return root / "bundle"


def change_under_load(deploy: Callable[..., str], before: Path, after: Path) -> None:
    """Deploy another bundle while clients draw: nobody fails, each picture is of one bundle."""
    paths = {bundle_digest(str(path)): path for path in (before, after)}
    old, new = paths
    options = {"num_inference_steps": 20, "routing": "full"}
    url = deploy(APP, bundle=str(before), ingress=INGRESS, colocated=COLOCATED)
    wait_for_application(APP)
    with Load(url, CLIENTS, {"prompt": "a cat", **options}) as load:
        load.wait_for_more(8)
        deploy(APP, bundle=str(after), ingress=INGRESS, colocated=COLOCATED)
        wait_until(lambda: load.answers[-1][1].headers.get("x-paris-bundle") == new)
        wait_for_application(APP)
        load.wait_for_more(8)
        last = load.answers[-4:]
    assert load.statuses == {200}
    assert {answer.json()["paris"]["bundle"] for _, answer in last} == {new}
    expected = {
        (digest, seed): generate(load_bundle(str(path)), ["a cat"], seed=seed, **options)[0]
        for digest, path in paths.items()
        for seed in range(4)
    }
    seen = {}
    for seed, answer in load.answers:
        facts = answer.json()["paris"]
        assert not facts["degraded"]
        seen[facts["bundle"], seed] = answer
    for (digest, seed), answer in seen.items():
        file = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(file)).tobytes() == expected[digest, seed].tobytes()
        assert read_picture(file)[0].bundle == digest
    assert {digest for digest, _ in seen} == {old, new}


def test_another_bundle_under_load_fails_nobody_and_mixes_with_none(
    deploy: Callable[..., str], seeded_bundle_path: Path, other_bundle_path: Path
) -> None:
    change_under_load(deploy, seeded_bundle_path, other_bundle_path)


@chaos
def test_experts_leave_and_join_under_load(
    deploy: Callable[..., str], seeded_bundle_path: Path, smaller_bundle_path: Path
) -> None:
    for before, after in (
        (seeded_bundle_path, smaller_bundle_path),
        (smaller_bundle_path, seeded_bundle_path),
    ):
        change_under_load(deploy, before, after)
        experts = {f"Expert-{k}" for k in range(load_bundle(str(after)).num_models)}
        deployed = serve.status().applications[APP].deployments
        assert {name for name in deployed if name.startswith("Expert-")} == experts
