"""The HTTP side: checks requests, hands them to a Sampler, answers in the OpenAI shapes."""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

from paris_ray.encoders.inspection import load_text_inspector
from paris_ray.folders import Folder
from paris_ray.model_folder.description import BundleDescription
from paris_ray.model_folder.facts import CONFIG
from paris_ray.sampling_options import sampling_options
from serve import metrics, pictures
from serve.access import Access, Frontage
from serve.checking import Order, Served, check
from serve.drawing import Drawing, DrawRequest
from serve.errors import ApiError, invalid
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
from serve.signing import PictureSigner, SigningOptions
from serve.source import BundleSource

WEB = Path(__file__).parent / "web"
PAGE = "index.html"
RANDOM_SEEDS = 2**32  # seeds we draw: short for people, and exact as JavaScript numbers
HEALTH_TIMEOUT_S = 5
READY_TIMEOUT_S = 0.8  # so that it is answered within a second


class HttpOptions(BaseModel):
    """What the operator decides about requests and answers.

    Attributes:
        aliases: Other names that requests may give the model.
        max_size: The largest width and height that pictures are resized to; None: they are not.
        public_url: What links begin with; None: as the request for the picture was addressed.
        timeout_s: Seconds after which a request is given up.
        max_pictures: The most pictures of one request: as many as a Sampler takes on; None: any.
        signing: By whom files are signed; None: they are not.
    """

    aliases: tuple[str, ...] = ()
    max_size: int | None = 2048
    public_url: str | None = None
    timeout_s: float = 110
    max_pictures: int | None = None
    signing: SigningOptions | None = None


class Caller(BaseModel):
    """Who sends a request.

    Attributes:
        client: Its key, `local` where there are none; None for a route that needs none.
        request_id: What the client calls the request, or we for it.
        is_sent_again: Whether another Ingress has died with it.
        base_url: What links begin with.
    """

    client: Client | None
    request_id: str
    is_sent_again: bool
    base_url: str


