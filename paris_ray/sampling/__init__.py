"""Drawing pictures from a bundle."""

from paris_ray.sampling.generation import generate

__all__ = ["generate"]
