"""What a bundle tells of itself: all but what is computed with its weights."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

from paris_ray.artifacts import VerifiedFolder, file_sha256
from paris_ray.cluster_facts import ClusterFacts, read_clusters
from paris_ray.config import ExpertConfig, RouterConfig
from paris_ray.config.release import ModelConfig, read_document
from paris_ray.errors import BundleError, ConfigError, ParisError
from paris_ray.model_folder.admissions import (
    ADMISSIONS,
    SignedAdmission,
    admission_names,
    read_admission,
    read_verdict,
)
from paris_ray.model_folder.facts import BundleFacts
from paris_ray.model_folder.history import EXPORTED, History
from paris_ray.run import CLUSTERS, EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS, SEED


class BundleDescription:
    """Experts, router, codec and text encoder that belong together, as their documents say.

    Args:
        parts: By folder name: `expert_0` ... `expert_K-1`, `router`, `vae` or `codec`,
            `text_encoder` and, for CLIP, `tokenizer`; `seed`, `clusters` and `admissions`, if there
            are any.
        facts: What the bundle says of itself.
        history: What became of its experts.
        defaults: Values of fields that the models' `config.json` do not tell.
        loras: Number of the expert of each adapter, by its name.
    """

    def __init__(
        self,
        parts: Mapping[str, VerifiedFolder],
        facts: BundleFacts,
        *,
        history: History = EXPORTED,
        defaults: Mapping[str, int] = MappingProxyType({}),
        loras: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.parts, self.facts, self.history = parts, facts, history
        self.loras = dict(loras)
        self.num_experts = sum(name.startswith("expert_") for name in parts)
        self._defaults = defaults
        names = [f"expert_{k}" for k in range(self.num_experts)]
        self._expert_names = [*names, SEED] if SEED in parts else names

    @property
    def num_models(self) -> int:
        """How many experts there are with the last resort, if there is one."""
        return len(self._expert_names)

    @property
    def last_resort(self) -> int | None:
        """The number, after all others, of the seed that the experts started from; None: no seed.

        It draws in the place of an expert that is lost: the router does not know of it.
        """
        return self.num_experts if SEED in self.parts else None

    def check_lora(self, name: str | None) -> None:
        """Raise ParisError, with the names that there are, unless an adapter has this one."""
        if name is not None and name not in self.loras:
            allowed = ", ".join(map(repr, self.loras)) or "the bundle has none"
            raise ParisError(f"lora={name!r} is not allowed: {allowed}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one picture's latents."""
        return _latent_shape(self.router_config)

    @property
    def expert_configs(self) -> tuple[ExpertConfig, ...]:
        """The architectures; raises BundleError if one reads other latents than the router."""
        return tuple(self._configs.values())[: self.num_experts]

    @cached_property
    def _configs(self) -> dict[str, ExpertConfig]:
        """The same by part, the seed's with them."""
        configs = {name: self._expert_config(name) for name in self._expert_names}
        for name, config in configs.items():
            shape = _latent_shape(config)
            if shape != self.latent_shape:
                raise BundleError(
                    f"{name}/{MODEL_CONFIG}: latents of shape {shape}, "
                    f"but the router reads {self.latent_shape}"
                )
        return configs

    @cached_property
    def router_config(self) -> RouterConfig:
        """The router's architecture; raises BundleError if it is for another number of experts."""
        config = self._router_config()
        if config.num_experts != self.num_experts:
            raise BundleError(
                f"router/{MODEL_CONFIG}: num_experts={config.num_experts}, "
                f"but the bundle has {self.num_experts} experts"
            )
        return config

    @cached_property
    def clusters(self) -> list[ClusterFacts]:
        """What each expert was trained on; empty if the bundle does not tell.

        Raises:
            BundleError: if the file that tells is damaged.
        """
        part = self.parts.get(CLUSTERS)
        return [] if part is None else read_clusters(part, self.num_experts)

    @cached_property
    def admissions(self) -> dict[int, SignedAdmission]:
        """The verdicts on experts that came from strangers, by the expert's number.

        Raises:
            BundleError: if one is damaged, or is one of other weights than the expert's.
        """
        part = self.parts.get(ADMISSIONS)
        if part is None:
            return {}
        verdicts = {}
        for name in admission_names(part.folder, self.num_experts):
            expert = name.removesuffix(".json")
            where = f"{part.folder.uri}/{name}"
            verdict = read_admission(read_verdict(part, name), where, self.parts[expert])
            verdicts[int(expert.removeprefix("expert_"))] = verdict
        return dict(sorted(verdicts.items()))

    def weights_digest(self, part: str) -> str:
        """Return the SHA-256 of the weights of an expert or the router, in hexadecimal.

        It is the published one, or computed where nobody published any, which reads the file.

        Args:
            part: `router`, `seed`, or `expert_` and a number.
        """
        name = ROUTER_WEIGHTS if part == "router" else EXPERT_WEIGHTS
        source = self.parts[part]
        published = (source.digests or {}).get(name)
        return published or file_sha256(source.folder, name)

    def _expert_config(self, name: str) -> ExpertConfig:
        return read_config(ExpertConfig, self.parts[name], self._defaults)

    def _router_config(self) -> RouterConfig:
        return read_config(RouterConfig, self.parts["router"], self._defaults)


def read_config(
    kind: type[ModelConfig], part: VerifiedFolder, defaults: Mapping[str, int]
) -> ModelConfig:
    """Return the architecture in a model's folder.

    Args:
        kind: `ExpertConfig` or `RouterConfig`.
        part: The folder.
        defaults: Values of fields that its `config.json` does not tell.

    Raises:
        BundleError: naming the field that is missing or not allowed.
    """
    where = f"{part.folder.uri}/{MODEL_CONFIG}"
    try:
        return read_document(kind, part.read_json(MODEL_CONFIG), where, defaults=defaults)
    except ConfigError as error:
        raise BundleError(str(error)) from None


def _latent_shape(config: ExpertConfig | RouterConfig) -> tuple[int, int, int]:
    return config.in_channels, config.input_size, config.input_size
