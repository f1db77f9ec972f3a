"""Who may use the API: holders of a key or, where there are none, this machine alone."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray.serve._private import constants
from ray.serve.context import _get_global_client
from starlette.requests import HTTPConnection

from paris_ray.errors import ConfigError
from paris_ray.loopback import is_loopback, why_not_local
from serve.errors import ApiError, invalid, too_many
from serve.keys import LOCAL, Client, KeyRing
from serve.schemas import ErrorDetail

EDGE_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
EDGE = "serve.gate:edge"


class Access:
    """The rule by which one application answers.

    Args:
        api_key_file: A file of keys, see `serve.keys`; None serves this machine alone.

    Raises:
        ConfigError: if the keys cannot be read.
    """

    def __init__(self, api_key_file: str | None) -> None:
        self._keys = None if api_key_file is None else KeyRing(api_key_file)

    @property
    def keyless(self) -> bool:
        """Whether there are no keys, and so this machine alone is answered."""
        return self._keys is None

    def check(self, connection: HTTPConnection, *, is_open: bool) -> Client | None:
        """Return who sent a request; None for an open route of a server with keys.

        Args:
            connection: The request's head; its body is not read.
            is_open: Whether the route needs no key.

        Raises:
            ApiError: 401 without a key, 403 from elsewhere, 429 for one request too many.
        """
        if self._keys is None:
            check_local(connection)
            return LOCAL
        if is_open:
            return None
        client = check_key(connection, self._keys)
        wait_s = self._keys.wait_s(client)
        if wait_s > 0:
            rate = client.quotas.requests_per_minute
            raise too_many(f"The key {client.name!r} may send {rate} requests a minute", wait_s)
        return client

    def client_named(self, name: str) -> Client | None:
        """Return the client of a name; None if there is none, or no longer."""
        if self._keys is None:
            return LOCAL if name == LOCAL.name else None
        return self._keys.named(name)

    @contextmanager
    def counting(self, client: Client, picture_steps: int) -> Iterator[None]:
        """Count the steps of the pictures that are drawn inside, unless that is refused or fails.

        Raises:
            ApiError: 429, if they are more than the client's key may have drawn now; 400, if they
                are more than it may ever have at once.
        """
        self._count_steps(client, picture_steps)
        try:
            yield
        except Exception as error:
            status = error.status if isinstance(error, ApiError) else 500  # as the gate answers it
            if self._keys is not None and (status == 429 or status >= 500):
                self._keys.give_back_steps(client, picture_steps)
            raise

    def _count_steps(self, client: Client, picture_steps: int) -> None:
        wait_s = 0.0 if self._keys is None else self._keys.wait_for_steps_s(client, picture_steps)
        if wait_s == 0:
            return
        rate = client.quotas.picture_steps_per_minute
        message = f"The key {client.name!r} may have {rate} picture steps drawn a minute"
        if wait_s == math.inf:  # never, whenever it is sent again
            message += f", and the request is for {picture_steps}"
            raise invalid(message, param="n", code="invalid_value")
        raise too_many(message, wait_s)


def check_local(connection: HTTPConnection) -> None:
    """Refuse requests from other machines, through proxies, and for other hosts.

    The proxy that binds to an address is Ray's, so the application can only refuse what comes
    through it; why each is refused: `paris_ray.loopback`.

    Raises:
        ApiError: with status 403.
    """
    client = connection.client.host if connection.client else ""
    reason = why_not_local(client, connection.headers, connection.scope["http_version"])
    if reason is not None:
        message = (
            "Without api_key_file this server answers only requests from its own machine to "
            f"localhost, not through a proxy ({reason})"
        )
        raise ApiError(403, ErrorDetail(message=message, type="permission_error"))


def check_key(connection: HTTPConnection, keys: KeyRing) -> Client:
    """Return whose key a request has.

    Raises:
        ApiError: with status 401, if it has none of ours.
    """
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    client = keys.find(secret) if scheme.lower() == "bearer" else None
    if client is None:
        detail = ErrorDetail(
            message="Send the API key as 'Authorization: Bearer KEY'",
            type="authentication_error",
            code="invalid_api_key",
        )
        raise ApiError(401, detail, {"WWW-Authenticate": "Bearer"})
    return client


@dataclass(frozen=True)
class Frontage:
    """What stands between clients and the application.

    Attributes:
        host: The address that Serve listens on; None: it does not.
        direct: Whether requests reach a replica without Ray's proxy (HAProxy, direct ingress): from
            an address that says nothing.
        has_edge: Whether Ray was started with `serve.gate.edge`, which it puts around its proxy or,
            where there is none, around the server of a replica.
        request_timeout_s: After how many seconds it gives a request up; None: never.
    """

    host: str | None
    direct: bool
    has_edge: bool
    request_timeout_s: float | None

    @classmethod
    def of_ray(cls) -> "Frontage":
        """Return that of the Serve that this process is a replica of."""
        # Ray has no public way to ask any of these.
        client = _get_global_client()
        assert client is not None
        callback = constants.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
        direct = constants.RAY_SERVE_ENABLE_HA_PROXY or constants.RAY_SERVE_ENABLE_DIRECT_INGRESS
        http = client.http_config
        return cls(http.host, direct, callback == EDGE, http.request_timeout_s)

    def check(self, *, keyless: bool, timeout_s: float) -> None:
        """Refuse to start where strangers could pass for local clients, or without the edge.

        Args:
            keyless: Whether there are no keys.
            timeout_s: After how many seconds the application gives a request up.

        Raises:
            ConfigError: with what to change.
        """
        if self.request_timeout_s is not None and timeout_s >= self.request_timeout_s:
            raise ConfigError(
                f"timeout_s={timeout_s:g} is not allowed: less than "
                f"http_options.request_timeout_s={self.request_timeout_s:g}, after which Ray "
                "gives the request up itself"
            )
        make_key = "Make a key: python -m jobs.new_key NAME --file keys.yaml"
        if keyless and self.direct:
            raise ConfigError(
                "RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_ENABLE_DIRECT_INGRESS=1 are not allowed "
                "without api_key_file: all machines' requests then look like local ones "
                f"(RAY_SERVE_THROUGHPUT_OPTIMIZED=1 sets the second). {make_key}"
            )
        if keyless and not is_loopback(self.host or ""):
            raise ConfigError(
                f"http_options.host={self.host!r} is not allowed without api_key_file: only "
                f"127.0.0.1, ::1 or localhost. {make_key}"
            )
        if not self.has_edge:
            raise ConfigError(
                f"Start every node of Ray with {EDGE_VARIABLE}={EDGE} in its environment: without "
                "it Ray's proxy lets clients override http_options.request_timeout_s"
            )
