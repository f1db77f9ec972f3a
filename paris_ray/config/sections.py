"""One tree of frozen dataclasses: every number of a run and its default."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from paris_ray.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]

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
        "sample_every",
        "tensorboard",
        "accumulation_steps",
        "gradient_checkpointing",
        "compile",
        "prefetch",
        "ema_device",
        "labels",
        "fallback_labels",
        "accelerator_type",
        "init_from",  # a place; the digest of the weights there counts
    }
)

# (hidden_size, num_layers, num_heads) of the published DiT sizes; all have patch_size 2.
PRESETS = {
    "S/2": (384, 12, 6),
    "B/2": (768, 12, 12),
    "L/2": (1024, 24, 16),
    "XL/2": (1152, 28, 16),
}

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
MAX_EXPERTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Which captioned images to read, and what counts as a bad row."""

    kind: Literal["openmoji", "image_folder", "parquet", "webdataset"] = "openmoji"
    path: str | None = None  # folder, or folder of .parquet / .tar files; null for openmoji
    image_size: int = 32  # pixels; the shorter side is resized, then the centre is cropped
    resize: Literal["lanczos", "adm"] = "lanczos"  # adm: halve with a box, then bicubic, as DiT
    horizontal_flip: bool = False  # also encode the mirror image; training draws one of the two
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

    kind: Literal["minilm", "clip", "open_clip"] = "minilm"
    # minilm: a local folder; null: the packaged all-MiniLM-L6-v2. clip: a local folder or hub name
    # such as openai/clip-vit-large-patch14. open_clip: a tag such as openai, or a local path.
    path: str | None = None
    model: str = "ViT-L-14"  # open_clip architecture
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """The image model whose features are clustered."""

    kind: Literal["open_clip", "timm"] = "open_clip"
    model: str = "paris-tiny"  # architecture; paris-tiny, for open_clip, ships with this package
    # A local folder or file, an open_clip tag or, for timm, a hub name; null: train on the corpus
    checkpoint: str | None = None
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

    kind: Literal["patch_pca", "autoencoder_kl"] = "patch_pca"
    path: str | None = None  # autoencoder_kl: local folder or hub name (stabilityai/sd-vae-ft-mse)
    posterior: Literal["mode", "sample"] = "mode"  # autoencoder_kl: its mode, or one recorded draw
    patch_size: int = 8  # pixels a latent pixel
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
    text_padding_mask: bool = False  # cross-attention skips padding; the release attends to it
    layer_norm_eps: float = 1e-6
    prediction: Literal["velocity", "preconditioned", "epsilon"] = "velocity"
    # Of an expert with prediction=epsilon (HDDM, arXiv 2603.06741):
    cosine_offset: float = 0.0  # s of the cosine schedule (arXiv 2102.09672); 0: the pure cosine
    min_alpha: float = 0.01  # least 1 - t to divide by
    x0_clamp: float | None = 20.0  # bound of the estimated clean latents; null: no guard

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ExpertConfig":
        """Return the architecture of a published size.

        Args:
            name: `S/2`, `B/2`, `L/2` or `XL/2` (DiT, arXiv 2212.09748, table 1).
            changes: Other fields.

        Raises:
            ConfigError: if there is no such size.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r} is not allowed: one of {', '.join(PRESETS)}")
        hidden_size, num_layers, num_heads = PRESETS[name]
        size = cls(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        return replace(size, **changes)


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
    head_activation: Literal["identity", "gelu"] = "identity"  # after the LayerNorm of the head
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training loop. Steps are optimiser steps; progress is counted in samples seen."""

    steps: int = 600
    epochs: float | None = None  # of the expert's own shard; if given, it replaces steps
    batch_size: int = 64  # samples of an optimiser step
    accumulation_steps: int = 1  # parts that a batch is cut into to fit the memory
    init_from: str | None = None  # folder of an expert to start from, such as jobs.convert_dit's
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 30
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    decay_share: float = 0.5  # last share of the steps, over which the rate falls
    final_learning_rate_share: float = 0.02
    max_grad_norm: float | None = 1.0  # null: gradients are not clipped
    ema_decay: float = 0.995
    ema_device: Literal["model", "cpu"] = "model"
    text_dropout: float = 0.1
    text_noise: float = 0.0  # standard deviation of noise added to sentence vectors
    t_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    t_logit_mean: float = 0.3
    t_logit_std: float = 1.0
    t_one_share: float = 0.1  # share of each batch at t = 1, pure noise
    precision: Precision = "auto"  # auto: bfloat16 autocast where the device has it in hardware
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks
    prefetch: int = 2  # batches made ready ahead; 0: none
    device: str = "auto"  # auto: a GPU if num_gpus reserves one, else the CPU
    threads: int = 1  # torch threads of one training process, never taken from num_cpus
    log_every: int = 25  # steps
    checkpoint_every: int = 200  # steps
    sample_every: int | None = None  # steps between sample grids; null: at the end alone
    tensorboard: bool = False  # also write TensorBoard event files
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    accelerator_type: str | None = None  # Ray's name of a GPU, such as L40S
    labels: dict[str, str] = field(default_factory=dict)  # Ray labels that the node must have
    fallback_labels: list[dict[str, str]] = field(default_factory=list)  # else these, in order
    max_retries: int = 3  # of a task whose process or node died


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Defaults of image generation; written into the bundle."""

    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    routing: str = "top-2"
    router_temperature: float = 1.0  # divides the router's logits


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Caption accuracy over the training captions."""

    max_captions: int | None = None  # captions to draw; null: all
    max_gallery: int | None = None  # corpus pictures to compare with; null: all
    dtype: Literal["float32", "bfloat16"] | None = None  # of experts and router; null: as stored
    batch_size: int = 64
    num_tasks: int = 2
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """Some equal GPUs of a fleet."""

    name: str = "A40"
    count: int = 8
    memory_gb: float = 48.0
    peak_tflops: float = 149.7  # dense bfloat16, as the maker states it
    mfu: float = 0.4  # share of the peak that training is expected to reach
    dollars_per_hour: float = 0.4  # of one GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """What `--dry-run` plans with; nothing else reads it."""

    num_images: int = 2_000  # rows of the corpus
    gpus: list[GpuConfig] = field(default_factory=list)


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
    # What differs for single experts, by number: `3: {expert: {...}, training: {...}}`
    experts: dict[str, Any] = field(default_factory=dict)
    fleet: FleetConfig = field(default_factory=FleetConfig)
