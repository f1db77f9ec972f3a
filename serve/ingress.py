"""The HTTP side: checks requests, hands them to the Sampler, answers in the OpenAI shapes."""

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import HTMLResponse
from numpy.typing import NDArray
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from paris_ray.errors import ParisError
from paris_ray.reports import png_bytes
from paris_ray.sampling.sampler import SamplingOptions, sampling_options
from serve.access import Access, Frontage
from serve.drawing import Drawing, DrawRequest
from serve.errors import install_error_handlers, invalid, unavailable
from serve.expert import ExpertUnavailableError
from serve.gate import Gate
from serve.schemas import (
    ErrorResponse,
    ImageData,
    ImagesRequest,
    ImagesResponse,
    Model,
    ModelFacts,
    ModelList,
    Provenance,
    SamplingDefaults,
)
from serve.source import BundleSource

PAGE = Path(__file__).parent / "web" / "index.html"
RANDOM_SEEDS = 2**32  # seeds we draw: short for people, and exact as JavaScript numbers
LATENCY_BUCKETS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
HEALTH_TIMEOUT_S = 5
OPEN_PATHS = ("/", "/healthz", "/readyz", "/openapi.json")  # need no key
TRANSIENT = (ExpertUnavailableError, RayActorError, BackPressureError)


class Ingress:
    """The deployment that HTTP requests reach; it holds no weights.

    Args:
        source: Where the bundle is; only its description is read.
        sampler: Handle of the Sampler.
        api_key_file: A file with the keys that are asked for; None serves this machine alone.

    Raises:
        RoutingError: if the routing that the bundle has as its default is not allowed.
        ConfigError: if the keys cannot be read, or strangers could pass for local clients.
    """

    def __init__(
        self, source: BundleSource, sampler: DeploymentHandle[Any], api_key_file: str | None
    ) -> None:
        self._bundle = source.open()
        # Defaults that are not allowed must fail the deployment, not every request without its own.
        sampling_options(self._bundle)
        self._sampler = sampler
        self.access = Access(api_key_file)
        Frontage.of_ray().check(keyless=self.access.keyless)
        self.page = PAGE.read_text()
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
        if self._loaded:  # a busy Sampler would answer late; a dead one Serve replaces
            return
        try:
            await asyncio.wait_for(self._sampler.check_health.remote(), HEALTH_TIMEOUT_S)
        except (TimeoutError, *TRANSIENT) as error:
            raise unavailable("The model is not loaded. Ask again") from error
        self._loaded = True

    def models(self) -> ModelList:
        """Return the one model that is served."""
        facts = self._bundle.facts
        defaults = SamplingDefaults(
            num_inference_steps=facts.sampling.num_inference_steps,
            guidance_scale=facts.sampling.guidance_scale,
            routing=facts.sampling.routing,
        )
        paris = ModelFacts(
            num_experts=self._bundle.num_experts,
            picture_size=facts.picture_size,
            defaults=defaults,
            example_prompts=list(facts.example_prompts),
            loras=self._bundle.loras,
            attribution=facts.attribution,
        )
        return ModelList(data=[Model(id=facts.model_name, created=self._began, paris=paris)])

    async def draw(self, request: ImagesRequest) -> ImagesResponse:
        """Answer a request for pictures.

        Raises:
            ApiError: if the model or size is another, or an expert is not available.
            ParisError: if the routing is not allowed.
        """
        began = time.perf_counter()
        options = self._check(request)
        seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        drawing = await self._ask_sampler(request, seed, options)
        data = await asyncio.to_thread(lambda: [_encode(p) for p in drawing.pictures])
        self._images.inc(request.n)
        self._seconds.observe(time.perf_counter() - began)
        facts = self._bundle.facts
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            size=self._size,
            paris=Provenance(
                seed=seed,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                routing=request.routing or facts.sampling.routing,
                lora=request.lora,
                experts=drawing.expert_usage,
                attribution=facts.attribution,
            ),
        )

    @property
    def _size(self) -> str:
        side = self._bundle.facts.picture_size
        return f"{side}x{side}"

    def _check(self, request: ImagesRequest) -> SamplingOptions:
        name = self._bundle.facts.model_name
        if request.model not in (None, name):
            raise invalid(
                f"model={request.model!r} does not exist: this server has {name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )
        if request.size not in ("auto", self._size):
            raise invalid(
                f"size={request.size!r} is not allowed: 'auto' or {self._size!r}",
                param="size",
                code="invalid_value",
            )
        try:
            self._bundle.check_lora(request.lora)
        except ParisError as error:
            raise invalid(str(error), param="lora", code="invalid_value") from None
        return sampling_options(
            self._bundle,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            routing=request.routing,
            lora=request.lora,
        )

    async def _ask_sampler(
        self, request: ImagesRequest, seed: int, options: SamplingOptions
    ) -> Drawing:
        seeds = list(range(seed, seed + request.n))
        wanted = DrawRequest(
            id=secrets.token_hex(8),
            client="local",
            prompts=[request.prompt] * request.n,
            seeds=seeds,
            options=options,
            timeout_s=110,
        )
        try:
            drawing: Drawing = await self._sampler.draw.remote(wanted)
        except TRANSIENT as error:
            reason = getattr(error, "cause", error)  # Ray wraps what a replica raised
            raise unavailable(f"{reason}. Send the request again") from error
        return drawing


def _encode(picture: NDArray[np.uint8]) -> ImageData:
    png = png_bytes(Image.fromarray(picture))
    return ImageData(b64_json=base64.b64encode(png).decode())


def _current_access() -> Access:
    ingress = serve.get_replica_context().servable_object
    assert isinstance(ingress, Ingress)
    return ingress.access


async def current_ingress() -> Ingress:
    """Return the Ingress of this replica; the routes below are plain functions of it."""
    ingress = serve.get_replica_context().servable_object
    assert isinstance(ingress, Ingress)
    return ingress


Current = Annotated[Ingress, Depends(current_ingress)]


v1 = APIRouter(prefix="/v1")


@v1.post("/images/generations")
async def generate_images(body: ImagesRequest, ingress: Current) -> ImagesResponse:
    """Draw pictures of a prompt."""
    return await ingress.draw(body)


@v1.get("/models")
async def list_models(ingress: Current) -> ModelList:
    """Return the served model, its defaults and limits."""
    return ingress.models()


open_routes = APIRouter()


@open_routes.get("/healthz")
async def healthz(ingress: Current) -> dict[str, str]:
    """Say that requests are answered; 503 while the model is loading."""
    await ingress.check_sampler()
    return {"status": "ok"}


@open_routes.get("/", response_class=HTMLResponse)
async def page(ingress: Current) -> str:
    """Return the page."""
    return ingress.page


def create_api(cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return the HTTP application.

    Args:
        cors_origins: Origins whose pages may use it.
    """
    api = FastAPI(
        title="paris_ray",
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
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
