"""The bundle: a model folder in the layout of the public Paris release.

    config.json  model_index.json  README.md  manifest.json
    expert_0/ ... expert_K-1/   config.json  diffusion_pytorch_model.safetensors
    router/                     config.json  pytorch_model.safetensors
    codec/  text_encoder/

Fields of our own stand under `paris_ray` in `config.json`. Parts load when they are first used, so
a Serve replica that hosts one expert reads one expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from paris_ray.artifacts import MANIFEST, Folder, VerifiedFolder, open_finished, read_manifest
from paris_ray.config import (
    ExpertConfig,
    RouterConfig,
    SamplingConfig,
    from_dict,
    to_dict,
)
from paris_ray.encoders.codec import Codec, load_codec
from paris_ray.encoders.text import MODEL_FILES, MiniLM, TextEncoder
from paris_ray.errors import BundleError, ConfigError
from paris_ray.models import Expert, Router, TextConditioning
from paris_ray.models.release import read_document
from paris_ray.run import BUNDLE, EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS

CONFIG = "config.json"
MAX_EXPERTS = 1024

Model = TypeVar("Model", Expert, Router)
Section = TypeVar("Section", ExpertConfig, RouterConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFacts:
    """What a bundle says of itself, beside the parts.

    Attributes:
        model_name: The name that the API serves it under.
        sampling: Default steps, guidance and routing.
        picture_size: Height and width of the pictures, in pixels.
        attribution: Licence line to show beside pictures, or None.
        example_prompts: A few captions of the corpus.
    """

    model_name: str
    sampling: SamplingConfig
    picture_size: int
    attribution: str | None
    example_prompts: tuple[str, ...]


class Bundle:
    """Experts, router, codec and text encoder that belong together; each loads on first use.

    Args:
        parts: `expert_0` ... `expert_K-1`, `router`, `codec` and `text_encoder`.
        facts: What the bundle says of itself.
    """

    def __init__(self, parts: Mapping[str, VerifiedFolder], facts: BundleFacts) -> None:
        self.parts, self.facts = parts, facts
        self.num_experts = sum(name.startswith("expert_") for name in parts)
        self.expert = lru_cache(maxsize=None)(self._load_expert)

    def _load_expert(self, index: int) -> Expert:
        """Return expert `index`.

        Raises:
            BundleError: if its configuration or weights do not fit.
        """
        expert = load_expert(self.parts[f"expert_{index}"])
        config = expert.config
        shape = (config.in_channels, config.input_size, config.input_size)
        if shape != self.latent_shape:
            raise BundleError(
                f"expert_{index}/{MODEL_CONFIG}: latents of shape {shape}, "
                f"but the router reads {self.latent_shape}"
            )
        return expert

    @cached_property
    def router(self) -> Router:
        """The router; raises BundleError if it does not fit the experts."""
        router = _load_model(Router, RouterConfig, self.parts["router"], ROUTER_WEIGHTS)
        if router.config.num_experts != self.num_experts:
            raise BundleError(
                f"router/{MODEL_CONFIG}: num_experts={router.config.num_experts}, "
                f"but the bundle has {self.num_experts} experts"
            )
        return router

    @cached_property
    def codec(self) -> Codec:
        """The codec between pictures and latents; raises BundleError if it does not fit."""
        codec = load_codec(self.parts["codec"])
        if codec.latent_shape != self.latent_shape:
            raise BundleError(
                f"codec/: latents of shape {codec.latent_shape}, "
                f"but the router reads {self.latent_shape}"
            )
        return codec

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder."""
        return MiniLM(self.parts["text_encoder"].local_path(MODEL_FILES))

    @cached_property
    def null_text(self) -> TextConditioning:
        """The encoded empty string, a batch of one: what guidance subtracts."""
        return self.encode_text([""])

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one picture's latents."""
        config = _read_config(RouterConfig, self.parts["router"])
        return config.in_channels, config.input_size, config.input_size

    def encode_text(self, prompts: Sequence[str]) -> TextConditioning:
        """Return the conditioning of some prompts.

        Each is encoded alone: beside others it would be padded, which changes the last bits of
        its vector, and a seed must mean the same picture in any batch.
        """
        encoded = {prompt: self.text_encoder.encode([prompt]) for prompt in dict.fromkeys(prompts)}
        return TextConditioning.concatenate([encoded[prompt] for prompt in prompts])


