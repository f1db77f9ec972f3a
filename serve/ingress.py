"""The HTTP side: checks requests, hands them to a Sampler, answers in the OpenAI shapes."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from paris_ray.bundle import bundle_digest
from paris_ray.encoders.inspection import load_text_inspector
from paris_ray.pictures import PictureRecord, read_picture
from paris_ray.sampling.sampler import sampling_options
from serve import openapi, pictures
from serve.access import check_key, check_local, read_api_key
from serve.checking import Order, Served, check
from serve.drawing import Drawing, DrawRequest
from serve.errors import ApiError, install_error_handlers, invalid
from serve.links import FileCache, LinkError, Links, LinkTarget, cluster_secret
from serve.relay import Samplers
from serve.schemas import (
    BatchesRequest,
    BatchesResponse,
    Cancelled,
    ErrorDetail,
    ErrorResponse,
    ImageData,
    ImagesRequest,
    ImagesResponse,
    Model,
    ModelFacts,
    ModelList,
    SamplingDefaults,
)
from serve.source import BundleSource

PAGE = Path(__file__).parent / "web" / "index.html"
RANDOM_SEEDS = 2**32  # seeds we draw: short for people, and exact as JavaScript numbers
LATENCY_BUCKETS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
HEALTH_TIMEOUT_S = 5
# A stream that fails before this has an error's status; later, the error is an event of it.
STREAM_STARTS_AFTER_S = 1.0
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")


class HttpOptions(BaseModel):
    """What the operator decides about requests and answers.

    Attributes:
        aliases: Other names that requests may give the model.
        max_size: The largest width and height that pictures are resized to; None: they are not.
        public_url: What links begin with; None: as the request for the picture was addressed.
        timeout_s: Seconds after which a request is given up.
    """

    aliases: tuple[str, ...] = ()
    max_size: int | None = 2048
    public_url: str | None = None
    timeout_s: float = 110


class Caller(BaseModel):
    """Who sends a request.

    Attributes:
        client: Name of its key, or `local` where there are none.
        request_id: What the client calls the request, or we for it.
        base_url: What links begin with.
    """

    client: str
    request_id: str
    base_url: str


class Ingress:
    """The deployment that HTTP requests reach; it holds no weights.

    Args:
        source: Where the bundle is; only its description and its tokenizer are read.
        sampler: Handle of the Sampler.
        api_key_file: A file with the key that `/v1` asks for; None serves this machine alone.
        options: What the operator decides.

    Raises:
        RoutingError: if the routing that the bundle has as its default is not allowed.
        ConfigError: if the key cannot be read.
    """

    def __init__(
        self,
        source: BundleSource,
        sampler: DeploymentHandle[Any],
        api_key_file: str | None,
        options: HttpOptions | None = None,
    ) -> None:
        bundle = source.open()
        # Defaults that are not allowed must fail the deployment, not every request without its own.
        sampling_options(bundle)
        self.options = options or HttpOptions()
        encoder = bundle.parts["text_encoder"]
        self.served = Served(
            bundle=bundle,
            digest=bundle_digest(source.uri),
            dtype=source.dtype,
            # Only CLIP's tokenizer has a folder of its own.
            inspector=load_text_inspector(encoder, bundle.parts.get("tokenizer", encoder)),
            loras={lora.name: lora.record() for lora in source.loras},
            aliases=self.options.aliases,
            max_size=self.options.max_size,
        )
        self.samplers = Samplers(sampler)
        self.api_key = None if api_key_file is None else read_api_key(api_key_file)
        self.page = PAGE.read_text()
        self._links, self._files = Links(cluster_secret()), FileCache()
        self._loaded = False
        self._began = int(time.time())
        self._images = Counter("paris_images", "Pictures drawn.")
        self._seconds = Histogram(
            "paris_request_seconds", "Time to draw one request.", boundaries=LATENCY_BUCKETS_S
        )

    async def check_sampler(self) -> None:
        """Return when the Sampler has answered once, and so has loaded its parts.

        Raises:
            ApiError: 503, if it does not within HEALTH_TIMEOUT_S.
        """
        if not self._loaded:  # a busy Sampler would answer late; a dead one Serve replaces
            await self.samplers.check_health(HEALTH_TIMEOUT_S)
            self._loaded = True

    def models(self) -> list[Model]:
        """Return the one model that is served, under all of its names."""
        bundle = self.served.bundle
        facts = bundle.facts
        defaults = SamplingDefaults(
            num_inference_steps=facts.sampling.num_inference_steps,
            guidance_scale=facts.sampling.guidance_scale,
            routing=facts.sampling.routing,
        )
        paris = ModelFacts(
            num_experts=bundle.num_experts,
            picture_size=facts.picture_size,
            defaults=defaults,
            example_prompts=list(facts.example_prompts),
            loras=bundle.loras,
            attribution=facts.attribution,
        )
        names = (facts.model_name, *self.options.aliases)
        return [Model(id=name, created=self._began, paris=paris) for name in names]

    def check(self, request: ImagesRequest | BatchesRequest) -> Order:
        """Return what a request asks for; raises as `serve.checking.check`."""
        return check(request, self.served, random_seed=secrets.randbelow(RANDOM_SEEDS))

    async def draw(self, order: Order, caller: Caller) -> tuple[Drawing, list[ImageData]]:
        """Return the pictures of a request, and their files or links.

        Raises:
            ApiError: 408, 429, 499 or 503.
        """
        began = time.perf_counter()
        drawing = await self.samplers.draw(self._draw_request(order, caller))
        files = await asyncio.to_thread(pictures.encode_all, order, drawing, self.served)
        self._images.inc(len(files))
        self._seconds.observe(time.perf_counter() - began)
        return drawing, [self._data(order, i, file, caller) for i, file in enumerate(files)]

    async def events(self, order: Order, caller: Caller) -> AsyncIterator[BaseModel]:
        """Yield the events of a stream: unfinished pictures, then each finished one.

        Raises:
            ApiError: as `draw`.
        """
        began, id = time.perf_counter(), caller.request_id
        async for message in self.samplers.stream(self._draw_request(order, caller)):
            if not isinstance(message, Drawing):
                yield await asyncio.to_thread(pictures.encode_partial, order, message, self.served)
                continue
            files = await asyncio.to_thread(pictures.encode_all, order, message, self.served)
            self._images.inc(len(files))
            self._seconds.observe(time.perf_counter() - began)
            for i, file in enumerate(files):
                data = self._data(order, i, file, caller)
                yield pictures.completed_event(order, message, self.served, data, id=id, picture=i)

    async def file(self, token: str, caller: Caller) -> tuple[bytes, str]:
        """Return the file behind a link and its kind, drawn again if it is forgotten.

        Raises:
            ApiError: 404 for a link that has expired or is not ours, or as `draw`.
        """
        try:
            target = self._links.read(token)
            if target.bundle != self.served.digest:
                raise LinkError("The link's picture was drawn by another model")
        except LinkError as error:
            raise invalid(str(error), param="token", code="link_expired", status=404) from None
        order = self.check(target.request)
        file = self._files.get(token)
        if file is None:
            request = self._draw_request(order, caller.model_copy(update={"client": target.client}))
            drawing = await self.samplers.draw(request)
            (file,) = await asyncio.to_thread(pictures.encode_all, order, drawing, self.served)
            self._files.put(token, file)
        return file, f"image/{order.output_format}"

    def _draw_request(self, order: Order, caller: Caller) -> DrawRequest:
        return order.draw_request(
            id=caller.request_id, client=caller.client, timeout_s=self.options.timeout_s
        )

    def _data(self, order: Order, picture: int, file: bytes, caller: Caller) -> ImageData:
        if not order.as_url:
            return ImageData(b64_json=base64.b64encode(file).decode())
        request = order.picture_request(picture)
        target = LinkTarget(request=request, client=caller.client, bundle=self.served.digest)
        token = self._links.sign(target)
        self._files.put(token, file)
        return ImageData(url=f"{caller.base_url}/v1/images/files/{token}.{order.output_format}")


async def current_ingress() -> Ingress:
    """Return the Ingress of this replica; the routes below are plain functions of it."""
    ingress = serve.get_replica_context().servable_object
    assert isinstance(ingress, Ingress)
    return ingress


Current = Annotated[Ingress, Depends(current_ingress)]


async def require_local(request: Request, ingress: Current) -> None:
    """Without a key, serve this machine alone."""
    if ingress.api_key is None:
        check_local(request)


async def require_key(request: Request, ingress: Current) -> None:
    """With a key, ask for it."""
    if ingress.api_key is not None:
        check_key(request, ingress.api_key)


async def current_caller(request: Request, ingress: Current) -> Caller:
    """Return who sends a request."""
    return Caller(
        client="local" if ingress.api_key is None else "api_key",
        request_id=request.headers["x-request-id"],  # Ray's proxy sees to it that there is one
        base_url=(ingress.options.public_url or str(request.base_url)).rstrip("/"),
    )


CurrentCaller = Annotated[Caller, Depends(current_caller)]
v1 = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])


@v1.post(
    "/images/generations",
    response_model=ImagesResponse,
    responses=openapi.drawing_responses(stream=True),
    openapi_extra=openapi.GENERATIONS,
)
async def generate_images(
    body: ImagesRequest, ingress: Current, caller: CurrentCaller, response: Response
) -> Any:
    """Draw pictures of a prompt; with `stream`, as server-sent events."""
    order = ingress.check(body)
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
    body: BatchesRequest, ingress: Current, caller: CurrentCaller, response: Response
) -> BatchesResponse:
    """Draw pictures of many prompts at once."""
    order = ingress.check(body)
    drawing, data = await ingress.draw(order, caller)
    response.headers.update(pictures.headers(order, ingress.served, drawing))
    answers = [
        pictures.response(order, drawing, ingress.served, data, id=caller.request_id, prompt=i)
        for i in range(len(order.prompts))
    ]
    return BatchesResponse(data=answers)


@v1.delete("/images/generations/{id}", responses=openapi.errors(401, 403, 404, 429, 500, 503))
async def cancel_images(id: str, ingress: Current, caller: CurrentCaller) -> Cancelled:
    """Cancel a request, or a batch, by its `X-Request-Id`; returns when it has stopped."""
    step = await ingress.samplers.cancel(caller.client, id)
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
    file, media_type = await ingress.file(token, caller)
    if media_type != f"image/{extension}":
        raise invalid("The link is damaged", param="token", code="link_expired", status=404)
    return Response(file, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})


@open_routes.get("/healthz", responses=openapi.errors(403, 500, 503))
async def healthz(ingress: Current) -> dict[str, str]:
    """Say that requests are answered; 503 while the model is loading."""
    await ingress.check_sampler()
    return {"status": "ok"}


@open_routes.get("/", response_class=HTMLResponse, responses=openapi.errors(403, 500, 503))
async def page(ingress: Current) -> str:
    """Return the page."""
    return ingress.page


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
        detail = ErrorDetail(message="The server failed on this request", type="server_error")
        yield _event(ErrorResponse(error=detail))
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


def create_api() -> FastAPI:
    """Return the HTTP application."""
    api = Api(
        title="paris_ray",
        dependencies=[Depends(require_local)],
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
    )
    install_error_handlers(api)
    api.include_router(v1)
    api.include_router(open_routes)
    return api
