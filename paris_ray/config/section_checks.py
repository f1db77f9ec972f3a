"""What the types of one section of a configuration cannot express."""

import math
import re

from paris_ray.config.corpus import (
    COLUMN_NAMES,
    PACKAGED_KINDS,
    PATH_KINDS,
    ClusterConfig,
    CorpusConfig,
)
from paris_ray.config.encoders import CodecConfig
from paris_ray.config.evaluation import QUALITIES, EvaluationConfig, SamplingConfig
from paris_ray.config.filter_checks import refused_filters
from paris_ray.config.models import (
    MAX_EXPERTS,
    MAX_TEXT_WIDTH,
    MODEL_LIMITS,
    ExpertConfig,
    RouterConfig,
)
from paris_ray.config.recipes import refused_recipe
from paris_ray.config.training import TrainingConfig
from paris_ray.errors import ConfigError
from paris_ray.storage import holds_keys, without_keys

FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def require(holds: bool, field_name: str, value: object, allowed: str) -> None:
    """Raise ConfigError, naming field, value and what is allowed, unless something holds."""
    if not holds:
        raise ConfigError(f"{field_name}={value!r} is not allowed: {allowed}")


def check_training(
    name: str, training: TrainingConfig, corpus: CorpusConfig, expert: ExpertConfig | None = None
) -> None:
    """Check how a model is trained.

    Args:
        name: Of the section.
        training: What it says.
        corpus: Whose captions are trained on.
        expert: What learns from data in it; None: something else learns.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    for field, value, allowed in refused_recipe(training, expert):
        require(False, f"{name}.{field}", value, allowed)
    counts = ("batch_size", "accumulation_steps", "log_every", "checkpoint_every")
    least = 0 if name == "seed_training" else 1
    require(training.steps >= least, f"{name}.steps", training.steps, f"at least {least}")
    for key in (*counts, "validate_every", "threads"):
        value = getattr(training, key)
        require(value >= 1, f"{name}.{key}", value, "at least 1")
    for key in ("epochs", "sample_every", "max_hours", "max_dollars"):
        value = getattr(training, key)
        require(value is None or 0 < value < math.inf, f"{name}.{key}", value, "> 0, or null")
    parts, allowed = training.accumulation_steps, f"a divisor of batch_size={training.batch_size}"
    require(training.batch_size % parts == 0, f"{name}.accumulation_steps", parts, allowed)
    shares = ("text_dropout", "t_one_share", "decay_share", "final_learning_rate_share")
    for key in (*shares, "ema_decay"):
        value = getattr(training, key)
        require(0 <= value <= 1, f"{name}.{key}", value, "between 0 and 1")
    for key in ("learning_rate", "adam_eps", "max_grad_norm"):
        value = getattr(training, key)
        allowed = "> 0, or null to clip nothing" if key == "max_grad_norm" else "> 0"
        require(value is None or 0 < value < math.inf, f"{name}.{key}", value, allowed)
    least_zero = ("weight_decay", "warmup_steps", "text_noise", "t_logit_std", "prefetch")
    for key in (*least_zero, "num_cpus", "num_gpus", "max_retries"):
        value = getattr(training, key)
        require(0 <= value < math.inf, f"{name}.{key}", value, "at least 0")
    price, allowed = training.dollars_per_hour, f"at least 0; {name}.max_dollars needs one"
    priced = training.max_dollars is None if price is None else 0 <= price < math.inf
    require(priced, f"{name}.dollars_per_hour", price, allowed)
    check_place(f"{name}.init_from", training.init_from)
    check_place(f"{name}.mlflow", training.mlflow)
    require(training.wandb != "", f"{name}.wandb", training.wandb, "a project, or null")
    betas = training.betas
    require(all(0 <= beta < 1 for beta in betas), f"{name}.betas", betas, "0 <= x < 1")
    weights, count = training.caption_weights, corpus.captions_per_row
    if weights is not None:
        fits = len(weights) == count and min(weights) >= 0 and 0 < sum(weights) < math.inf
        allowed = f"numbers >= 0, not all of them 0, as many as corpus.captions_per_row={count}"
        require(fits, f"{name}.caption_weights", weights, allowed)


def check_model(name: str, model: ExpertConfig | RouterConfig) -> None:
    """Check an architecture on its own, before anything is allocated for it.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    for key, most in MODEL_LIMITS.items():
        value = getattr(model, key)
        require(1 <= value <= most, f"{name}.{key}", value, f"between 1 and {most}")
    require(0 < model.mlp_ratio <= 16, f"{name}.mlp_ratio", model.mlp_ratio, "0 < x <= 16")
    eps = model.layer_norm_eps
    require(0 < eps <= 1, f"{name}.layer_norm_eps", eps, "0 < x <= 1")
    widths = {"text_embed_dim": 0}
    if isinstance(model, ExpertConfig):
        widths = {"text_embed_dim": 1, "text_hidden_size": 1}
        _check_epsilon(name, model)
        rotary = model.blocks == "released" or model.hidden_size // model.num_heads % 4 == 0
        allowed = "released, unless hidden_size / num_heads is a multiple of 4"
        require(rotary, f"{name}.blocks", model.blocks, allowed)
        adapter, silent = model.text_adapter, model.text_injection == "spatial"
        allowed = "false for text_injection=spatial, which reads no tokens"
        require(not (adapter and silent), f"{name}.text_adapter", adapter, allowed)
    else:
        count, allowed = model.num_experts, f"between 1 and {MAX_EXPERTS}"
        require(1 <= count <= MAX_EXPERTS, f"{name}.num_experts", count, allowed)
    for key, least in widths.items():
        value, allowed = getattr(model, key), f"between {least} and {MAX_TEXT_WIDTH}"
        require(least <= value <= MAX_TEXT_WIDTH, f"{name}.{key}", value, allowed)
    quarters = model.hidden_size % 4 == 0  # sine and cosine of row and column
    require(quarters, f"{name}.hidden_size", model.hidden_size, "a multiple of 4")
    divisible = model.hidden_size % model.num_heads == 0
    allowed = f"a multiple of num_heads={model.num_heads}"
    require(divisible, f"{name}.hidden_size", model.hidden_size, allowed)
    allowed = f"a multiple of patch_size={model.patch_size}"
    require(
        model.input_size % model.patch_size == 0, f"{name}.input_size", model.input_size, allowed
    )


