"""The HTTP side: checks requests, hands them to a Sampler, answers in the OpenAI shapes."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from paris_ray.bundle import Bundle, bundle_digest
from paris_ray.encoders.inspection import load_text_inspector
from paris_ray.sampling.sampler import sampling_options
from serve import pictures
from serve.access import Access, Frontage
from serve.checking import Order, Served, check
from serve.drawing import Drawing, DrawRequest
from serve.errors import invalid
from serve.keys import Client
from serve.links import FileCache, LinkError, Links, LinkTarget, cluster_secret
from serve.relay import Samplers
from serve.schemas import (
    BatchesRequest,
    ExpertFacts,
    ImageData,
    ImagesRequest,
    Model,
    ModelFacts,
    Readiness,
    SamplingDefaults,
)
from serve.source import BundleSource

WEB = Path(__file__).parent / "web"
PAGE = "index.html"
RANDOM_SEEDS = 2**32  # seeds we draw: short for people, and exact as JavaScript numbers
LATENCY_BUCKETS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
HEALTH_TIMEOUT_S = 5
READY_TIMEOUT_S = 0.8  # so that it is answered within a second


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
        client: Its key, `local` where there are none; None for a route that needs none.
        request_id: What the client calls the request, or we for it.
        base_url: What links begin with.
    """

    client: Client | None
    request_id: str
    base_url: str


def _expert_facts(bundle: Bundle) -> list[ExpertFacts]:
    """Return what a bundle tells of its experts."""
    names = [
        [name for name, at in bundle.loras.items() if at == k] for k in range(bundle.num_experts)
    ]
    if not bundle.clusters:
        return [
            ExpertFacts(expert=k, rows=None, words=[], pictures=[], loras=names[k])
            for k in range(bundle.num_experts)
        ]
    return [
        ExpertFacts(
            expert=k, rows=told.rows, words=told.words, pictures=told.pictures, loras=names[k]
        )
        for k, told in enumerate(bundle.clusters)
    ]


class Ingress:
    """The deployment that HTTP requests reach; it holds no weights.

    Args:
        source: Where the bundle is; only its description and its tokenizer are read.
        sampler: Handle of the Sampler.
        api_key_file: A file with the keys that are asked for; None serves this machine alone.
        options: What the operator decides.

    Raises:
        RoutingError: if the routing that the bundle has as its default is not allowed.
        ConfigError: if the keys cannot be read, or strangers could pass for local clients.
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
        self.access = Access(api_key_file)
        Frontage.of_ray().check(keyless=self.access.keyless)
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
        self.experts = _expert_facts(bundle)
        self.web = {file.name: file.read_bytes() for file in WEB.iterdir()}
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

    async def readiness(self) -> Readiness:
        """Return what a Sampler says of itself.

        Raises:
            ApiError: 503, if none does at once.
        """
        return Readiness(**await self.samplers.state(READY_TIMEOUT_S))

    def models(self) -> list[Model]:
        """Return the one model that is served, under all of its names."""
        bundle = self.served.bundle
        facts = bundle.facts
        defaults = SamplingDefaults(
            num_inference_steps=facts.sampling.num_inference_steps,
            solver=facts.sampling.solver,
            time_grid=facts.sampling.time_grid,
            guidance_scale=facts.sampling.guidance_scale,
            routing=facts.sampling.routing,
        )
        paris = ModelFacts(
            num_experts=bundle.num_experts,
            picture_size=facts.picture_size,
            defaults=defaults,
            qualities=list(facts.sampling.presets),
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
        request = self._own_request(order, caller)
        drawing = await self.samplers.draw(request)
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
        request = self._own_request(order, caller)
        async for message in self.samplers.stream(request):
            if not isinstance(message, Drawing):
                yield await asyncio.to_thread(pictures.encode_partial, order, message, self.served)
                continue
            files = await asyncio.to_thread(pictures.encode_all, order, message, self.served)
            self._images.inc(len(files))
            self._seconds.observe(time.perf_counter() - began)
            for i, file in enumerate(files):
                data = self._data(order, i, file, caller)
                yield pictures.completed_event(order, message, self.served, data, id=id, picture=i)

    async def file(self, token: str, request_id: str) -> tuple[bytes, str]:
        """Return the file behind a link and its kind, drawn again if it is forgotten.

        It is drawn for whom the link was made for.

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
            request = order.draw_request(
                id=request_id, client=target.client, timeout_s=self.options.timeout_s
            )
            drawing = await self.samplers.draw(request)
            (file,) = await asyncio.to_thread(pictures.encode_all, order, drawing, self.served)
            self._files.put(token, file)
        return file, f"image/{order.output_format}"

    def _own_request(self, order: Order, caller: Caller) -> DrawRequest:
        """Return what the Sampler is asked for a caller, within the caller's quotas."""
        client = caller.client
        assert client is not None  # the gate lets nobody else draw
        most = client.quotas.concurrent_pictures
        if most is not None and order.num_pictures > most:  # never, whenever it is sent again
            message = f"{order.num_pictures} pictures are not allowed: your key has {most} at once"
            raise invalid(message, param="n", code="invalid_value")
        self.access.check_steps(client, order.picture_steps)
        return order.draw_request(
            id=caller.request_id,
            client=client.name,
            timeout_s=self.options.timeout_s,
            max_pictures_of_client=most,
        )

    def _data(self, order: Order, picture: int, file: bytes, caller: Caller) -> ImageData:
        if not order.as_url:
            return ImageData(b64_json=base64.b64encode(file).decode())
        request = order.picture_request(picture)
        assert caller.client is not None
        target = LinkTarget(request=request, client=caller.client.name, bundle=self.served.digest)
        token = self._links.sign(target)
        self._files.put(token, file)
        return ImageData(url=f"{caller.base_url}/v1/images/files/{token}.{order.output_format}")
