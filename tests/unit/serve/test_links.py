"""Links: signed, expiring, opaque; and a bounded memory of files."""

import asyncio
from dataclasses import replace

import pytest
from cryptography.fernet import Fernet

from paris_ray.pictures import LoRARecord
from serve.links import LIFETIME_S, FileCache, LinkError, Links, LinkTarget
from serve.schemas import ImagesRequest
from serve.source import Origin

SECRET = Fernet.generate_key()
REQUEST = ImagesRequest(prompt="a secret cat \U0001f431", seed=3, guidance_scale=2, size="64x64")
LORA = LoRARecord(expert=1, sha256="1" * 64, merge=False)
ORIGIN = Origin(bundle="0" * 64, dtype="bfloat16", lora=LORA)
TARGET = LinkTarget(request=REQUEST, client="alice", origin=ORIGIN)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


# The released layout has no digest.
@pytest.mark.parametrize("origin", [ORIGIN, replace(ORIGIN, dtype=None, lora=None), Origin()])
def test_a_link_comes_back_from_any_replica(origin: Origin) -> None:
    target = TARGET.model_copy(update={"origin": origin})
    assert Links(SECRET).read(Links(SECRET).sign(target)) == target


def test_pictures_of_other_origins_have_other_names() -> None:
    changes = [
        {"bundle": "1" * 64},
        {"dtype": "float16"},
        {"lora": None},
        {"lora": replace(LORA, sha256="2" * 64)},
        {"lora": replace(LORA, merge=True)},
    ]
    others = [TARGET.model_copy(update={"origin": replace(ORIGIN, **change)}) for change in changes]
    assert len({TARGET.name, *(other.name for other in others)}) == 1 + len(changes)


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
        origin=ORIGIN,
    )
    assert len(Links(SECRET).sign(longest)) < 8000  # what proxies take as a path


def kept(files: FileCache, *names: str) -> list[bytes | None]:
    return [files._files.get(name) for name in names]


def test_the_memory_of_files_is_bounded() -> None:
    files = FileCache(max_bytes=10)
    files.put("a", b"1234")
    files.put("b", b"1234")
    assert kept(files, "a", "b", "c") == [b"1234", b"1234", None]
    files.put("c", b"1234")
    assert kept(files, "a", "c") == [None, b"1234"]
    files.put("c", b"12345")
    assert kept(files, "b", "c") == [b"1234", b"12345"]
    files.put("d", b"12345678901")
    assert kept(files, "b", "c", "d") == [None, None, None]
    files.put("e", b"1234567890")
    assert kept(files, "e") == [b"1234567890"]


def test_a_file_is_made_once_for_all_who_ask_meanwhile() -> None:
    files, made, ready = FileCache(), [], asyncio.Event()

    async def make() -> bytes:
        made.append(1)
        await ready.wait()
        return b"file"

    async def ask() -> None:
        asked = [asyncio.create_task(files.fetch("a", make)) for _ in range(5)]
        await asyncio.sleep(0)
        asked[0].cancel()  # the first hangs up: the others get it all the same
        await asyncio.sleep(0)
        ready.set()
        got = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError)
        assert got[1:] == [b"file"] * 4
        assert await files.fetch("a", make) == b"file"

    asyncio.run(ask())
    assert made == [1]


def test_what_cannot_be_made_is_tried_again() -> None:
    files, answers = FileCache(), iter([ValueError("no room"), b"file"])

    async def make() -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def ask() -> None:
        with pytest.raises(ValueError, match="no room"):
            await files.fetch("a", make)
        assert await files.fetch("a", make) == b"file"

    asyncio.run(ask())