def _check_epsilon(name: str, model: ExpertConfig) -> None:
    offset, alpha, clamp = model.cosine_offset, model.min_alpha, model.x0_clamp
    require(0 <= offset <= 0.1, f"{name}.cosine_offset", offset, "between 0 and 0.1")
    # Sampling begins at t = 1, where nothing else keeps the divisor from 0.
    require(0 < alpha < 1, f"{name}.min_alpha", alpha, "0 < x < 1")
    require(clamp is None or clamp > 0, f"{name}.x0_clamp", clamp, "> 0, or null")


def check_place(name: str, place: str | None) -> None:
    """Raise ConfigError if the location that an option gives holds keys of a store."""
    allowed = (
        "a URI without keys, which would be written into files of the run; stores find theirs in "
        "the environment (AWS_ACCESS_KEY_ID and others)"
    )
    if place is not None and holds_keys(place):
        require(False, name, without_keys(place), allowed)


def check_corpus_path(corpus: CorpusConfig) -> None:
    """Check that pictures are read from where they are, and that none given are left unread."""
    path, is_given = corpus.path, corpus.path is not None
    if corpus.kind in PACKAGED_KINDS:
        allowed = f"kind={corpus.kind} has its own pictures; say corpus.kind={'|'.join(PATH_KINDS)}"
        require(not is_given, "corpus.path", path, allowed)
    else:
        require(is_given, "corpus.path", path, f"a path for kind={corpus.kind}")


def check_corpus(corpus: CorpusConfig) -> None:
    """Check the corpus; raises ConfigError, naming what is not allowed."""
    templates = corpus.caption_templates
    well_formed = templates[:1] == ["{}"] and all(t.count("{}") == 1 for t in templates)
    allowed = "texts with one {} each, the first of them '{}', the caption itself"
    require(well_formed, "corpus.caption_templates", templates, allowed)
    require(corpus.image_size >= 8, "corpus.image_size", corpus.image_size, "at least 8 pixels")
    require(corpus.rows_per_shard >= 1, "corpus.rows_per_shard", corpus.rows_per_shard, ">= 1")
    require(corpus.limit is None or corpus.limit >= 1, "corpus.limit", corpus.limit, ">= 1, null")
    colour, allowed = corpus.background, "red, green and blue, each 0 to 255, such as [255,255,255]"
    is_colour = len(colour) == 3 and all(0 <= channel <= 255 for channel in colour)
    require(is_colour, "corpus.background", colour, allowed)
    for key in ("max_image_bytes", "max_pixels"):
        require(getattr(corpus, key) >= 1, f"corpus.{key}", getattr(corpus, key), "at least 1")
    count = corpus.captions_per_row
    allowed = "between 1 and 64, or null"
    require(count is None or 1 <= count <= 64, "corpus.captions_per_row", count, allowed)
    for key in ("split", "image_column", "caption_column"):
        value = getattr(corpus, key)
        require(value != "", f"corpus.{key}", value, "a name, or null")
    share = corpus.held_out_share
    require(0 <= share < 1, "corpus.held_out_share", share, "0 <= x < 1; 0: no row")
    for key in ("held_out_key", "attributes"):
        _check_labelling(f"corpus.{key}", getattr(corpus, key))
    require(0 <= corpus.max_bad_share <= 1, "corpus.max_bad_share", corpus.max_bad_share, "0..1")
    for name, value, allowed in refused_filters(corpus.filters):
        require(False, f"corpus.filters.{name}", value, allowed)


