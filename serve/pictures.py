"""From a drawing to what clients get: files with their records, answers, headers, events."""

import base64
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

import paris_ray
from paris_ray.pictures import (
    RESIZE_FILTER,
    WEIGHT_DIGITS,
    PictureRecord,
    encode_picture,
    sparse_weights,
)
from serve.checking import Order, Served
from serve.drawing import Drawing, Partial
from serve.schemas import (
    CompletedEvent,
    EventPlace,
    ImageData,
    ImagesResponse,
    PartialImageEvent,
    Provenance,
    Usage,
)
from serve.source import Origin

SOFTWARE = f"paris_ray {paris_ray.__version__}"
PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))  # what a header may hold as it is
HEADER_PREFIX = "X-Paris-"


def encode_all(order: Order, drawing: Drawing, served: Served) -> list[bytes]:
    """Return the files of all pictures; slow, so not for an event loop."""
    return [
        _encode(
            pixels,
            replace(
                _record(order, served, i, drawing.origin),
                expert_weights=sparse_weights(drawing.expert_weights[i]),
                missing_experts=drawing.missing_experts,
                last_resort=drawing.last_resort,
            ),
            order,
            served,
        )
        for i, pixels in enumerate(drawing.pictures)
    ]


def encode_partial(order: Order, partial: Partial, served: Served) -> PartialImageEvent:
    """Return the event of an unfinished picture; slow like `encode_all`."""
    record = replace(
        _record(order, served, partial.picture, partial.origin), unfinished_at=partial.step
    )
    file = _encode(partial.pixels, record, order, served)
    return PartialImageEvent(
        b64_json=base64.b64encode(file).decode(),
        created_at=int(time.time()),
        size=_square(order.size),
        quality=order.quality,
        output_format=order.output_format,
        partial_image_index=partial.index,
        paris=EventPlace(picture=partial.picture, step=partial.step),
    )


def _encode(
    pixels: NDArray[np.uint8], record: PictureRecord, order: Order, served: Served
) -> bytes:
    """Return the file of a picture, signed if this server signs."""
    file = encode_picture(pixels, record, order.output_format)
    return served.signer.sign(file, record, order.output_format) if served.signer else file


def _record(order: Order, served: Served, picture: int, origin: Origin) -> PictureRecord:
    facts = served.bundle.facts
    return PictureRecord(
        software=SOFTWARE,
        model=facts.model_name,
        bundle=origin.bundle,
        dtype=origin.dtype,
        prompt=order.prompts[picture // order.n],
        seed=order.seed + picture,
        sampling=order.sampling,
        lora=origin.lora,
        native_size=facts.picture_size,
        size=order.size,
        resize_filter=_resize_filter(order, served),
        output_compression=order.output_compression,
        expert_weights=[],
        missing_experts=[],
        unfinished_at=None,
        attribution=facts.attribution,
    )


def response(
    order: Order,
    drawing: Drawing,
    served: Served,
    data: Sequence[ImageData],
    *,
    id: str,
    prompt: int = 0,
) -> ImagesResponse:
    """Return the answer about the pictures of one prompt.

    Args:
        order: The request.
        drawing: Of all its prompts.
        served: What drew it.
        data: The files of all pictures.
        id: Of the request.
        prompt: Number of the prompt.
    """
    pictures = range(prompt * order.n, (prompt + 1) * order.n)
    return ImagesResponse(
        created=int(time.time()),
        data=[data[i] for i in pictures],
        output_format=order.output_format,
        quality=order.quality,
        size=_square(order.size),
        usage=_usage(order, served, prompt, len(pictures)),
        paris=_provenance(order, drawing, served, pictures, id=id),
    )


def completed_event(
    order: Order, drawing: Drawing, served: Served, data: ImageData, *, id: str, picture: int
) -> CompletedEvent:
    """Return the event of a finished picture; arguments as in `response`."""
    pictures = range(picture, picture + 1)
    return CompletedEvent(
        b64_json=data.b64_json,
        url=data.url,
        created_at=int(time.time()),
        size=_square(order.size),
        quality=order.quality,
        output_format=order.output_format,
        usage=_usage(order, served, picture // order.n, 1),
        paris=_provenance(order, drawing, served, pictures, id=id),
    )


def headers(order: Order, served: Served, drawing: Drawing | None = None) -> dict[str, str]:
    """Return what proxies that drop `paris` from an answer let through.

    Args:
        order: The request.
        served: What draws it.
        drawing: The pictures, if they are finished when the headers go.
    """
    sampling, facts = order.sampling, served.bundle.facts
    values = {
        "Model": facts.model_name,
        "Bundle": drawing.origin.bundle if drawing else None,
        "Seed": order.seed,
        "Steps": sampling.num_inference_steps,
        "Solver": sampling.solver,
        "Time-Grid": sampling.time_grid,
        "Guidance": sampling.guidance_scale,
        "Routing": sampling.routing,
        "Lora": sampling.lora,
        "Allowed-Experts": ",".join(map(str, sampling.allowed_experts or [])) or None,
        "Warnings": ",".join(dict.fromkeys(_warning_codes(order))) or None,
        "Missing-Experts": ",".join(map(str, drawing.missing_experts)) or None if drawing else None,
        "Last-Resort": "true" if drawing and drawing.last_resort else None,
        "Attribution": facts.attribution,
    }
    return {
        HEADER_PREFIX + name: quote(str(value), safe=PRINTABLE.replace("%", ""))
        for name, value in values.items()
        if value is not None
    }


def _warning_codes(order: Order) -> list[str]:
    return [w.code for i in range(len(order.prompts)) for w in order.warnings(i)]


def _provenance(
    order: Order, drawing: Drawing, served: Served, pictures: range, *, id: str
) -> Provenance:
    facts, sampling = served.bundle.facts, order.sampling
    weights = [drawing.expert_weights[i] for i in pictures]
    return Provenance(
        id=id,
        model=facts.model_name,
        bundle=drawing.origin.bundle,
        seed=order.seed + pictures.start,
        num_inference_steps=sampling.num_inference_steps,
        solver=sampling.solver,
        time_grid=sampling.time_grid,
        guidance_scale=sampling.guidance_scale,
        routing=sampling.routing,
        lora=sampling.lora,
        allowed_experts=sampling.allowed_experts,
        native_size=_square(facts.picture_size),
        resize_filter=_resize_filter(order, served),
        experts=[drawing.expert_usage[i] for i in pictures],
        expert_weights=[[[round(w, WEIGHT_DIGITS) for w in r] for r in rows] for rows in weights],
        missing_experts=drawing.missing_experts,
        last_resort=drawing.last_resort,
        degraded=bool(drawing.missing_experts),
        warnings=order.warnings(pictures.start // order.n),
        attribution=facts.attribution,
    )


def _usage(order: Order, served: Served, prompt: int, count: int) -> Usage:
    report = order.reports[prompt]
    text = min(report.num_tokens, report.max_tokens) * count
    _, height, width = served.bundle.latent_shape
    drawn = height * width * count
    return Usage(
        input_tokens=text,
        input_tokens_details={"text_tokens": text, "image_tokens": 0},
        output_tokens=drawn,
        total_tokens=text + drawn,
    )


def _resize_filter(order: Order, served: Served) -> Literal["lanczos"] | None:
    return None if order.size == served.bundle.facts.picture_size else RESIZE_FILTER


def _square(side: int) -> str:
    return f"{side}x{side}"
