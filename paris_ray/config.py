"""One tree of frozen dataclasses: every number of a run, its default, and what is allowed.

`load("quickstart", ["training.steps=50"])` reads YAML, applies `key=value` overrides and returns a
typed tree. Unknown keys and wrong types are refused with the allowed ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from paris_ray.artifacts import absolute_uri, canonical_json, sha256_hex
from paris_ray.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]
Section = TypeVar("Section")

# Keys that say where, how fast and how leniently a stage runs, not what it makes.
RESOURCE_KEYS = frozenset(
    {
        "pool",
        "max_bad_share",
        "num_cpus",
        "num_gpus",
        "num_tasks",
        "threads",
        "device",
        "max_retries",
        "log_every",
        "checkpoint_every",
    }
)


# Far above any published expert; a bundle from a stranger must not make us allocate terabytes.
MODEL_LIMITS = {
    "input_size": 1024,
    "patch_size": 64,
    "in_channels": 4096,
    "hidden_size": 16_384,
    "num_layers": 256,
    "num_heads": 256,
}
MAX_TEXT_WIDTH = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Which captioned images to read, and what counts as a bad row."""

    kind: Literal["openmoji", "image_folder", "parquet", "webdataset"] = "openmoji"
    path: str | None = None  # folder, or folder of .parquet / .tar files; null for openmoji
    image_size: int = 32  # pixels; the shorter side is resized, then the centre is cropped
    limit: int | None = None  # keep only the first rows, in corpus order
    rows_per_shard: int = 64  # the unit of reading, of resuming and of one output file
    caption_templates: list[str] = field(default_factory=lambda: ["{}"])  # first = the caption
    attribution: str | None = None  # licence line to show beside pictures; openmoji has its own
    max_pixels: int = 64_000_000  # a larger image is taken for a decompression bomb
    max_bad_share: float = 0.1  # refuse to go on if more than this share is quarantined


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """The Ray Data actors of one encoder."""

    num_actors: int = 1
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text encoder."""

    kind: Literal["minilm"] = "minilm"
    path: str | None = None  # local model folder; null: the packaged all-MiniLM-L6-v2
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """The open_clip image model whose features are clustered."""

    model: str = "paris-tiny"  # open_clip model name; paris-tiny ships with this package
    checkpoint: str | None = None  # local folder, file or open_clip tag; null: train on the corpus
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-3
    max_images: int = 20_000  # the first valid images train the model and fit the codec
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """The codec between pictures and latents."""

    kind: Literal["patch_pca"] = "patch_pca"
    patch_size: int = 8  # pixels
    num_components: int = 96  # latent channels
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Hierarchical spherical k-means: fine centres, then balanced coarse clusters."""

    num_clusters: int = 8
    num_fine: int = 128
    iterations: int = 50
    max_imbalance: float = 1.25  # the largest cluster may have this multiple of rows / clusters
    num_cpus: float = 1.0
    threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Architecture of one expert (Paris, arXiv 2510.03434; DiT, arXiv 2212.09748)."""

    input_size: int = 32  # height and width of the latents
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    text_embed_dim: int = 768
    text_injection: Literal["cross_attention", "spatial"] = "cross_attention"
    text_hidden_size: int = 256  # width of the spatial text projection
    prediction: Literal["velocity", "preconditioned"] = "velocity"
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Architecture of the router: DiT with AdaLN-Zero and a class token."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_experts: int = 8
    text_embed_dim: int = 0  # 0: no text, as the released router
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training loop. Steps are optimiser steps; progress is counted in samples seen."""

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup_steps: int = 30
    decay_share: float = 0.5  # last share of the steps, over which the rate falls linearly
    final_learning_rate_share: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    text_dropout: float = 0.1
    text_noise: float = 0.0  # standard deviation of noise added to text embeddings
    t_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    t_logit_mean: float = 0.3
    t_logit_std: float = 1.0
    t_one_share: float = 0.1  # share of each batch at t = 1, pure noise
    precision: Precision = "auto"  # auto: bfloat16 autocast where the device has it in hardware
    device: str = "auto"
    threads: int = 1  # torch threads of one training process, never taken from num_cpus
    log_every: int = 25  # steps
    checkpoint_every: int = 200  # steps
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_retries: int = 3  # of a task whose process or node died


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Defaults of image generation; written into the bundle."""

    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    routing: str = "top-2"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Caption accuracy over the training captions."""

    max_captions: int | None = None  # null: all
    batch_size: int = 64
    num_tasks: int = 2
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run. `run_dir` is a path or a pyarrow.fs URI that every node can reach."""

    run_dir: str = "runs/quickstart"
    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    text: TextConfig = field(default_factory=TextConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    router_training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def packaged_configs() -> list[str]:
    """Return the names that `load` accepts beside paths."""
    folder = resources.files("paris_ray") / "configs"
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read_yaml(name_or_path: str) -> DictConfig:
    if name_or_path in packaged_configs():
        text = (resources.files("paris_ray") / "configs" / f"{name_or_path}.yaml").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        raise ConfigError(
            f"config={name_or_path!r} is neither a file nor one of {packaged_configs()}"
        )
    loaded = OmegaConf.create(text)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config={name_or_path!r} does not hold a mapping")
    return loaded


def _allowed_keys(full_key: str) -> list[str]:
    """Return the keys allowed beside a refused one."""
    section: Any = Config
    for part in full_key.split(".")[:-1]:
        section = {f.name: f.type for f in fields(section)}.get(part)
    return [f.name for f in fields(section)] if is_dataclass(section) else []


def _explain(error: OmegaConfBaseException) -> ConfigError:
    key = error.full_key or ""
    reason = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        return ConfigError(f"unknown key {key!r}; allowed here: {', '.join(_allowed_keys(key))}")
    return ConfigError(f"{key}: {reason}" if key else reason)


def _require(holds: bool, field_name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{field_name}={value!r} is not allowed: {allowed}")


def _check_training(name: str, training: TrainingConfig) -> None:
    for key in ("steps", "batch_size", "log_every", "checkpoint_every", "threads"):
        value = getattr(training, key)
        _require(value >= 1, f"{name}.{key}", value, "at least 1")
    for key in ("text_dropout", "t_one_share", "decay_share", "ema_decay"):
        value = getattr(training, key)
        _require(0 <= value <= 1, f"{name}.{key}", value, "between 0 and 1")
    _require(training.learning_rate > 0, f"{name}.learning_rate", training.learning_rate, "> 0")


def check_model(name: str, model: ExpertConfig | RouterConfig) -> None:
    """Check an architecture on its own, before anything is allocated for it.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    for key, most in MODEL_LIMITS.items():
        value = getattr(model, key)
        _require(1 <= value <= most, f"{name}.{key}", value, f"between 1 and {most}")
    _require(0 < model.mlp_ratio <= 16, f"{name}.mlp_ratio", model.mlp_ratio, "0 < x <= 16")
    widths = {"text_embed_dim": 0}
    if isinstance(model, ExpertConfig):
        widths = {"text_embed_dim": 1, "text_hidden_size": 1}
    else:
        _require(model.num_experts >= 1, f"{name}.num_experts", model.num_experts, ">= 1")
    for key, least in widths.items():
        value, allowed = getattr(model, key), f"between {least} and {MAX_TEXT_WIDTH}"
        _require(least <= value <= MAX_TEXT_WIDTH, f"{name}.{key}", value, allowed)
    quarters = model.hidden_size % 4 == 0  # sine and cosine of row and column
    _require(quarters, f"{name}.hidden_size", model.hidden_size, "a multiple of 4")
    divisible = model.hidden_size % model.num_heads == 0
    allowed = f"a multiple of num_heads={model.num_heads}"
    _require(divisible, f"{name}.hidden_size", model.hidden_size, allowed)
    allowed = f"a multiple of patch_size={model.patch_size}"
    _require(
        model.input_size % model.patch_size == 0, f"{name}.input_size", model.input_size, allowed
    )


