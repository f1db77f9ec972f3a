"""Writing a bundle: the parts of a run, copied into the layout of the public Paris release."""

from collections.abc import Mapping
from typing import Any

from paris_ray.artifacts import Folder, Manifest, publish
from paris_ray.bundle import CONFIG, EXPERT_WEIGHTS, KIND, ROUTER_WEIGHTS, Bundle, facts_to_json
from paris_ray.encoders import codec
from paris_ray.encoders.text import MODEL_FILES

MODEL_INDEX = "model_index.json"
MODEL_CARD = "README.md"


def export_bundle(
    bundle: Bundle,
    target: Folder,
    *,
    model_card: str,
    config_digest: str,
    parents: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Manifest:
    """Copy a bundle's parts to `target`, describe them there, and publish the folder.

    Args:
        bundle: Where the parts are; every file is verified on the way.
        target: The new model folder.
        model_card: Text of its `README.md`.
        config_digest: Digest of the configuration that made it.
        parents: Digests of the artefacts it was made from.
        facts: Measured numbers for the manifest.
    """
    for name, part in bundle.parts.items():
        for file_name in _files_of(name):
            (target / name).write(file_name, part.read(file_name))
    target.write_json(CONFIG, _public_config(bundle))
    target.write_json(MODEL_INDEX, _model_index(bundle))
    target.write(MODEL_CARD, model_card.encode())
    return publish(target, KIND, config_digest=config_digest, parents=parents, facts=facts)


def _files_of(part: str) -> tuple[str, ...]:
    if part.startswith("expert_"):
        return CONFIG, EXPERT_WEIGHTS
    return {
        "router": (CONFIG, ROUTER_WEIGHTS),
        "codec": (codec.CONFIG, codec.WEIGHTS),
        "text_encoder": MODEL_FILES,
    }[part]


def _public_config(bundle: Bundle) -> dict[str, Any]:
    """Return the fields of the public release, and ours under `paris_ray`."""
    channels, size, _ = bundle.latent_shape
    return {
        "model_name": bundle.facts.model_name,
        "num_experts": bundle.num_experts,
        "image_size": size,
        "num_channels": channels,
        "expert_architecture": "dit",
        "router_architecture": "dit",
        "use_latents": True,
        "vae_name": bundle.parts["codec"].read_json(codec.CONFIG)["kind"],
        "text_encoder_name": "all-MiniLM-L6-v2",
        "paris_ray": facts_to_json(bundle.facts),
    }


def _model_index(bundle: Bundle) -> dict[str, Any]:
    """Return which class reads which part; the loader is `paris_ray.bundle.Bundle`."""
    experts = {f"expert_{k}": ["paris_ray.models", "Expert"] for k in range(bundle.num_experts)}
    return {
        "_class_name": "Bundle",
        "_library": "paris_ray.bundle",
        "num_experts": bundle.num_experts,
        "router": ["paris_ray.models", "Router"],
        "codec": ["paris_ray.encoders.codec", "PatchPCA"],
        "text_encoder": ["paris_ray.encoders.text", "MiniLM"],
        **experts,
    }
