"""Every failure in the OpenAI error shape: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from paris_ray.errors import ParisError, RoutingError
from serve.schemas import ErrorDetail, ErrorResponse, ImagesRequest

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
    return ApiError(503, ErrorDetail(message=message, type="unavailable_error", code="unavailable"))


def install_error_handlers(api: FastAPI) -> None:
    """Make an application answer every failure in the OpenAI error shape."""
    api.add_exception_handler(ApiError, _on_api_error)
    api.add_exception_handler(RequestValidationError, _on_validation_error)
    api.add_exception_handler(ParisError, _on_paris_error)
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(Exception, _on_bug)


def _respond(
    status: int, detail: ErrorDetail, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(ErrorResponse(error=detail).model_dump(), status, headers)


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _respond(error.status, error.detail, error.headers)


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _respond(400, describe_violation(error.errors()[0]))


async def _on_paris_error(_: Request, error: Exception) -> JSONResponse:
    param = "routing" if isinstance(error, RoutingError) else None
    detail = ErrorDetail(message=str(error), type=INVALID, param=param, code="invalid_value")
    return _respond(400, detail)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _respond(error.status_code, ErrorDetail(message=message, type=INVALID), error.headers)


async def _on_bug(_: Request, __: Exception) -> JSONResponse:
    # The traceback goes to the log; it may hold what the client must not see.
    message = "The server failed on this request; its log says why."
    return _respond(500, ErrorDetail(message=message, type="server_error"))


def describe_violation(violation: Mapping[str, Any]) -> ErrorDetail:
    """Return the error of one pydantic violation of the request body."""
    field = str(violation["loc"][1])[:LONGEST_VALUE] if len(violation["loc"]) > 1 else None
    match violation["type"]:
        case "json_invalid":
            return ErrorDetail(
                message=f"The body is not JSON: {violation['ctx']['error']}",
                type=INVALID,
                code="invalid_json",
            )
        case "extra_forbidden":
            allowed = ", ".join(ImagesRequest.model_fields)
            message, code = f"Unknown parameter {field!r}; allowed: {allowed}", "unknown_parameter"
        case "missing" if field is not None:
            message, code = f"Missing required parameter {field!r}", "missing_required_parameter"
        case _ if field is None:
            message, code = "The body must be a JSON object (application/json)", "invalid_type"
        case _:
            value = repr(violation["input"])[:LONGEST_VALUE]
            message, code = f"{field}={value} is not allowed: {violation['msg']}", "invalid_value"
    return ErrorDetail(message=message, type=INVALID, param=field, code=code)
