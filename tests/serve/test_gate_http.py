"""The gate and the edge of Ray's proxy over real sockets, served from a config file."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from jobs.local_cluster import free_port
from paris_ray.api_keys import digest_of
from serve.gate import MAX_BODY_BYTES
from tests.long_tests import chaos

pytestmark = pytest.mark.serve

REPOSITORY = Path(__file__).parents[2]
SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]  # the `serve` command
LIMIT_S = 10  # the operator's: http_options.request_timeout_s
IMAGES = "/v1/images/generations"
BODY = {"prompt": "a cat", "num_inference_steps": 1}
SMALL = {"num_cpus": 0.1}


class Server:
    """`serve run` of a config file on a Ray of its own."""

    def __init__(self, folder: Path, host: str, apps: list[dict[str, Any]], **env: str) -> None:
        self.port, self._log = free_port(), folder / "serve.log"
        options = {"host": host, "port": self.port, "request_timeout_s": LIMIT_S}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({"http_options": options, "applications": apps}))
        self._ray_folder = tempfile.mkdtemp(prefix="pr-", dir="/tmp")  # sockets' paths are short
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        ours = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": self._ray_folder, "PYTHONPATH": path}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*SERVE, "run", "--address", "local", str(config)],
                env=os.environ | ours | env,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 180) -> None:
        """Return when the log holds a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def wait_until_served(self, path: str, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.serves(path):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def serves(self, path: str) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        shutil.rmtree(self._ray_folder, ignore_errors=True)


def paris(name: str, bundle: Path, **args: object) -> dict[str, Any]:
    sizes = {
        "ingress": SMALL | {"num_replicas": 1},
        "sampler": SMALL,
        "colocated": True,
        "timeout_s": 0.9 * LIMIT_S,
    }
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "serve.app:build",
        "args": {"bundle": str(bundle), **sizes, **args},
    }