def _check_labelling(name: str, labelling: str | None) -> None:
    allowed = "names of columns such as object,background, or a regular expression with groups"
    if labelling is None or COLUMN_NAMES.fullmatch(labelling):
        return
    try:
        groups = re.compile(labelling).groups
    except re.error as error:
        raise ConfigError(f"{name}={labelling!r} is not allowed: {allowed} ({error})") from None
    require(groups > 0, name, labelling, allowed)


def check_codec(codec: CodecConfig, image_size: int) -> None:
    """Check the codec; raises ConfigError, naming what is not allowed."""
    size, count = codec.patch_size, codec.num_components
    if codec.kind == "autoencoder_kl":
        require(codec.path is not None, "codec.path", None, "a folder or a hub name for its kind")
    divides = size >= 1 and image_size % size == 0
    allowed = f"a divisor of corpus.image_size={image_size}"
    require(divides, "codec.patch_size", size, allowed)
    most = 3 * size**2
    allowed = f"between 1 and {most}, the values of one patch"
    require(1 <= count <= most, "codec.num_components", count, allowed)


def check_cluster(cluster: ClusterConfig) -> None:
    """Check the clusters; raises ConfigError, naming what is not allowed."""
    count = cluster.num_clusters
    require(count >= 1, "cluster.num_clusters", count, "at least 1")
    allowed = f"at least cluster.num_clusters={count}"
    require(cluster.num_fine >= count, "cluster.num_fine", cluster.num_fine, allowed)
    count = cluster.remove_directions
    require(0 <= count <= 1024, "cluster.remove_directions", count, "between 0 and 1024")
    if cluster.features == "random":
        allowed = "0 for cluster.features=random, which has no features"
        require(count == 0, "cluster.remove_directions", count, allowed)
    share = cluster.shared_share
    require(0 <= share <= 0.5, "cluster.shared_share", share, "between 0 and 0.5")
    require(cluster.max_imbalance >= 1, "cluster.max_imbalance", cluster.max_imbalance, ">= 1")


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check the evaluation; raises ConfigError, naming what is not allowed."""
    for key in ("batch_size", "num_tasks", "threads"):
        value = getattr(evaluation, key)
        require(value >= 1, f"evaluation.{key}", value, "at least 1")
    for key in ("max_captions", "max_gallery"):
        value = getattr(evaluation, key)
        require(value is None or value >= 1, f"evaluation.{key}", value, "at least 1, or null")
    name, allowed = evaluation.name, "letters, digits and _ . - of which a letter or digit is first"
    is_plain = name is None or FOLDER_NAME.fullmatch(name) is not None
    require(is_plain, "evaluation.name", name, allowed)
    allowed = "false, or true with an evaluation.name: it is not how the model draws"
    require(name is not None or not evaluation.oracle, "evaluation.oracle", True, allowed)


def check_sampling(sampling: SamplingConfig) -> None:
    """Check how pictures are drawn; raises ConfigError, naming what is not allowed."""
    steps = {"sampling": sampling.num_inference_steps}
    for quality, preset in sampling.presets.items():
        known = quality in QUALITIES
        require(known, "sampling.presets", quality, f"only {', '.join(QUALITIES)}")
        steps[f"sampling.presets.{quality}"] = preset.num_inference_steps
    for name, count in steps.items():
        require(count >= 1, f"{name}.num_inference_steps", count, "at least 1")
    scale = sampling.guidance_scale
    require(0 <= scale <= 100, "sampling.guidance_scale", scale, "between 0 and 100")
    temperature = sampling.router_temperature
    allowed = "> 0, or 0 for the fitted one"
    require(temperature >= 0, "sampling.router_temperature", temperature, allowed)
