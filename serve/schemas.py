"""What goes over the wire: the OpenAI Images shapes, and our additions to them.

Requests are strict: an unknown field or a wrong type is refused, never ignored or converted.
Whatever OpenAI does not define stands under `paris` in a response.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from paris_ray.config import MAX_EXPERTS, SolverName, TimeGrid
from paris_ray.model_folder.history import Entry
from paris_ray.pictures import PictureFormat

MAX_PICTURES = 10
MAX_BATCH_PICTURES = 64
MAX_STEPS = 100
Name = Annotated[str, Field(max_length=200)]  # refusals repeat it, and must stay short
Prompt = Annotated[str, Field(min_length=1, max_length=1000)]
# Picture i uses seed + i, which must stay a 63-bit number.
MAX_SEED = 2**63 - 1 - MAX_BATCH_PICTURES
# Left out rather than null: tools ask which of two keys there is.
OnlyIfAny = Annotated[str | None, Field(exclude_if=lambda value: value is None)]
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]


class DrawingFields(BaseModel):
    """What requests for pictures have in common; None means the default.

    Attributes:
        model: The served model's name or an alias; None means that one.
        n: How many pictures of a prompt, 1 by default; picture i uses `seed + i`.
        size: `auto` (the model's own), that or another square such as `1024x1024`, resized.
        quality: One of the model's presets of steps and solver; `hd` is `high`. `auto`, `standard`
            and those that the model has not draw by default.
        response_format: `b64_json`, or `url`: a link to this server that expires.
        output_format: Kind of file, `png` by default.
        output_compression: Quality of a JPEG or WebP, 100 by default.
        background: Pictures are opaque, which both values allow.
        moderation: There is none, which both values allow.
        style: Changes nothing, and a warning says so.
        user: The caller's own user; changes nothing.
        safety_identifier: The same under its newer name.
        seed: Seed of the first picture; None draws one, which the response tells.
        num_inference_steps: Steps of the solver; None takes the model's default, as below.
        solver: How steps are made.
        time_grid: Where they are.
        guidance_scale: Classifier-free guidance; 1 switches it off.
        routing: `top-1`, `top-2`, ..., `full` (or `full-ensemble`), `threshold:x`,
            `top-p:x` or `agree:x`.
        lora: Name of an adapter that one expert draws with; None: all draw as they are.
        allowed_experts: Numbers of the experts that may draw, as if there were no others; None:
            all.
        allow_degraded: Whether pictures may be finished without an expert that is lost, which the
            response then says; true by default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Name | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_PICTURES)
    size: Name | None = None
    quality: Quality | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: PictureFormat | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    solver: SolverName | None = None
    time_grid: TimeGrid | None = None
    guidance_scale: float | None = Field(default=None, ge=0, le=20)
    routing: Annotated[Name, Field(min_length=1)] | None = None
    lora: Name | None = None
    allowed_experts: list[int] | None = Field(default=None, min_length=1, max_length=MAX_EXPERTS)
    allow_degraded: bool | None = None


class ImagesRequest(DrawingFields):
    """Body of `POST /v1/images/generations`.

    Attributes:
        prompt: What to draw.
        stream: Whether to answer with server-sent events, of which the last hold the pictures.
        partial_images: How many unfinished states of each picture are sent before; with `stream`.
    """

    prompt: Prompt
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)


class BatchesRequest(DrawingFields):
    """Body of `POST /v1/images/batches`.

    Attributes:
        prompts: What to draw; picture i of all uses `seed + i`.
    """

    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_BATCH_PICTURES)


class ImageData(BaseModel):
    """One picture.

    Attributes:
        b64_json: The file in base64; left out where there is a link.
        url: Where the file is for an hour; left out where the file is here.
    """

    b64_json: OnlyIfAny = None
    url: OnlyIfAny = None


class Usage(BaseModel):
    """How much was read and drawn.

    Attributes:
        input_tokens: Tokens of the prompt that the text encoder reads, for every picture.
        input_tokens_details: The same by kind.
        output_tokens: Positions of the latents of all pictures.
        total_tokens: Both.
    """

    input_tokens: int
    input_tokens_details: dict[Literal["text_tokens", "image_tokens"], int]
    output_tokens: int
    total_tokens: int


class RequestWarning(BaseModel):
    """What a request does not get of what it asks for.

    Attributes:
        code: For a program: `text_cut`, `unknown_text`, `empty_text`, `quality_unused` or
            `style_unused`.
        message: For a person.
    """

    code: Literal["text_cut", "unknown_text", "empty_text", "quality_unused", "style_unused"]
    message: str


