"""From the trained parts of a run to a model folder in the layout of the public Paris release."""

from typing import Any

from paris_ray.artifacts import Folder, open_finished, read_manifest
from paris_ray.bundle import (
    CONFIG,
    Bundle,
    BundleFacts,
    facts_to_json,
)
from paris_ray.embeddings import read_table
from paris_ray.encoders import codec
from paris_ray.encoders.text import MODEL_FILES
from paris_ray.run import (
    EMBEDDINGS,
    ENCODERS,
    EXPERT,
    EXPERT_WEIGHTS,
    MODEL_CONFIG,
    ROUTER,
    ROUTER_WEIGHTS,
    Run,
)

MODEL_INDEX = "model_index.json"
MODEL_CARD = "README.md"


def open_trained_parts(run: Run) -> Bundle:
    """Return the parts of a run as a bundle, before they are exported.

    Raises:
        ArtifactError: naming the part that is not finished.
    """
    encoders = open_finished(run.encoders, ENCODERS)
    experts = range(run.num_experts)
    parts = {f"expert_{k}": open_finished(run.expert(k), EXPERT) for k in experts}
    parts["router"] = open_finished(run.router, ROUTER)
    parts |= {name: encoders.part(name) for name in ("codec", "text_encoder")}
    facts = BundleFacts(
        model_name=run.folder.uri.rstrip("/").rsplit("/", 1)[-1],
        sampling=run.config.sampling,
        picture_size=run.config.corpus.image_size,
        attribution=read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"],
        example_prompts=tuple(_middle_caption(run.shard(k)) for k in experts),
    )
    return Bundle(parts, facts)


def _middle_caption(shard: Folder) -> str:
    captions = read_table(shard, ["caption"])["caption"]
    return str(captions[len(captions) // 2])


def write_bundle(bundle: Bundle, target: Folder, *, model_card: str) -> None:
    """Copy a bundle's parts to `target` and describe them there; the caller publishes it.

    Args:
        bundle: Where the parts are; every file is verified on the way.
        target: The new model folder.
        model_card: Text of its `README.md`.
    """
    for name, part in bundle.parts.items():
        for file_name in _files_of(name):
            (target / name).write(file_name, part.read(file_name))
    target.write_json(CONFIG, _public_config(bundle))
    target.write_json(MODEL_INDEX, _model_index(bundle))
    target.write(MODEL_CARD, model_card.encode())


def _files_of(part: str) -> tuple[str, ...]:
    if part.startswith("expert_"):
        return MODEL_CONFIG, EXPERT_WEIGHTS
    return {
        "router": (MODEL_CONFIG, ROUTER_WEIGHTS),
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
        "text_encoder_name": "MiniLM",
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
