"""The page's server: what is answered, to whom, and what cannot be asked for."""

import hashlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx
import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs import watch as watch_job
from paris_ray.api_keys import Key
from paris_ray.artifacts import METRICS
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.watching import connection as watch_connection
from paris_ray.watching import server as watch_server
from paris_ray.watching.runs import BEGUN, WatchedRun, check_run
from paris_ray.watching.server import listen, server_of, watch_app
from tests.watched_runs import SECRET, grid_of, write_run

REPOSITORY = Path(__file__).parents[3]
KEYS = (Key(name="alice", sha256=hashlib.sha256(b"s3cret").hexdigest()),)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write_run(Folder(tmp_path_factory.mktemp("watched") / "run"))


def client_of(
    run: Folder, keys: tuple[Key, ...] | None = None, address: str = "127.0.0.1"
) -> httpx.AsyncClient:
    app = watch_app([WatchedRun(run.uri)], keys)
    transport = httpx.ASGITransport(app, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8270")


@pytest.fixture
def url(run: Folder) -> Iterator[str]:
    """The application behind a real socket."""
    listener = listen("127.0.0.1", 0, keyless=True, usual_port=0)
    with served(watch_app([WatchedRun(run.uri)], None), listener):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def served(app: ASGIApp, listener: socket.socket) -> Iterator[uvicorn.Server]:
    server = server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


def test_every_answer_has_the_digest_of_what_it_says(url: str) -> None:
    paths = ["/", "/watch.js", "/watch.css", "/api/state", "/api/differences"]
    paths += [f"/api/runs/0/{name}" for name in ("clusters", "router")]
    models = ("curves/expert-0", "captions/expert-0", "grids/expert-0/4", "grids/expert-0/4/small")
    paths += [f"/api/runs/0/{name}" for name in models]
    with httpx.Client(base_url=url) as client:
        for path in paths:
            first = client.get(path)
            assert first.status_code == 200, path
            assert first.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in first.headers["content-security-policy"]
            again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b""), path
            assert again.headers["etag"] == first.headers["etag"]


def test_an_answer_that_changed_is_sent(url: str, run: Folder) -> None:
    state = httpx.get(f"{url}/api/state")
    folder = run / "experts/expert_2"
    folder.write(METRICS, b'{"samples_seen": 4, "loss": 1.5}\n')
    try:
        tag = {"If-None-Match": state.headers["etag"]}
        while (changed := httpx.get(f"{url}/api/state", headers=tag)).status_code == 304:
            time.sleep(0.1)
        models = {m["name"]: m for m in changed.json()["runs"][0]["models"]}
        assert models["expert-2"]["loss"] == 1.5
    finally:
        folder.delete(METRICS)


def test_a_grid_is_the_file(url: str) -> None:
    response = httpx.get(f"{url}/api/runs/0/grids/expert-0/8")
    assert response.headers["content-type"] == "image/png"
    assert response.content == grid_of(8)


