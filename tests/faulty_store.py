"""A proxy before an object store that answers some requests with a fault."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from jobs.local_cluster import LOOPBACK
from paris_ray.folders import Folder
from tests.s3_server import BUCKET, REGION

Fault = Literal["500", "503", "reset", "cut", "hang", "slow"]
HANG_S = 600.0
SLOW_S = 0.2


@dataclass
class FaultyStore:
    """A running proxy.

    Attributes:
        port: Where it listens.
        fault: What is wrong with a request, by its number from 0, method and path; None: nothing.
        asked: The methods and paths so far.
    """

    port: int = 0
    fault: Callable[[int, str, str], Fault | None] = lambda number, method, path: None
    asked: list[tuple[str, str]] = field(default_factory=list)

    def every(self, n: int, kind: Fault) -> None:
        """Let every n-th request from now on fail."""
        self.asked.clear()
        self.fault = lambda number, method, path: kind if number % n == n - 1 else None

    def always(self, kind: Fault, *methods: str) -> None:
        """Let all requests fail, or those with one of some methods."""
        self.fault = lambda number, method, path: kind if not methods or method in methods else None

    def never(self) -> None:
        """Let no request fail any more."""
        self.fault = lambda number, method, path: None


class _Server(ThreadingHTTPServer):
    """Hands requests on to the store at a port of this machine."""

    daemon_threads = True

    def __init__(self, upstream: int, store: FaultyStore) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.upstream, self.store = upstream, store
        self.stopped, self.lock = threading.Event(), threading.Lock()

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            number = len(self.store.asked)
            self.store.asked.append((method, path))
        return self.store.fault(number, method, path)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = _body(self)
        fault = self.server.fault_of(self.command, self.path)
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hang":
            self.server.stopped.wait(HANG_S)
        if fault in ("hang", "reset"):
            _reset(self)
            return
        time.sleep(SLOW_S if fault == "slow" else 0)
        self.forward(body, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def forward(self, body: bytes, *, cut: bool) -> None:
        connection = http.client.HTTPConnection(LOOPBACK, self.server.upstream)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            _reset(self)

    def log_message(self, *_: object) -> None:
        pass


def folder_at(port: int, name: str) -> Folder:
    """A folder in the bucket of a store, or of a proxy before it, at a port of this machine."""
    options = f"endpoint_override={LOOPBACK}:{port}&scheme=http&region={REGION}"
    return Folder(f"s3://{BUCKET}/{name}?{options}")


@contextmanager
def faulty_store(upstream: int) -> Iterator[FaultyStore]:
    """Start a proxy before the store at a port of this machine."""
    store = FaultyStore()
    with _Server(upstream, store) as server:
        store.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield store
        finally:
            server.stopped.set()
            server.shutdown()


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in handler.headers.get("Transfer-Encoding", ""):
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        while handler.rfile.readline().strip():
            pass
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """End a connection as a machine does that died."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
