"""From the trained parts of a run to a model folder in the layout of the public Paris release."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paris_ray import cluster_facts
from paris_ray.artifacts import VerifiedFolder, open_finished, read_manifest
from paris_ray.bundle import (
    CONFIG,
    MODEL_INDEX,
    Bundle,
    BundleFacts,
    Dtype,
    facts_to_json,
)
from paris_ray.config import CodecConfig, Config, SamplingConfig, TextConfig, is_released
from paris_ray.embeddings import num_rows, part_names, read_rows
from paris_ray.encoders.folders import (
    CODEC_FILES,
    MINILM_FILES,
    TEXT_ENCODER,
    TEXT_ENCODER_FILES,
    TOKENIZER,
    VAE_FILES,
    tokenizer_files,
)
from paris_ray.encoders.hub import HUB_NAME
from paris_ray.folders import Folder
from paris_ray.model_folder.admissions import ADMISSIONS, admission_names
from paris_ray.model_folder.history import EXPORTED, write_history
from paris_ray.model_folder.history import FILE as HISTORY
from paris_ray.run import (
    CLUSTERS,
    DISTILLED,
    EMBEDDINGS,
    ENCODERS,
    EXPERT,
    EXPERT_WEIGHTS,
    FEW_STEP,
    MODEL_CONFIG,
    ROUTER,
    ROUTER_WEIGHTS,
    SEED,
    Run,
)

MODEL_CARD = "README.md"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# What reads a part, as model_index.json has it. The release names its pipeline's class, which was
# never published, and the version of diffusers that it was made with.
CLASSES = {
    "vae": ["diffusers", "AutoencoderKL"],
    "codec": ["paris_ray.encoders.codec", "PatchPCA"],
    TOKENIZER: ["transformers", "CLIPTokenizer"],
    "router": ["paris_ray.models", "Router"],
    SEED: ["paris_ray.models", "Expert"],
}
PUBLIC_PIPELINE = {"_class_name": "DDMPipeline", "_diffusers_version": "0.21.0"}
OWN_PIPELINE = {"_class_name": "Bundle", "_library": "paris_ray.bundle"}


def open_trained_parts(run: Run, *, device: str = "cpu", dtype: Dtype | None = None) -> Bundle:
    """Return the parts of a run as a bundle, before they are exported.

    Args:
        run: The run.
        device: Where the parts run: `cpu`, `cuda` or `auto`.
        dtype: Data type of experts and router; None keeps the stored one.

    Raises:
        ArtifactError: naming the part that is not finished.
    """
    experts = range(run.num_experts)
    parts = {f"expert_{k}": open_finished(run.expert(k), EXPERT) for k in experts}
    parts["router"] = open_finished(run.router, ROUTER)
    if run.config.seed_training.steps:
        parts[SEED] = open_finished(run.seed, SEED)
    if run.clusters.exists(cluster_facts.FILE):
        parts[CLUSTERS] = open_finished(run.clusters, CLUSTERS)
    sampling = sampling_with(run.config.sampling, read_manifest(run.router, ROUTER).facts)
    return _as_bundle(run, parts, _name(run), sampling, device=device, dtype=dtype)


def open_student(
    run: Run, student: str, *, device: str = "cpu", dtype: Dtype | None = None
) -> Bundle:
    """Return a distilled model of a run, with the run's encoders, as a bundle of one expert.

    Args:
        run: The run.
        student: Which model, `STUDENT` or `FEW_STEP`.
        device: Where the parts run: `cpu`, `cuda` or `auto`.
        dtype: Data type of expert and router; None keeps the stored one.

    Raises:
        ArtifactError: if it, or the encoders, are not finished.
    """
    source = open_finished(run.student(student), DISTILLED)
    parts = {name: source.part(name) for name in ("expert_0", "router")}
    sampling = student_sampling(run.config, student)
    name = f"{_name(run)}-{DISTILLED}"
    return _as_bundle(run, parts, name, sampling, device=device, dtype=dtype)


def student_sampling(config: Config, student: str) -> SamplingConfig:
    """Return how a distilled model draws.

    One of few steps has the guidance in its weights, and is good at no other number of steps.
    """
    sampling = replace(config.sampling, routing="top-1", router_temperature=1.0)
    steps = config.distillation.num_inference_steps
    if student != FEW_STEP or steps is None:
        return sampling
    return replace(sampling, num_inference_steps=steps, guidance_scale=1.0, presets={})


def _name(run: Run) -> str:
    return run.folder.uri.rstrip("/").rsplit("/", 1)[-1]


def _as_bundle(
    run: Run,
    models: Mapping[str, VerifiedFolder],
    name: str,
    sampling: SamplingConfig,
    *,
    device: str,
    dtype: Dtype | None,
) -> Bundle:
    config, encoders = run.config, open_finished(run.encoders, ENCODERS)
    codec_folder = run.codec.uri.rsplit("/", 1)[-1]
    shared = (codec_folder, TEXT_ENCODER, TOKENIZER)
    found = {name: encoders.part(name) for name in shared if run.encoders.exists(name)}
    facts = BundleFacts(
        model_name=name,
        sampling=sampling,
        picture_size=config.corpus.image_size,
        attribution=read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"],
        example_prompts=tuple(middle_caption(run.shard(k)) for k in range(run.num_experts)),
        vae_name=codec_name(config.codec),
        text_encoder_name=text_encoder_name(config.text),
    )
    return Bundle({**models, **found}, facts, device=device, dtype=dtype)


def sampling_with(sampling: SamplingConfig, router: Mapping[str, Any]) -> SamplingConfig:
    """Return how a bundle draws: for a temperature of 0 with the one fitted to its router.

    Args:
        sampling: As configured.
        router: Facts of the router: what `training.router.measure_router` returned.
    """
    if sampling.router_temperature:
        return sampling
    held_out = router.get("held_out")
    temperature = 1.0 if held_out is None else float(held_out["temperature"])
    return replace(sampling, router_temperature=temperature)


def middle_caption(shard: Folder) -> str:
    """Return a caption of a shard, as an example of what to ask for."""
    count = sum(num_rows(shard, name) for name in part_names(shard))
    return str(read_rows(shard, np.array([count // 2]), ["caption"])["caption"][0])


def codec_name(config: CodecConfig) -> str:
    """Return what a bundle says that its codec is, without a path of this machine."""
    return config.kind if config.path is None else public_name(config.path)


def text_encoder_name(config: TextConfig) -> str:
    """Return what a bundle says that its text encoder is, without a path of this machine."""
    if config.kind == "minilm":
        return MINILM
    name = public_name(config.path or "")
    return f"open_clip {config.model} {name}" if config.kind == "open_clip" else name


def public_name(name_or_path: str) -> str:
    """Return a hub name as it is, and of a path, which is nobody's business, the end."""
    return name_or_path if HUB_NAME.fullmatch(name_or_path) else Path(name_or_path).name


