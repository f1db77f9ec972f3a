"""What goes over the wire: the OpenAI Images shapes, and our additions to them.

Requests are strict: an unknown field or a wrong type is refused, never ignored or converted.
Whatever OpenAI does not define stands under `paris` in a response.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_PICTURES = 10
Name = Annotated[str, Field(max_length=200)]  # refusals repeat it, and must stay short
MAX_SEED = 2**63 - 1 - MAX_PICTURES  # picture i uses seed + i, which must stay a 63-bit number


class ImagesRequest(BaseModel):
    """Body of `POST /v1/images/generations`.

    Attributes:
        prompt: What to draw.
        model: The served model's name; None means that one.
        n: How many pictures; picture i uses `seed + i`.
        size: `auto` or the model's only size, for example `256x256`.
        seed: Seed of the first picture; None draws one, which the response tells.
        num_inference_steps: Euler steps; None takes the model's default, like the next two.
        guidance_scale: Classifier-free guidance; 1 switches it off.
        routing: `top-1`, `top-2`, ..., `full` (or `full-ensemble`), `threshold:x`
            or `top-p:x`.
        lora: Name of an adapter that one expert draws with; None: all draw as they are.
        response_format: Only `b64_json`; nothing is stored, so there is no `url` to give.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=1000)
    model: Name | None = None
    n: int = Field(default=1, ge=1, le=MAX_PICTURES)
    size: Name = "auto"
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    num_inference_steps: int | None = Field(default=None, ge=1, le=100)
    guidance_scale: float | None = Field(default=None, ge=0, le=20)
    routing: Name | None = None
    lora: Name | None = None
    response_format: Literal["b64_json"] = "b64_json"


class ImageData(BaseModel):
    """One picture.

    Attributes:
        b64_json: The PNG file in base64.
    """

    b64_json: str


class Provenance(BaseModel):
    """How the pictures came about; sending these values again gives the same pictures.

    Attributes:
        seed: Seed of the first picture.
        num_inference_steps: Euler steps.
        guidance_scale: Classifier-free guidance.
        routing: How experts were chosen.
        lora: Name of the adapter, or None.
        experts: For each picture, the mean weight of every expert over the steps; sums to 1.
        attribution: Licence line to show beside the pictures, or None.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    routing: str
    lora: str | None
    experts: list[list[float]]
    attribution: str | None


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`.

    Attributes:
        created: Unix time, in seconds.
        data: The pictures.
        output_format: Always `png`.
        size: Width and height, for example `32x32`.
        paris: How the pictures came about.
    """

    created: int
    data: list[ImageData]
    output_format: Literal["png"] = "png"
    size: str
    paris: Provenance


class SamplingDefaults(BaseModel):
    """What a request gets that does not say otherwise; fields as in `ImagesRequest`."""

    num_inference_steps: int
    guidance_scale: float
    routing: str


class ModelFacts(BaseModel):
    """What a client may want to know of a model.

    Attributes:
        num_experts: How many experts it has.
        picture_size: Height and width of its pictures, in pixels.
        defaults: Its sampling defaults.
        example_prompts: A few captions of its corpus.
        loras: Number of the expert of each adapter that a request may name.
        attribution: Licence line to show beside the pictures, or None.
    """

    num_experts: int
    picture_size: int
    defaults: SamplingDefaults
    example_prompts: list[str]
    loras: dict[str, int]
    attribution: str | None


class Model(BaseModel):
    """One entry of `GET /v1/models`.

    Attributes:
        id: The model's name.
        object: Always `model`.
        created: When this server began to serve it, Unix time in seconds.
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
        data: The one model that is served.
    """

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        message: For a person: the field, its value and what is allowed.
        type: `invalid_request_error`, `authentication_error`, `permission_error`,
            `unavailable_error` or `server_error`.
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
