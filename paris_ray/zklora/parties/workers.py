"""Where the weights are: processes that evaluate and prove; the gateway asks them.

`LoRAWorker` answers updates of rows, `prove_modules` proves. None of them knows users.
"""

import time
from collections.abc import Mapping

import ray
from ray.util.metrics import Histogram

from paris_ray.zklora.commitment import ModuleOpening
from paris_ray.zklora.fixed_point import Int16, Int64, evaluate
from paris_ray.zklora.proof import prove

PROVE_RETRIES = 5


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
