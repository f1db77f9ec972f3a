"""From the body of a request to what the Sampler draws: one pure function, without Ray or HTTP."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from paris_ray.encoders.inspection import TextInspector, TextReport, is_blank
from paris_ray.errors import ParisError
from paris_ray.model_folder.description import BundleDescription
from paris_ray.pictures import PictureFormat, Sampling
from paris_ray.sampling_options import (
    SamplingOptions,
    check_allowed_experts,
    num_evaluations,
    sampling_options,
)
from serve.drawing import DrawRequest
from serve.errors import invalid
from serve.schemas import (
    MAX_BATCH_PICTURES,
    BatchesRequest,
    DrawingFields,
    ImagesRequest,
    RequestWarning,
)
from serve.signing import PictureSigner

QualityName = Literal["auto", "low", "medium", "high"]
# What requests say, and DALL-E's names: `standard` was its default.
QUALITIES: Mapping[str, QualityName] = {
    "auto": "auto",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "standard": "auto",
    "hd": "high",
}
PRESET_FIELDS = ("num_inference_steps", "solver", "time_grid")
SQUARE = re.compile(r"([1-9][0-9]{0,4})x\1")
LONGEST_QUOTE = 40  # characters of a prompt that a warning repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What one application offers.

    Attributes:
        bundle: What it tells of itself.
        inspector: Of its text encoder.
        aliases: Other names of the model.
        max_size: The largest width and height to resize to; None: pictures are not resized.
        signer: Signs their files; None: they are not signed.
    """

    bundle: BundleDescription
    inspector: TextInspector
    aliases: Sequence[str]
    max_size: int | None
    signer: PictureSigner | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A checked request: what to draw, and how to answer.

    Attributes:
        prompts: The texts; `n` pictures of each.
        reports: What the text encoder makes of each.
        n: How many pictures of each.
        seed: Seed of the first picture.
        sampling: How they are sampled, for people.
        options: The same, for the Sampler.
        quality: The preset, or `auto`.
        size: Width and height of the files.
        output_format: Kind of file.
        output_compression: Quality of a JPEG or WebP, or None.
        as_url: Whether the answer holds links rather than files.
        stream: Whether the answer is a stream of events.
        partial_images: How many unfinished states of each picture it has.
        allow_degraded: Whether pictures may be finished without an expert that is lost.
        unused: Warnings about fields that change nothing.
    """

    prompts: tuple[str, ...]
    reports: tuple[TextReport, ...]
    n: int
    seed: int
    sampling: Sampling
    options: SamplingOptions
    quality: QualityName
    size: int
    output_format: PictureFormat
    output_compression: int | None
    as_url: bool
    stream: bool
    partial_images: int
    allow_degraded: bool
    unused: tuple[RequestWarning, ...]

    @property
    def num_pictures(self) -> int:
        """How many pictures, of all prompts together."""
        return len(self.prompts) * self.n

    @property
    def picture_steps(self) -> int:
        """What it costs: evaluations of the velocity, of all pictures together."""
        evaluations = num_evaluations(self.options.solver, self.options.num_inference_steps)
        return self.num_pictures * evaluations

    def draw_request(
        self, *, id: str, client: str, timeout_s: float, max_pictures_of_client: int | None = None
    ) -> DrawRequest:
        """Return what the Sampler is asked."""
        return DrawRequest(
            id=id,
            client=client,
            prompts=[prompt for prompt in self.prompts for _ in range(self.n)],
            seeds=list(range(self.seed, self.seed + self.n * len(self.prompts))),
            options=self.options,
            timeout_s=timeout_s,
            partial_images=self.partial_images,
            allow_degraded=self.allow_degraded,
            max_pictures_of_client=max_pictures_of_client,
        )

    def picture_request(self, picture: int) -> ImagesRequest:
        """Return the request for one of the pictures alone, which must be that very picture."""
        return ImagesRequest(
            prompt=self.prompts[picture // self.n],
            seed=self.seed + picture,
            size=f"{self.size}x{self.size}",
            output_format=self.output_format,
            output_compression=self.output_compression,
            allow_degraded=False,
            **asdict(self.sampling),
        )

    def warnings(self, prompt: int) -> list[RequestWarning]:
        """Return what the request does not get of what it asks for, by the number of a prompt."""
        return [*_text_warnings(self.reports[prompt]), *self.unused]


def check(request: ImagesRequest | BatchesRequest, served: Served, *, random_seed: int) -> Order:
    """Return what a request asks for, with every default filled in.

    Args:
        request: The body, whose single fields are valid.
        served: What there is.
        random_seed: The seed of a request without one.

    Raises:
        ApiError: 400 or 404, naming the field, its value and what is allowed.
        ParisError: if the routing is not allowed.
    """
    _check_model(request.model, served)
    n = 1 if request.n is None else request.n
    sampling, quality = _sampling(request, served)
    stream, partial_images = _streaming(request)
    prompts = _prompts(request, n)
    return Order(
        prompts=prompts,
        reports=tuple(map(served.inspector.inspect, prompts)),
        n=n,
        seed=random_seed if request.seed is None else request.seed,
        sampling=sampling,
        options=sampling_options(served.bundle, **asdict(sampling)),
        quality=quality,
        size=_size(request.size, served),
        output_format=request.output_format or "png",
        output_compression=_compression(request),
        as_url=request.response_format == "url",
        stream=stream,
        partial_images=partial_images,
        allow_degraded=request.allow_degraded is not False,
        unused=tuple(_unused(request, quality)),
    )


def _check_model(name: str | None, served: Served) -> None:
    names = (served.bundle.facts.model_name, *served.aliases)
    if name is not None and name not in names:
        allowed = " or ".join(map(repr, names))
        message = f"model={name!r} does not exist: this server has {allowed}"
        raise invalid(message, param="model", code="model_not_found", status=404)


def _prompts(request: ImagesRequest | BatchesRequest, n: int) -> tuple[str, ...]:
    single = isinstance(request, ImagesRequest)
    field = "prompt" if single else "prompts"
    prompts = (request.prompt,) if isinstance(request, ImagesRequest) else tuple(request.prompts)
    if len(prompts) * n > MAX_BATCH_PICTURES:
        message = f"n={n} is not allowed for {len(prompts)} prompts: {MAX_BATCH_PICTURES} pictures"
        raise invalid(f"{message} at most", param="n", code="invalid_value")
    for i, prompt in enumerate(prompts):
        where = field if single else f"{field}[{i}]"
        if "\0" in prompt:
            message = f"{where} holds the character NUL, which no text has"
            raise invalid(message, param=field, code="invalid_value")
        if is_blank(prompt):
            message = f"{where} is blank: say what to draw"
            raise invalid(message, param=field, code="invalid_value")
    return prompts


def _sampling(request: DrawingFields, served: Served) -> tuple[Sampling, QualityName]:
    """Return how to sample, and the preset that says so."""
    try:
        served.bundle.check_lora(request.lora)
    except ParisError as error:
        raise invalid(str(error), param="lora", code="invalid_value") from None
    try:
        check_allowed_experts(request.allowed_experts, served.bundle.num_experts)
    except ParisError as error:
        raise invalid(str(error), param="allowed_experts", code="invalid_value") from None
    defaults, quality = served.bundle.facts.sampling, QUALITIES[request.quality or "auto"]
    preset = defaults.presets.get(quality)
    own = {name: getattr(request, name) for name in PRESET_FIELDS}
    own = {name: value for name, value in own.items() if value is not None}
    if preset is not None and own:
        message = f"quality={request.quality!r} is not allowed beside {', '.join(own)}"
        raise invalid(f"{message}: send one or the other", param="quality", code="invalid_value")
    source = defaults if preset is None else preset
    scale = request.guidance_scale
    sampling = Sampling(
        **{name: own.get(name, getattr(source, name)) for name in PRESET_FIELDS},
        guidance_scale=defaults.guidance_scale if scale is None else float(scale),
        routing=defaults.routing if request.routing is None else request.routing,
        lora=request.lora,
        allowed_experts=request.allowed_experts,
    )
    return sampling, "auto" if preset is None else quality


def _size(size: str | None, served: Served) -> int:
    native = served.bundle.facts.picture_size
    if size in (None, "auto", f"{native}x{native}"):
        return native
    allowed = f"'auto' or '{native}x{native}'"
    if served.max_size is not None:
        allowed += f", or another square up to '{served.max_size}x{served.max_size}', resized"
        square = SQUARE.fullmatch(size or "")
        if square and int(square[1]) <= served.max_size:
            return int(square[1])
    message = f"size={size!r} is not allowed: {allowed}"
    raise invalid(message, param="size", code="invalid_value")


def _compression(request: DrawingFields) -> int | None:
    value = request.output_compression
    if request.output_format in (None, "png"):
        if value not in (None, 100):
            message = f"output_compression={value} is not allowed: 100 for png, which loses nothing"
            raise invalid(message, param="output_compression", code="invalid_value")
        return None
    return 100 if value is None else value


def _streaming(request: ImagesRequest | BatchesRequest) -> tuple[bool, int]:
    if isinstance(request, BatchesRequest):
        return False, 0
    stream, count = bool(request.stream), request.partial_images or 0
    if count and not stream:
        message = f"partial_images={count} is not allowed: 0, or stream=true beside it"
        raise invalid(message, param="partial_images", code="invalid_value")
    return stream, count


def _unused(request: DrawingFields, quality: QualityName) -> Iterator[RequestWarning]:
    if QUALITIES[request.quality or "auto"] != quality:
        message = f"the model has no preset for quality={request.quality!r}: it draws by default"
        yield RequestWarning(code="quality_unused", message=message)
    if request.style is not None:
        message = "style changes nothing here: describe it in the prompt"
        yield RequestWarning(code="style_unused", message=message)


def _text_warnings(report: TextReport) -> list[RequestWarning]:
    found = []
    if report.num_tokens > report.max_tokens:
        message = (
            f"text cut at token {report.max_tokens} of {report.num_tokens}: "
            f"{_quote(report.unread)} is not read"
        )
        found.append(RequestWarning(code="text_cut", message=message))
    if report.unknown:
        parts = ", ".join(map(_quote, report.unknown[:5]))
        message = f"the text encoder does not know {parts}: all unknown text means the same to it"
        found.append(RequestWarning(code="unknown_text", message=message))
    if report.is_empty:
        message = "the text encoder finds no text in the prompt: it draws as without one"
        found.append(RequestWarning(code="empty_text", message=message))
    return found


def _quote(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}...")
