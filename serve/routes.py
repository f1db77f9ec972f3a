"""The routes of the HTTP application: plain functions of the Ingress of their replica."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray import serve

from paris_ray.pictures import PictureRecord, read_picture
from serve import openapi, pictures
from serve.access import Access
from serve.checking import Order
from serve.errors import ApiError, error_of, failed, install_error_handlers, invalid
from serve.gate import SENT_AGAIN_HEADER, Gate
from serve.ingress import PAGE, Caller, Ingress
from serve.keys import Client
from serve.schemas import (
    BatchesRequest,
    BatchesResponse,
    Cancelled,
    ErrorDetail,
    ErrorResponse,
    ExpertList,
    ImagesRequest,
    ImagesResponse,
    Model,
    ModelList,
    Readiness,
)

# A stream that fails before this has an error's status; later, the error is an event of it.
STREAM_STARTS_AFTER_S = 1.0
# What needs no key; a link is its own.
OPEN_PATHS = ("/", "/web/", "/healthz", "/readyz", "/openapi.json", "/v1/images/files/")
WEB_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")


def _this_ingress() -> Ingress:
    ingress = serve.get_replica_context().servable_object
    assert isinstance(ingress, Ingress)
    return ingress


async def current_ingress() -> Ingress:
    """Return the Ingress of this replica; the routes below are plain functions of it."""
    return _this_ingress()


Current = Annotated[Ingress, Depends(current_ingress)]


async def current_caller(request: Request, ingress: Current) -> Caller:
    """Return who sends a request, as the gate found."""
    client: Client | None = request.state.client
    return Caller(
        client=client,
        request_id=request.state.request_id,
        is_sent_again=SENT_AGAIN_HEADER.decode() in request.headers,
        base_url=(ingress.options.public_url or str(request.base_url)).rstrip("/"),
    )


def _current_access() -> Access:
    return _this_ingress().access


CurrentCaller = Annotated[Caller, Depends(current_caller)]
v1 = APIRouter(prefix="/v1")


@v1.post(
    "/images/generations",
    response_model=ImagesResponse,
    responses=openapi.drawing_responses(stream=True),
    openapi_extra=openapi.GENERATIONS,
)
async def generate_images(
    body: ImagesRequest,
    ingress: Current,
    caller: CurrentCaller,
    request: Request,
    response: Response,
) -> Any:
    """Draw pictures of a prompt; with `stream`, as server-sent events."""
    order = _check(body, ingress, request)
    if order.stream:
        return await _stream(order, ingress, caller)
    drawing, data = await ingress.draw(order, caller)
    response.headers.update(pictures.headers(order, ingress.served, drawing))
    return pictures.response(order, drawing, ingress.served, data, id=caller.request_id)


@v1.post(
    "/images/batches",
    responses=openapi.drawing_responses(),
    openapi_extra=openapi.BATCHES,
)
async def generate_batches(
    body: BatchesRequest,
    ingress: Current,
    caller: CurrentCaller,
    request: Request,
    response: Response,
) -> BatchesResponse:
    """Draw pictures of many prompts at once."""
    order = _check(body, ingress, request)
    drawing, data = await ingress.draw(order, caller)
    response.headers.update(pictures.headers(order, ingress.served, drawing))
    answers = [
        pictures.response(order, drawing, ingress.served, data, id=caller.request_id, prompt=i)
        for i in range(len(order.prompts))
    ]
    return BatchesResponse(data=answers)


@v1.delete("/images/generations/{id}", responses=openapi.errors(401, 403, 404, 429, 500, 503))
async def cancel_images(
    id: str, ingress: Current, caller: CurrentCaller, client: str | None = None
) -> Cancelled:
    """Cancel a request, or a batch, by its `X-Request-Id`; returns when it has stopped.

    An admin's key may cancel requests of another `client`, by the name of its key.
    """
    assert caller.client is not None  # the gate lets nobody else cancel
    owner = caller.client.name if client is None else client
    if owner != caller.client.name and caller.client.role != "admin":
        message = "Only an admin's key may cancel requests of others"
        raise ApiError(403, ErrorDetail(message=message, type="permission_error", param="client"))
    step = await ingress.samplers.cancel(owner, id)
    if step is None:
        message = f"id={id[:80]!r} is not being drawn"
        raise invalid(message, param="id", code="request_not_found", status=404)
    return Cancelled(id=id, step=step)


@v1.post(
    "/images/provenance",
    responses=openapi.errors(400, 401, 403, 408, 413, 429, 500, 503),
    openapi_extra=openapi.provenance_body(PICTURE_TYPES),
)
async def read_provenance(request: Request) -> PictureRecord:
    """Return the record that a picture file carries; the body is the file."""
    file = await request.body()
    record, _ = await asyncio.to_thread(read_picture, file)
    return record


@v1.get("/models", responses=openapi.errors(401, 403, 429, 500, 503))
async def list_models(ingress: Current) -> ModelList:
    """Return the served model under all of its names, its defaults and limits."""
    return ModelList(data=ingress.models())


@v1.get("/models/{id:path}", responses=openapi.errors(401, 403, 404, 429, 500, 503))
async def retrieve_model(id: str, ingress: Current) -> Model:
    """Return one model."""
    for model in ingress.models():
        if model.id == id:
            return model
    message = f"model={id[:80]!r} does not exist"
    raise invalid(message, param="model", code="model_not_found", status=404)


@v1.get("/experts", responses=openapi.errors(401, 403, 429, 500, 503))
async def list_experts(ingress: Current) -> ExpertList:
    """Return what the experts were trained on, in words and pictures, and their adapters."""
    return ExpertList(data=ingress.experts)


open_routes = APIRouter()


@open_routes.get(
    "/v1/images/files/{token}.{extension}",
    response_class=Response,
    responses=openapi.file_responses(PICTURE_TYPES),
)
async def image_file(
    token: str, extension: str, ingress: Current, caller: CurrentCaller
) -> Response:
    """Return the file behind a link, which needs no key."""
    file = await ingress.file(token, extension, caller.request_id)
    headers = {"Cache-Control": "private, max-age=3600"}
    return Response(file, media_type=f"image/{extension}", headers=headers)


@open_routes.get("/healthz", responses=openapi.errors(403, 500, 503))
async def healthz(ingress: Current) -> dict[str, str]:
    """Say that requests are answered; 503 while the model is loading."""
    await ingress.check_sampler()
    return {"status": "ok"}


@open_routes.get("/readyz", responses=openapi.errors(403, 500, 503))
async def readyz(ingress: Current) -> Readiness:
    """Say whether pictures can be drawn, and which experts do not answer."""
    return await ingress.readiness()


@open_routes.get(
    "/", response_class=Response, responses=openapi.web_responses("text/html", 403, 500, 503)
)
async def page(ingress: Current) -> Response:
    """Return the page."""
    return _web_file(ingress, PAGE)


@open_routes.get(
    "/web/{name}",
    response_class=Response,
    responses=openapi.web_responses("text/javascript", 403, 404, 500, 503),
)
async def web_file(name: str, ingress: Current) -> Response:
    """Return a script or the style of the page."""
    if name not in ingress.web:
        raise error_of(404)
    return _web_file(ingress, name)


def _web_file(ingress: Ingress, name: str) -> Response:
    """Return a file of the page; browsers ask again each time, so that all are of one version."""
    media_type = WEB_TYPES[name.rpartition(".")[2]]
    headers = {"Cache-Control": "no-cache"}
    return Response(ingress.web[name], media_type=media_type, headers=headers)


def _check(body: ImagesRequest | BatchesRequest, ingress: Ingress, request: Request) -> Order:
    """Return what a request asks for; its size is logged."""
    order = ingress.check(body)
    request.state.logged.update(n=order.num_pictures, steps=order.options.num_inference_steps)
    return order


async def _stream(order: Order, ingress: Ingress, caller: Caller) -> StreamingResponse:
    """Return a stream of events; raises if it fails at once, so that a refusal has its status."""
    events = ingress.events(order, caller)
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=STREAM_STARTS_AFTER_S)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return StreamingResponse(
        _server_sent(first, events),
        media_type="text/event-stream",
        headers=pictures.headers(order, ingress.served)
        | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _server_sent(
    first: "asyncio.Future[BaseModel]", events: AsyncIterator[BaseModel]
) -> AsyncIterator[str]:
    try:
        yield _event(await first)
        async for event in events:
            yield _event(event)
    except ApiError as error:
        yield _event(ErrorResponse(error=error.detail))
    except Exception:
        yield _event(ErrorResponse(error=failed().detail))
        raise
    finally:
        first.cancel()


def _event(event: BaseModel) -> str:
    name = getattr(event, "type", "error")
    return f"event: {name}\ndata: {event.model_dump_json()}\n\n"


class Api(FastAPI):
    """The HTTP application."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        return openapi.complete(super().openapi())


def create_api(cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return the HTTP application.

    Args:
        cors_origins: Origins whose pages may use it.
    """
    api = Api(
        title="paris_ray",
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
    )
    api.add_middleware(
        Gate, find_access=_current_access, open_paths=OPEN_PATHS, cors_origins=cors_origins
    )
    install_error_handlers(api)
    api.include_router(v1)
    api.include_router(open_routes)
    return api