@pytest.mark.parametrize(
    "path",
    [
        "/ray_token",
        "/api/runs/0/grids/expert-0/..%2F..%2F..%2Fray_token",
        "/api/runs/0/grids/..%2F..%2F/ray_token",
        "/api/runs/0/grids/expert-0/samples.png",
        "/api/runs/0/curves/..",
        "/api/runs/0/curves/%2e%2e%2fray_token",
        "/api/runs/0/captions/expert-99",
        "/api/runs/1/clusters",
        "/api/runs/-1/clusters",
        pytest.param(f"/api/runs/{'9' * 5000}/clusters", id="a run of 5000 digits"),
        "/../ray_token",
        "/watch.js/../../models.py",
        "/web/watch.js",
    ],
)
def test_nothing_else_of_the_folder_is_served(url: str, path: str) -> None:
    """Sent as it stands: a client's library would tidy it up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.split()[1] == b"404", answer
    assert SECRET.encode() not in answer


def test_it_only_answers_questions(url: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert httpx.request(method, f"{url}/api/state").status_code == 405


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("192.0.2.7", {}),
        ("127.0.0.1", {"Host": "evil.example"}),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.7"}),
    ],
)
async def test_without_keys_only_this_machine_is_answered(
    run: Folder, address: str, headers: dict[str, str]
) -> None:
    async with client_of(run, address=address) as client:
        for path in ("/", "/api/state"):
            response = await client.get(path, headers=headers)
            assert response.status_code == 403
            assert "--api-key-file" in response.json()["error"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("site", "status"),
    [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)],
)
async def test_other_pages_in_the_browser_keep_nothing_busy(
    run: Folder, site: str, status: int
) -> None:
    async with client_of(run) as client:
        headers = {"Sec-Fetch-Site": site}
        assert (await client.get("/api/state", headers=headers)).status_code == status
        assert (await client.get("/", headers=headers)).status_code == 200  # by a link


@pytest.mark.anyio
async def test_what_needs_no_key_is_told_by_the_path_alone(run: Folder) -> None:
    """An address put together with the Host header may have another one."""
    async with client_of(run, KEYS, "192.0.2.7") as client:
        for path in ("/%09", "/watch%0A.js"):  # which parsers of addresses leave out
            assert (await client.get(path)).status_code == 401, path
        for host in ("x/watch.js?", "x/?"):
            refused = await client.get("/api/state", headers={"Host": host})
            assert refused.status_code == 401, host


@pytest.mark.anyio
async def test_with_keys_the_run_is_told_to_their_holders(run: Folder) -> None:
    async with client_of(run, KEYS, "192.0.2.7") as client:
        assert (await client.get("/")).status_code == 200  # the page asks for the key
        for secret in ("", "Bearer", "Bearer wrong", "Basic s3cret", "s3cret"):
            refused = await client.get("/api/state", headers={"Authorization": secret})
            assert refused.status_code == 401, secret
            assert refused.headers["www-authenticate"] == "Bearer"
        answer = await client.get("/api/state", headers={"Authorization": "Bearer s3cret"})
        assert answer.json()["runs"][0]["name"] == "run"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_are_not_served_without_keys(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host='.*' is not allowed without --api-key-file"):
        listen(host, None, keyless=True, usual_port=0)


def test_the_usual_port_gives_way_and_an_asked_for_one_does_not() -> None:
    with listen("127.0.0.1", None, keyless=True, usual_port=0) as taken:
        port = taken.getsockname()[1]
        with listen("127.0.0.1", None, keyless=True, usual_port=port) as other:
            assert other.getsockname()[1] != port
        with pytest.raises(ConfigError, match=f"--port={port} cannot be listened on"):
            listen("127.0.0.1", port, keyless=True, usual_port=0)


@pytest.mark.parametrize("host", ["..", "\u00e9" * 100])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host='.*' --port=0 cannot be listened on"):
        listen(host, 0, keyless=False, usual_port=0)


def test_ctrl_c_ends_it_quietly(run: Folder) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.watch", run.uri, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as server:
        assert server.stdout is not None
        told = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert told is not None
        assert httpx.get(told[0]).status_code == 200  # it is being served
        server.send_signal(signal.SIGINT)
        _, complaints = server.communicate(timeout=60)
    assert (server.returncode, complaints) == (0, "")


@pytest.mark.parametrize("price", ["inf", "nan", "-1"])
def test_a_price_that_is_none_is_refused(
    run: Folder, price: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["watch", run.uri, f"--dollars-per-hour={price}"])
    monkeypatch.setattr(watch_job, "log_to_stdout", lambda: None)
    monkeypatch.setattr(watch_server, "serve", lambda *_: None)
    with pytest.raises(SystemExit):
        watch_job.main()
    assert "--dollars-per-hour=" in capsys.readouterr().err


HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("sent", "trickled"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(HEAD, b"X: y\r\n", id="a head without an end"),
        pytest.param(HEAD + b"\r\n", b"", id="nothing after an answer"),
        pytest.param(HEAD + b"\r\nGET / HTTP/1.1\r\n", b"X: y\r\n", id="a head after an answer"),
        pytest.param(HEAD + b"Content-Length: 9999\r\n\r\n", b"x", id="a body"),
    ],
)
def test_who_does_not_ask_in_time_is_hung_up_on(
    run: Folder, monkeypatch: pytest.MonkeyPatch, sent: bytes, trickled: bytes
) -> None:
    """Without a key, which is asked for when a head is there."""
    monkeypatch.setattr(watch_connection, "HEAD_TIMEOUT_S", 0.3)
    listener = listen("127.0.0.1", 0, keyless=False, usual_port=0)
    with (
        served(watch_app([WatchedRun(run.uri)], KEYS), listener),
        socket.create_connection(listener.getsockname()) as client,
    ):
        client.sendall(sent)
        assert is_hung_up_on(client, trickled)


def is_hung_up_on(client: socket.socket, trickled: bytes) -> bool:
    """Send a few bytes again and again, for far longer than the limit is."""
    client.settimeout(0.05)
    for _ in range(100):
        try:
            client.sendall(trickled)
            if client.recv(65536) == b"":
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await anyio.sleep(0.5)
            await Response("there")(scope, receive, send)

    monkeypatch.setattr(watch_connection, "HEAD_TIMEOUT_S", 0.1)
    listener = listen("127.0.0.1", 0, keyless=True, usual_port=0)
    with served(slow, listener):
        assert httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/").text == "there"


def test_who_takes_nothing_of_the_answers_is_hung_up_on(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key, by asking for the page again and again."""
    monkeypatch.setattr(watch_connection, "ANSWER_TIMEOUT_S", 0.2)
    listener = listen("127.0.0.1", 0, keyless=False, usual_port=0)
    with (
        served(watch_app([WatchedRun(run.uri)], KEYS), listener) as server,
        unread_answers(listener, b"/watch.js", 300),
    ):
        assert becomes(lambda: bool(server.server_state.connections))
        assert becomes(lambda: not server.server_state.connections)


