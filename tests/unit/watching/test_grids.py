"""Sample grids: which are told, and what is refused to be decoded."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.reports import picture_grid, png_bytes
from paris_ray.watching import grids
from paris_ray.watching.grids import MAX_GRIDS, grid_files, preview, read_grid


def grid(side: int, count: int = 16) -> bytes:
    pictures = np.zeros((count, side, side, 3), np.uint8)
    pictures[:] = np.arange(count, dtype=np.uint8)[:, None, None, None] * 10
    return png_bytes(picture_grid(pictures, columns=8))


def test_grids_are_in_the_order_of_training() -> None:
    names = ["samples.png", "samples/step-001000.png", "samples/step-000200.png", "metrics.jsonl"]
    names += ["samples/step-x.png", "samples/step-000200.png.tmp", "samples_without_lora.png"]
    assert grid_files(names) == {
        "200": "samples/step-000200.png",
        "1000": "samples/step-001000.png",
        "without": "samples_without_lora.png",
        "final": "samples.png",
    }


def test_of_very_many_grids_some_and_the_last_are_told() -> None:
    told = grid_files(f"samples/step-{i:06d}.png" for i in range(1, 10_001))
    assert len(told) == MAX_GRIDS
    assert list(told)[-1] == "10000"


def test_a_preview_has_smaller_pictures_in_the_same_places() -> None:
    small = Image.open(io.BytesIO(preview(grid(256), "here")))
    assert small.size == (8 * 128, 2 * 128)
    assert small.getpixel((3 * 128 + 5, 128 + 5)) == (110,) * 3
    assert preview(grid(64), "here") == grid(64)


def with_long_text() -> bytes:
    """A grid whose head has a text that is much longer than its file."""
    png, content = grid(64), b"zTXtnote\0\0" + zlib.compress(bytes(2 << 20))
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    head = 8 + 25  # signature and IHDR
    return png[:head] + chunk + png[head:]


@pytest.mark.parametrize("payload", [b"<html>", b"", grid(64)[:20], with_long_text()])
def test_what_is_no_png_is_refused(tmp_path: Path, payload: bytes) -> None:
    Folder(tmp_path).write("samples.png", payload)
    with pytest.raises(ArtifactError, match=r"samples\.png is no PNG"):
        read_grid(Folder(tmp_path), "samples.png")


def test_a_jpeg_is_no_png(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    Folder(tmp_path).write("samples.png", buffer.getvalue())
    with pytest.raises(ArtifactError, match="no PNG"):
        read_grid(Folder(tmp_path), "samples.png")


def test_too_large_files_and_pictures_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    folder.write("samples.png", grid(64))
    monkeypatch.setattr(grids, "MAX_PIXELS", 1000)
    with pytest.raises(ArtifactError, match="512 x 128 pixels, at most 1000"):
        read_grid(folder, "samples.png")
    monkeypatch.setattr(grids, "MAX_BYTES", 10)
    with pytest.raises(ArtifactError, match="bytes, at most 10"):
        read_grid(folder, "samples.png")


def test_a_damaged_picture_is_told(tmp_path: Path) -> None:
    damaged = bytearray(grid(256))
    damaged[len(damaged) // 2 :] = b""
    with pytest.raises(ArtifactError, match="here is damaged"):
        preview(bytes(damaged), "here")
