"""One purchase, as its escrow tells of it."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from paris_ray.errors import ProtocolError
from paris_ray.receipts import DIGEST, State
from paris_ray.zklora.manifest import MAX_COUNT

MAX_REASON = 1000  # characters


@dataclass(frozen=True, slots=True)
class Trade:
    """One purchase, as it stands.

    Attributes:
        session: Its id: that of the session in which the adapter was tried.
        adapter_id: What is bought.
        buyer: Public key.
        seller: Public key: the manifest's contributor.
        price: Credits.
        state: Where it stands.
        since: When it came there, seconds since 1970.
        states: All states that it has passed, the present one last.
        transcript_root: What both parties have signed, once they have.
        proofs_digest: SHA-256 of the proofs, once they were handed over.
        reason: Why it was disputed, refunded or settled without the buyer's word.
    """

    session: str
    adapter_id: str
    buyer: str
    seller: str
    price: int
    state: State
    since: float
    states: tuple[State, ...]
    transcript_root: str | None
    proofs_digest: str | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "state": str(self.state), "states": [*map(str, self.states)]}

    @classmethod
    def from_json(cls, document: Any) -> "Trade":
        """Return the trade that `to_json` wrote, or that anybody says it did.

        Raises:
            ProtocolError: naming a field that is missing, unknown or not allowed.
        """
        if not isinstance(document, Mapping) or document.keys() != _ALLOWED.keys():
            raise ProtocolError(f"not a trade: the fields of one are {', '.join(_ALLOWED)}")
        for name, is_allowed in _ALLOWED.items():
            if not is_allowed(value := document[name]):
                raise ProtocolError(f"not a trade: {name}={reprlib.repr(value)} is not allowed")
        states = tuple(map(State, document["states"]))
        if states[-1] != document["state"]:
            raise ProtocolError(f"not a trade: state={document['state']} is not the last of states")
        return cls(**{**document, "state": states[-1], "states": states})


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _is_digest_or_null(value: object) -> bool:
    return value is None or _is_digest(value)


def _is_price(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf


def _is_state(value: object) -> bool:
    return isinstance(value, str) and value in tuple(State)


def _is_states(value: object) -> bool:
    if not isinstance(value, list):
        return False
    return 0 < len(value) <= len(State) and all(map(_is_state, value))


def _is_reason_or_null(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, str) and len(value) <= 2 * MAX_REASON and value.isprintable()


_ALLOWED: Mapping[str, Callable[[object], bool]] = {
    "session": _is_digest,
    "adapter_id": _is_digest,
    "buyer": _is_digest,  # a key has as many digits
    "seller": _is_digest,
    "price": _is_price,
    "state": _is_state,
    "since": _is_time,
    "states": _is_states,
    "transcript_root": _is_digest_or_null,
    "proofs_digest": _is_digest_or_null,
    "reason": _is_reason_or_null,
}
