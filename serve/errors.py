"""Every failure in the OpenAI error shape: `{"error": {"message", "type", "param", "code"}}`."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from paris_ray.errors import ParisError, RoutingError
from serve.schemas import BatchesRequest, ErrorDetail, ErrorResponse, ImagesRequest

INVALID = "invalid_request_error"
LONGEST_VALUE = 80  # characters of a refused value or field that are repeated in the message


class ApiError(Exception):
    """A refusal that an endpoint decides on.

    Args:
        status: HTTP status.
        detail: Body of the answer.
        headers: Headers of the answer.
    """

    def __init__(
        self, status: int, detail: ErrorDetail, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail.message)
        self.status, self.detail, self.headers = status, detail, headers


def invalid(message: str, *, param: str, code: str, status: int = 400) -> ApiError:
    """Return the refusal of a field's value."""
    return ApiError(status, ErrorDetail(message=message, type=INVALID, param=param, code=code))


def unavailable(message: str) -> ApiError:
    """Return the answer to a request that may succeed when sent again."""
    detail = ErrorDetail(message=message, type="unavailable_error", code="unavailable")
    return ApiError(503, detail, retry_after(1))


def too_many(message: str, retry_after_s: float) -> ApiError:
    """Return the refusal of a client that asks for more than it may at the moment."""
    detail = ErrorDetail(message=message, type="rate_limit_error", code="rate_limit_exceeded")
    return ApiError(429, detail, retry_after(retry_after_s))


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that says when to ask again: whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def malformed(message: str) -> ApiError:
    """Return the refusal of what is no proper HTTP request."""
    return ApiError(400, ErrorDetail(message=message, type=INVALID, code="malformed_request"))


def too_large(message: str, *, status: int, code: str) -> ApiError:
    """Return the refusal of a request that is too long: 413 for its body, 431 for its head."""
    return ApiError(status, ErrorDetail(message=message, type=INVALID, code=code))


def too_slow(message: str) -> ApiError:
    """Return the answer to a request that did not arrive in time, or took too long."""
    return ApiError(408, ErrorDetail(message=message, type="timeout_error", code="timeout"))


def failed() -> ApiError:
    """Return the answer where something broke; the log says what, and it is not for the client."""
    message = "The server failed on this request; its log says why."
    return ApiError(500, ErrorDetail(message=message, type="server_error"))


def error_of(status: int) -> ApiError:
    """Return, in our words, an error that Ray or a library answers in its own.

    Theirs may hold addresses, process ids and names of classes.
    """
    match status:
        case 404:
            return ApiError(404, ErrorDetail(message="There is no such route", type=INVALID))
        case 408:
            return too_slow("The request took longer than this server allows")
        case 429:
            return too_many("The server has too much to do. Send the request again", 1)
        case 502 | 503 | 504:
            return unavailable("The server cannot take this request now. Send it again")
        case _ if status < 500:
            return ApiError(status, ErrorDetail(message="The request is refused", type=INVALID))
        case _:
            return failed()


def install_error_handlers(api: FastAPI) -> None:
    """Make an application answer every refusal in the OpenAI error shape; bugs are the gate's."""
    api.add_exception_handler(ApiError, _on_api_error)
    api.add_exception_handler(RequestValidationError, _on_validation_error)
    api.add_exception_handler(ParisError, _on_paris_error)
    api.add_exception_handler(HTTPException, _on_http_exception)


def as_response(error: ApiError) -> JSONResponse:
    """Return the answer that a refusal is."""
    return JSONResponse(ErrorResponse(error=error.detail).model_dump(), error.status, error.headers)


def _respond(
    status: int, detail: ErrorDetail, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return as_response(ApiError(status, detail, headers))


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return as_response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    body = BatchesRequest if request.url.path.endswith("/batches") else ImagesRequest
    return _respond(400, describe_violation(error.errors()[0], body))


async def _on_paris_error(_: Request, error: Exception) -> JSONResponse:
    param = "routing" if isinstance(error, RoutingError) else None
    detail = ErrorDetail(message=str(error), type=INVALID, param=param, code="invalid_value")
    return _respond(400, detail)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _respond(error.status_code, ErrorDetail(message=message, type=INVALID), error.headers)


def describe_violation(
    violation: Mapping[str, Any], body: type[BaseModel] = ImagesRequest
) -> ErrorDetail:
    """Return the error of one pydantic violation of a request's body, which is to be of a type."""
    field = str(violation["loc"][1])[:LONGEST_VALUE] if len(violation["loc"]) > 1 else None
    match violation["type"]:
        case "json_invalid":
            return ErrorDetail(
                message=f"The body is not JSON: {violation['ctx']['error']}",
                type=INVALID,
                code="invalid_json",
            )
        case "extra_forbidden":
            allowed = ", ".join(body.model_fields)
            message, code = f"Unknown parameter {field!r}; allowed: {allowed}", "unknown_parameter"
        case "missing" if field is not None:
            message, code = f"Missing required parameter {field!r}", "missing_required_parameter"
        case _ if field is None:
            message, code = "The body must be a JSON object (application/json)", "invalid_type"
        case _:
            value = repr(violation["input"])[:LONGEST_VALUE]
            message, code = f"{field}={value} is not allowed: {violation['msg']}", "invalid_value"
    return ErrorDetail(message=message, type=INVALID, param=field, code=code)
