"""What takes minutes: `make chaos` runs it, and `make test` a short form."""

import os

import pytest

CHAOS = os.environ.get("CHAOS") == "1"
chaos = pytest.mark.skipif(not CHAOS, reason="minutes: make chaos")
