"""Schemathesis against the served OpenAPI document: no server error, nothing undocumented.

`make fuzz` tries 2,000 cases (HTTP_FUZZ_CASES); `make test` some of them.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.serve

CASES = int(os.environ.get("HTTP_FUZZ_CASES", "100"))
OPERATIONS = 5  # that have endless cases; the others have few
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def test_whatever_is_sent_is_answered_as_documented(
    start_app: Callable[..., str], tmp_path: Path
) -> None:
    # Long drawings are refused or given up: it is the answers that are tried.
    limits = {"max_active_pictures": 8, "max_waiting_pictures": 8}
    url = start_app("fuzz", colocated=True, timeout_s=5, limits=limits)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--url", url, "--checks", ",".join(CHECKS), "--max-examples", str(CASES // OPERATIONS)),
        *("--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "60"),
        *("--no-color", "--continue-on-failure"),
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(run.stdout[-20_000:])
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    (generated,) = re.findall(r"(\d+) generated", run.stdout.replace(",", ""))
    assert int(generated) >= CASES
