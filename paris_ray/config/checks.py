"""What the types of a configuration cannot express."""

import math
import re

from paris_ray.config.conversion import expert_setup
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
from paris_ray.config.filters import SCORES
from paris_ray.config.fleet_checks import refused_fleet
from paris_ray.config.lora import LoRARun
from paris_ray.config.models import (
    MAX_EXPERTS,
    MAX_TEXT_WIDTH,
    MODEL_LIMITS,
    ExpertConfig,
    RouterConfig,
    unlike_fields,
)
from paris_ray.config.recipes import refused_recipe
from paris_ray.config.sections import Config
from paris_ray.config.training import TrainingConfig
from paris_ray.errors import ConfigError
from paris_ray.storage import holds_keys, without_keys

FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def _require(holds: bool, field_name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{field_name}={value!r} is not allowed: {allowed}")


def _check_training(
    name: str, training: TrainingConfig, corpus: CorpusConfig, expert: ExpertConfig | None = None
) -> None:
    """Check a training; `expert` is what learns from data in it, None: something else learns."""
    for field, value, allowed in refused_recipe(training, expert):
        _require(False, f"{name}.{field}", value, allowed)
    counts = ("batch_size", "accumulation_steps", "log_every", "checkpoint_every")
    least = 0 if name == "seed_training" else 1
    _require(training.steps >= least, f"{name}.steps", training.steps, f"at least {least}")
    for key in (*counts, "validate_every", "threads"):
        value = getattr(training, key)
        _require(value >= 1, f"{name}.{key}", value, "at least 1")
    for key in ("epochs", "sample_every", "max_hours", "max_dollars"):
        value = getattr(training, key)
        _require(value is None or value > 0, f"{name}.{key}", value, "> 0, or null")
    parts, allowed = training.accumulation_steps, f"a divisor of batch_size={training.batch_size}"
    _require(training.batch_size % parts == 0, f"{name}.accumulation_steps", parts, allowed)
    shares = ("text_dropout", "t_one_share", "decay_share", "final_learning_rate_share")
    for key in (*shares, "ema_decay"):
        value = getattr(training, key)
        _require(0 <= value <= 1, f"{name}.{key}", value, "between 0 and 1")
    for key in ("learning_rate", "adam_eps", "max_grad_norm"):
        value = getattr(training, key)
        allowed = "> 0, or null to clip nothing" if key == "max_grad_norm" else "> 0"
        _require(value is None or 0 < value < math.inf, f"{name}.{key}", value, allowed)
    least_zero = ("weight_decay", "warmup_steps", "text_noise", "t_logit_std", "prefetch")
    for key in (*least_zero, "num_cpus", "num_gpus", "max_retries"):
        value = getattr(training, key)
        _require(0 <= value < math.inf, f"{name}.{key}", value, "at least 0")
    price, allowed = training.dollars_per_hour, f"at least 0; {name}.max_dollars needs one"
    priced = training.max_dollars is None if price is None else 0 <= price < math.inf
    _require(priced, f"{name}.dollars_per_hour", price, allowed)
    check_place(f"{name}.mlflow", training.mlflow)
    _require(training.wandb != "", f"{name}.wandb", training.wandb, "a project, or null")
    betas = training.betas
    _require(all(0 <= beta < 1 for beta in betas), f"{name}.betas", betas, "0 <= x < 1")
    weights, count = training.caption_weights, corpus.captions_per_row
    if weights is not None:
        fits = len(weights) == count and min(weights) >= 0 and 0 < sum(weights) < math.inf
        allowed = f"numbers >= 0, not all of them 0, as many as corpus.captions_per_row={count}"
        _require(fits, f"{name}.caption_weights", weights, allowed)


def check_model(name: str, model: ExpertConfig | RouterConfig) -> None:
    """Check an architecture on its own, before anything is allocated for it.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    for key, most in MODEL_LIMITS.items():
        value = getattr(model, key)
        _require(1 <= value <= most, f"{name}.{key}", value, f"between 1 and {most}")
    _require(0 < model.mlp_ratio <= 16, f"{name}.mlp_ratio", model.mlp_ratio, "0 < x <= 16")
    eps = model.layer_norm_eps
    _require(0 < eps <= 1, f"{name}.layer_norm_eps", eps, "0 < x <= 1")
    widths = {"text_embed_dim": 0}
    if isinstance(model, ExpertConfig):
        widths = {"text_embed_dim": 1, "text_hidden_size": 1}
        _check_epsilon(name, model)
        rotary = model.blocks == "released" or model.hidden_size // model.num_heads % 4 == 0
        allowed = "released, unless hidden_size / num_heads is a multiple of 4"
        _require(rotary, f"{name}.blocks", model.blocks, allowed)
        adapter, silent = model.text_adapter, model.text_injection == "spatial"
        allowed = "false for text_injection=spatial, which reads no tokens"
        _require(not (adapter and silent), f"{name}.text_adapter", adapter, allowed)
    else:
        count, allowed = model.num_experts, f"between 1 and {MAX_EXPERTS}"
        _require(1 <= count <= MAX_EXPERTS, f"{name}.num_experts", count, allowed)
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


def _check_epsilon(name: str, model: ExpertConfig) -> None:
    offset, alpha, clamp = model.cosine_offset, model.min_alpha, model.x0_clamp
    _require(0 <= offset <= 0.1, f"{name}.cosine_offset", offset, "between 0 and 0.1")
    # Sampling begins at t = 1, where nothing else keeps the divisor from 0.
    _require(0 < alpha < 1, f"{name}.min_alpha", alpha, "0 < x < 1")
    _require(clamp is None or clamp > 0, f"{name}.x0_clamp", clamp, "> 0, or null")


def _check_experts(config: Config) -> dict[str, ExpertConfig]:
    """Check the overrides of single experts; return their architectures by name."""
    num_clusters = config.cluster.num_clusters
    models = {}
    for index in config.experts:
        exists = index.isascii() and index.isdigit() and int(index) < num_clusters
        allowed = f"0 to {num_clusters - 1}, as cluster.num_clusters={num_clusters}"
        _require(exists and index == str(int(index)), "experts", index, allowed)
        setup = expert_setup(config, int(index))
        name = f"experts.{index}.training"
        _check_training(name, setup.training, config.corpus, setup.expert)
        same = setup.expert.text_embed_dim == config.expert.text_embed_dim
        name, width = f"experts.{index}.expert", config.expert.text_embed_dim
        allowed = f"{width}, since all experts read one text encoder"
        _require(same, f"{name}.text_embed_dim", setup.expert.text_embed_dim, allowed)
        models[name] = setup.expert
    return models


def _check_seed(config: Config) -> None:
    """Check that every expert can start from the seed, before that is trained."""
    _check_training("seed_training", config.seed_training, config.corpus, config.expert)
    if not config.seed_training.steps:
        return
    for index in config.experts:
        setup = expert_setup(config, int(index))
        if setup.training.init_from is not None:
            continue
        for field, (own, seeds) in unlike_fields(setup.expert, config.expert).items():
            allowed = f"{seeds!r}, as the seed has it that it starts from; or its own init_from"
            _require(False, f"experts.{index}.expert.{field}", own, allowed)


def _check_federation(config: Config) -> None:
    """Check that what a federation gives is asked of nobody else."""
    folder, experts = config.federation.folder, config.federation.experts
    if folder is None:
        allowed = "[] without a federation.folder, as all experts are trained"
        _require(not experts, "federation.experts", experts, allowed)
        return
    numbers = range(config.cluster.num_clusters)
    fits = bool(experts) and set(experts) <= set(numbers) and len(set(experts)) == len(experts)
    allowed = f"different numbers from 0 to {len(numbers) - 1}, at least one"
    _require(fits, "federation.experts", experts, allowed)
    allowed = "null with a federation.folder, which gives the encoders"
    _require(config.prepared_from is None, "prepared_from", config.prepared_from, allowed)
    allowed = "0 with a federation.folder: training.init_from names the seed that it gives"
    steps = config.seed_training.steps
    _require(steps == 0, "seed_training.steps", steps, allowed)
    allowed = "image, caption or both with a federation.folder, which gives centroids"
    features = config.cluster.features
    _require(features != "random", "cluster.features", features, allowed)


def _check_students(config: Config) -> None:
    _check_training("distil_training", config.distil_training, config.corpus)
    _check_training("few_step_training", config.few_step_training, config.corpus)
    start = config.few_step_training.init_from
    _require(
        start is None, "few_step_training.init_from", start, "null, it starts from the student"
    )
    share = config.distillation.routed_share
    _require(0 <= share <= 1, "distillation.routed_share", share, "between 0 and 1")
    steps = config.distillation.num_inference_steps
    allowed = "at least 1, or null"
    _require(steps is None or steps >= 1, "distillation.num_inference_steps", steps, allowed)


def check_distillation(config: Config) -> None:
    """Check what only a distillation asks of the other sections, before anything is trained.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    oracle = config.evaluation.oracle
    _require(not oracle, "evaluation.oracle", oracle, "false: one expert has no choice")
    steps, most = config.distillation.num_inference_steps, config.sampling.num_inference_steps
    if steps is None:
        return
    name = "distillation.num_inference_steps"
    allowed = f"a divisor of sampling.num_inference_steps={most}, or null"
    _require(most % steps == 0, name, steps, allowed)
    # Each of few steps is to lead where several of the ensemble's equal Euler steps lead.
    for key, allowed in (("solver", "euler"), ("time_grid", "linspace")):
        own = getattr(config.sampling, key)
        _require(own == allowed, f"sampling.{key}", own, f"{allowed}, or null for {name}")
    # At t = 1, where pictures begin, all of x_t is noise: whoever predicts that learns nothing.
    allowed = "null for expert.prediction=epsilon, as the first of few steps is at pure noise"
    _require(config.expert.prediction != "epsilon", name, steps, allowed)


def _check_clip(config: Config) -> None:
    """Check what CLIP's token states ask of the others, before days of encoding."""
    states = config.text.token_states
    _require(0 <= states <= 128, "text.token_states", states, "between 0 and 128")
    if config.text.kind == "minilm":
        return
    _require(states == 0, "text.token_states", states, "0 for CLIP, which has no other text")
    kind = f"text.kind={config.text.kind}"
    features = config.cluster.features
    allowed = f"image or random for {kind}"
    _require(features in ("image", "random"), "cluster.features", features, allowed)
    _require(config.text.path is not None, "text.path", None, f"a path or a name for {kind}")
    names = [f"experts.{index}." for index in config.experts]
    setups = [config, *(expert_setup(config, int(index)) for index in config.experts)]
    for name, setup in zip(["", *names], setups, strict=True):
        noise = setup.training.text_noise
        _require(noise == 0, f"{name}training.text_noise", noise, f"0 for {kind}")
    for name in ("seed_training", "router_training", "distil_training", "few_step_training"):
        training = getattr(config, name)
        noise = training.text_noise if training.steps else 0
        _require(noise == 0, f"{name}.text_noise", noise, f"0 for {kind}")


def _check_shared(config: Config) -> None:
    """Check that batches have room for an expert's own rows beside those that all have."""
    if not config.cluster.shared_share:
        return
    sizes = {"training": config.training.batch_size}
    for index in config.experts:
        setup = expert_setup(config, int(index))
        sizes[f"experts.{index}.training"] = setup.training.batch_size
    for name, size in sizes.items():
        allowed = "at least 2, as cluster.shared_share is not 0"
        _require(size >= 2, f"{name}.batch_size", size, allowed)


def _check_shapes(config: Config) -> None:
    """Check that experts and router fit the latents that the codec makes."""
    input_size = config.corpus.image_size // config.codec.patch_size
    experts = {"expert": config.expert, **_check_experts(config)}
    models: dict[str, ExpertConfig | RouterConfig] = {**experts, "router": config.router}
    for name, model in models.items():
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


def _check_corpus_path(corpus: CorpusConfig) -> None:
    """Check that pictures are read from where they are, and that none given are left unread."""
    path, is_given = corpus.path, corpus.path is not None
    if corpus.kind in PACKAGED_KINDS:
        allowed = f"kind={corpus.kind} has its own pictures; say corpus.kind={'|'.join(PATH_KINDS)}"
        _require(not is_given, "corpus.path", path, allowed)
    else:
        _require(is_given, "corpus.path", path, f"a path for kind={corpus.kind}")


def _check_places(config: Config) -> None:
    """Check that no keys of a store stand in a URI: it goes into files and messages of the run."""
    places = {
        "run_dir": config.run_dir,
        "prepared_from": config.prepared_from,
        "federation.folder": config.federation.folder,
        "corpus.path": config.corpus.path,
        "seed_training.init_from": config.seed_training.init_from,
        "training.init_from": config.training.init_from,
        "router_training.init_from": config.router_training.init_from,
        "distil_training.init_from": config.distil_training.init_from,
    }
    for name, place in places.items():
        check_place(name, place)


def check_place(name: str, place: str | None) -> None:
    """Raise ConfigError if the location that an option gives holds keys of a store."""
    allowed = (
        "a URI without keys, which would be written into files of the run; stores find theirs in "
        "the environment (AWS_ACCESS_KEY_ID and others)"
    )
    if place is not None and holds_keys(place):
        _require(False, name, without_keys(place), allowed)


def _check_corpus(corpus: CorpusConfig) -> None:
    templates = corpus.caption_templates
    well_formed = templates[:1] == ["{}"] and all(t.count("{}") == 1 for t in templates)
    allowed = "texts with one {} each, the first of them '{}', the caption itself"
    _require(well_formed, "corpus.caption_templates", templates, allowed)
    _require(corpus.image_size >= 8, "corpus.image_size", corpus.image_size, "at least 8 pixels")
    _require(corpus.rows_per_shard >= 1, "corpus.rows_per_shard", corpus.rows_per_shard, ">= 1")
    _require(corpus.limit is None or corpus.limit >= 1, "corpus.limit", corpus.limit, ">= 1, null")
    colour, allowed = corpus.background, "red, green and blue, each 0 to 255, such as [255,255,255]"
    is_colour = len(colour) == 3 and all(0 <= channel <= 255 for channel in colour)
    _require(is_colour, "corpus.background", colour, allowed)
    for key in ("max_image_bytes", "max_pixels"):
        _require(getattr(corpus, key) >= 1, f"corpus.{key}", getattr(corpus, key), "at least 1")
    count = corpus.captions_per_row
    allowed = "between 1 and 64, or null"
    _require(count is None or 1 <= count <= 64, "corpus.captions_per_row", count, allowed)
    for key in ("split", "image_column", "caption_column"):
        value = getattr(corpus, key)
        _require(value != "", f"corpus.{key}", value, "a name, or null")
    share = corpus.held_out_share
    _require(0 <= share < 1, "corpus.held_out_share", share, "0 <= x < 1; 0: no row")
    for key in ("held_out_key", "attributes"):
        _check_labelling(f"corpus.{key}", getattr(corpus, key))
    _require(0 <= corpus.max_bad_share <= 1, "corpus.max_bad_share", corpus.max_bad_share, "0..1")
    for name, value, allowed in refused_filters(corpus.filters):
        _require(False, f"corpus.filters.{name}", value, allowed)


def _check_labelling(name: str, labelling: str | None) -> None:
    allowed = "names of columns such as object,background, or a regular expression with groups"
    if labelling is None or COLUMN_NAMES.fullmatch(labelling):
        return
    try:
        groups = re.compile(labelling).groups
    except re.error as error:
        raise ConfigError(f"{name}={labelling!r} is not allowed: {allowed} ({error})") from None
    _require(groups > 0, name, labelling, allowed)


def _check_codec(codec: CodecConfig, image_size: int) -> None:
    size, count = codec.patch_size, codec.num_components
    if codec.kind == "autoencoder_kl":
        _require(codec.path is not None, "codec.path", None, "a folder or a hub name for its kind")
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
    count = cluster.remove_directions
    _require(0 <= count <= 1024, "cluster.remove_directions", count, "between 0 and 1024")
    if cluster.features == "random":
        allowed = "0 for cluster.features=random, which has no features"
        _require(count == 0, "cluster.remove_directions", count, allowed)
    share = cluster.shared_share
    _require(0 <= share <= 0.5, "cluster.shared_share", share, "between 0 and 0.5")
    _require(cluster.max_imbalance >= 1, "cluster.max_imbalance", cluster.max_imbalance, ">= 1")


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    for key in ("batch_size", "num_tasks", "threads"):
        value = getattr(evaluation, key)
        _require(value >= 1, f"evaluation.{key}", value, "at least 1")
    for key in ("max_captions", "max_gallery"):
        value = getattr(evaluation, key)
        _require(value is None or value >= 1, f"evaluation.{key}", value, "at least 1, or null")
    name, allowed = evaluation.name, "letters, digits and _ . - of which a letter or digit is first"
    is_plain = name is None or FOLDER_NAME.fullmatch(name) is not None
    _require(is_plain, "evaluation.name", name, allowed)
    allowed = "false, or true with an evaluation.name: it is not how the model draws"
    _require(name is not None or not evaluation.oracle, "evaluation.oracle", True, allowed)


def _check_sampling(sampling: SamplingConfig) -> None:
    steps = {"sampling": sampling.num_inference_steps}
    for quality, preset in sampling.presets.items():
        known = quality in QUALITIES
        _require(known, "sampling.presets", quality, f"only {', '.join(QUALITIES)}")
        steps[f"sampling.presets.{quality}"] = preset.num_inference_steps
    for name, count in steps.items():
        _require(count >= 1, f"{name}.num_inference_steps", count, "at least 1")
    scale = sampling.guidance_scale
    _require(0 <= scale <= 100, "sampling.guidance_scale", scale, "between 0 and 100")
    temperature = sampling.router_temperature
    allowed = "> 0, or 0 for the fitted one"
    _require(temperature >= 0, "sampling.router_temperature", temperature, allowed)


def _check_fleet(config: Config) -> None:
    for name, value, allowed in refused_fleet(config.fleet, config.cluster.num_clusters):
        _require(False, f"fleet.{name}", value, allowed)


def check(config: Config) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    _check_corpus_path(config.corpus)
    _check_places(config)
    _check_corpus(config.corpus)
    _check_codec(config.codec, config.corpus.image_size)
    _check_cluster(config.cluster)
    if config.features.kind == "timm":
        allowed = "a hub name or a local path, as only open_clip models are trained here"
        _require(config.features.checkpoint is not None, "features.checkpoint", None, allowed)
    for key in ("steps", "batch_size", "max_images"):
        value = getattr(config.features, key)
        _require(value >= 1, f"features.{key}", value, "at least 1")
    _check_training("training", config.training, config.corpus, config.expert)
    _check_training("router_training", config.router_training, config.corpus)
    _check_students(config)
    _check_shapes(config)
    _check_seed(config)
    _check_federation(config)
    _check_shared(config)
    _check_clip(config)
    _check_evaluation(config.evaluation)
    _check_sampling(config.sampling)
    _check_fleet(config)


def check_lora_run(run: LoRARun) -> None:
    """Check what types cannot express, and that nothing is given that is not this run's to say.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    _check_corpus(run.corpus)
    _check_training("training", run.training, run.corpus)
    given, default = run.corpus, CorpusConfig()
    _require(given.path is None, "corpus.path", given.path, "leave it out and give --data")
    allowed = "leave it out, the bundle decides"
    size = given.image_size
    _require(size == default.image_size, "corpus.image_size", size, allowed)
    for key in (*SCORES, "max_similarity"):
        value = getattr(given.filters, key)
        _require(value is None, f"corpus.filters.{key}", value, "null, a LoRA has no such model")
    optimizer = run.training.hidden_optimizer
    allowed = "adamw: the factors of a LoRA are no hidden matrices"
    _require(optimizer == "adamw", "training.hidden_optimizer", optimizer, allowed)
    start = run.training.init_from
    _require(start is None, "training.init_from", start, "null, a LoRA starts from the expert")