def test_who_takes_an_answer_slowly_gets_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the connection is closed behind it meanwhile."""
    monkeypatch.setattr(watch_connection, "HEAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(watch_connection, "ANSWER_TIMEOUT_S", 0.4)
    size = 30_000_000

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Response(b"x" * size)(scope, receive, send)

    listener = listen("127.0.0.1", 0, keyless=True, usual_port=0)
    with (
        served(large, listener),
        socket.create_connection(listener.getsockname()) as client,
    ):
        client.sendall(HEAD + b"\r\n")
        begun, taken = time.monotonic(), 0
        while chunk := client.recv(1 << 18):
            taken += len(chunk)
            time.sleep(0.01)
    assert time.monotonic() - begun > 2 * watch_connection.ANSWER_TIMEOUT_S
    assert taken > size


@contextmanager
def unread_answers(listener: socket.socket, path: bytes, count: int) -> Iterator[socket.socket]:
    """Yield a client with little room, which has asked, and read nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.connect(listener.getsockname())
        request = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.sendall(request * count)
        yield client


def becomes(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, for far longer than it takes."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "is a file"),
        ("folder", "has none of encoders, embeddings, "),
        ("none", "does not exist"),
    ],
)
def test_what_is_no_run_is_refused(
    run: Folder,
    tmp_path: Path,
    name: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder" / "pictures").mkdir(parents=True)
    place = str(tmp_path / name)
    monkeypatch.setattr(watch_job, "log_to_stdout", lambda: None)
    monkeypatch.setattr(watch_server, "serve", lambda *_: None)
    for field, given in (("RUN", [place]), ("OTHER", [run.uri, place])):
        monkeypatch.setattr(sys, "argv", ["watch", *given, "--port=0"])
        with pytest.raises(SystemExit):
            watch_job.main()
        told = capsys.readouterr().err
        assert f"{field}={place!r} is not allowed: it {problem}" in told
        assert "the folder of a run" in told


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_is_one_from_its_beginning(tmp_path: Path, name: str) -> None:
    Folder(tmp_path).write(name if "." in name else f"{name}/part.parquet", b"")
    check_run("RUN", str(tmp_path))


def test_an_empty_folder_is_watched_until_there_is_something(run: Folder, tmp_path: Path) -> None:
    place = tmp_path / "beginning"
    place.mkdir()
    check_run("RUN", str(place))
    clock = [0.0]
    watched = WatchedRun(str(place), clock=lambda: clock[0])
    told = watched.overview()
    assert (told["models"], told["stages"], told["problem"]) == ([], [], None)
    shutil.copytree(run.local_path, place, dirs_exist_ok=True)
    clock[0] = 60.0
    assert watched.overview()["models"]


def test_a_damaged_file_is_an_error_in_words(run: Folder, tmp_path: Path) -> None:
    own = Folder(tmp_path)
    (own / "experts/expert_0").write(METRICS, b'{"samples_seen": 4, "loss": 1}\n')
    (own / "experts/expert_0").write("samples.png", b"no picture")
    app = watch_app([WatchedRun(own.uri)], None)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/api/runs/0/grids/expert-0/final")

    response = anyio.run(ask)
    assert response.status_code == 503
    assert "samples.png is no PNG file" in response.json()["error"]
