"""What an application under load tells Prometheus, and that board and alerts ask for no more.

One application, scraped from Ray's own endpoint: requests that queue, are refused, cancelled, hung
up on, drawn without an expert, and sent again since their Sampler died.
"""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import MatchOp
from ray._private.worker import global_worker

from serve import metrics
from serve.relay import OUTCOMES

pytestmark = pytest.mark.serve

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
APP = "watched"
IMAGES = "/v1/images/generations"
SECRET = "a zebra that nobody may read about"
MOST_WAITING = 5
LONG: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 60, "routing": "full"}
ROUTE = f"/{APP}{IMAGES}"
DRAWN = MOST_WAITING + 2  # requests that queue: the first, those behind it, and one for a link
NUM_STEPS = DRAWN * LONG["num_inference_steps"]
MODELS = ("router", "0", "1", "2")
STAGES = ("queue", "text", "draw", "decode", "encode", "transport")
Labels = dict[str, str]
Scrape = dict[str, list[tuple[Labels, float]]]


def scrape() -> Scrape:
    """Return what Prometheus would get now: the values of each series, by name."""
    (node,) = (node for node in ray.nodes() if node["Alive"])  # other tests' nodes are dead
    text = httpx.get(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ).text
    found: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def of_application(scraped: Scrape, name: str) -> list[tuple[Labels, float]]:
    """Return a metric's series of this application; at the edge its routes tell which it is."""
    return [
        (labels, value)
        for labels, value in scraped.get(f"ray_paris_{name}", [])
        if labels.get("application", APP) == APP
        and labels.get("route", ROUTE).startswith(f"/{APP}/")
    ]


def total(scraped: Scrape, name: str, **labels: str) -> float:
    """Return the sum of a metric's series of this application that have some labels."""
    series = of_application(scraped, name)
    return sum(value for found, value in series if labels.items() <= found.items())


def answered(scraped: Scrape, status: str) -> float:
    """Return how many requests for pictures were answered with a status."""
    return total(scraped, "http_seconds_count", route=ROUTE, status=status)


def scraped_when(true: Callable[[Scrape], bool]) -> Scrape:
    """Return a scrape of which something is true; processes report every second."""
    deadline = time.monotonic() + 90
    while not true(scraped := scrape()):
        assert time.monotonic() < deadline, {k: v for k, v in scraped.items() if "paris" in k}
        time.sleep(1)
    return scraped


@dataclass
class Client:
    """Sends requests for pictures, and has a clock.

    Args:
        url: Of the application.
    """

    url: str
    seconds: list[float] = field(default_factory=list)  # of those that were answered with 200

    def draw(self, **body: object) -> httpx.Response:
        began = time.monotonic()
        answer = httpx.post(self.url + IMAGES, json=LONG | body, timeout=120)
        if answer.status_code == 200:
            self.seconds.append(time.monotonic() - began)
        return answer

    def cancel(self, id: str) -> httpx.Response:
        return httpx.delete(f"{self.url}{IMAGES}/{id}", timeout=60)

    def wait_for(self, **counts: int) -> None:
        """Return when the Sampler has so many pictures in work and waiting."""
        deadline = time.monotonic() + 60
        while True:
            state = httpx.get(f"{self.url}/readyz", timeout=60).json()
            if counts.items() <= state.items():
                return
            assert time.monotonic() < deadline, state
            time.sleep(0.01)


@dataclass
class Watched:
    """What was done, and what was told of it.

    Attributes:
        seconds: Of the requests that queued, by the client's clock.
        token: Of a link.
        loaded: Scraped when these were answered.
        end: Scraped after the others, and after processes were killed.
    """

    seconds: list[float]
    token: str
    loaded: Scrape
    end: Scrape


def queue_up(client: Client, pool: ThreadPoolExecutor) -> None:
    """Fill the queue, and ask for one picture too many; all of the others are drawn in turn."""
    asked = [pool.submit(client.draw)]
    client.wait_for(active_pictures=1)
    asked += [pool.submit(client.draw, prompt=SECRET) for _ in range(MOST_WAITING)]
    client.wait_for(active_pictures=1, waiting_pictures=MOST_WAITING)
    assert client.draw().status_code == 429
    assert {one.result().status_code for one in asked} == {200}