@pytest.fixture(scope="module")
def server(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`open` without keys, `keyed`, and applications that misbehave."""
    folder = tmp_path_factory.mktemp("server")
    keys = [
        {"name": "alice", "sha256": digest_of("s3cret")},
        {"name": "bob", "sha256": digest_of("b0b"), "quotas": {"requests_per_minute": 2}},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    strange = {
        "name": "strange",
        "route_prefix": "/strange",
        "import_path": "misbehaving_app:build",
        "args": {},
    }
    few = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    busy = strange | {"name": "busy", "route_prefix": "/busy", "args": few}
    two = {"num_replicas": 2}
    mortal = strange | {"name": "mortal", "route_prefix": "/mortal", "args": two}
    keyed = paris("keyed", tiny_bundle_path, api_key_file=str(folder / "keys.yaml"))
    apps = [paris("open", tiny_bundle_path), keyed, strange, busy, mortal]
    server = Server(folder, "127.0.0.1", apps)
    try:
        for path in ("/open/healthz", "/keyed/healthz", "/strange", "/busy", "/mortal"):
            server.wait_until_served(path)
        yield server
    finally:
        server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        yield client


def assert_error(status: int, content_type: str, body: bytes, expected: int) -> dict[str, Any]:
    assert status == expected, body
    assert content_type == "application/json"
    (error,) = json.loads(body).values()
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def error_of(response: httpx.Response, expected: int) -> dict[str, Any]:
    content_type = response.headers.get("content-type", "")
    return assert_error(response.status_code, content_type, response.content, expected)


class Raw:
    """One connection, byte by byte."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)

    def send(self, text: str | bytes) -> "Raw":
        self._socket.sendall(text.encode() if isinstance(text, str) else text)
        return self

    def head(
        self, path: str, *headers: str, method: str = "POST", host: str = "localhost"
    ) -> "Raw":
        return self.send(
            "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""])
        )

    def read(self) -> bytes:
        """Return all until the server closes the connection."""
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := self._socket.recv(65536):
                received += chunk
        return received

    def error(self, expected: int) -> dict[str, Any]:
        head, _, body = self.read().partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        assert headers["connection"] == "close"
        return assert_error(int(lines[0].split()[1]), headers["content-type"], body, expected)

    def close(self) -> None:
        self._socket.close()


JSON = "Content-Type: application/json"


@pytest.mark.parametrize("number", [5, 50])
def test_half_sent_bodies_hold_up_nobody(server: Server, client: httpx.Client, number: int) -> None:
    slow = [
        Raw(server).head(f"/open{IMAGES}", JSON, "Content-Length: 100").send("{")
        for _ in range(number)
    ]
    # Did they wait for the slow ones, the operator's limit would end them, too.
    assert client.get("/open/healthz").status_code == 200
    assert client.get("/open/v1/models").status_code == 200
    assert client.post(f"/open{IMAGES}", json=BODY).status_code == 200
    with ThreadPoolExecutor(number) as pool:
        errors = list(pool.map(lambda raw: raw.error(408), slow))
    assert {error["type"] for error in errors} == {"timeout_error"}


def test_strangers_are_refused_before_their_body_comes(
    server: Server, client: httpx.Client
) -> None:
    foreign = [
        Raw(server).head(f"/open{IMAGES}", "Content-Length: 9", host="evil.example")
        for _ in range(5)
    ]
    keyless = [Raw(server).head(f"/keyed{IMAGES}", "Transfer-Encoding: chunked") for _ in range(5)]
    for raw in foreign:
        assert raw.error(403)["type"] == "permission_error"
    for raw in keyless:
        assert raw.error(401)["code"] == "invalid_api_key"
    assert client.get("/keyed/healthz").status_code == 200


KEY = {"Authorization": "Bearer s3cret"}


@pytest.mark.parametrize("path", [f"/open{IMAGES}", f"/keyed{IMAGES}"])
@pytest.mark.parametrize("headers", [{}, KEY])
def test_a_hundred_megabytes_are_refused(
    client: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    response = client.post(path, content=bytes(100_000_000), headers=headers)
    assert error_of(response, 413)["code"] == "body_too_large"


def test_endless_chunks_are_cut(client: httpx.Client) -> None:
    sent = []

    def chunks() -> Iterator[bytes]:
        for _ in range(1000):
            sent.append(1)
            yield bytes(100_000)

    refused = client.post(f"/keyed{IMAGES}", content=chunks())
    assert error_of(refused, 401)["code"] == "invalid_api_key"
    assert len(sent) < 1000
    sent.clear()
    refused = client.post(f"/keyed{IMAGES}", content=chunks(), headers=KEY)
    assert error_of(refused, 413)["code"] == "body_too_large"
    assert len(sent) < 1000
    good = iter([b'{"prompt": ', b'"a cat"}'])
    headers = KEY | {"Content-Type": "application/json"}
    assert client.post(f"/keyed{IMAGES}", content=good, headers=headers).status_code == 200


def test_the_longest_body_is_read(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/open{IMAGES}", content=b" " * MAX_BODY_BYTES, headers=headers)
    assert error_of(response, 400)["code"] == "invalid_json"


def test_nobody_waits_longer_than_the_operator_says(client: httpx.Client) -> None:
    longer = {"x-request-timeout-seconds": str(20 * LIMIT_S)}
    wait = {"seconds": 1.5 * LIMIT_S}
    error = error_of(client.get("/strange", params=wait, headers=longer), 408)
    assert error["type"] == "timeout_error"


def test_clients_may_wait_less(client: httpx.Client) -> None:
    shorter = {"x-request-timeout-seconds": "0.2"}
    error_of(client.get("/strange", params={"seconds": LIMIT_S / 2}, headers=shorter), 408)


def test_hanging_up_ends_the_work_whatever_the_header_says(
    server: Server, client: httpx.Client
) -> None:
    before = client.get("/strange").json()["cancelled"]
    raw = Raw(server)
    raw.head(f"/strange?seconds={LIMIT_S / 2}", "x-request-disconnect-disabled: ?1", method="GET")
    time.sleep(1)  # until it is on its way; too short a time would only weaken the test
    raw.close()
    deadline = time.monotonic() + LIMIT_S / 2
    while client.get("/strange").json()["cancelled"] == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.get("/strange").json()["cancelled"] == before + 1


def test_a_request_id_of_other_bytes_is_replaced(client: httpx.Client) -> None:
    for value in (b"\xff\xfe", b"x" * 100, b"a b"):
        response = client.get("/open/v1/models", headers={"X-Request-Id": value})
        assert response.status_code == 200
        (ours,) = response.headers.get_list("x-request-id")
        assert len(ours) == 32
    response = client.get("/open/v1/models", headers={"X-Request-Id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    response = client.get("/open/v1/models", headers={"x-session-id": b"\xff"})
    assert response.status_code == 200


def test_head(client: httpx.Client) -> None:
    for path in ("/open/", "/open/healthz", "/open/v1/models"):
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) == len(client.get(path).content)
    assert client.head(f"/open{IMAGES}").status_code == 405


def test_a_slow_head_holds_up_nobody(server: Server, client: httpx.Client) -> None:
    slow = [Raw(server).send("POST / HTTP/1.1\r\nHost: local") for _ in range(50)]
    silent = Raw(server)
    assert client.get("/open/healthz").status_code == 200
    assert client.post(f"/open{IMAGES}", json=BODY).status_code == 200
    for raw in slow:
        assert raw.error(408)["type"] == "timeout_error"
    assert silent.read() == b""


def test_an_endless_head_is_cut(server: Server) -> None:
    raw = Raw(server).send("GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            raw.send(b"x" * 100_000)
    assert raw.error(431)["code"] == "headers_too_large"


@pytest.mark.parametrize("text", ["nonsense\r\n\r\n", "GET / HTTP/1.1\r\nbad header\r\n\r\n"])
def test_what_is_no_http_is_refused_in_our_shape(server: Server, text: str) -> None:
    assert Raw(server).send(text).error(400)["code"] == "malformed_request"


def test_what_ray_answers_is_in_our_shape(client: httpx.Client) -> None:
    assert "route" in error_of(client.get("/nowhere"), 404)["message"]
    error_of(client.get("/-/routes"), 404)
    assert client.get("/-/healthz").status_code == 200


def test_a_request_whose_replica_died_is_sent_to_another(
    client: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "life").touch()
    answer = client.post("/mortal", params={"life": str(tmp_path / "life")}, content=b"abc")
    assert (answer.status_code, answer.json()["body"]) == (200, "abc")
    assert not (tmp_path / "life").exists()


def test_a_request_that_kills_replicas_kills_two(client: httpx.Client, server: Server) -> None:
    server.wait_until_served("/mortal")
    died = client.get("/mortal", params={"die": 1})
    # The second one is perhaps still starting when the time is over.
    message = error_of(died, died.status_code)["message"]
    assert died.status_code in (408, 503)
    assert "actor" not in message.lower()


def test_a_full_queue_is_an_error_in_our_shape(client: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get("/busy", params={"seconds": 1}), range(8)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert error_of(answer, 503)["code"] == "unavailable"
        assert answer.headers["retry-after"] == "1"


def test_rates(client: httpx.Client) -> None:
    client.headers["Authorization"] = "Bearer b0b"
    statuses = [client.get("/keyed/v1/models").status_code for _ in range(2)]
    refused = client.get("/keyed/v1/models")
    assert statuses == [200, 200]
    assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert client.get("/keyed/v1/models", headers=KEY).status_code == 200


def as_nginx(head: bytes, client: str, port: int) -> bytes:
    """What nginx's proxy_pass sends where nothing else is configured."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"host:")]
    lines[0] = lines[0].replace(b"HTTP/1.1", b"HTTP/1.0")
    return b"\r\n".join([lines[0], f"Host: 127.0.0.1:{port}".encode(), *lines[1:]])


def as_haproxy(head: bytes, client: str, port: int) -> bytes:
    """What HAProxy sends with `option forwardfor`."""
    return head[:-2] + f"X-Forwarded-For: {client}\r\n\r\n".encode()


def as_via(head: bytes, client: str, port: int) -> bytes:
    """What a cache sends."""
    return head[:-2] + b"Via: 1.1 relay\r\n\r\n"


Rewrite = Callable[[bytes, str, int], bytes]


async def relay(port: int, rewrite: Rewrite, listening: "asyncio.Future[int]") -> None:
    """A reverse proxy: it hands on one request a connection, as some program does."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        head = head[:-2] + b"Connection: close\r\n\r\n"
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
        upstream.write(rewrite(head, writer.get_extra_info("peername")[0], port))
        while chunk := await upstream_reader.read(65536):
            writer.write(chunk)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "0.0.0.0", 0)
    listening.set_result(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


@contextlib.contextmanager
def proxy_before(port: int, rewrite: Rewrite) -> Iterator[int]:
    loop = asyncio.new_event_loop()
    listening: asyncio.Future[int] = loop.create_future()
    task = loop.create_task(relay(port, rewrite, listening))
    own_port = loop.run_until_complete(listening)
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    yield own_port
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    loop.close()


def remote_address() -> str:
    """An address of this machine that others see; from it we look like another machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("rewrite", [as_nginx, as_haproxy, as_via])
def test_strangers_behind_a_proxy_of_this_machine_need_a_key(
    server: Server, rewrite: Rewrite
) -> None:
    with proxy_before(server.port, rewrite) as port, httpx.Client() as client:
        url = f"http://{remote_address()}:{port}"
        as_local = {"Host": f"localhost:{server.port}"}  # what a stranger would say
        for path in ("/open/", "/open/healthz", "/open/v1/models"):
            refused = client.get(url + path, headers=as_local)
            assert "proxy" in error_of(refused, 403)["message"]
        error_of(client.get(f"{url}/keyed/v1/models", headers=as_local), 401)
        assert client.get(f"{url}/keyed/v1/models", headers=as_local | KEY).status_code == 200


NO_EDGE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": ""}
HA_PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
HOST_REFUSED = "http_options.host='0.0.0.0' is not allowed without api_key_file"
NO_EDGE_REFUSED = "Start every node of Ray with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
HA_PROXY_REFUSED = "RAY_SERVE_ENABLE_DIRECT_INGRESS=1 are not allowed without api_key_file"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "key").write_text("s3cret")
    return {"api_key_file": str(tmp_path / "key")}


@chaos
def test_unsafe_applications_are_refused(
    tiny_bundle_path: Path, keys: dict[str, str], tmp_path: Path
) -> None:
    """Each by itself, in one Ray: an Ingress has the environment that its node would have."""

    def unsafe(name: str, env: dict[str, str] | None = None, **args: object) -> dict[str, Any]:
        # It is an Ingress that refuses to start; no Sampler need have started.
        app = paris(name, tiny_bundle_path, sampler={"num_cpus": 10_000}, **args)
        options = SMALL | {"runtime_env": {"env_vars": env or {}}}
        return app | {"deployments": [{"name": "Ingress", "ray_actor_options": options}]}

    refused = {
        HOST_REFUSED: unsafe("open"),
        f"timeout_s={LIMIT_S} is not allowed": unsafe("late", timeout_s=LIMIT_S, **keys),
        NO_EDGE_REFUSED: unsafe("bare", NO_EDGE, **keys),
        HA_PROXY_REFUSED: unsafe("direct", HA_PROXY),
    }
    server = Server(tmp_path, "0.0.0.0", list(refused.values()))
    try:
        for text in refused:
            server.wait_for(text)
        assert not any(server.serves(f"{app['route_prefix']}/") for app in refused.values())
    finally:
        server.stop()


@chaos
@pytest.mark.parametrize(
    ("host", "env", "refused"),
    [
        ("0.0.0.0", {}, HOST_REFUSED),
        ("127.0.0.1", NO_EDGE, NO_EDGE_REFUSED),
        ("127.0.0.1", HA_PROXY, HA_PROXY_REFUSED),
    ],
)
def test_an_unsafe_start_is_refused(
    tiny_bundle_path: Path, tmp_path: Path, host: str, env: dict[str, str], refused: str
) -> None:
    """A Ray each, all of which has the environment."""
    server = Server(tmp_path, host, [paris("open", tiny_bundle_path)], **env)
    try:
        server.wait_for(refused)
        assert not server.serves("/open/")
    finally:
        server.stop()
