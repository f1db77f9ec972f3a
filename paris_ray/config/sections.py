"""The whole tree of a run: every number of it, with its default."""

from dataclasses import dataclass, field
from typing import Any

from paris_ray.config.corpus import ClusterConfig, CorpusConfig
from paris_ray.config.distillation import DistillationConfig
from paris_ray.config.encoders import CodecConfig, FeaturesConfig, TextConfig
from paris_ray.config.evaluation import EvaluationConfig, SamplingConfig
from paris_ray.config.federation import FederationConfig
from paris_ray.config.fleet import FleetConfig
from paris_ray.config.models import ExpertConfig, RouterConfig
from paris_ray.config.training import TrainingConfig

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
        "max_hours",
        "max_dollars",
        "dollars_per_hour",
        "log_every",
        "checkpoint_every",
        "validate_every",
        "sample_every",
        "tensorboard",
        "wandb",
        "mlflow",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run. `run_dir` is a path or a pyarrow.fs URI that every node can reach."""

    run_dir: str = "runs/quickstart"
    # run_dir of a run whose encoders and embeddings are read, instead of own ones being made: many
    # runs of one corpus need it encoded once
    prepared_from: str | None = None
    federation: FederationConfig = field(default_factory=FederationConfig)
    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    text: TextConfig = field(default_factory=TextConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    # One model trained on everything, from which all experts start; steps=0: none, as Paris has it
    seed_training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=0))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    router_training: TrainingConfig = field(default_factory=TrainingConfig)
    # One expert from all of them (jobs.distil, which the pipeline does not run)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    distil_training: TrainingConfig = field(default_factory=TrainingConfig)
    few_step_training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # What differs for single experts, by number: `3: {expert: {...}, training: {...}}`
    experts: dict[str, Any] = field(default_factory=dict)
    fleet: FleetConfig = field(default_factory=FleetConfig)