def cancel_and_hang_up(client: Client, pool: ThreadPoolExecutor) -> None:
    cancelled = pool.submit(
        httpx.post,
        client.url + IMAGES,
        json=LONG | {"num_inference_steps": 100, "n": 4},
        headers={"X-Request-Id": "unwanted"},
        timeout=60,
    )
    client.wait_for(active_pictures=1)
    assert client.cancel("unwanted").status_code == 200
    assert cancelled.result().status_code == 499
    body = LONG | {"num_inference_steps": 100, "n": 4, "stream": True, "partial_images": 3}
    with httpx.stream("POST", client.url + IMAGES, json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("event: ")
    client.wait_for(active_pictures=0, waiting_pictures=0)


def lose_processes(
    client: Client, pool: ThreadPoolExecutor, kill_replicas: Callable[[str, str], int]
) -> None:
    kill_replicas(APP, "Expert-0")
    assert client.draw(num_inference_steps=2).json()["paris"]["missing_experts"] == [0]
    asked = pool.submit(client.draw)
    client.wait_for(active_pictures=1)
    kill_replicas(APP, "Sampler")
    assert asked.result().status_code == 200


@pytest.fixture(scope="module")
def watched(start_app: Callable[..., str], kill_replicas: Callable[[str, str], int]) -> Watched:
    limits = {"max_active_pictures": 1, "max_waiting_pictures": MOST_WAITING, "lost_after_s": 2}
    client = Client(start_app(APP, limits=limits))
    with ThreadPoolExecutor(8) as pool:
        queue_up(client, pool)
        link = client.draw(prompt=SECRET, response_format="url").json()["data"][0]["url"]
        assert httpx.get(link).status_code == 200
        loaded, seconds = scraped_when(all_is_told), list(client.seconds)
        cancel_and_hang_up(client, pool)
        lose_processes(client, pool, kill_replicas)
        end = scraped_when(lambda s: total(s, "resends_total") and answered(s, "499") == 2)
    return Watched(seconds, link.split("/")[-1].split(".")[0], loaded, end)


def all_is_told(scraped: Scrape) -> bool:
    """Whether all processes have reported the requests that queued."""
    stages = [total(scraped, "stage_seconds_count", stage=stage) for stage in STAGES]
    steps = [total(scraped, "batch_rows_exact_total", model=model) for model in MODELS]
    refused = total(scraped, "drawings_total", outcome="refused")
    requests = [answered(scraped, "200"), *stages]
    return {*requests} == {DRAWN} and {*steps} == {NUM_STEPS} and refused == 1


def logs() -> dict[Path, str]:
    """Return what all processes of Ray have logged."""
    folder = Path(global_worker.node.get_logs_dir_path())
    return {p: p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file()}


# -- What is told ----------------------------------------------------------------------------------


def test_clients_felt_what_is_told_and_the_stages_explain_it(watched: Watched) -> None:
    felt = total(watched.loaded, "http_seconds_exact_total", route=ROUTE, status="200")
    stages = {
        stage: total(watched.loaded, "stage_seconds_exact_total", stage=stage) for stage in STAGES
    }
    assert stages["queue"] >= stages.pop("text")
    assert felt / 2 < sum(stages.values()) < felt < sum(watched.seconds)
    assert stages["queue"] > stages["draw"]  # they were drawn one after the other
    inside = total(watched.loaded, "ingress_seconds_exact_total", route=ROUTE, status="200")
    assert sum(stages.values()) < inside < felt


def test_outcomes_and_statuses_are_counted(watched: Watched) -> None:
    def outcomes(scraped: Scrape) -> dict[str, float]:
        names = {labels["outcome"] for labels, _ in of_application(scraped, "drawings_total")}
        return {name: total(scraped, "drawings_total", outcome=name) for name in names}

    assert outcomes(watched.loaded) == {"drawn": DRAWN, "refused": 1}
    assert answered(watched.loaded, "429") == 1
    told = outcomes(watched.end)
    assert (told["cancelled"], told["degraded"], answered(watched.end, "499")) == (2, 1, 2)
    assert total(watched.end, "resends_total") == 1
    assert total(watched.end, "call_failures_total", model="0") >= 1


def test_work_is_shared_among_the_models(watched: Watched) -> None:
    assert total(watched.loaded, "images_total") == DRAWN
    assert total(watched.loaded, "router_mass_total") == pytest.approx(DRAWN)
    for model in MODELS:
        assert total(watched.loaded, "batch_rows_exact_total", model=model) == NUM_STEPS
        assert total(watched.loaded, "call_seconds_count", model=model, part="compute") == NUM_STEPS
    for k in "012":
        answer, served, compute = (
            total(watched.loaded, "call_seconds_exact_total", model=k, part=part)
            for part in ("answer", "served", "compute")
        )
        assert answer > served > compute > 0
    assert total(watched.end, "waiting_calls") == 0


def test_every_metric_is_told_and_nothing_of_a_client(watched: Watched) -> None:
    declared = {m.name: m for m in vars(metrics).values() if isinstance(m, metrics.Metric)}
    for name, metric in declared.items():
        suffix = {metrics.Total: "_total", metrics.Level: "", metrics.Distribution: "_count"}
        samples = watched.end[f"ray_{name}{suffix[type(metric)]}"]
        assert all(set(metric.labels) <= labels.keys() for labels, _ in samples), name
    ours = {name: series for name, series in watched.end.items() if name.startswith("ray_paris_")}
    values = {
        value for series in ours.values() for labels, _ in series for value in labels.values()
    }
    assert not {value for value in values if "zebra" in value or "unwanted" in value}
    assert watched.token not in values


# -- Who asks for it -------------------------------------------------------------------------------


def board_expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    variables = {"$__rate_interval": "5m", "$application": ".*"}
    expressions = [target["expr"] for target in targets]
    for name, value in variables.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+), (\w+)\)", variable["query"]["query"]
            ).groups()
            expressions.append(f"count by ({label}) ({metric})")
    return expressions


