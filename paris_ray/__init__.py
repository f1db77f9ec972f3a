"""paris_ray: diffusion experts trained without communication, on Ray."""

__version__ = "0.1.0"
