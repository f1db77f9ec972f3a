"""Models that somebody else trained: read only if they are what the federation agreed on."""

from typing import TypeVar

import torch
from torch import nn

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle.weights import StoredModel
from paris_ray.clustering import Clustering
from paris_ray.config import Config, ExpertConfig, RouterConfig, identity
from paris_ray.embeddings import read_null_text
from paris_ray.encoders.codec import load_codec
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.encoders.text import load_text_encoder
from paris_ray.errors import FederationError, ParisError
from paris_ray.models import Expert, Router
from paris_ray.run import CODEC_FOLDERS, ENCODERS, MODEL_CONFIG, ROUTER, SEED

CPU = torch.device("cpu")
Model = TypeVar("Model", bound=nn.Module)


def open_router(part: VerifiedFolder, expected: RouterConfig) -> Router:
    """Return a router of this very architecture, on the CPU; raises like `open_expert`."""
    stored = StoredModel(Router, part)
    _check_fields(part, stored.config, expected)
    return _finite(stored.load(CPU), part)


def open_expert(part: VerifiedFolder, expected: ExpertConfig) -> Expert:
    """Return an expert of this very architecture and objective, on the CPU.

    Args:
        part: Its folder; may come from a stranger.
        expected: What it must be.

    Raises:
        FederationError: naming the file and field that differ, or the tensor that is not finite.
        BundleError: if the weights do not fit their configuration.
    """
    stored = StoredModel(Expert, part)
    _check_fields(part, stored.config, expected)
    return _finite(stored.load(CPU), part)


def _check_fields(
    part: VerifiedFolder, found: ExpertConfig | RouterConfig, expected: ExpertConfig | RouterConfig
) -> None:
    """Compare architectures before anything is allocated for them."""
    own = identity(found)
    for field, value in identity(expected).items():
        if own[field] != value:
            raise FederationError(
                f"{part.folder.uri}/{MODEL_CONFIG}: {field}={own[field]!r}, "
                f"the federation's is {value!r}"
            )


def _finite(model: Model, part: VerifiedFolder) -> Model:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise FederationError(f"{part.folder.uri}: tensor {name!r} is not finite")
    return model


def check_federation_parts(source: VerifiedFolder, config: Config) -> None:
    """Check all that a federation gives, before anything is computed with it.

    Args:
        source: Its folder; may come from a stranger.
        config: What it says of itself.

    Raises:
        FederationError: naming the file that does not fit.
    """
    try:
        Clustering.load(source.folder).check(config.cluster.num_clusters)
        _check_encoders(source.part(ENCODERS), config)
        open_router(source.part(ROUTER), config.router)
        if has_part(source, SEED):
            open_expert(source.part(SEED), config.expert)
    except ParisError as error:
        raise FederationError(f"what {source.folder.uri} gives is not allowed: {error}") from None


def _check_encoders(encoders: VerifiedFolder, config: Config) -> None:
    """Check that codec and text encoder make what the experts read."""
    expert = config.expert
    codec = load_codec(encoders.part(CODEC_FOLDERS[config.codec.kind]), config.corpus.image_size)
    latents = (expert.in_channels, expert.input_size, expert.input_size)
    if codec.latent_shape != latents:
        shapes = f"latents of shape {codec.latent_shape}, the experts read {latents}"
        raise FederationError(f"{encoders.folder.uri}: {shapes}")
    text = encoders.part(TEXT_ENCODER)
    tokenizer = encoders.part(TOKENIZER) if has_part(encoders, TOKENIZER) else text
    width = load_text_encoder(text, tokenizer).embed_dim
    if width != expert.text_embed_dim:
        widths = f"text of width {width}, the experts read {expert.text_embed_dim}"
        raise FederationError(f"{encoders.folder.uri}: {widths}")
    _ = read_null_text(encoders.folder)


def has_part(source: VerifiedFolder, name: str) -> bool:
    """Return whether files of a part are listed."""
    return bool(source.part(name).digests)
