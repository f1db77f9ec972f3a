"""Who may use the API: holders of the key or, where there is none, this machine alone."""

import hmac
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request

from paris_ray.errors import ConfigError
from serve.errors import ApiError
from serve.schemas import ErrorDetail


def read_api_key(path: str) -> str:
    """Return the key in a file, without surrounding white space.

    Raises:
        ConfigError: if the file cannot be read, or is empty.
    """
    try:
        key = Path(path).read_text().strip()
    except OSError as error:
        raise ConfigError(f"api_key_file={path!r} cannot be read: {error}") from None
    if not key:
        raise ConfigError(f"api_key_file={path!r} is empty: put the key in it")
    return key


def check_local(request: Request) -> None:
    """Refuse requests from other machines, and those meant for another host.

    The client's address protects a server without a key that someone bound to a public interface:
    the proxy that binds is Ray's, so the application can only refuse what comes through it. The
    Host header protects against DNS rebinding, where a web page that the user visits has its own
    name resolved to 127.0.0.1 and lets the browser, a local client, send the requests.

    Raises:
        ApiError: with status 403.
    """
    client = request.client.host if request.client else ""
    host = _host_name(request.headers.get("host", ""))
    if not (is_loopback(client) and is_loopback(host)):
        message = (
            "Without api_key_file this server answers only requests from its own machine to "
            f"localhost (client {client!r}, host {host!r})"
        )
        raise ApiError(403, ErrorDetail(message=message, type="permission_error"))


def check_key(request: Request, key: str) -> None:
    """Refuse requests without the key.

    Raises:
        ApiError: with status 401.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared in constant time: the answer's delay must not tell how many characters fit.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
        detail = ErrorDetail(
            message="Send the API key as 'Authorization: Bearer KEY'",
            type="authentication_error",
            code="invalid_api_key",
        )
        raise ApiError(401, detail, {"WWW-Authenticate": "Bearer"})


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this very machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
