"""What a stranger without token or key gets at each port of a Ray and its Serve application."""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from types import ModuleType

import grpc
import httpx
import psutil
import ray.core.generated
import ray.serve.generated

from jobs.local_cluster import LOOPBACK, port_is_free

# Calls of the object manager are in no module that Ray generates for Python.
OBJECT_MANAGER = [f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull")]
PATHS = ("/api/jobs/", "/metrics", "/api/serve/applications/", "/logs")
NAMED = {"ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::ProxyActor"}
REFUSED = {"UNAUTHENTICATED", "UNIMPLEMENTED"}  # the latter of services of other ports


@cache
def ray_calls() -> list[str]:
    """Return the names of all calls of Ray's gRPC services."""
    found = {
        f"/{service.full_name}/{method.name}"
        for module in (*_messages(ray.core.generated), *_messages(ray.serve.generated))
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    return [*sorted(found), *OBJECT_MANAGER]


def _messages(package: ModuleType) -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(module.name)


def protections(family: list[psutil.Process]) -> set[tuple[str, str]]:
    """Return the kinds of processes that listen, and what a stranger gets there."""
    found = set()
    for process in family:
        with suppress(psutil.NoSuchProcess):  # Ray ends workers that are idle
            kind = kind_of(process)
            for connection in process.net_connections("tcp"):
                port = connection.laddr.port
                if connection.status == psutil.CONN_LISTEN:
                    answer = what_a_stranger_gets(port)
                    found |= set() if port_is_free(port) else {(kind, answer)}
    return found


def kind_of(process: psutil.Process) -> str:
    """Return what a process is: the name that Ray gives it, as far as it is always the same."""
    command = process.cmdline()
    title = command[0].partition(" ")[0].partition(".")[0]  # an actor's call follows its class
    if title.startswith("ray::"):
        return title if title in NAMED else "actors, tasks"
    if "ray.util.client.server" in command:
        return "client server"
    if title.startswith("ray-dashboard") or "dashboard.py" in " ".join(command):
        return "dashboard"
    return "autoscaler" if "autoscaler" in " ".join(command) else command[0].rpartition("/")[2]


def what_a_stranger_gets(port: int) -> str:
    """Ask in all ways for everything, without token or key; return what the answers are."""
    try:
        answers = [httpx.get(f"http://{LOOPBACK}:{port}{path}", timeout=60) for path in PATHS]
    except httpx.HTTPError:
        return _by_grpc(port)
    statuses = {answer.status_code for answer in answers}
    if statuses == {401}:
        return "HTTP 401"
    if all("version=" in answer.headers["content-type"] for answer in answers):  # Prometheus'
        return "metrics"
    models = httpx.get(f"http://{LOOPBACK}:{port}/v1/models", timeout=60)
    return "the application" if '"object":"list"' in models.text else f"HTTP {statuses}"


def _by_grpc(port: int) -> str:
    with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
        codes = {_code(channel, call) for call in ray_calls()}
    refused = "UNAUTHENTICATED" in codes and codes <= REFUSED
    return "gRPC UNAUTHENTICATED" if refused else f"gRPC {codes}"


def _code(channel: grpc.Channel, call: str) -> str:
    try:
        channel.unary_unary(call)(b"", timeout=60)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
