"""Many requests at once: what is admitted, which calls run together, and what a failure costs.

Every picture has a `denoise` of its own, so pictures enter, leave and wait without the others. The
calls that they want made queue by model; whoever computes for a model takes everything that waits
for it whenever he is free (continuous batching: Orca, Yu et al. 2022; here by step of denoising and
by expert). A slow or dead expert delays the pictures that want it and no others.

This is a scheduler alone: no clock of its own (each method is told the time, in seconds), no
threads, no event loop, no Ray. `serve.sampler` drives it; tests drive it by simulation.
"""

from paris_ray.sampling.engine.lanes import Batch
from paris_ray.sampling.engine.requests import Event, Failed, Finished, Previewed, Ticket
from paris_ray.sampling.engine.scheduler import Engine, Limits

__all__ = [
    "Batch",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "Limits",
    "Previewed",
    "Ticket",
]
