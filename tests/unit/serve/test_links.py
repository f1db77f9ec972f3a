"""Links: signed, expiring, opaque; and a bounded memory of files."""

import pytest
from cryptography.fernet import Fernet

from serve.links import LIFETIME_S, FileCache, LinkError, Links, LinkTarget
from serve.schemas import ImagesRequest

SECRET = Fernet.generate_key()
REQUEST = ImagesRequest(prompt="a secret cat \U0001f431", seed=3, guidance_scale=2, size="64x64")
TARGET = LinkTarget(request=REQUEST, client="alice", bundle="d")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def test_a_link_comes_back_from_any_replica() -> None:
    token = Links(SECRET).sign(TARGET)
    assert Links(SECRET).read(token) == TARGET


def test_a_link_expires() -> None:
    clock = Clock()
    links = Links(SECRET, clock)
    token = links.sign(TARGET)
    clock.now += LIFETIME_S
    assert links.read(token) == TARGET
    clock.now += 1
    with pytest.raises(LinkError, match="has expired"):
        links.read(token)


def test_changed_and_foreign_links_are_refused() -> None:
    links = Links(SECRET)
    token = links.sign(TARGET)
    middle = len(token) // 2
    other = "A" if token[middle] != "A" else "B"
    foreign = Links(Fernet.generate_key()).sign(TARGET)
    changed = token[:middle] + other + token[middle + 1 :]
    for bad in ("", "x", "\u20ac", token[:-8], changed, foreign):
        with pytest.raises(LinkError):
            links.read(bad)


def test_a_link_does_not_show_the_prompt_and_fits_into_a_path() -> None:
    token = Links(SECRET).sign(TARGET)
    assert "secret" not in token
    assert set(token) <= set("-_=ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    longest = LinkTarget(
        request=REQUEST.model_copy(update={"prompt": "\U0001f431" * 1000}),
        client="a" * 64,
        bundle="0" * 64,
    )
    assert len(Links(SECRET).sign(longest)) < 8000  # what proxies take as a path


def test_the_memory_of_files_is_bounded() -> None:
    files = FileCache(max_bytes=10)
    files.put("a", b"1234")
    files.put("b", b"1234")
    assert (files.get("a"), files.get("b"), files.get("c")) == (b"1234", b"1234", None)
    files.put("c", b"1234")
    assert (files.get("a"), files.get("c")) == (None, b"1234")
    files.put("c", b"12345")
    assert (files.get("b"), files.get("c")) == (b"1234", b"12345")
    files.put("d", b"12345678901")
    assert [files.get(name) for name in "bcd"] == [None, None, None]
    files.put("e", b"1234567890")
    assert files.get("e") == b"1234567890"
