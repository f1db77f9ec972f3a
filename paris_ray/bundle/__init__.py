"""The bundle: the models of a model folder (`paris_ray.model_folder`), to draw with.

Parts load when they are first used, so a Serve replica that hosts one expert reads one expert, and
weights are mapped: on a CPU the page cache is their only copy.
"""

from paris_ray.bundle.loading import load_bundle
from paris_ray.bundle.parts import Bundle, load_expert
from paris_ray.config import Dtype
from paris_ray.model_folder.facts import CONFIG, MODEL_INDEX, BundleFacts, facts_to_json
from paris_ray.model_folder.layout import bundle_digest

__all__ = [
    "CONFIG",
    "MODEL_INDEX",
    "Bundle",
    "BundleFacts",
    "Dtype",
    "bundle_digest",
    "facts_to_json",
    "load_bundle",
    "load_expert",
]
