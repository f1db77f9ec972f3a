"""The house: the floors below the pipeline need no Ray, and the README's commands exist.

That imports point down is `lint-imports`'s to say; it is part of `make test`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CORE = ("config", "corpora", "models", "training.expert", "sampling", "bundle", "export")


def test_the_core_imports_without_ray() -> None:
    imports = "; ".join(f"import paris_ray.{name}" for name in CORE)
    check = "import sys; assert 'ray' not in sys.modules, 'ray was imported'"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        # Their tasks run in processes of their own, which take longer to import torch than to work.
        ("accounts cluster duplicates file_list filtering moving report shards", "torch"),
        # The driver's: what later verbs need is imported when they run.
        ("stages prepare", "diffusers open_clip timm transformers"),
    ],
)
def test_prepare_starts_without_what_takes_seconds_to_import(modules: str, heavy: str) -> None:
    imports = "; ".join(f"import paris_ray.pipeline.{name}" for name in modules.split())
    check = (
        f"import sys; found = set({heavy.split()}) & sys.modules.keys(); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, cwd=REPOSITORY)


TARGETS = ("quickstart", "stop", "test", "bench", "demo-zklora", "fuzz", "soak", "study")


@pytest.mark.parametrize("target", TARGETS)
def test_the_readmes_commands_exist(target: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"\n{target}:" in makefile
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    assert any(f"make {target}" in document.read_text() for document in documents)
