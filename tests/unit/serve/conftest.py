"""What requests are checked against, without Ray or HTTP."""

import pytest

from paris_ray.bundle import Bundle
from paris_ray.encoders.inspection import load_text_inspector
from serve.checking import Served


@pytest.fixture(scope="session")
def served(tiny_bundle: Bundle) -> Served:
    """The tiny bundle, as an application offers it."""
    encoder = tiny_bundle.parts["text_encoder"]
    return Served(
        bundle=tiny_bundle,
        inspector=load_text_inspector(encoder, encoder),
        aliases=("gpt-image-1",),
        max_size=512,
    )
