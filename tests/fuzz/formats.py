"""Hostile files that are well-formed: pictures, archives and tables that say what none should."""

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.fuzz.mutations import LARGE, TEXTS, flip, number

SIDE = 9000  # of a picture that is too large: 81 million pixels, few bytes in a file
MIB_OF_ZEROS = 200  # of a member that is too large: in a few, more than a case may take


# Pictures


def edit_chunks(rng: Random, content: bytes) -> bytes:
    """A chunk of a PNG that is another one, repeated or new, with the right checksum."""
    chunks = _chunks(content)
    chosen = rng.randrange(len(chunks))
    name, body = chunks[chosen]
    match rng.randrange(3):
        case 0:
            chunks[chosen] = name, rng.choice((flip, number))(rng, body) if body else body
        case 1:
            chunks[chosen:chosen] = [(name, body)] * rng.choice((1, 2, 1000))
        case _:
            chunks.insert(1, rng.choice(_CHUNKS)())
    return content[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, start = [], 8
    while start + 12 <= len(content):
        size = int.from_bytes(content[start : start + 4], "big")
        found.append((content[start + 4 : start + 8], content[start + 8 : start + 8 + size]))
        start += 12 + size
    return found


@lru_cache
def _inflating() -> bytes:
    return zlib.compress(bytes(64 << 20))


_CHUNKS: Sequence[Callable[[], tuple[bytes, bytes]]] = (
    lambda: (b"iCCP", b"p\0\0" + _inflating()),
    lambda: (b"zTXt", b"Raw profile type exif\0\0" + _inflating()),
    lambda: (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + _inflating()),
    lambda: (b"gAMA", b"\0\0\0\0"),
    lambda: (b"tRNS", b"\xff" * 6),
    lambda: (b"PLTE", b"\xff" * 3),
    lambda: (b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 64),
    lambda: (b"acTL", b"\xff" * 8),
)


def repeat_scans(rng: Random, content: bytes) -> bytes:
    """A JPEG whose pixels are gone through again and again, and are many.

    Before a scan, or in a long run, may stand what means nothing.
    """
    head = content.index(b"\xff\xc2" if b"\xff\xc2" in content else b"\xff\xc0")
    size = struct.pack(">HH", *rng.choice(((900, 1100), (64, 15_000), (12, 16))))
    content = content[: head + 5] + size + content[head + 9 :]
    start = content.rindex(b"\xff\xda")
    first, fill = content[:-2], rng.choice((b"", b"\xff", b"\xff\x01"))
    scans = (fill + content[start:-2]) * rng.choice((2, 50, 500, 5000))
    return first + fill * rng.choice((1, 1 << 20)) + scans + content[-2:]


def too_large(rng: Random, content: bytes) -> bytes:
    """A picture of more pixels than are allowed, which takes few bytes; or an icon that holds it.

    The header of the icon tells another size.
    """
    kind = rng.choice(("PNG", "TIFF", "GIF", "ICO"))
    return _icon() if kind == "ICO" else _large(kind)


@lru_cache
def _large(kind: str) -> bytes:
    stream = io.BytesIO()
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    Image.new("1", (SIDE, SIDE)).save(stream, kind, **options)
    return stream.getvalue()


def _icon() -> bytes:
    inner = _large("PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


# Archives


def add_member(rng: Random, content: bytes) -> bytes:
    """A tar with a member that a program would not write, before others."""
    place = rng.choice((0, 512 * rng.randrange(len(content) // 512)))
    return content[:place] + _member(rng) + content[place:]


def _member(rng: Random) -> bytes:
    info = tarfile.TarInfo(rng.choice((*TEXTS[1:], "a.png", "a.txt", "./b.png", "x" * 5000)))
    info.type = rng.choice((*(bytes([kind]) for kind in b"0123456789KLSxgXV\0"), b"2", b"1"))
    info.linkname = rng.choice((*TEXTS, "a.png", info.name))
    body = rng.choice((b"", b"x" * 600, b"11 x=y\n" * 40, b"9" * 512, b"30 size=-1\n"))
    info.size = rng.choice((len(body), len(body), *LARGE, 8**11 - 1))
    if rng.random() < 0.3:
        info.pax_headers = rng.choice(_PAX)
    form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    header = bytearray(info.tobuf(form, "utf-8", "replace"))
    if rng.random() < 0.3:
        header[124:136] = rng.choice((b"\xff" * 12, b"-0000000001\0", b"\x80" + b"\x7f" * 11))
        header[148:156] = b" " * 8
        header[148:155] = f"{sum(header[:512]):06o}\0".encode()
    return bytes(header) + body + bytes(-len(body) % 512)


_PAX: Sequence[dict[str, str]] = (
    {"size": "-1"},
    {"size": "9" * 400},
    {"path": "../outside/secret.png"},
    {"linkpath": "/etc/passwd"},
    {"GNU.sparse.map": "0,1," * 1000, "GNU.sparse.size": "99999999999"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"},
    {"hdrcharset": "BINARY", "path": "\udcff"},
    {"mtime": "nan", "uid": "1e999", "gid": "-1"},
    {"comment": "x" * (2 << 20)},
)


def inside_gzip(rng: Random, content: bytes) -> bytes:
    """What was compressed is changed: its checksum is right."""
    return gzip.compress(rng.choice((flip, number, add_member))(rng, gzip.decompress(content)), 1)


def inflating_members(rng: Random, content: bytes) -> bytes:
    """Members of a row that have few bytes in the file, and fill the memory."""
    parts = []
    for extension in ("png", "jpg", "webp", "gif", "bmp", "txt"):
        info = tarfile.TarInfo(f"bomb.{extension}")
        info.size = MIB_OF_ZEROS << 20
        parts += [gzip.compress(info.tobuf()), _zeros()]
    return b"".join(parts) + gzip.compress(bytes(1024))


@lru_cache
def _zeros() -> bytes:
    return gzip.compress(bytes(MIB_OF_ZEROS << 20), 1)


# Tables


def claim_rows(rng: Random, content: bytes) -> bytes:
    """A Parquet file whose footer says of the file, or of a group, that it has more rows."""
    size = int.from_bytes(content[-8:-4], "little")
    body, footer = content[: -8 - size], content[-8 - size : -8]
    table = pq.read_metadata(io.BytesIO(content))
    stated = b"\x16" + _zigzag(table.num_rows)  # a field of 64 bits, the next after the last
    place = rng.choice([i for i in range(len(footer)) if footer.startswith(stated, i)])
    claimed = b"\x16" + _zigzag(rng.choice((0, -1, 10**4, 10**6, 10**9, 10**12, 2**62)))
    footer = footer[:place] + claimed + footer[place + len(stated) :]
    return body + footer + len(footer).to_bytes(4, "little") + content[-4:]


def _zigzag(value: int) -> bytes:
    rest, parts = (value << 1) ^ (value >> 63), []
    while rest > 127:
        parts.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*parts, rest])


def other_columns(rng: Random, content: bytes) -> bytes:
    """The same rows with one column of other values, or of another type."""
    table = pq.read_table(io.BytesIO(content))
    name = rng.choice(table.column_names)
    values = rng.choice(_COLUMNS)(table.num_rows)
    place = table.column_names.index(name)
    if rng.random() < 0.5:
        table = table.set_column(place, name, values)
    else:
        table = table.append_column(rng.choice((name, "extra", *TEXTS[:6])), values)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression=rng.choice(("zstd", "snappy", "gzip", "none")))
    return stream.getvalue()


def _deep(rows: int) -> Any:
    kind: pa.DataType = pa.int8()
    for _ in range(60):
        kind = pa.list_(kind)
    return pa.nulls(rows, kind)


_COLUMNS: Sequence[Callable[[int], Any]] = (
    lambda rows: pa.array([2**63 - 1] * rows, pa.timestamp("us")),
    lambda rows: pa.array([-(2**63) + 1] * rows, pa.timestamp("ns")),
    lambda rows: pa.array([2**62] * rows, pa.timestamp("ms", "Europe/Nowhere")),
    lambda rows: pa.array([2**31 - 1] * rows, pa.date32()),
    lambda rows: pa.array([2**63 - 1] * rows, pa.duration("s")),
    lambda rows: pa.array([1] * rows, pa.decimal256(70, 40)),
    lambda rows: pa.array([float("nan")] * rows, pa.float16()),
    lambda rows: pa.array([[("a", 1), ("a", 2)]] * rows, pa.map_(pa.string(), pa.int8())),
    lambda rows: pa.array([{"bytes": None, "path": "/etc/passwd"}] * rows),
    lambda rows: pa.array([{"path": "../outside/secret.png"}] * rows),
    lambda rows: pa.array([b"\xff\xfe"] * rows, pa.binary()).cast(pa.string(), safe=False),
    lambda rows: pa.array(["../outside/secret.png"] * rows),
    lambda rows: pa.array(["\0", "a/" * 50_000] * (rows // 2) + ["x"] * (rows % 2)),
    lambda rows: pa.array([["a", None, ""]] * rows),
    lambda rows: pa.array(["x"] * rows).dictionary_encode(),
    lambda rows: pa.array([bytes(1 << 20)] * rows).dictionary_encode(),
    lambda rows: pa.nulls(rows),
    lambda rows: pa.FixedShapeTensorArray.from_storage(
        pa.fixed_shape_tensor(pa.int8(), (1, 0)), pa.array([[]] * rows, pa.list_(pa.int8(), 0))
    ),
    _deep,
)
