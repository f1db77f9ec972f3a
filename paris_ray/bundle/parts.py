"""The parts of a bundle: each loads on first use, and all must fit together."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from threading import Lock
from types import MappingProxyType

import torch

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle.adapters import LoRA, read_lora
from paris_ray.bundle.texts import Texts
from paris_ray.bundle.weights import DTYPES, StoredModel, read_header
from paris_ray.config import Dtype, ExpertConfig, RouterConfig
from paris_ray.devices import resolve_device
from paris_ray.encoders.codec import Codec, load_codec
from paris_ray.encoders.folders import (
    CODEC_WEIGHTS,
    TEXT_ENCODER,
    TEXT_ENCODER_WEIGHTS,
    TOKENIZER,
    VAE_WEIGHTS,
)
from paris_ray.encoders.text import TextEncoder, load_text_encoder
from paris_ray.errors import BundleError, ConfigError
from paris_ray.model_folder.description import BundleDescription
from paris_ray.model_folder.facts import BundleFacts
from paris_ray.model_folder.history import EXPORTED, History
from paris_ray.models import Expert, Router, TextConditioning
from paris_ray.models.lora import attach_all
from paris_ray.run import MODEL_CONFIG

MAX_RESIDENT = 2  # experts on the device with offload=True: those of top-2, the default
ENCODER_WEIGHTS = {
    "vae": VAE_WEIGHTS,
    "codec": CODEC_WEIGHTS,
    TEXT_ENCODER: TEXT_ENCODER_WEIGHTS,
}


class Bundle(BundleDescription):
    """Experts, router, codec and text encoder that belong together; each loads on first use.

    Args:
        parts: As of `BundleDescription`, like the next three.
        facts: What the bundle says of itself.
        history: What became of its experts.
        defaults: Values of fields that the models' `config.json` do not tell.
        dtype: Data type of experts and router; None keeps the stored one.
        device: Where all parts run: `cpu`, `cuda` or `auto`. It is looked for when the first part
            loads, so that a machine without it can read the facts.
        offload: Keep at most two experts on the device, the ones used last. An expert that
            returns is read again from the page cache, or the disk.

    Raises:
        ConfigError: if `dtype` is not allowed.
    """

    def __init__(
        self,
        parts: Mapping[str, VerifiedFolder],
        facts: BundleFacts,
        *,
        history: History = EXPORTED,
        defaults: Mapping[str, int] = MappingProxyType({}),
        dtype: Dtype | None = None,
        device: str = "cpu",
        offload: bool = False,
    ) -> None:
        if dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype={dtype!r} is not allowed: {', '.join(DTYPES)} or None")
        super().__init__(parts, facts, history=history, defaults=defaults)
        self.offload, self._device_name = offload, device
        self._dtype = None if dtype is None else DTYPES[dtype]
        self._experts = {
            name: StoredModel(Expert, parts[name], defaults=defaults) for name in self._expert_names
        }
        self._router = StoredModel(Router, parts["router"], defaults=defaults)
        most = MAX_RESIDENT if offload else self.num_models
        self._adapters: dict[str, LoRA] = {}
        self._resident = _Resident(self._load_expert, self._adapters, most)

    # A model keeps its own: no document is read twice.
    def _expert_config(self, name: str) -> ExpertConfig:
        config: ExpertConfig = self._experts[name].config
        return config

    def _router_config(self) -> RouterConfig:
        config: RouterConfig = self._router.config
        return config

    def expert(self, index: int, lora: str | None = None) -> Expert:
        """Return expert `index`, or the last resort, with one of its adapters or as it is.

        Raises:
            BundleError: if its configuration or weights do not fit.
        """
        if lora is not None and self.loras[lora] != index:
            raise ValueError(f"lora={lora!r} is not an adapter of expert {index}")
        return self._resident.get(index, lora)

    def mixed_expert(self, index: int) -> Expert:
        """Return expert `index` for batches of which each sample names its adapter, or none.

        Only those that `mixes` allows: see `models.lora.adapted_samples`.
        """
        return self._resident.get_mixed(index)

    def mixes(self, lora: str | None) -> bool:
        """Return whether samples with this adapter can be in a batch with others.

        A merged one has weights of its own.
        """
        return lora is None or not self._adapters[lora].merged

    def add_lora(
        self,
        name: str,
        path: str,
        *,
        expert: int | None = None,
        merge: bool = False,
        receipt_key: str | None = None,
    ) -> None:
        """Make an adapter known under a name that requests can give; the bundle's files stay.

        Args:
            name: The name.
            path: Path or URI of what `jobs.train_lora` made, or of any folder in PEFT's layout.
            expert: Which expert it is for; None: the one that the folder's receipt or manifest
                names.
            merge: Compute the adapted weights once, rather than both products at each step: as
                fast as without an adapter, but the targeted weights are in memory twice.
            receipt_key: For an adapter that was bought through ZKLoRA: your public key, in
                hexadecimal, which signs the receipts of your purchases.

        Raises:
            ConfigError: if there is one of that name.
            BundleError: if no expert is given or known, or the adapter does not fit that expert.
            ArtifactError: if a file is missing, damaged, or not the published one.
            ReceiptError: if the adapter was bought, and its receipt is not signed by that key, is
                not OPENED, or is for other weights or another expert; or if a key is given, and
                there is no receipt.
        """
        if name in self.loras:
            raise ConfigError(f"lora={name!r} is not allowed: there is one of that name already")
        self._adapters[name] = read_lora(
            path,
            self.expert_configs,
            lambda index: self.weights_digest(f"expert_{index}"),
            expert=expert,
            merged=merge,
            receipt_key=receipt_key,
        )
        self.loras[name] = self._adapters[name].expert

    def holds(self, index: int) -> bool:
        """Return whether expert `index` is loaded."""
        return index in self._resident

    # Parts load when sampling first asks for them, in inference mode; tensors made in it could
    # never take part in training, of a LoRA for example.
    @torch.inference_mode(False)
    def _load_expert(self, index: int) -> Expert:
        _ = self.expert_configs
        return list(self._experts.values())[index].load(self.device, self._dtype)

    @cached_property
    def device(self) -> torch.device:
        """Where the parts run; raises ConfigError if this machine does not have it."""
        return resolve_device(self._device_name)

    @cached_property
    @torch.inference_mode(False)
    def router(self) -> Router:
        """The router; raises BundleError if it does not fit the experts."""
        _ = self.router_config
        return self._router.load(self.device, self._dtype)

    @cached_property
    @torch.inference_mode(False)
    def codec(self) -> Codec:
        """The codec between pictures and latents; raises BundleError if it does not fit."""
        name = "vae" if "vae" in self.parts else "codec"
        codec = load_codec(self.parts[name], self.facts.picture_size)
        if codec.latent_shape != self.latent_shape:
            raise BundleError(
                f"{name}/: latents of shape {codec.latent_shape}, "
                f"but the router reads {self.latent_shape}"
            )
        return codec.to(self.device)

    @cached_property
    @torch.inference_mode(False)
    def text_encoder(self) -> TextEncoder:
        """The text encoder; raises BundleError if it is damaged."""
        text_encoder = self.parts[TEXT_ENCODER]
        # Only CLIP's tokenizer has a folder of its own.
        tokenizer = self.parts.get(TOKENIZER, text_encoder)
        return load_text_encoder(text_encoder, tokenizer).to(self.device)

    @cached_property
    def null_text(self) -> TextConditioning:
        """The encoded empty string, a batch of one: what guidance subtracts.

        Raises:
            BundleError: if the experts or the router cannot read what the text encoder writes.
        """
        text = self.encode_text([""])
        width = text.text_embeddings.shape[2]
        for name, config in self._configs.items():
            if config.text_embed_dim != width:
                raise BundleError(
                    f"{name}/{MODEL_CONFIG}: text_embed_dim={config.text_embed_dim}, "
                    f"but the text encoder has {width}"
                )
        router_width = self.router_config.text_embed_dim
        if router_width not in (0, text.pooled_text.shape[1]):
            raise BundleError(
                f"router/{MODEL_CONFIG}: text_embed_dim={router_width}, "
                f"but the text encoder has {text.pooled_text.shape[1]}"
            )
        return text

    def num_parameters(self) -> tuple[tuple[int, ...], int]:
        """Return the number of parameters of every expert, and of the router."""
        models = tuple(expert.num_parameters() for expert in self._experts.values())
        return models[: self.num_experts], self._router.num_parameters()

    def check_headers(self) -> None:
        """Compare every model of a local bundle with its weights' header; no tensor is read.

        Of codec and text encoder, which are compared when they load, it must be one at all.

        Raises:
            BundleError: naming the file, and the tensor that does not fit.
        """
        for expert in self._experts.values():
            expert.check_header(self._dtype)
        self._router.check_header(self._dtype)
        for name, weights in ENCODER_WEIGHTS.items():
            if name in self.parts:
                folder = self.parts[name].folder
                read_header(folder.local_path / weights, f"{folder.uri}/{weights}")

    @cached_property
    def texts(self) -> Texts:
        """What the text encoder makes of prompts; raises BundleError if it is damaged."""
        return Texts(self.text_encoder)

    def encode_text(self, prompts: Sequence[str]) -> TextConditioning:
        """Return the conditioning of some prompts, on the CPU: of each what it gets alone.

        A seed must mean the same picture in any batch, so all that draws encodes its text here.
        """
        return self.texts.encode(prompts)


class _Resident:
    """The loaded experts; the least recently used is dropped before one too many loads.

    With an expert go its adapted views, which hold its weights too.
    """

    def __init__(self, load: Callable[[int], Expert], loras: Mapping[str, LoRA], most: int) -> None:
        self._load, self._loras, self._most = load, loras, most
        self._experts: OrderedDict[int, dict[str | tuple[str, ...] | None, Expert]] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._experts

    def get(self, index: int, lora: str | None) -> Expert:
        with self._lock:
            views = self._views(index)
            if lora is not None and lora not in views:
                views[lora] = self._loras[lora].adapt(views[None])
            return views[lora]

    def get_mixed(self, index: int) -> Expert:
        with self._lock:
            views = self._views(index)
            expert = views[None]
            loras = {
                name: lora
                for name, lora in self._loras.items()
                if lora.expert == index and not lora.merged
            }
            if not loras:
                return expert
            names = tuple(loras)  # another view once an adapter has been added
            if names not in views:
                for former in [name for name in views if isinstance(name, tuple)]:
                    del views[former]
                with torch.inference_mode(False):
                    adapters = {name: lora.beside(expert) for name, lora in loras.items()}
                    views[names] = attach_all(expert, adapters)
            return views[names]

    def _views(self, index: int) -> dict[str | tuple[str, ...] | None, Expert]:
        if index not in self._experts:
            while len(self._experts) >= self._most:
                self._experts.popitem(last=False)
            self._experts[index] = {None: self._load(index)}
        self._experts.move_to_end(index)
        return self._experts[index]


def load_expert(part: VerifiedFolder) -> Expert:
    """Return the expert in a folder; raises BundleError if its weights do not fit its config."""
    return StoredModel(Expert, part).load(torch.device("cpu"))
