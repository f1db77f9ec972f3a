"""Proofs are verified by tasks, a few modules each; they import no torch, which takes seconds."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Histogram

from paris_ray.errors import VerificationError
from paris_ray.zklora.curve import Equation, check_equations
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.evidence import Evidence, Progress
from paris_ray.zklora.parties.results import in_chunks
from paris_ray.zklora.proof import Claim, proof_equation

MODULES_AT_ONCE = 4  # that one task checks


@ray.remote(num_cpus=1)
def check_proofs(claims: Mapping[str, Claim]) -> dict[str, Equation]:
    """Return the equation of each proof; they are checked together.

    Raises:
        VerificationError: naming a module whose proof is malformed.
    """
    seconds = Histogram(
        "paris_zklora_verify_seconds",
        "Time to check a module's proof, without the multiplication that all share.",
        boundaries=[0.003, 0.01, 0.03, 0.1, 0.3, 1, 3],
    )
    equations = {}
    for name, claim in claims.items():
        start = time.perf_counter()
        try:
            equations[name] = proof_equation(*claim)
        except VerificationError as error:
            raise VerificationError(f"{name}: {error}") from None
        seconds.observe(time.perf_counter() - start)
    return equations


def verify_evidence(
    evidence: Evidence,
    manifest: AdapterManifest,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Check every proof of a session: tasks over chunks of modules, then one multiplication.

    Args:
        evidence: Rows and proofs.
        manifest: The pinned one.
        on_progress: Is told how many modules are done, and of how many.

    Raises:
        VerificationError: if something is left out, or naming the modules that do not hold.
    """
    claims = evidence.claims(manifest)
    equations: dict[str, Equation] = {}

    def check(chunk: Sequence[str]) -> Any:
        return check_proofs.remote({name: claims[name] for name in chunk})

    for checked in in_chunks(check, list(claims), MODULES_AT_ONCE):
        equations |= checked
        on_progress(len(equations), len(claims))
    check_equations(equations, "the proof")
