"""ZKLoRA: a LoRA is tried, proved, paid for and received, without being shown before.

numpy in, bytes out: these functions are the stable core. Around them are the signed manifest, the
session's transcript and the escrow; `parties/` has the services.

Source: Roy et al. 2025, arXiv 2501.13965, for the setting; docs/zklora.md for the scheme.
"""

from importlib.util import find_spec

from paris_ray.errors import VerificationError

if find_spec("py_arkworks_bls12381") is None:
    raise ModuleNotFoundError("ZKLoRA needs an extra: pip install -e '.[zklora]'")

from paris_ray.zklora.commitment import (
    ModuleCommitment,
    ModuleOpening,
    commit,
    open_commitment,
    open_commitments,
)
from paris_ray.zklora.fixed_point import QuantisedModule, dequantise, evaluate, quantise
from paris_ray.zklora.proof import prove, verify, verify_batch, verify_named

__all__ = [
    "ModuleCommitment",
    "ModuleOpening",
    "QuantisedModule",
    "VerificationError",
    "commit",
    "dequantise",
    "evaluate",
    "open_commitment",
    "open_commitments",
    "prove",
    "quantise",
    "verify",
    "verify_batch",
    "verify_named",
]
