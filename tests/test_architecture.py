"""The house: the floors below the pipeline need no Ray, and the README's commands exist.

That imports point down is `lint-imports`'s to say; it is part of `make test`.
"""

import ast
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
    import_without([f"paris_ray.pipeline.{name}" for name in modules.split()], heavy.split())


def import_without(modules: list[str], heavy: list[str]) -> None:
    """Import modules in a process of their own; fail if something heavy comes with them."""
    imports = "; ".join(f"import {name}" for name in modules)
    check = f"import sys; found = set({heavy}) & sys.modules.keys(); assert not found, found"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, cwd=REPOSITORY)


# All of serve/ that an Ingress needs, Ray's proxy among them; the others compute, or deploy it all.
COMPUTING = {"app", "coalescing", "expert", "measuring", "opening", "sampler"}
OF_THE_INGRESS = {file.stem for file in (REPOSITORY / "serve").glob("*.py")} - COMPUTING


def test_an_ingress_starts_without_what_it_never_computes_with() -> None:
    modules = [f"serve.{name}" for name in sorted(OF_THE_INGRESS - {"__init__"})]
    assert {"serve.ingress", "serve.routes", "serve.source"} <= set(modules)
    import_without(modules, ["torch", "safetensors.torch", "transformers", "tokenizers", "einops"])


def test_python_without_assertions_checks_as_much() -> None:
    """`python -O` leaves assertions out: here they tell the type checker a type, and no more."""
    asserted = {
        f"{file.relative_to(REPOSITORY)}:{node.lineno}": node.test
        for folder in ("paris_ray", "jobs", "serve")
        for file in (REPOSITORY / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    }
    assert asserted, "the search finds what is there"
    assert not [place for place, test in asserted.items() if not narrows(test)]


def narrows(test: ast.expr) -> bool:
    """Return whether an assertion says `x is not None`, `isinstance(x, T)` or not."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return narrows(operand)
        case ast.Compare(ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.Call(func=ast.Name(id="isinstance")):
            return True
    return False


@pytest.mark.parametrize(
    ("asserted", "allowed"),
    [
        ("x is not None", True),
        ("isinstance(x, int)", True),
        ("not isinstance(x, int)", True),
        ("x", False),
        ("len(x) == 2", False),
        ("x is None", False),
        ("x is None or y", False),
        ("isinstance(x, int) and x > 0", False),
    ],
)
def test_what_narrows_a_type(asserted: str, allowed: bool) -> None:
    assert narrows(ast.parse(asserted, mode="eval").body) == allowed


TARGETS = ("quickstart", "stop", "test", "bench", "demo-zklora", "fuzz", "soak", "study")


@pytest.mark.parametrize("target", TARGETS)
def test_the_readmes_commands_exist(target: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"\n{target}:" in makefile
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    assert any(f"make {target}" in document.read_text() for document in documents)


def test_what_make_test_leaves_out_make_chaos_runs() -> None:
    _, _, chaos = (REPOSITORY / "Makefile").read_text().partition("\nchaos:")
    recipe = chaos.partition("\n\n")[0]
    long = [
        path
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if "from tests.long_tests import" in path.read_text() and path != Path(__file__)
    ]
    assert len(long) > 8
    for path in long:
        place = path.relative_to(REPOSITORY)
        assert str(place) in recipe or f" {place.parent}\n" in f"{recipe}\n", place
