"""Who counts as this very machine, where a server has no keys."""

from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

# A proxy that says so in any of these speaks for somebody else.
FORWARDING_HEADERS = ("forwarded", "via", "x-real-ip")
FORWARDING_PREFIX = "x-forwarded-"


def why_not_local(client: str, headers: Mapping[str, str], http_version: str) -> str | None:
    """Return why a request is not from this machine to this machine; None: it is.

    The client's address protects a server that someone bound to a public interface. The Host header
    protects against DNS rebinding, where a web page that the user visits has its own name resolved
    to 127.0.0.1 and lets the browser, a local client, send the requests. Behind a proxy on this
    machine everybody is a local client: many of them say whom they speak for, in a header or by
    HTTP/1.0. One that does not cannot be told from a local client.

    Args:
        client: Address of whoever sent it.
        headers: By their names, in small letters.
        http_version: Such as `1.1`.
    """
    forwarded = sorted(name for name in headers if _is_forwarding(name))
    if http_version == "1.0":
        forwarded.append("HTTP/1.0")
    if forwarded:
        return f"sent through a proxy: {forwarded[0]}"
    host = _host_name(headers.get("host", ""))
    return None if is_loopback(client) and is_loopback(host) else f"host {host[:80]!r}"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this very machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_forwarding(header: str) -> bool:
    return header in FORWARDING_HEADERS or header.startswith(FORWARDING_PREFIX)


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