def write_bundle(bundle: Bundle, target: Folder, *, model_card: str) -> None:
    """Copy a bundle's parts to `target` and describe them there; the caller publishes it.

    Args:
        bundle: Where the parts are; every file is verified on the way.
        target: The new model folder.
        model_card: Text of its `README.md`.
    """
    for name, part in bundle.parts.items():
        for file_name in _files_of(name, part, bundle.num_experts):
            (target / name).write(file_name, part.read(file_name))
    target.write_json(CONFIG, _public_config(bundle))
    target.write_json(MODEL_INDEX, _model_index(bundle))
    if bundle.history != EXPORTED:
        target.write(HISTORY, write_history(bundle.history))
    target.write(MODEL_CARD, model_card.encode())


def _files_of(name: str, part: VerifiedFolder, num_experts: int) -> tuple[str, ...]:
    if name.startswith("expert_"):
        return MODEL_CONFIG, EXPERT_WEIGHTS
    if name == TOKENIZER:
        return tuple(tokenizer_files(part.folder))
    if name == ADMISSIONS:
        return admission_names(part.folder, num_experts)
    if name == TEXT_ENCODER:
        return MINILM_FILES if _is_minilm(part) else TEXT_ENCODER_FILES
    return {
        "router": (MODEL_CONFIG, ROUTER_WEIGHTS),
        SEED: (MODEL_CONFIG, EXPERT_WEIGHTS),
        "codec": CODEC_FILES,
        "vae": VAE_FILES,
        CLUSTERS: (cluster_facts.FILE,),
    }[name]


def _is_minilm(text_encoder: VerifiedFolder) -> bool:
    return bool(text_encoder.read_json(MODEL_CONFIG)["model_type"] == "bert")


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
        "vae_name": bundle.facts.vae_name,
        "text_encoder_name": bundle.facts.text_encoder_name,
        "paris_ray": facts_to_json(bundle.facts),
    }


def _model_index(bundle: Bundle) -> dict[str, Any]:
    """Return which class reads which part; `paris_ray.bundle.load_bundle` reads them all."""
    minilm = _is_minilm(bundle.parts[TEXT_ENCODER])
    text_class = (
        ["paris_ray.encoders.text", "MiniLM"] if minilm else ["transformers", "CLIPTextModel"]
    )
    released = all(map(is_released, bundle.expert_configs))
    public = "vae" in bundle.parts and not minilm and released
    experts = {f"expert_{k}": ["paris_ray.models", "Expert"] for k in range(bundle.num_experts)}
    return {
        **(PUBLIC_PIPELINE if public else OWN_PIPELINE),
        "num_experts": bundle.num_experts,
        TEXT_ENCODER: text_class,
        **{name: CLASSES[name] for name in bundle.parts if name in CLASSES},
        **experts,
    }
