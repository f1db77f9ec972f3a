"""The configuration of a run: `load("quickstart", ["training.steps=50"])` returns a typed tree.

Unknown keys, wrong types and values that are not allowed are refused with the allowed ones.
"""

from paris_ray.config.checks import check, check_distillation
from paris_ray.config.conversion import (
    digest,
    expert_setup,
    from_dict,
    identity,
    to_dict,
    to_yaml,
)
from paris_ray.config.corpus import PATH_KINDS, ClusterConfig, CorpusConfig
from paris_ray.config.distillation import DistillationConfig, Objective
from paris_ray.config.encoders import CodecConfig, FeaturesConfig, PoolConfig, TextConfig
from paris_ray.config.evaluation import (
    QUALITIES,
    EvaluationConfig,
    Preset,
    SamplingConfig,
    SolverName,
    TimeGrid,
)
from paris_ray.config.federation import FederationConfig
from paris_ray.config.filters import FILTERS, SCORES, ClipConfig, FiltersConfig
from paris_ray.config.fleet import FleetConfig, GpuConfig, Stage
from paris_ray.config.loading import (
    load,
    load_lora,
    local_paths,
    packaged_configs,
    packaged_recipes,
    read_values,
    recipe_overrides,
    run_folder,
    with_absolute_paths,
    with_fleet,
    with_overrides,
)
from paris_ray.config.lora import LoRAConfig, LoRARun
from paris_ray.config.models import (
    MAX_EXPERTS,
    MAX_TEXT_WIDTH,
    MODEL_LIMITS,
    OFF_IN_MODELS,
    PRESETS,
    Dtype,
    ExpertConfig,
    RouterConfig,
    is_released,
    unlike_fields,
)
from paris_ray.config.recipes import HiddenOptimizer, RecipeConfig, aligned_block, synced_blocks
from paris_ray.config.section_checks import check_model, check_place
from paris_ray.config.sections import RESOURCE_KEYS, Config
from paris_ray.config.training import Precision, TrainingConfig

__all__ = [
    "FILTERS",
    "PATH_KINDS",
    "MAX_EXPERTS",
    "MAX_TEXT_WIDTH",
    "MODEL_LIMITS",
    "OFF_IN_MODELS",
    "PRESETS",
    "QUALITIES",
    "RESOURCE_KEYS",
    "SCORES",
    "ClipConfig",
    "ClusterConfig",
    "CodecConfig",
    "Config",
    "CorpusConfig",
    "DistillationConfig",
    "Dtype",
    "EvaluationConfig",
    "ExpertConfig",
    "FeaturesConfig",
    "FederationConfig",
    "FiltersConfig",
    "FleetConfig",
    "GpuConfig",
    "LoRAConfig",
    "LoRARun",
    "Objective",
    "PoolConfig",
    "HiddenOptimizer",
    "Precision",
    "Preset",
    "RecipeConfig",
    "RouterConfig",
    "SamplingConfig",
    "SolverName",
    "Stage",
    "TextConfig",
    "TimeGrid",
    "TrainingConfig",
    "aligned_block",
    "check",
    "check_distillation",
    "check_model",
    "check_place",
    "digest",
    "expert_setup",
    "from_dict",
    "identity",
    "is_released",
    "load",
    "load_lora",
    "local_paths",
    "packaged_configs",
    "packaged_recipes",
    "read_values",
    "recipe_overrides",
    "run_folder",
    "synced_blocks",
    "to_dict",
    "to_yaml",
    "unlike_fields",
    "with_absolute_paths",
    "with_fleet",
    "with_overrides",
]