def _check_shapes(config: Config) -> None:
    """Check that experts and router fit the latents that the codec makes."""
    input_size = config.corpus.image_size // config.codec.patch_size
    for name, model in (("expert", config.expert), ("router", config.router)):
        check_model(name, model)
        source = "corpus.image_size / codec.patch_size"
        fits = model.input_size == input_size
        _require(fits, f"{name}.input_size", model.input_size, f"{input_size} = {source}")
        num_components = config.codec.num_components
        fits = model.in_channels == num_components
        allowed = f"{num_components} = codec.num_components"
        _require(fits, f"{name}.in_channels", model.in_channels, allowed)
    num_clusters = config.cluster.num_clusters
    fits = config.router.num_experts == num_clusters
    allowed = f"{num_clusters} = cluster.num_clusters"
    _require(fits, "router.num_experts", config.router.num_experts, allowed)


def _check_corpus(corpus: CorpusConfig) -> None:
    if corpus.kind != "openmoji":
        _require(corpus.path is not None, "corpus.path", None, f"a path for kind={corpus.kind}")
    templates = corpus.caption_templates
    well_formed = templates[:1] == ["{}"] and all(t.count("{}") == 1 for t in templates)
    allowed = "texts with one {} each, the first of them '{}', the caption itself"
    _require(well_formed, "corpus.caption_templates", templates, allowed)
    _require(corpus.image_size >= 8, "corpus.image_size", corpus.image_size, "at least 8 pixels")
    _require(corpus.rows_per_shard >= 1, "corpus.rows_per_shard", corpus.rows_per_shard, ">= 1")
    _require(corpus.limit is None or corpus.limit >= 1, "corpus.limit", corpus.limit, ">= 1, null")
    _require(0 <= corpus.max_bad_share <= 1, "corpus.max_bad_share", corpus.max_bad_share, "0..1")