def load_expert(part: VerifiedFolder) -> Expert:
    """Return the expert in a folder; raises BundleError if its weights do not fit its config."""
    return _load_model(Expert, ExpertConfig, part, EXPERT_WEIGHTS)


def _load_model(
    model_class: type[Model], config_class: type[Any], part: VerifiedFolder, weights: str
) -> Model:
    """Build a model on the meta device, then give it the stored tensors."""
    config = _read_config(config_class, part)
    with torch.device("meta"):
        model = model_class(config)
    try:
        state = safetensors.torch.load(part.read(weights))
    except SafetensorError as error:
        raise BundleError(f"{part.folder.uri}/{weights} is damaged: {error}") from None
    _check_state(model, state, f"{part.folder.uri}/{weights}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _read_config(config_class: type[Section], part: VerifiedFolder) -> Section:
    """Return a model's configuration, checked before anything is allocated for it."""
    where = f"{part.folder.uri}/{MODEL_CONFIG}"
    try:
        return read_document(config_class, part.read_json(MODEL_CONFIG), where)
    except ConfigError as error:
        raise BundleError(str(error)) from None


def _check_state(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise BundleError(
                f"{where}: tensor {name!r} has shape {found.get(name, 'missing')}, "
                f"its {MODEL_CONFIG} means {expected.get(name, 'none')}"
            )


def load_bundle(path: str, digest: str | None = None) -> Bundle:
    """Open a model folder.

    Args:
        path: A path or a pyarrow.fs URI of a folder in the layout of the Paris release.
        digest: Digest of the manifest of the only bundle that is wanted; None takes any.

    Raises:
        BundleError: if a part is missing, or a value is not allowed.
        ArtifactError: if a file does not have the digest that the folder's manifest gives.
    """
    folder = Folder(path)
    if not folder.exists(CONFIG):
        raise BundleError(f"no model folder at {folder.uri}: it has no {CONFIG}")
    if digest is not None and read_manifest(folder, BUNDLE).digest != digest:
        raise BundleError(f"{folder.uri} is another bundle than the one of digest {digest}")
    if folder.exists(MANIFEST):
        source = open_finished(folder, BUNDLE)
    else:
        source = VerifiedFolder(folder, None)
    document = source.read_json(CONFIG)
    where = f"{folder.uri}/{CONFIG}"
    num_experts = document.get("num_experts") if isinstance(document, dict) else None
    if not isinstance(num_experts, int) or not 1 <= num_experts <= MAX_EXPERTS:
        raise BundleError(f"{where}: num_experts={num_experts!r}, allowed: 1 to {MAX_EXPERTS}")
    names = [f"expert_{k}" for k in range(num_experts)] + ["router", "codec", "text_encoder"]
    for name in names:
        if not folder.exists(name):
            raise BundleError(f"{folder.uri} lacks {name}/, which {CONFIG} calls for")
    if folder.exists(f"expert_{num_experts}"):
        raise BundleError(f"{where}: num_experts={num_experts}, but expert_{num_experts}/ exists")
    return Bundle({name: source.part(name) for name in names}, _read_facts(document, where))


def facts_to_json(facts: BundleFacts) -> dict[str, Any]:
    """Return the facts as the `paris_ray` field of a bundle's `config.json`."""
    return {
        "sampling": to_dict(facts.sampling),
        "picture_size": facts.picture_size,
        "attribution": facts.attribution,
        "example_prompts": list(facts.example_prompts),
    }


def _read_facts(document: Mapping[str, Any], where: str) -> BundleFacts:
    ours = document.get("paris_ray")
    if not isinstance(ours, dict):
        raise BundleError(f"{where}: the field paris_ray is missing")
    try:
        return BundleFacts(
            model_name=str(document["model_name"]),
            sampling=from_dict(SamplingConfig, ours["sampling"], f"{where}: paris_ray.sampling"),
            picture_size=int(ours["picture_size"]),
            attribution=None if ours["attribution"] is None else str(ours["attribution"]),
            example_prompts=tuple(map(str, ours["example_prompts"])),
        )
    except KeyError as error:
        raise BundleError(f"{where}: the field {error} is missing") from None
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(f"{where}: {error}") from None
