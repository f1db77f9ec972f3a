"""Keys, quotas and rates: pure, with a clock that is turned by hand."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from paris_ray.api_keys import Quotas, digest_of
from paris_ray.errors import ConfigError
from serve.access import Access
from serve.errors import ApiError
from serve.keys import LOCAL, Client, KeyRing, TokenBucket
from serve.schemas import ErrorDetail

REPOSITORY = Path(__file__).resolve().parents[3]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *entries: dict[str, object]) -> Path:
    """Write a file of keys, with another time than the last."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(yaml.safe_dump(list(entries)))
    os.utime(path, ns=(before + 10**9, before + 10**9))
    return path


def entry(name: str, secret: str, **other: object) -> dict[str, object]:
    return {"name": name, "sha256": digest_of(secret), **other}


def test_one_key_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("  s3cret\n")
    ring = KeyRing(str(tmp_path / "key"))
    assert ring.find("s3cret") == Client("api_key")
    assert ring.find("other") is None
    assert ring.wait_s(Client("api_key")) == 0


def test_several_keys_with_roles_and_quotas(tmp_path: Path) -> None:
    quotas = {"requests_per_minute": 6, "concurrent_pictures": 2, "picture_steps_per_minute": 99}
    path = write(
        tmp_path / "keys.yaml",
        entry("alice", "a", quotas=quotas),
        entry("bob", "b", role="admin"),
    )
    ring = KeyRing(str(path))
    assert ring.find("a") == Client("alice", "user", Quotas(**quotas))
    assert ring.find("b") == Client("bob", "admin")
    assert ring.find("") is None
    assert ring.find(digest_of("a")) is None  # who reads the file has no key


def test_keys_change_without_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.yaml", entry("alice", "a"))
    ring = KeyRing(str(path), clock)
    write(path, entry("bob", "b"))
    assert ring.find("a") is not None  # looked at once a second
    clock.now += 1
    assert ring.find("a") is None
    assert ring.find("b") == Client("bob")