def _expert_facts(bundle: BundleDescription) -> list[ExpertFacts]:
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
    """The deployment that HTTP requests reach; it holds no weights, and needs no torch.

    Args:
        source: Where the bundle is; only its description and its tokenizer are read.
        sampler: Handle of the Sampler.
        api_key_file: A file with the keys that are asked for; None serves this machine alone.
        options: What the operator decides.

    Raises:
        RoutingError: if the routing that the bundle has as its default is not allowed.
        ConfigError: if the keys cannot be read, strangers could pass for local clients, Ray
            would give requests up first, or pictures cannot be signed.
    """

    def __init__(
        self,
        source: BundleSource,
        sampler: DeploymentHandle[Any],
        api_key_file: str | None,
        options: HttpOptions | None = None,
    ) -> None:
        bundle = source.describe()
        # Defaults that are not allowed must fail the deployment, not every request without its own.
        sampling_options(bundle)
        self.access, self.options = Access(api_key_file), options or HttpOptions()
        signing = self.options.signing
        signer = None if signing is None else PictureSigner(signing)
        Frontage.of_ray().check(keyless=self.access.keyless, timeout_s=self.options.timeout_s)
        encoder = bundle.parts["text_encoder"]
        self.served = Served(
            bundle=bundle,
            # Only CLIP's tokenizer has a folder of its own.
            inspector=load_text_inspector(encoder, bundle.parts.get("tokenizer", encoder)),
            aliases=self.options.aliases,
            max_size=self.options.max_size,
            signer=signer,
        )
        self._source = source
        self.samplers = Samplers(sampler, _own_deployment())
        self.experts = _expert_facts(bundle)
        self.web = {file.name: file.read_bytes() for file in WEB.iterdir()}
        self._links, self._files = Links(cluster_secret()), FileCache()
        self._loaded = False
        self._created = Folder(source.uri).modified(CONFIG)  # the same of every replica

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

    async def cancel_between(self, client: str, request_id: str, is_unsure: bool) -> bool:
        """Do as `Samplers.cancel_between`, for another replica."""
        return self.samplers.cancel_between(client, request_id, is_unsure)

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
            history=list(bundle.history),
        )
        names = (facts.model_name, *self.options.aliases)
        return [Model(id=name, created=self._created, paris=paris) for name in names]

    def check(self, request: ImagesRequest | BatchesRequest) -> Order:
        """Return what a request asks for; raises as `serve.checking.check`."""
        return check(request, self.served, random_seed=secrets.randbelow(RANDOM_SEEDS))

    async def draw(self, order: Order, caller: Caller) -> tuple[Drawing, list[ImageData]]:
        """Return the pictures of a request, and their files or links.

        Raises:
            ApiError: 408, 429, 499 or 503.
        """
        client, request = await self._own_request(order, caller)
        with self.access.counting(client, order.picture_steps):
            drawing = await self.samplers.draw(request)
        files = await self._encode(order, drawing)
        data = [self._data(order, i, file, drawing, caller) for i, file in enumerate(files)]
        return drawing, data

    async def events(self, order: Order, caller: Caller) -> AsyncIterator[BaseModel]:
        """Yield the events of a stream: unfinished pictures, then each finished one.

        Raises:
            ApiError: as `draw`.
        """
        client, request = await self._own_request(order, caller)
        with self.access.counting(client, order.picture_steps):
            async for event in self._events(order, request, caller):
                yield event

    async def _events(
        self, order: Order, request: DrawRequest, caller: Caller
    ) -> AsyncIterator[BaseModel]:
        id = caller.request_id
        async for message in self.samplers.stream(request):
            if not isinstance(message, Drawing):
                yield await asyncio.to_thread(pictures.encode_partial, order, message, self.served)
                continue
            for i, file in enumerate(await self._encode(order, message)):
                data = self._data(order, i, file, message, caller)
                yield pictures.completed_event(order, message, self.served, data, id=id, picture=i)

    async def file(self, token: str, extension: str, request_id: str) -> bytes:
        """Return the file behind a link, drawn again if it is forgotten.

        It is drawn for whom the link was made for, within the quotas of that key.

        Raises:
            ApiError: 404 for a link that has expired or is not ours, or as `draw`.
        """
        try:
            target = self._links.read(token)
            client = self.access.client_named(target.client)
            if client is None or not (target.name in self._files or self._can_draw(target)):
                raise LinkError(
                    "The link's picture is of another model or adapter, or was drawn without an "
                    "expert that was lost, or its key is gone"
                )
        except LinkError as error:
            raise _link_expired(str(error)) from None
        order = self.check(target.request)
        if extension != order.output_format:
            raise _link_expired("The link is damaged")

        async def draw() -> bytes:
            request = self._request_of(client, order, request_id)
            request = replace(request, origin=target.origin)
            with self.access.counting(client, order.picture_steps):
                drawing = await self.samplers.draw(request)
            (file,) = await self._encode(order, drawing)
            return file

        return await self._files.fetch(target.name, draw)

    def _can_draw(self, target: LinkTarget) -> bool:
        """Return whether the picture of a link would be the same, as far as is known here."""
        origin = self._source.origin(target.request.lora)
        return target.origin == origin and not target.is_degraded

    async def _encode(self, order: Order, drawing: Drawing) -> list[bytes]:
        with metrics.STAGES.time(stage="encode"):
            files = await asyncio.to_thread(pictures.encode_all, order, drawing, self.served)
        metrics.IMAGES.add(len(files))
        return files

    async def _own_request(self, order: Order, caller: Caller) -> tuple[Client, DrawRequest]:
        """Return whose a request is, and what the Sampler is asked for it.

        Raises:
            ApiError: 400, if it is for more pictures than there can ever be room for.
        """
        client = caller.client
        assert client is not None  # the gate lets nobody else draw
        own, anybodys = client.quotas.concurrent_pictures, self.options.max_pictures
        for most, whose in ((own, "your key has"), (anybodys, "this server takes")):
            if most is not None and order.num_pictures > most:  # never, whenever it is sent again
                message = f"{order.num_pictures} pictures are not allowed: {whose} {most} at once"
                raise invalid(message, param="n", code="invalid_value")
        if caller.is_sent_again:  # what a Sampler still draws for the dead one fills its quota
            with suppress(ApiError):
                await self.samplers.cancel(client.name, caller.request_id)
        return client, self._request_of(client, order, caller.request_id)

    def _request_of(self, client: Client, order: Order, id: str) -> DrawRequest:
        return order.draw_request(
            id=id,
            client=client.name,
            timeout_s=self.options.timeout_s,
            max_pictures_of_client=client.quotas.concurrent_pictures,
        )

    def _data(
        self, order: Order, picture: int, file: bytes, drawing: Drawing, caller: Caller
    ) -> ImageData:
        if not order.as_url:
            return ImageData(b64_json=base64.b64encode(file).decode())
        request = order.picture_request(picture)
        assert caller.client is not None
        target = LinkTarget(
            request=request,
            client=caller.client.name,
            origin=drawing.origin,
            is_degraded=bool(drawing.missing_experts),
        )
        self._files.put(target.name, file)
        token = self._links.sign(target)
        return ImageData(url=f"{caller.base_url}/v1/images/files/{token}.{order.output_format}")


def _link_expired(message: str) -> ApiError:
    return invalid(message, param="token", code="link_expired", status=404)


def _own_deployment() -> DeploymentHandle[Any]:
    own = serve.get_replica_context()
    return serve.get_deployment_handle(own.deployment, own.app_name)
