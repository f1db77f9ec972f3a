"""What all users together have learned of an adapter so far, from the journal of their sessions."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from paris_ray.zklora.leakage import Span, predicted_error
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.sessions import SessionJournal


def describe_leak(journal: SessionJournal, manifest: AdapterManifest, inputs: Path) -> str:
    """Return in a line for people what the answers so far give away.

    Args:
        journal: Of all sessions.
        manifest: Of the offer.
        inputs: A sample of real inputs, as `save_inputs` writes it; without it only directions are
            counted.
    """
    real = load_file(inputs) if inputs.exists() else {}
    most, errors = (0.0, 0, 0), []
    for name, terms in manifest.terms.items():
        d_in, _, _ = terms.dimensions
        span = Span.of(d_in, journal.calls.inputs(manifest.adapter_id, name))
        most = max(most, (span.dimensions / d_in, span.dimensions, d_in))
        if name in real:
            errors.append(predicted_error(span, real[name]))
    _, known, d_in = most
    line = f"learned by all users so far: at most {known} of {d_in} directions of a module"
    if not errors:
        return line
    return f"{line}; a thief's updates are off by {np.mean(errors):.2f}, relative to the true ones"
