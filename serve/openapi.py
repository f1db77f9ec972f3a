"""What the OpenAPI document says beside the types: every status, and examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from serve.schemas import CompletedEvent, ErrorResponse, PartialImageEvent

Document = dict[str, Any]

EVENTS = (PartialImageEvent, CompletedEvent)
# By status: what it means, and the error of an example.
ERRORS: Mapping[int, tuple[str, Document]] = {
    400: (
        "A field is not allowed",
        {
            "message": "size='banana' is not allowed: 'auto' or '64x64'",
            "type": "invalid_request_error",
            "param": "size",
            "code": "invalid_value",
        },
    ),
    401: (
        "The key is missing or unknown",
        {
            "message": "Send the API key as 'Authorization: Bearer KEY'",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        },
    ),
    403: (
        "Without keys, only this machine is answered; only an admin cancels requests of others",
        {
            "message": "Without api_key_file this server answers only its own machine",
            "type": "permission_error",
            "param": None,
            "code": None,
        },
    ),
    404: (
        "There is no such route, model, request or link",
        {
            "message": "model='other' does not exist: this server has 'quickstart'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        },
    ),
    405: (
        "The route has other methods, which the header Allow lists",
        {
            "message": "PUT /v1/images/generations: Method Not Allowed",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        },
    ),
    408: (
        "The body did not arrive, or the pictures were not finished, in time",
        {
            "message": "The pictures were not finished in the time that a request has",
            "type": "timeout_error",
            "param": None,
            "code": "timeout",
        },
    ),
    413: (
        "The body is too long",
        {
            "message": "The body is too long; allowed are 1048576 bytes",
            "type": "invalid_request_error",
            "param": None,
            "code": "body_too_large",
        },
    ),
    429: (
        "There is no room, or too many requests came; the header Retry-After says when to ask",
        {
            "message": "There is no room for the request: 256 pictures wait already. "
            "Send it again when Retry-After says",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        },
    ),
    499: (
        "The request was cancelled",
        {
            "message": "The request was cancelled after 3 steps",
            "type": "cancelled_error",
            "param": None,
            "code": "cancelled",
        },
    ),
    500: (
        "The server failed; its log says why",
        {
            "message": "The server failed on this request; its log says why.",
            "type": "server_error",
            "param": None,
            "code": None,
        },
    ),
    503: (
        "A part of the server is being replaced or loads",
        {
            "message": "A part of the model is being replaced. Send the request again",
            "type": "unavailable_error",
            "param": None,
            "code": "unavailable",
        },
    ),
}


def errors(*statuses: int) -> dict[int | str, Document]:
    """Return the `responses` of a route that may answer with these errors; all may with 405."""
    return {
        status: {
            "model": ErrorResponse,
            "description": ERRORS[status][0],
            "content": {"application/json": {"example": {"error": ERRORS[status][1]}}},
        }
        for status in sorted({*statuses, 405})
    }


def drawing_responses(*, stream: bool = False) -> dict[int | str, Document]:
    """Return the `responses` of a route that draws."""
    found = errors(400, 401, 403, 404, 408, 413, 429, 499, 500, 503)
    found[200] = {"description": "The pictures", "headers": HEADERS}
    if stream:
        found[200]["content"] = {"text/event-stream": {"itemSchema": _event()}}
    return found


def file_responses(media_types: Sequence[str]) -> dict[int | str, Document]:
    """Return the `responses` of the route that answers with a picture file."""
    found = errors(403, 404, 408, 429, 499, 500, 503)
    content: Document = {media_type: {} for media_type in media_types}
    return found | {200: {"description": "The file", "content": content}}


def web_responses(media_type: str, *statuses: int) -> dict[int | str, Document]:
    """Return the `responses` of a route that answers with a file of the page."""
    content: Document = {media_type: {"schema": {"type": "string"}}}
    return errors(*statuses) | {200: {"description": "The file", "content": content}}


def complete(document: Document) -> Document:
    """Return FastAPI's document with the events of a stream, and without the answer 422.

    FastAPI adds that to every route; ours is 400.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, events = models_json_schema(
        [(event, "serialization") for event in EVENTS], ref_template="#/components/schemas/{model}"
    )
    document["components"]["schemas"] = events["$defs"] | schemas
    return document


def _event() -> Document:
    """Return the schema of one event of a stream, as OpenAPI has it from 3.2 on."""
    names = [*EVENTS, ErrorResponse]
    data = {"oneOf": [{"$ref": f"#/components/schemas/{event.__name__}"} for event in names]}
    return {
        "type": "object",
        "description": "With stream=true.",
        "properties": {
            "event": {"type": "string"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": data,
            },
        },
        "required": ["event", "data"],
    }


HEADERS: Document = {
    f"X-Paris-{name}": {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "Model": "The model's own name",
        "Bundle": "Digest of its bundle",
        "Seed": "Seed of the first picture",
        "Steps": "num_inference_steps",
        "Solver": "solver",
        "Time-Grid": "time_grid",
        "Guidance": "guidance_scale",
        "Routing": "routing",
        "Lora": "Name of the adapter",
        "Allowed-Experts": "Numbers of the experts that might draw, with commas between them",
        "Warnings": "Codes of the warnings, with commas between them",
        "Missing-Experts": "Experts that were lost and drawn without",
        "Attribution": "Licence line to show beside the pictures, percent-encoded",
    }.items()
}


def _body_examples(**examples: Document) -> Document:
    values = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"content": {"application/json": {"examples": values}}}}


GENERATIONS = _body_examples(
    short={"prompt": "a purple cat, yellow background"},
    repeatable={
        "prompt": "a purple cat, yellow background",
        "n": 2,
        "seed": 7,
        "num_inference_steps": 8,
        "guidance_scale": 2.0,
        "routing": "top-2",
    },
    file={
        "prompt": "a purple cat",
        "size": "512x512",
        "output_format": "webp",
        "output_compression": 80,
        "response_format": "url",
    },
    stream={"prompt": "a purple cat", "stream": True, "partial_images": 2},
)
BATCHES = _body_examples(
    pictures_of_two_prompts={"prompts": ["a purple cat", "a blue dog"], "n": 2, "seed": 7}
)


def provenance_body(media_types: Sequence[str]) -> Document:
    """Return the body of the route that takes a picture file."""
    schema = {"type": "string", "format": "binary"}
    content = {media_type: {"schema": schema} for media_type in media_types}
    return {"requestBody": {"required": True, "content": content}}
