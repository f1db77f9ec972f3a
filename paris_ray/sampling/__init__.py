"""Drawing pictures from a bundle."""

from paris_ray.sampling.sampler import generate

__all__ = ["generate"]
