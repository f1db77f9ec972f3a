"""What sections of a configuration ask of each other, and the checks of all of it."""

from paris_ray.config.conversion import expert_setup
from paris_ray.config.corpus import CorpusConfig
from paris_ray.config.filters import SCORES
from paris_ray.config.fleet_checks import refused_fleet
from paris_ray.config.lora import LoRARun
from paris_ray.config.models import ExpertConfig, RouterConfig, unlike_fields
from paris_ray.config.section_checks import (
    check_cluster,
    check_codec,
    check_corpus,
    check_corpus_path,
    check_evaluation,
    check_model,
    check_place,
    check_sampling,
    check_training,
    require,
)
from paris_ray.config.sections import Config


def _check_experts(config: Config) -> dict[str, ExpertConfig]:
    """Check the overrides of single experts; return their architectures by name."""
    num_clusters = config.cluster.num_clusters
    models = {}
    for index in config.experts:
        exists = index.isascii() and index.isdigit() and int(index) < num_clusters
        allowed = f"0 to {num_clusters - 1}, as cluster.num_clusters={num_clusters}"
        require(exists and index == str(int(index)), "experts", index, allowed)
        setup = expert_setup(config, int(index))
        name = f"experts.{index}.training"
        check_training(name, setup.training, config.corpus, setup.expert)
        same = setup.expert.text_embed_dim == config.expert.text_embed_dim
        name, width = f"experts.{index}.expert", config.expert.text_embed_dim
        allowed = f"{width}, since all experts read one text encoder"
        require(same, f"{name}.text_embed_dim", setup.expert.text_embed_dim, allowed)
        models[name] = setup.expert
    return models


def _check_seed(config: Config) -> None:
    """Check that every expert can start from the seed, before that is trained."""
    check_training("seed_training", config.seed_training, config.corpus, config.expert)
    if not config.seed_training.steps:
        return
    for index in config.experts:
        setup = expert_setup(config, int(index))
        if setup.training.init_from is not None:
            continue
        for field, (own, seeds) in unlike_fields(setup.expert, config.expert).items():
            allowed = f"{seeds!r}, as the seed has it that it starts from; or its own init_from"
            require(False, f"experts.{index}.expert.{field}", own, allowed)


def _check_federation(config: Config) -> None:
    """Check that what a federation gives is asked of nobody else."""
    folder, experts = config.federation.folder, config.federation.experts
    if folder is None:
        allowed = "[] without a federation.folder, as all experts are trained"
        require(not experts, "federation.experts", experts, allowed)
        return
    numbers = range(config.cluster.num_clusters)
    fits = bool(experts) and set(experts) <= set(numbers) and len(set(experts)) == len(experts)
    allowed = f"different numbers from 0 to {len(numbers) - 1}, at least one"
    require(fits, "federation.experts", experts, allowed)
    allowed = "null with a federation.folder, which gives the encoders"
    require(config.prepared_from is None, "prepared_from", config.prepared_from, allowed)
    allowed = "0 with a federation.folder: training.init_from names the seed that it gives"
    steps = config.seed_training.steps
    require(steps == 0, "seed_training.steps", steps, allowed)
    allowed = "image, caption or both with a federation.folder, which gives centroids"
    features = config.cluster.features
    require(features != "random", "cluster.features", features, allowed)


def _check_students(config: Config) -> None:
    check_training("distil_training", config.distil_training, config.corpus)
    check_training("few_step_training", config.few_step_training, config.corpus)
    start = config.few_step_training.init_from
    require(start is None, "few_step_training.init_from", start, "null, it starts from the student")
    share = config.distillation.routed_share
    require(0 <= share <= 1, "distillation.routed_share", share, "between 0 and 1")
    steps = config.distillation.num_inference_steps
    allowed = "at least 1, or null"
    require(steps is None or steps >= 1, "distillation.num_inference_steps", steps, allowed)


