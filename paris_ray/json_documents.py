"""JSON that may come from a stranger."""

import json
from collections.abc import Iterable
from typing import Any

MAX_NESTING = 64  # ours has less than 10 levels


def load_json(payload: bytes | str) -> Any:
    """Return parsed JSON that may come from a stranger.

    Raises:
        ValueError: if it is none, or nested so deeply that whoever copies, compares or shows it
            would exhaust the interpreter's stack.
    """
    try:
        document = json.loads(payload)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_NESTING} times") from None
    level = [document]
    for _ in range(MAX_NESTING):
        level = [inner for each in level for inner in _inner_values(each)]
        if not level:
            return document
    raise ValueError(f"it is nested more than {MAX_NESTING} times")


def _inner_values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
