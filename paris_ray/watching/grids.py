"""The sample grids of a training: which there are, and smaller ones for an overview."""

import io
import re
from collections.abc import Iterable, Mapping

from PIL import Image

from paris_ray.artifacts import SAMPLES
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.reports import png_bytes

COLUMNS = 8  # of a grid
MAX_GRIDS = 200  # that an overview tells of
MAX_BYTES, MAX_PIXELS = 64 << 20, 64_000_000
PREVIEW_PIXELS = 128  # side of a picture in an overview
FINAL, WITHOUT = "final", "without"
_STEP = re.compile(rf"{SAMPLES}/step-(\d{{1,9}})\.png")
_NAMED = {"samples_without_lora.png": WITHOUT, "samples.png": FINAL}


def grid_files(names: Iterable[str]) -> Mapping[str, str]:
    """Return the files of a model's grids by what tells them apart, in their order.

    That is the step, `FINAL` for the trained model's or `WITHOUT` for one without its adapter. Of
    very many, evenly spread ones, and the last, are told.

    Args:
        names: Of the files in a model's folder.
    """
    found: dict[int, str] = {}
    present = set(names)
    for name in present:
        if match := _STEP.fullmatch(name):
            found[int(match[1])] = name
    steps = sorted(found)
    if len(steps) > MAX_GRIDS:
        steps = [steps[(i + 1) * len(steps) // MAX_GRIDS - 1] for i in range(MAX_GRIDS)]
    named = {told: name for name, told in _NAMED.items() if name in present}
    return {str(step): found[step] for step in steps} | named


def read_grid(folder: Folder, name: str) -> bytes:
    """Return the bytes of a grid, which is a PNG of a size that may be decoded.

    Raises:
        ArtifactError: if it is none, or there is none.
    """
    stamp = folder.stamp(name)
    if stamp is not None and stamp.size > MAX_BYTES:
        raise ArtifactError(f"{folder.uri}/{name} has {stamp.size} bytes, at most {MAX_BYTES}")
    payload = folder.read(name)
    with _opened(payload, f"{folder.uri}/{name}"):
        return payload


def preview(payload: bytes, source: str) -> bytes:
    """Return a grid with pictures of at most PREVIEW_PIXELS, as PNG.

    Raises:
        ArtifactError: if it is damaged.
    """
    with _opened(payload, source) as grid:
        side = grid.width // COLUMNS
        if side <= PREVIEW_PIXELS:
            return payload
        rows = max(1, round(grid.height / side))
        size = (COLUMNS * PREVIEW_PIXELS, rows * PREVIEW_PIXELS)
        try:
            return png_bytes(grid.convert("RGB").resize(size, Image.Resampling.BOX))
        except (OSError, SyntaxError, ValueError) as error:
            raise ArtifactError(f"{source} is damaged: {error}") from None


def _opened(payload: bytes, source: str) -> Image.Image:
    """Return a picture of which only the head has been read."""
    try:
        picture = Image.open(io.BytesIO(payload), formats=["PNG"])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{source} is no PNG file: {error}") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise ArtifactError(
            f"{source} has {picture.width} x {picture.height} pixels, at most {MAX_PIXELS}"
        )
    return picture