class Provenance(BaseModel):
    """How the pictures came about; sending these values again gives the same pictures.

    Attributes:
        id: Of the request: what `DELETE /v1/images/generations/{id}` cancels.
        model: The model's own name.
        bundle: Digest of its bundle, or None if it has none.
        seed: Seed of the first picture.
        num_inference_steps: Steps of the solver.
        solver: How steps were made.
        time_grid: Where they were.
        guidance_scale: Classifier-free guidance.
        routing: How experts were chosen.
        lora: Name of the adapter, or None.
        allowed_experts: Numbers of the experts that might draw, or None: all.
        native_size: Width and height that the pictures were drawn at.
        resize_filter: Filter between that size and theirs, or None.
        experts: For each picture, the mean weight of every expert over the steps; sums to 1.
        expert_weights: For each picture and evaluation of the velocity, the weight of every expert.
        missing_experts: Experts that were lost and drawn without.
        last_resort: Whether the seed that all experts started from drew in their place, with their
            weight.
        degraded: Whether there are any.
        warnings: What the request does not get of what it asks for.
        attribution: Licence line to show beside the pictures, or None.
    """

    id: str
    model: str
    bundle: str | None
    seed: int
    num_inference_steps: int
    solver: SolverName
    time_grid: TimeGrid
    guidance_scale: float
    routing: str
    lora: str | None
    allowed_experts: list[int] | None
    native_size: str
    resize_filter: str | None
    experts: list[list[float]]
    expert_weights: list[list[list[float]]]
    missing_experts: list[int]
    last_resort: bool
    degraded: bool
    warnings: list[RequestWarning]
    attribution: str | None


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`.

    Attributes:
        created: Unix time, in seconds.
        data: The pictures.
        background: Always `opaque`.
        output_format: Kind of file.
        quality: The preset that drew them, or `auto`.
        size: Width and height, for example `64x64`.
        usage: How much was read and drawn.
        paris: How the pictures came about.
    """

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    quality: Literal["auto", "low", "medium", "high"]
    size: str
    usage: Usage
    paris: Provenance


class BatchesResponse(BaseModel):
    """Answer of `POST /v1/images/batches`.

    Attributes:
        object: Always `list`.
        data: For each prompt what `POST /v1/images/generations` would have answered.
    """

    object: Literal["list"] = "list"
    data: list[ImagesResponse]


class EventPlace(BaseModel):
    """Which picture an event is about, and how far it is.

    Attributes:
        picture: Number of the picture, from 0.
        step: How many evaluations of the velocity are done.
    """

    picture: int
    step: int


class PartialImageEvent(BaseModel):
    """An unfinished picture; fields as in `ImagesResponse`.

    Attributes:
        type: Also the name of the event.
        b64_json: The file in base64.
        partial_image_index: Which of the picture's partial images, from 0.
        paris: Which picture, and how far.
    """

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    created_at: int
    size: str
    quality: str
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    partial_image_index: int
    paris: EventPlace


class CompletedEvent(BaseModel):
    """A finished picture; fields as in `ImagesResponse`, of this picture alone.

    Attributes:
        type: Also the name of the event.
        b64_json: The file in base64, or None if the request asks for links.
        url: Where the file is, or None.
    """

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: OnlyIfAny = None
    url: OnlyIfAny = None
    created_at: int
    size: str
    quality: str
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    usage: Usage
    paris: Provenance


class Cancelled(BaseModel):
    """Answer of `DELETE /v1/images/generations/{id}`.

    Attributes:
        id: Of the request.
        cancelled: Always true; a request that is not being drawn is answered 404.
        step: How many evaluations of the velocity were done.
    """

    id: str
    cancelled: Literal[True] = True
    step: int


class SamplingDefaults(BaseModel):
    """What a request gets that does not say otherwise; fields as in `ImagesRequest`."""

    num_inference_steps: int
    solver: SolverName
    time_grid: TimeGrid
    guidance_scale: float
    routing: str


class ModelFacts(BaseModel):
    """What a client may want to know of a model.

    Attributes:
        num_experts: How many experts it has.
        picture_size: Height and width of its pictures, in pixels.
        defaults: Its sampling defaults.
        qualities: The values of `quality` that it has presets for.
        example_prompts: A few captions of its corpus.
        loras: Number of the expert of each adapter that a request may name.
        attribution: Licence line to show beside the pictures, or None.
        history: What became of its experts, oldest first.
    """

    num_experts: int
    picture_size: int
    defaults: SamplingDefaults
    qualities: list[str]
    example_prompts: list[str]
    loras: dict[str, int]
    attribution: str | None
    history: list[Entry]


class Model(BaseModel):
    """One entry of `GET /v1/models`.

    Attributes:
        id: The model's name, or an alias.
        object: Always `model`.
        created: When its bundle was written, Unix time in seconds.
        owned_by: Always `paris_ray`.
        paris: What a client may want to know of it.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["paris_ray"] = "paris_ray"
    paris: ModelFacts


class ModelList(BaseModel):
    """Answer of `GET /v1/models`.

    Attributes:
        object: Always `list`.
        data: The one model that is served, under its name and its aliases.
    """

    object: Literal["list"] = "list"
    data: list[Model]


class ExpertFacts(BaseModel):
    """What one expert was trained on, as far as the model tells.

    Attributes:
        expert: Its number.
        rows: Pictures of its cluster; None where the model does not tell of its clusters.
        words: What is said of them more often than of all others, the most telling first.
        pictures: Some of them: PNG files of 32x32 pixels, in base64.
        loras: Names of the adapters that it can draw with.
    """

    expert: int
    rows: int | None
    words: list[str]
    pictures: list[str]
    loras: list[str]


class ExpertList(BaseModel):
    """Answer of `GET /v1/experts`.

    Attributes:
        object: Always `list`.
        data: The experts, in order.
    """

    object: Literal["list"] = "list"
    data: list[ExpertFacts]


class Readiness(BaseModel):
    """Answer of `GET /readyz`, from one Sampler.

    Attributes:
        status: Always `ready`; a model that is not loaded is answered with 503.
        num_experts: How many experts the model has.
        failing_experts: Those that did not answer when they were last asked.
        active_pictures: Pictures that are being drawn.
        waiting_pictures: Pictures that wait to be drawn.
    """

    status: Literal["ready"] = "ready"
    num_experts: int
    failing_experts: list[int]
    active_pictures: int
    waiting_pictures: int


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        message: For a person: the field, its value and what is allowed.
        type: `invalid_request_error`, `authentication_error`, `permission_error`,
            `rate_limit_error`, `timeout_error`, `cancelled_error`, `unavailable_error` or
            `server_error`.
        param: The field at fault, or None.
        code: The reason, for a program, or None.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success.

    Attributes:
        error: What went wrong.
    """

    error: ErrorDetail
