"""Picture files that carry the record of how they were drawn, so that they can be drawn again.

The record is JSON in ASCII: in a PNG the text chunk `paris_ray`, in a JPEG or WebP the Exif field
UserComment.
"""

import io
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ConfigDict, TypeAdapter, ValidationError

from paris_ray.config import Dtype, SolverName, TimeGrid
from paris_ray.errors import PictureError

PictureFormat = Literal["png", "jpeg", "webp"]
FORMATS: tuple[PictureFormat, ...] = get_args(PictureFormat)
PNG_KEY = "paris_ray"
EXIF_IFD, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
# A JPEG has 64 KiB for all of its Exif.
MAX_JPEG_RECORD_BYTES = 60_000
WEIGHT_DIGITS = 4
RESIZE_FILTER: Literal["lanczos"] = "lanczos"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a picture is sampled: the arguments of `paris_ray.sampling.generate` of these names."""

    num_inference_steps: int
    solver: SolverName
    time_grid: TimeGrid
    guidance_scale: float
    routing: str
    lora: str | None = None
    allowed_experts: list[int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRARecord:
    """The adapter that a picture was drawn with.

    Attributes:
        expert: Number of its expert.
        sha256: Digest of its weights.
        merge: Whether it was merged into the expert's weights.
    """

    expert: int
    sha256: str
    merge: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureRecord:
    """How one picture was drawn.

    Attributes:
        software: Program and version that drew it.
        model: Name of the model.
        bundle: Digest of the bundle's manifest; None: it has none, as the public release.
        dtype: Data type of experts and router; None: as stored.
        prompt: The text.
        seed: The picture's own.
        sampling: Steps, solver, guidance, routing and adapter.
        lora: What is known of the adapter, or None.
        native_size: Height and width that it was drawn at, in pixels.
        size: Height and width of the file.
        resize_filter: Filter of Pillow between the two, or None.
        output_compression: Quality of a JPEG or WebP, 0 to 100, or None.
        expert_weights: For each evaluation of the velocity, the weight of every expert that has
            any, by its number; a single row, their mean, where a JPEG has no room for more.
        missing_experts: Those that were lost and drawn without.
        last_resort: Whether the seed that all started from drew in their place, with their weight.
        unfinished_at: After how many evaluations an unfinished picture was sent; None: finished.
        attribution: Licence line to show beside the picture, or None.
    """

    # Files come from strangers: no conversions, no fields that nobody knows.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    software: str
    model: str
    bundle: str | None
    dtype: Dtype | None
    prompt: str
    seed: int
    sampling: Sampling
    lora: LoRARecord | None
    native_size: int
    size: int
    resize_filter: Literal["lanczos"] | None
    output_compression: int | None
    expert_weights: list[dict[int, float]]
    missing_experts: list[int]
    unfinished_at: int | None
    attribution: str | None
    last_resort: bool = False  # which files of earlier versions do not tell

    def averaged(self) -> "PictureRecord":
        """Return the record with the mean of the weights in place of each evaluation's."""
        totals: dict[int, float] = {}
        for row in self.expert_weights:
            for expert, weight in row.items():
                totals[expert] = totals.get(expert, 0.0) + weight / len(self.expert_weights)
        mean = {k: round(weight, WEIGHT_DIGITS) for k, weight in sorted(totals.items())}
        return replace(self, expert_weights=[mean])

    def to_json(self) -> bytes:
        """Return the record as JSON in ASCII."""
        return json.dumps(asdict(self), separators=(",", ":")).encode("ascii")


_RECORD = TypeAdapter(PictureRecord)


def sparse_weights(weights: list[list[float]]) -> list[dict[int, float]]:
    """Return dense rows of weights `(E, K)` as a record holds them."""
    return [
        {k: round(weight, WEIGHT_DIGITS) for k, weight in enumerate(row) if weight > 0}
        for row in weights
    ]


def encode_picture(
    pixels: NDArray[np.uint8], record: PictureRecord, output_format: PictureFormat
) -> bytes:
    """Return the file of a picture: the same pixels and record give the same bytes.

    Args:
        pixels: `(S, S, 3)`, as drawn.
        record: How it was drawn; says the size and the compression of the file.
        output_format: Kind of file.
    """
    image = Image.fromarray(pixels)
    if record.size != record.native_size:
        image = image.resize((record.size, record.size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if output_format == "png":
        image.save(buffer, "PNG", pnginfo=_png_info(record))
    else:
        quality = 100 if record.output_compression is None else record.output_compression
        exif = _exif(record, most=MAX_JPEG_RECORD_BYTES if output_format == "jpeg" else None)
        image.save(buffer, output_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()


def _png_info(record: PictureRecord) -> PngInfo:
    info = PngInfo()
    info.add_text(PNG_KEY, record.to_json().decode("ascii"))
    return info


def _exif(record: PictureRecord, most: int | None) -> Image.Exif:
    payload = record.to_json()
    if most is not None and len(payload) > most:
        payload = record.averaged().to_json()
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + payload
    return exif


def read_picture(file: bytes) -> tuple[PictureRecord, PictureFormat]:
    """Return the record in a picture file and the kind of the file; its pixels stay packed.

    Raises:
        PictureError: if it is no such picture, or carries no record of ours.
    """
    try:
        with Image.open(io.BytesIO(file), formats=[name.upper() for name in FORMATS]) as image:
            output_format = next(name for name in FORMATS if name.upper() == image.format)
            payload = _payload(image)
    except Exception:  # decoders of arbitrary bytes, and readers of EXIF, raise almost anything
        told = "the file is not a PNG, JPEG or WebP picture, or it is damaged"
        raise PictureError(told) from None
    if payload is None:
        raise PictureError("the picture carries no record of paris_ray")
    try:
        return _RECORD.validate_json(payload), output_format
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise PictureError(f"the picture's record is damaged: {where}: {first['msg']}") from None


def _payload(image: Image.Image) -> bytes | None:
    if image.format == "PNG":
        text: Any = image.info.get(PNG_KEY)
        return text.encode() if isinstance(text, str) else None
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(ASCII):
        return None
    return comment.removeprefix(ASCII)
