"""What user and contributor say to each other: the fields of every request, checked."""

from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from paris_ray.errors import ProtocolError
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.transcript import drawing_digest

DIGEST = Field(pattern="^[0-9a-f]{64}$")
MAX_PROMPTS = 10
MAX_PROMPT = 1000  # characters
MAX_SEED = 2**63 - 1
MIN_ROWS_A_PICTURE = 16  # a picture is an answer too, and whoever has enough can train on them


class _Fields(BaseModel):
    """Fields that one sends, or has been sent.

    Raises:
        ProtocolError: naming each field that is missing, unknown or not allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = "; ".join(
                ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
                for problem in error.errors()
            )
            raise ProtocolError(f"{type(self).__name__}: {problems}") from None


class OpenRequest(_Fields):
    """Begin a session, or return to one after a lost connection: the nonce names it."""

    adapter_id: str = DIGEST
    nonce_u: str = DIGEST
    mode: str = Field(pattern="^(exact|audit)$")


class CallRequest(_Fields):
    """Ask for the update of some rows, the tensor `x`."""

    session: str = DIGEST
    seq: int
    module: str
    exponent: int


class DrawRequest(_Fields):
    """Ask for pictures of the adapted model; asked again until they are there.

    `audit_rows` rows of each module are opened later.
    """

    session: str = DIGEST
    prompts: list[Annotated[str, Field(max_length=MAX_PROMPT)]] = Field(
        min_length=1, max_length=MAX_PROMPTS
    )
    seed: int = Field(ge=0, le=MAX_SEED)
    audit_rows: int = Field(ge=1)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    routing: str | None = Field(default=None, max_length=40)

    @model_validator(mode="after")
    def _check_pictures(self) -> Self:
        pictures = len(self.prompts)
        if self.seed + pictures - 1 > MAX_SEED:
            raise PydanticCustomError(
                "seed", f"seed={self.seed} is not allowed: seed + {pictures - 1} is above 2^63 - 1"
            )
        if self.audit_rows < MIN_ROWS_A_PICTURE * pictures:
            raise PydanticCustomError(
                "audit_rows",
                f"audit_rows={self.audit_rows} is not allowed for {pictures} prompts: at least "
                f"{MIN_ROWS_A_PICTURE} a picture, {MIN_ROWS_A_PICTURE * pictures} in all",
            )
        return self

    def digest(self, pictures: NDArray[np.uint8]) -> str:
        """Return what binds pictures `(n, S, S, 3)` to all that was asked for."""
        return drawing_digest(self.model_dump(exclude={"session"}), pictures)


class CloseRequest(_Fields):
    """Hand over the signed log; the answer is the contributor's signature."""

    session: str = DIGEST
    statement: dict[str, Any]


class EndRequest(_Fields):
    """Break an open session off; what it has paid for stays paid."""

    session: str = DIGEST


class ProveRequest(_Fields):
    """Fix the verifier's nonce, and ask for the proofs; asked again until they are there."""

    session: str = DIGEST
    nonce_v: str = DIGEST


class ReleaseRequest(_Fields):
    """Say that the escrow holds the price, so that the key can go there."""

    session: str = DIGEST


def tensor_of(message: Message, name: str, dtype: type[np.generic], ndim: int) -> NDArray[Any]:
    """Return a tensor of an answer; raises ProtocolError if it has none of that type."""
    tensor = message.tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.ndim != ndim:
        raise ProtocolError(
            f"the answer {message.kind!r} has no {np.dtype(dtype).name} {name!r} of {ndim} "
            "dimensions"
        )
    return tensor