def _check_codec(codec: CodecConfig, image_size: int) -> None:
    size, count = codec.patch_size, codec.num_components
    divides = size >= 1 and image_size % size == 0
    allowed = f"a divisor of corpus.image_size={image_size}"
    _require(divides, "codec.patch_size", size, allowed)
    most = 3 * size**2
    allowed = f"between 1 and {most}, the values of one patch"
    _require(1 <= count <= most, "codec.num_components", count, allowed)


def _check_cluster(cluster: ClusterConfig) -> None:
    count = cluster.num_clusters
    _require(count >= 1, "cluster.num_clusters", count, "at least 1")
    allowed = f"at least cluster.num_clusters={count}"
    _require(cluster.num_fine >= count, "cluster.num_fine", cluster.num_fine, allowed)
    _require(cluster.max_imbalance >= 1, "cluster.max_imbalance", cluster.max_imbalance, ">= 1")


def check(config: Config) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    _check_corpus(config.corpus)
    _check_codec(config.codec, config.corpus.image_size)
    _check_cluster(config.cluster)
    for key in ("steps", "batch_size", "max_images"):
        value = getattr(config.features, key)
        _require(value >= 1, f"features.{key}", value, "at least 1")
    _check_training("training", config.training)
    _check_training("router_training", config.router_training)
    _check_shapes(config)
    for key in ("batch_size", "num_tasks", "threads"):
        value = getattr(config.evaluation, key)
        _require(value >= 1, f"evaluation.{key}", value, "at least 1")
    steps = config.sampling.num_inference_steps
    _require(steps >= 1, "sampling.num_inference_steps", steps, "at least 1")


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Return the typed configuration of a YAML file with `key=value` overrides.

    Args:
        name_or_path: A packaged name (`quickstart`) or the path of a YAML file.
        overrides: For example `["training.steps=50", "corpus.kind=image_folder"]`.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value that is not allowed.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Config),
            _read_yaml(name_or_path),
            OmegaConf.from_dotlist(list(overrides)),
        )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error) from None
    except yaml.YAMLError as error:
        where = f"config={name_or_path!r} or an override"
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def from_dict(section: type[Section], values: object, source: str) -> Section:
    """Return one configuration section from parsed JSON that may come from a stranger.

    Args:
        section: The dataclass.
        values: The parsed document.
        source: What to call the document in an error.

    Raises:
        ConfigError: for an unknown key, a wrong type or an interpolation.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source} does not hold a mapping")
    if "${" in str(values):  # OmegaConf would expand it, for example to environment variables
        raise ConfigError(f"{source} holds an interpolation, which is not allowed here")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(section), values)
        typed = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        allowed = ", ".join(to_dict(section))
        raise ConfigError(
            f"{source}: unknown key {error.full_key!r}; allowed here: {allowed}"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(typed, section)
    return typed


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(section: Any) -> dict[str, Any]:
    """Return a configuration section as plain JSON values."""
    container = OmegaConf.to_container(OmegaConf.structured(section))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _without_resources(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_resources(v) for k, v in value.items() if k not in RESOURCE_KEYS}


def identity(section: Any) -> dict[str, Any]:
    """Return what of a section decides results: all but `RESOURCE_KEYS`.

    Where and how fast a stage runs does not count: a run may be continued on other machines.
    """
    values: dict[str, Any] = _without_resources(to_dict(section))
    return values


def digest(config: Config, *sections: str) -> str:
    """Return the digest of the named top-level sections, which identify a stage's result."""
    tree = identity(config)
    return sha256_hex(canonical_json({name: tree[name] for name in sections}))


def local_paths(config: Config) -> dict[str, str]:
    """Return every path that a configuration gives, by its key."""
    paths = {
        "run_dir": config.run_dir,
        "corpus.path": config.corpus.path,
        "text.path": config.text.path,
        "features.checkpoint": config.features.checkpoint,
    }
    # A checkpoint may also be an open_clip tag, which is no path.
    if not Path(config.features.checkpoint or "").exists():
        del paths["features.checkpoint"]
    return {key: path for key, path in paths.items() if path is not None}


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with paths that mean the same in every process."""
    for key, path in local_paths(config).items():
        section, _, name = key.rpartition(".")
        absolute: dict[str, Any] = {name: absolute_uri(path)}
        if section:
            absolute = {section: replace(getattr(config, section), **absolute)}
        config = replace(config, **absolute)
    return config


def run_folder(config: Config) -> str:
    """Return `run_dir` in the form that means the same on every node."""
    return absolute_uri(config.run_dir)
