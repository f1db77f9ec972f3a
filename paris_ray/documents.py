"""What strangers write: documents whose fields are checked, and texts made fit to be shown."""

import reprlib
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from paris_ray.errors import ParisError, ProtocolError, naming

MAX_COUNT = 2**53 - 1  # exact in every reader of JSON


class Document(BaseModel):
    """Fields of fixed names, types and ranges; no value is converted into another.

    Raises:
        ProtocolError: naming a field that is missing, unknown or not allowed, its value, and what
            is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, /, **fields: Any) -> None:
        for name in fields.keys() - type(self).model_fields.keys():  # there may be millions
            raise ProtocolError(f"field {reprlib.repr(name)} is unknown")
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ProtocolError(first_problem(error)) from None

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the document that `to_json` wrote, or that anybody says it did.

        Raises:
            ProtocolError: as the class does.
        """
        if not isinstance(values, dict):
            shown = reprlib.repr(values)
            raise ProtocolError(f"{cls.__name__}={shown} is not allowed: a mapping")
        with naming(cls.__name__, ProtocolError):
            return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return self.model_dump(mode="json")


def first_problem(error: ValidationError) -> str:
    """Return what is wrong with the first field that is: its name, its value, what is allowed."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"field {where!r} is missing"
    if problem["type"] == "unexpected_keyword_argument":  # of a dataclass
        return f"field {reprlib.repr(where)} is unknown"
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, ParisError):  # of a part, or of what fields are together
        return f"{where}: {inner}" if where else str(inner)
    shown = reprlib.repr(problem["input"])
    return f"{where}={shown:.200} is not allowed: {problem['msg']}"


def check_printable(text: str) -> str:
    """Return a text; raises ValueError if it could steer a terminal."""
    if not text.isprintable():
        raise ValueError("it must be printable")
    return text


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Size = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Printable = Annotated[str, AfterValidator(check_printable)]


def printable(text: str, most: int) -> str:
    """Return what another party wrote, harmless in a terminal, and at most so long."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