def check_distillation(config: Config) -> None:
    """Check what only a distillation asks of the other sections, before anything is trained.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    oracle = config.evaluation.oracle
    require(not oracle, "evaluation.oracle", oracle, "false: one expert has no choice")
    steps, most = config.distillation.num_inference_steps, config.sampling.num_inference_steps
    if steps is None:
        return
    name = "distillation.num_inference_steps"
    allowed = f"a divisor of sampling.num_inference_steps={most}, or null"
    require(most % steps == 0, name, steps, allowed)
    # Each of few steps is to lead where several of the ensemble's equal Euler steps lead.
    for key, allowed in (("solver", "euler"), ("time_grid", "linspace")):
        own = getattr(config.sampling, key)
        require(own == allowed, f"sampling.{key}", own, f"{allowed}, or null for {name}")
    # At t = 1, where pictures begin, all of x_t is noise: whoever predicts that learns nothing.
    allowed = "null for expert.prediction=epsilon, as the first of few steps is at pure noise"
    require(config.expert.prediction != "epsilon", name, steps, allowed)


def _check_clip(config: Config) -> None:
    """Check what CLIP's token states ask of the others, before days of encoding."""
    states = config.text.token_states
    require(0 <= states <= 128, "text.token_states", states, "between 0 and 128")
    if config.text.kind == "minilm":
        return
    require(states == 0, "text.token_states", states, "0 for CLIP, which has no other text")
    kind = f"text.kind={config.text.kind}"
    features = config.cluster.features
    allowed = f"image or random for {kind}"
    require(features in ("image", "random"), "cluster.features", features, allowed)
    require(config.text.path is not None, "text.path", None, f"a path or a name for {kind}")
    names = [f"experts.{index}." for index in config.experts]
    setups = [config, *(expert_setup(config, int(index)) for index in config.experts)]
    for name, setup in zip(["", *names], setups, strict=True):
        noise = setup.training.text_noise
        require(noise == 0, f"{name}training.text_noise", noise, f"0 for {kind}")
    for name in ("seed_training", "router_training", "distil_training", "few_step_training"):
        training = getattr(config, name)
        noise = training.text_noise if training.steps else 0
        require(noise == 0, f"{name}.text_noise", noise, f"0 for {kind}")


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
        require(size >= 2, f"{name}.batch_size", size, allowed)


def _check_shapes(config: Config) -> None:
    """Check that experts and router fit the latents that the codec makes."""
    input_size = config.corpus.image_size // config.codec.patch_size
    experts = {"expert": config.expert, **_check_experts(config)}
    models: dict[str, ExpertConfig | RouterConfig] = {**experts, "router": config.router}
    for name, model in models.items():
        check_model(name, model)
        source = "corpus.image_size / codec.patch_size"
        fits = model.input_size == input_size
        require(fits, f"{name}.input_size", model.input_size, f"{input_size} = {source}")
        num_components = config.codec.num_components
        fits = model.in_channels == num_components
        allowed = f"{num_components} = codec.num_components"
        require(fits, f"{name}.in_channels", model.in_channels, allowed)
    num_clusters = config.cluster.num_clusters
    fits = config.router.num_experts == num_clusters
    allowed = f"{num_clusters} = cluster.num_clusters"
    require(fits, "router.num_experts", config.router.num_experts, allowed)


def _check_places(config: Config) -> None:
    """Check that no keys of a store stand in a URI: it goes into files and messages of the run."""
    places = {
        "run_dir": config.run_dir,
        "prepared_from": config.prepared_from,
        "federation.folder": config.federation.folder,
        "corpus.path": config.corpus.path,
    }
    for name, place in places.items():
        check_place(name, place)


def _check_fleet(config: Config) -> None:
    for name, value, allowed in refused_fleet(config.fleet, config.cluster.num_clusters):
        require(False, f"fleet.{name}", value, allowed)


def check(config: Config) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    check_corpus_path(config.corpus)
    _check_places(config)
    check_corpus(config.corpus)
    check_codec(config.codec, config.corpus.image_size)
    check_cluster(config.cluster)
    if config.features.kind == "timm":
        allowed = "a hub name or a local path, as only open_clip models are trained here"
        require(config.features.checkpoint is not None, "features.checkpoint", None, allowed)
    for key in ("steps", "batch_size", "max_images"):
        value = getattr(config.features, key)
        require(value >= 1, f"features.{key}", value, "at least 1")
    check_training("training", config.training, config.corpus, config.expert)
    check_training("router_training", config.router_training, config.corpus)
    _check_students(config)
    _check_shapes(config)
    _check_seed(config)
    _check_federation(config)
    _check_shared(config)
    _check_clip(config)
    check_evaluation(config.evaluation)
    check_sampling(config.sampling)
    _check_fleet(config)


def check_lora_run(run: LoRARun) -> None:
    """Check what types cannot express, and that nothing is given that is not this run's to say.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    check_corpus(run.corpus)
    check_training("training", run.training, run.corpus)
    given, default = run.corpus, CorpusConfig()
    require(given.path is None, "corpus.path", given.path, "leave it out and give --data")
    allowed = "leave it out, the bundle decides"
    size = given.image_size
    require(size == default.image_size, "corpus.image_size", size, allowed)
    for key in (*SCORES, "max_similarity"):
        value = getattr(given.filters, key)
        require(value is None, f"corpus.filters.{key}", value, "null, a LoRA has no such model")
    optimizer = run.training.hidden_optimizer
    allowed = "adamw: the factors of a LoRA are no hidden matrices"
    require(optimizer == "adamw", "training.hidden_optimizer", optimizer, allowed)
    start = run.training.init_from
    require(start is None, "training.init_from", start, "null, a LoRA starts from the expert")
