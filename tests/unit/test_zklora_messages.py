"""Arrays from the other side are what is expected of them, before anything is built."""

from typing import Any

import numpy as np
import pytest

from paris_ray.errors import ProtocolError
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import EndRequest, tensors_of

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


def test_a_request_without_tensors_brings_none() -> None:
    fields = {"session": "0" * 64}
    assert EndRequest.read(Message("end", fields)).session == "0" * 64
    with pytest.raises(ProtocolError, match="end: tensor 'x' is not expected"):
        EndRequest.read(Message("end", fields, {"x": np.zeros(1, np.uint8)}))
    with pytest.raises(ProtocolError, match="EndRequest: session"):
        EndRequest.read(Message("end", {}))
