"""What Ray computes for the parties: updates, proofs, and whether proofs hold.

Weights are in the processes of `LoRAWorker` and `prove_modules`, which know no users. None of these
processes imports torch, which takes seconds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Histogram

from paris_ray.errors import VerificationError
from paris_ray.zklora.commitment import ModuleOpening
from paris_ray.zklora.curve import Equation, check_equations
from paris_ray.zklora.fixed_point import Int16, Int64, evaluate
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.evidence import Evidence, Progress
from paris_ray.zklora.proof import Claim, proof_equation, prove

MODULES_AT_ONCE = 4  # of one task: enough to pay for its start, few enough to share out
PROVE_RETRIES = 5


def result(reference: Any) -> Any:
    """Return what a task or actor returned; raise what it raised, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


# They reserve no CPU: one that waits must not keep a proof from the last one.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class LoRAWorker:
    """Answers the updates of rows; the weights never leave it.

    Args:
        openings: The weights.
    """

    def __init__(self, openings: Mapping[str, ModuleOpening]) -> None:
        self._openings = openings

    def evaluate(self, rows: Mapping[str, Int16]) -> list[Int64]:
        """Return the exact updates `(rows, d_out)` of some rows `(rows, d_in)` of each module."""
        return [evaluate(self._openings[name].module, x) for name, x in rows.items()]


def prove_all(
    openings: Any,
    names: Sequence[str],
    claim: Callable[[str], tuple[Int16, Int64, bytes]],
    on_progress: Progress,
) -> dict[str, bytes]:
    """Return the proof of each module.

    Args:
        openings: Reference of the weights.
        names: Of the modules.
        claim: Returns inputs, outputs and context of a module.
        on_progress: Is told how many modules are proved, and of how many.

    Raises:
        ParisError: if outputs are not those of the weights.
    """

    def start(chunk: Sequence[str]) -> Any:
        return prove_modules.remote(openings, {name: claim(name) for name in chunk})

    return _by_tasks(start, names, on_progress)


@ray.remote(num_cpus=1, max_retries=PROVE_RETRIES)
def prove_modules(
    openings: Mapping[str, ModuleOpening], claims: Mapping[str, tuple[Int16, Int64, bytes]]
) -> dict[str, bytes]:
    """Return the proof of each module; a task that is tried again draws new masks.

    Args:
        openings: The weights.
        claims: Inputs, outputs and context by module.
    """
    seconds = Histogram(
        "paris_zklora_prove_seconds",
        "Time to prove a module.",
        boundaries=[0.03, 0.1, 0.3, 1, 3, 10, 30],
    )
    proofs = {}
    for name, (x, y, context) in claims.items():
        start = time.perf_counter()
        proofs[name] = prove(openings[name], x, y, context)
        seconds.observe(time.perf_counter() - start)
    return proofs


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

    def start(chunk: Sequence[str]) -> Any:
        return check_proofs.remote({name: claims[name] for name in chunk})

    check_equations(_by_tasks(start, list(claims), on_progress), "the proof")


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


def _by_tasks(
    start: Callable[[Sequence[str]], Any], names: Sequence[str], on_progress: Progress
) -> dict[str, Any]:
    """Return by module what tasks return of a few modules each.

    Few more tasks are started than the cluster computes at a time: what they are given lies in
    memory.
    """
    most = 1 + int(ray.cluster_resources().get("CPU", 1))
    waiting: list[Any] = []
    found: dict[str, Any] = {}
    chunks = [names[i : i + MODULES_AT_ONCE] for i in range(0, len(names), MODULES_AT_ONCE)]
    while chunks or waiting:
        while chunks and len(waiting) < most:
            waiting.append(start(chunks.pop(0)))
        ready, waiting = ray.wait(waiting)
        found |= result(ready[0])
        on_progress(len(found), len(names))
    return found
