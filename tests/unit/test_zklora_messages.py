"""Arrays from the other side are what is expected of them, before anything is built."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from paris_ray.errors import ProtocolError, SignatureError, VerificationError
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.evidence import check_names
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import REQUESTS, tensors_of, values_of

FORMS: dict[str, Any] = {"x": (np.int16, (None, 3)), "y": (np.int64, (2, 5))}


def message(**tensors: np.ndarray) -> Message:
    return Message("call", {}, tensors)


def whole(**changes: Any) -> Message:
    tensors = {"x": np.zeros((4, 3), np.int16), "y": np.zeros((2, 5), np.int64)} | changes
    return message(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_tensors_that_are_expected_are_returned() -> None:
    found = tensors_of(whole(), FORMS)
    assert found.keys() == {"x", "y"} and found["x"].shape == (4, 3)
    assert tensors_of(message(), {}) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": None}, r"tensor 'x' is missing, not int16 of shape \(any, 3\)"),
        ({"x": np.zeros((4, 3), np.int64)}, r"tensor 'x' is int64 of shape \(4, 3\)"),
        ({"x": np.zeros((4, 2), np.int16)}, r"tensor 'x' is int16 of shape \(4, 2\)"),
        ({"x": np.zeros(3, np.int16)}, r"tensor 'x' is int16 of shape \(3,\)"),
        ({"x": np.zeros((4, 3, 1), np.int16)}, "tensor 'x' is int16"),
        ({"x": np.array(1, np.int16)}, r"tensor 'x' is int16 of shape \(\)"),
        ({"y": np.zeros((3, 5), np.int64)}, r"tensor 'y' .* not int64 of shape \(2, 5\)"),
        ({"z": np.zeros(0, np.uint8)}, "tensor 'z' is not expected"),
    ],
)
def test_other_tensors_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProtocolError, match=f"^call: {said}"):
        tensors_of(whole(**changes), FORMS)


X = np.zeros((2, 3), np.int16)
CALL = {"session": "0" * 64, "seq": 0, "modules": ["a"], "exponent": 0, "owed": None}
SIGNED = {"kind": "close", "document": {}, "public_key": "0" * 64, "signature": "1" * 128}


def ask(kind: str, fields: dict[str, Any], **tensors: np.ndarray) -> list[Any]:
    return values_of(Message(kind, fields, tensors), REQUESTS[kind])


def test_values_come_in_the_order_of_the_table() -> None:
    turned = dict(reversed(CALL.items()))
    *fields, x = ask("call", turned, x=X)
    assert fields == list(CALL.values()) and x is X
    assert ask("call", CALL | {"owed": SIGNED}, x=X)[4] == SIGNED  # whoever takes it checks it
    session, statement = ask("close", {"session": "s", "statement": SIGNED})
    assert (session, statement.to_json()) == ("s", SIGNED)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("open", {}, "open has the fields adapter_id, nonce_u"),
        ("open", {"adapter_id": "a"}, "open has the fields adapter_id, nonce_u"),
        ("end", {"session": "s", "admin": True}, "end has the fields session"),
        ("open", {"adapter_id": "a", "nonce_u": ["n"]}, "nonce_u of open must be of type str"),
        ("call", CALL | {"session": 7}, "session of call must be of type str"),
        ("call", CALL | {"seq": "0"}, "seq of call must be of type int"),
        ("call", CALL | {"seq": 0.5}, "seq of call must be of type int"),
        ("call", CALL | {"seq": True}, "seq of call must be of type int"),
        ("call", CALL | {"exponent": None}, "exponent of call must be of type int"),
        ("call", CALL | {"seq": 2**63}, "seq of call must be text in UTF-8 or a number of 64 bits"),
        ("call", CALL | {"exponent": -(2**63) - 1}, "exponent of call must be text in UTF-8"),
        ("end", {"session": "\ud800"}, "session of end must be text in UTF-8"),
        ("call", CALL | {"modules": "a"}, "modules of call must be of type list"),
        ("call", {k: v for k, v in CALL.items() if k != "modules"}, "call has the fields exponent"),
        ("close", {"session": "s", "statement": []}, "a signed document has the fields"),
        ("close", {"session": "s", "statement": None}, "a signed document has the fields"),
        ("close", {"session": "s", "statement": SIGNED | {"document": 1}}, "document of a signed"),
    ],
)
def test_other_values_are_refused(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises((ProtocolError, SignatureError), match=f"^{said}"):
        ask(kind, fields, **({"x": X} if kind == "call" else {}))


def test_a_request_without_tensors_brings_none() -> None:
    assert ask("end", {"session": "s"}) == ["s"]
    with pytest.raises(ProtocolError, match="end: tensor 'x' is not expected"):
        ask("end", {"session": "s"}, x=X)
    with pytest.raises(ProtocolError, match="call: tensor 'x' is missing"):
        ask("call", CALL)
    with pytest.raises(ProtocolError, match="call: tensor 'x' is int64"):
        ask("call", CALL, x=X.astype(np.int64))


def test_what_a_stranger_calls_things_does_not_steer_a_terminal() -> None:
    """Errors are printed as they are, and the kind and the names in an answer are the other's."""
    steering = "\x1b[2J" + "x" * 2000
    for fields, tensors in (({"more": 1}, {}), ({}, {"x": X})):
        with pytest.raises(ProtocolError) as refused:
            values_of(Message(steering, fields, tensors), {})
        assert str(refused.value).isprintable() and len(str(refused.value)) < 200
    manifest = cast(AdapterManifest, SimpleNamespace(terms={"a": None}))
    with pytest.raises(
        VerificationError, match=r"of the 1 modules of the manifest: \?\[2Jx"
    ) as told:
        check_names("rows_left", {"a": 1, steering: 1}, manifest)
    assert str(told.value).isprintable() and len(str(told.value)) < 1200