def alert_expressions() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


# Labels' values that did not come up here.
UNSEEN = {"status": {"500"}, "outcome": {*OUTCOMES.values(), "failed"}}


@pytest.mark.parametrize("read", [board_expressions, alert_expressions])
def test_board_and_alerts_ask_for_what_there_is(
    watched: Watched, read: Callable[[], list[str]]
) -> None:
    expressions = read()
    assert len(expressions) > 8
    for expression in expressions:
        assert_answerable(promql_parser.parse(expression), watched.end)


def assert_answerable(expression: promql_parser.Expr, scraped: Scrape) -> None:
    """Check that an expression asks for metrics, labels and values that exist."""
    for selector in selectors(expression):
        assert selector.name in scraped, selector.name
        for matcher in selector.matchers.matchers:
            values = {labels.get(matcher.name, "") for labels, _ in scraped[selector.name]}
            values |= UNSEEN.get(matcher.name, set())
            pattern = matcher.value if matcher.op == MatchOp.Re else re.escape(matcher.value)
            assert any(re.fullmatch(pattern, v) for v in values), (selector.name, matcher.value)
    for part in parts(expression, promql_parser.AggregateExpr):
        if part.modifier is not None:
            for selector in selectors(part):
                labels = set.intersection(*(set(one) for one, _ in scraped[selector.name]))
                assert set(part.modifier.labels) <= labels, (selector.name, part.modifier.labels)


def selectors(expression: promql_parser.Expr) -> list[Any]:
    return parts(expression, promql_parser.VectorSelector)


def parts(expression: promql_parser.Expr, kind: type) -> list[Any]:
    """Return the parts of an expression that are of a kind."""
    found: list[Any] = []
    promql_parser.walk(
        expression, lambda part: found.append(part) if isinstance(part, kind) else None
    )
    return found


# -- What is logged --------------------------------------------------------------------------------


def test_each_request_has_a_line_without_what_it_asked_for(watched: Watched) -> None:
    written = logs()
    everything = "".join(written.values())
    assert watched.token not in everything
    assert SECRET not in everything
    (log,) = [text for path, text in written.items() if f"replica_{APP}_Ingress" in path.name]
    lines = [json.loads(line) for line in log.splitlines()]
    (cancelled,) = [line for line in lines if line.get("request_id") == "unwanted"]
    assert 0 < cancelled["seconds"] < 60
    told = {"method": "POST", "status": 499, "client": "local", "n": 4, "steps": 100}
    told |= {"route": ROUTE, "application": APP}
    assert told.items() <= cancelled.items()
