"""What a bundle says of itself in its `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import (
    MODEL_LIMITS,
    QUALITIES,
    Preset,
    SamplingConfig,
    from_dict,
    to_dict,
)
from paris_ray.encoders.folders import MAX_BLOCKS, downsampling
from paris_ray.errors import BundleError, ConfigError

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
OURS = "paris_ray"
MAX_STEPS = 1000
MAX_PICTURE_SIZE = 65_536
# What the release does not say: the defaults of its authors' comparisons (HDDM, arXiv 2603.06741).
# Its presets are the quickstart's shares of the steps, which were not measured on the release.
RELEASE_SAMPLING = SamplingConfig(
    num_inference_steps=50,
    guidance_scale=7.5,
    routing="top-2",
    presets={
        "low": Preset(num_inference_steps=19),
        "medium": Preset(num_inference_steps=25),
        "high": Preset(num_inference_steps=50),
    },
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFacts:
    """What a bundle says of itself, beside the parts.

    Attributes:
        model_name: The name that the API serves it under.
        sampling: Default steps, guidance and routing.
        picture_size: Height and width of the pictures, in pixels.
        attribution: Licence line to show beside pictures, or None.
        example_prompts: A few captions of the corpus.
        vae_name: What the codec was called where it came from; for people.
        text_encoder_name: The same of the text encoder.
    """

    model_name: str
    sampling: SamplingConfig
    picture_size: int
    attribution: str | None
    example_prompts: tuple[str, ...]
    vae_name: str | None = None
    text_encoder_name: str | None = None


def facts_to_json(facts: BundleFacts) -> dict[str, Any]:
    """Return the facts as the `paris_ray` field of a bundle's `config.json`."""
    return {
        "sampling": to_dict(facts.sampling),
        "picture_size": facts.picture_size,
        "attribution": facts.attribution,
        "example_prompts": list(facts.example_prompts),
    }


def read_integer(document: Mapping[str, Any], field: str, most: int, where: str) -> int:
    """Return a field of a document; raises BundleError unless it is an integer from 1 to `most`."""
    value = document.get(field)
    if type(value) is not int or not 1 <= value <= most:
        raise BundleError(f"{where}: {field}={value!r}, allowed: 1 to {most}")
    return value


def read_facts(document: Mapping[str, Any], vae: VerifiedFolder | None, where: str) -> BundleFacts:
    """Return the facts in a `config.json`; those of the public release have defaults.

    Args:
        document: The parsed file, which may come from a stranger.
        vae: The folder `vae/`, or None if the bundle has another codec.
        where: What to call the file in an error.

    Raises:
        BundleError: naming the field that is missing or not allowed.
    """
    try:
        ours = _own_fields(document, vae, where)
        facts = BundleFacts(
            model_name=_text(document["model_name"], "model_name"),
            sampling=from_dict(SamplingConfig, ours["sampling"], f"{where}: {OURS}.sampling"),
            picture_size=read_integer(ours, "picture_size", MAX_PICTURE_SIZE, f"{where}: {OURS}"),
            attribution=_optional_text(ours["attribution"], f"{OURS}.attribution"),
            example_prompts=_texts(ours["example_prompts"], f"{OURS}.example_prompts"),
            vae_name=_optional_text(document.get("vae_name"), "vae_name"),
            text_encoder_name=_optional_text(
                document.get("text_encoder_name"), "text_encoder_name"
            ),
        )
    except KeyError as error:
        raise BundleError(f"{where}: the field {error} is missing") from None
    except ConfigError as error:
        raise BundleError(f"{where}: {error}") from None
    _check_sampling(facts.sampling, f"{where}: {OURS}.sampling")
    return facts


def _own_fields(
    document: Mapping[str, Any], vae: VerifiedFolder | None, where: str
) -> Mapping[str, Any]:
    if OURS in document or vae is None:
        ours = document.get(OURS)
        if not isinstance(ours, dict):
            raise BundleError(f"{where}: the field {OURS} is missing")
        return ours
    size = read_integer(document, "image_size", MODEL_LIMITS["input_size"], where)
    return {
        "sampling": to_dict(RELEASE_SAMPLING),
        "picture_size": size * _pixels_a_latent_pixel(vae),
        "attribution": None,
        "example_prompts": [],
    }


def _pixels_a_latent_pixel(vae: VerifiedFolder) -> int:
    """Return how many pixels a latent pixel spans (8 in Stable Diffusion)."""
    document = vae.read_json(CONFIG)
    channels = document.get("block_out_channels") if isinstance(document, dict) else None
    if not isinstance(channels, list) or not 1 <= len(channels) <= MAX_BLOCKS:
        where = f"{vae.folder.uri}/{CONFIG}"
        allowed = f"allowed: 1 to {MAX_BLOCKS} numbers"
        raise BundleError(f"{where}: block_out_channels={channels!r}, {allowed}")
    return downsampling(channels)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{field}={value!r}, allowed: a text")
    return value


def _optional_text(value: object, field: str) -> str | None:
    return None if value is None else _text(value, field)


def _texts(value: object, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{field}={value!r}, allowed: a list of texts")
    return tuple(value)


def _check_sampling(sampling: SamplingConfig, where: str) -> None:
    """Check what types cannot express; the routing is checked when it is used."""
    qualities = list(sampling.presets)
    known = set(qualities) <= set(QUALITIES)
    _require(known, f"{where}: presets", qualities, ", ".join(QUALITIES))
    steps = {"num_inference_steps": sampling.num_inference_steps}
    for quality, preset in sampling.presets.items():
        steps[f"presets.{quality}.num_inference_steps"] = preset.num_inference_steps
    for field, count in steps.items():
        _require(1 <= count <= MAX_STEPS, f"{where}: {field}", count, f"1 to {MAX_STEPS}")
    scale, temperature = sampling.guidance_scale, sampling.router_temperature
    _require(0 <= scale <= 100, f"{where}: guidance_scale", scale, "0 to 100")
    warm = 0 < temperature < math.inf
    _require(warm, f"{where}: router_temperature", temperature, "above 0")


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise BundleError(f"{field}={value!r}, allowed: {allowed}")
