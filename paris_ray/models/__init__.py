"""Experts and router."""

from paris_ray.config import ExpertConfig, RouterConfig
from paris_ray.models.conditioning import TextConditioning
from paris_ray.models.expert import EncodedText, Expert
from paris_ray.models.router import Router

__all__ = ["EncodedText", "Expert", "ExpertConfig", "Router", "RouterConfig", "TextConditioning"]