def test_a_broken_change_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.yaml", entry("alice", "a"))
    ring = KeyRing(str(path), clock)
    write(path, {"name": "alice"})
    clock.now += 1
    assert ring.find("a") == Client("alice")
    assert "sha256" in caplog.text
    path.unlink()
    clock.now += 1
    assert ring.find("a") == Client("alice")
    write(path, entry("bob", "b"))
    clock.now += 1
    assert (ring.find("a"), ring.find("b")) == (None, Client("bob"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the file"),
        ("[]", "has no key"),
        ("{", "not YAML"),
        ("name: alice", "the file"),
        ("- {name: alice, sha256: abc}", r"0\.sha256"),
        (f"- {{name: a b, sha256: {'0' * 64}}}", r"0\.name"),
        (f"- {{name: a, sha256: {'f' * 64}, role: root}}", r"0\.role"),
        (f"- {{name: a, sha256: {'f' * 64}, key: x}}", r"0\.key"),
        (f"- {{name: a, sha256: {'f' * 64}, quotas: {{requests_per_minute: 0}}}}", "quotas"),
        (f"- &k {{name: a, sha256: {'f' * 64}}}\n- *k", "name 'a' is there twice"),
        (
            f"- {{name: a, sha256: {'f' * 64}}}\n- {{name: b, sha256: {'f' * 64}}}",
            "sha256 'f+' is there twice",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        KeyRing(str(tmp_path / "keys.yaml"))


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(str(tmp_path / "none"))
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        Access(str(tmp_path / "empty"))
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(str(tmp_path / "bytes"))


@given(st.integers(1, 1000), st.lists(st.floats(0, 100), max_size=300))
def test_no_window_has_more_than_the_rate_and_a_full_bucket(rate: int, waits: list[float]) -> None:
    bucket, now, taken = TokenBucket(rate, 0.0), 0.0, 0
    for wait in waits:
        now += wait
        taken += bucket.take(1, now) == 0
        assert taken <= rate + now * rate / 60 + 1e-6


@given(st.integers(1, 1000))
def test_after_the_wait_there_is_one_again(rate: int) -> None:
    bucket = TokenBucket(rate, 0.0)
    assert [bucket.take(1, 0.0) for _ in range(rate)] == [0.0] * rate
    wait = bucket.take(1, 0.0)
    assert 0 < wait <= 60
    assert bucket.take(1, wait / 2) > 0
    assert bucket.take(1, wait + 1e-6) == 0
    assert bucket.take(1, 0.0) > 0  # a clock that goes back gives nothing


def test_one_request_too_many(tmp_path: Path) -> None:
    limited = entry("alice", "a", quotas={"requests_per_minute": 2})
    path = write(tmp_path / "keys.yaml", limited, entry("bob", "b"))
    access = Access(str(path))

    def send(secret: str) -> Client | None:
        headers = [(b"authorization", f"Bearer {secret}".encode())]
        scope = {"type": "http", "headers": headers, "http_version": "1.1"}
        return access.check(HTTPConnection(scope), is_open=False)

    assert [send("a"), send("a"), *(send("b") for _ in range(50))]
    with pytest.raises(ApiError) as refused:
        send("a")
    assert refused.value.status == 429
    assert refused.value.headers is not None
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 30
    with pytest.raises(ApiError) as unknown:
        send("wrong")
    assert unknown.value.status == 401


def test_rates_are_kept_for_present_keys_only(tmp_path: Path) -> None:
    clock = Clock()
    limited = {"quotas": {"requests_per_minute": 1}}
    path = write(
        tmp_path / "keys.yaml", entry("alice", "a", **limited), entry("bob", "b", **limited)
    )
    ring = KeyRing(str(path), clock)
    clients = [client for secret in ("a", "b") if (client := ring.find(secret))]
    assert [ring.wait_s(client) for client in clients * 2] == [0, 0, 60, 60]
    write(path, entry("bob", "b", **limited))
    clock.now += 1
    assert ring.find("a") is None
    assert set(ring._limits._buckets) == {("bob", "requests")}
    assert ring.wait_s(clients[1]) == 59  # of those that stay


def new_key(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "jobs.new_key", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_new_key_is_printed_once_and_works(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.yaml"
    made = new_key("alice", "--file", str(path), "--requests-per-minute", "60")
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert len(secret) >= 43
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert KeyRing(str(path)).find(secret) == Client(
        "alice", "user", Quotas(requests_per_minute=60)
    )
    path.write_text("# our keys\n" + path.read_text())
    other = new_key("bob", "--file", str(path), "--role", "admin")
    ring = KeyRing(str(path))
    assert ring.find(other.stdout.strip()) == Client("bob", "admin")
    assert ring.find(secret) is not None
    assert path.read_text().startswith("# our keys\n")


def test_a_key_that_would_break_the_file_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    assert new_key("alice", "--file", str(path)).returncode == 0
    before = path.read_text()
    for arguments, named in (
        (["alice"], "'alice' is there twice"),
        (["a b"], "NAME='a b' is not allowed"),
        (["-x"], "NAME"),
        (["bob", "--concurrent-pictures", "0"], "--concurrent-pictures=0 is not allowed"),
    ):
        refused = new_key(*arguments, "--file", str(path))
        assert refused.returncode == 2, arguments
        assert named in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not refused.stdout
    assert path.read_text() == before
    path.write_text(before + "- {name: carol, sha256: abc}\n")  # the server would not read it
    assert "sha256" in new_key("bob", "--file", str(path)).stderr
    (tmp_path / "json.yaml").write_text('[{"name": "x"}]')
    assert new_key("bob", "--file", str(tmp_path / "json.yaml")).returncode == 2
    assert new_key("bob", "--file", str(tmp_path / "key.txt")).returncode == 2


def test_steps_of_pictures_are_counted_apart_from_requests(tmp_path: Path) -> None:
    quotas = {"requests_per_minute": 1, "picture_steps_per_minute": 100}
    ring = KeyRing(str(write(tmp_path / "keys.yaml", entry("bob", "b", quotas=quotas))), Clock())
    client = ring.find("b")
    assert client is not None
    assert ring.wait_s(client) == 0
    assert [ring.wait_for_steps_s(client, steps) for steps in (60, 60, 40)] == [0, 12, 0]
    assert ring.wait_for_steps_s(client, 101) == math.inf
    assert ring.wait_for_steps_s(Client("nobody"), 10**9) == 0


def test_steps_of_what_is_refused_or_fails_are_not_counted(tmp_path: Path) -> None:
    quotas = {"picture_steps_per_minute": 100}
    access = Access(str(write(tmp_path / "keys.yaml", entry("bob", "b", quotas=quotas))))
    client = access.client_named("bob")
    assert client is not None

    def draw(steps: int, status: int = 200) -> int:
        try:
            with access.counting(client, steps):
                if status != 200:
                    raise ApiError(status, ErrorDetail(message="", type=""))
        except ApiError as error:
            return error.status
        return 200

    assert [draw(90, status) for status in (429, 500, 503)] == [429, 500, 503]
    with pytest.raises(RuntimeError), access.counting(client, 90):
        raise RuntimeError("what nobody foresaw")
    assert draw(50) == 200
    assert draw(40, 499) == 499  # who cancels has had the work
    assert draw(11) == 429
    assert draw(101) == 400  # more than a minute has: never, whenever it is sent again
    assert draw(9, 429) == 429  # nothing that was not taken is given back
    assert [draw(9), draw(9)] == [200, 429]


def test_clients_by_name(tmp_path: Path) -> None:
    access = Access(str(write(tmp_path / "keys.yaml", entry("bob", "b", role="admin"))))
    assert access.client_named("bob") == Client("bob", "admin")
    assert access.client_named("local") is None
    assert Access(None).client_named("local") == LOCAL
    assert Access(None).client_named("bob") is None
