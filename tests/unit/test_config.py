"""Configuration: what is refused and in which words, and what a digest depends on."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from paris_ray.config import (
    RESOURCE_KEYS,
    Config,
    ExpertConfig,
    Preset,
    RouterConfig,
    SamplingConfig,
    TrainingConfig,
    digest,
    expert_setup,
    from_dict,
    load,
    load_lora,
    local_paths,
    packaged_configs,
    to_dict,
    to_yaml,
    unlike_fields,
    with_absolute_paths,
    with_overrides,
)
from paris_ray.errors import ConfigError

KeyPath = tuple[str, ...]


def refusal(*overrides: str, config: str = "quickstart") -> str:
    with pytest.raises(ConfigError) as caught:
        load(config, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_loads(name: str) -> None:
    assert load(name).run_dir


def test_overrides_and_interpolations() -> None:
    config = load("quickstart", ["training.steps=50", "cluster.num_clusters=4", "seed=7"])
    assert (config.training.steps, config.seed) == (50, 7)
    assert config.router.num_experts == 4  # follows cluster.num_clusters


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load("quickstart", ["corpus.limit=5", "training.betas=[0.8,0.9]"])
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load(str(tmp_path / "saved.yaml")) == config
    assert "${" not in to_yaml(config)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("training.stepz=5", ["'training.stepz'", "allowed", "steps, epochs"]),
        ("trainings.steps=5", ["'trainings'", "allowed", "router_training"]),
        ("features.pool.actors=2", ["'features.pool.actors'", "num_actors"]),
        ("training.steps=many", ["training.steps", "many"]),
        ("training.steps=1.5", ["training.steps", "1.5"]),
        ("training.steps=null", ["training.steps"]),
        ("corpus.kind=tar", ["corpus.kind", "tar"]),
        ("training=5", ["TrainingConfig", "5"]),
        ("training=[1", ["is not YAML"]),
        ("fleet.gpus={name: A40}", ["override", "container types"]),
        ("sampling.presets.low.steps=3", ["'sampling.presets.low.steps'", "num_inference_steps"]),
        ("training.steps", ["'training.steps'", "key=value"]),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(override: str, fragments: list[str]) -> None:
    message = refusal(override)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corpus.path", "null"),
        ("corpus.caption_templates", "[nothing]"),
        ("corpus.caption_templates", "[]"),
        ("corpus.image_size", "4"),
        ("corpus.captions_per_row", "0"),
        ("corpus.captions_per_row", "65"),
        ("corpus.max_bad_share", "2"),
        ("corpus.background", "[0,0]"),
        ("corpus.background", "[0,0,256]"),
        ("corpus.max_pixels", "0"),
        ("corpus.max_image_bytes", "0"),
        ("codec.patch_size", "5"),
        ("codec.num_components", "769"),
        ("cluster.num_clusters", "0"),
        ("cluster.num_fine", "4"),
        ("cluster.max_imbalance", "0.9"),
        ("training.steps", "0"),
        ("training.text_dropout", "1.5"),
        ("training.learning_rate", "0"),
        ("training.learning_rate", ".nan"),
        ("router_training.batch_size", "0"),
        ("features.steps", "0"),
        ("expert.input_size", "8"),
        ("expert.in_channels", "4"),
        ("expert.hidden_size", "1000000000"),
        ("expert.hidden_size", "129"),
        ("expert.hidden_size", "18"),
        ("expert.text_embed_dim", "-1"),
        ("expert.mlp_ratio", "0"),
        ("router.num_layers", "257"),
        ("router.num_experts", "3"),
        ("router.num_experts", "1000000000000000000"),
        ("expert.min_alpha", "1"),
        ("expert.layer_norm_eps", "0"),
        ("expert.layer_norm_eps", ".nan"),
        ("expert.x0_clamp", "0"),
        ("expert.cosine_offset", "-1"),
        ("training.accumulation_steps", "7"),
        ("training.max_grad_norm", "0"),
        ("training.max_grad_norm", "-1"),
        ("training.betas", "[1.5,0.9]"),
        ("training.betas", "[[0.8,0.9],0.9]"),
        ("training.betas", "[{a: 1},0.9]"),
        ("training.layersync_blocks", "[[1],3]"),
        ("training.learning_rate", ".inf"),
        ("training.warmup_steps", "-5"),
        ("training.t_logit_std", "-1"),
        ("training.num_gpus", "-1"),
        ("training.text_noise", "0.25"),
        ("text.path", "null"),
        ("sampling.guidance_scale", "-4"),
        ("training.epochs", "0"),
        ("training.epochs", ".inf"),
        ("sampling.router_temperature", "-1"),
        ("fleet.num_images", "0"),
        ("features.checkpoint", "null"),
        ("text.token_states", "-1"),
        ("text.token_states", "129"),
        ("cluster.features", "caption"),
        ("cluster.remove_directions", "-1"),
        ("cluster.remove_directions", "1025"),
        ("cluster.shared_share", "0.6"),
        ("cluster.shared_share", "-0.1"),
        ("corpus.held_out_share", "1"),
        ("corpus.held_out_share", "-0.1"),
        ("training.validate_every", "0"),
        ("seed_training.steps", "-1"),
        ("seed_training.batch_size", "0"),
        ("evaluation.max_captions", "0"),
    ],
)
def test_values_that_do_not_fit_are_refused(field: str, value: str) -> None:
    other = ["text.kind=clip", "text.token_states=0", "cluster.features=image"]
    clip = [*other, "text.path=openai/clip-vit-large-patch14"]
    extra = {
        "corpus.path": ["corpus.kind=parquet"],
        "features.checkpoint": ["features.kind=timm"],
        "text.path": other,
        "cluster.features": [o for o in clip if not o.startswith("cluster")],
        "training.text_noise": clip,
    }
    others = extra.get(field, [])
    assert refusal(f"{field}={value}", *others).startswith(f"{field}=")


# What YAML reads otherwise: a comment, a mapping, a list, a number, an alias, a truth, quotes.
TEXTS = ["/data/exp #1", "/data/a: b", "[x]", "{x: 1}", "007", "1e3", "*x", "no", "~", '"x"', " x"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_was_given(text: str) -> None:
    keys = ["run_dir", "prepared_from", "corpus.attribution", "training.labels.zone"]
    config = load("quickstart", [f"{key}={text}" for key in keys])
    found = (config.run_dir, config.prepared_from, config.corpus.attribution)
    assert (*found, config.training.labels["zone"]) == (text,) * 4


def test_an_experts_own_values_are_read_as_those_of_all() -> None:
    given = ["init_from=/data/seed #1", "steps=7", "betas=[0.8,0.9]", "max_grad_norm=null"]
    config = load("quickstart", [f"experts.1.training.{each}" for each in given])
    training = expert_setup(config, 1).training
    assert training == replace(load("quickstart", [f"training.{e}" for e in given]).training)
    assert (training.init_from, training.steps) == ("/data/seed #1", 7)


def test_null_stands_for_no_text_where_there_may_be_none() -> None:
    config = load("quickstart", ["run_dir=null", "prepared_from=null", "corpus.attribution=Null"])
    assert (config.run_dir, config.prepared_from) == ("null", None)
    assert config.corpus.attribution == "Null"


@pytest.mark.parametrize("key", ["run_dir", "prepared_from", "experts.1.training.init_from"])
def test_what_the_shell_did_not_replace_is_no_text(key: str) -> None:
    assert refusal(f"{key}=").startswith(f"{key}= is not allowed: a text")
    message = refusal(f"{key}=${{HOME}}/x")
    assert message.startswith(f"{key}='${{HOME}}/x' is not allowed: no ${{...}} here")


@pytest.mark.parametrize("kind", ["scenes", "openmoji"])
def test_a_path_is_refused_by_a_kind_that_would_not_read_it(kind: str) -> None:
    assert refusal("corpus.path=/data/mine", f"corpus.kind={kind}") == (
        f"corpus.path='/data/mine' is not allowed: kind={kind} has its own pictures; "
        "say corpus.kind=image_folder|sidecars|parquet|webdataset"
    )


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("experts.9.training.steps=3", ["experts='9'", "0 to 7"]),
        ("experts.one.training.steps=3", ["experts='one'"]),
        (
            "experts.0.training.stepz=3",
            ["experts.0.training", "'stepz'", "allowed here: ", "steps, epochs"],
        ),
        ("experts.0.router.seed=1", ["experts.0", "expert, training"]),
        ("experts.0=5", ["experts.0=5"]),
        ("experts.0.expert=5", ["experts.0.expert=5"]),
        ("experts.0.expert.hidden_size=63", ["experts.0.expert.hidden_size=63"]),
        ("experts.0.expert.in_channels=1", ["experts.0.expert.in_channels=1", "codec"]),
        ("experts.0.expert.text_embed_dim=1", ["experts.0.expert.text_embed_dim=1"]),
        ("experts.0.training.batch_size=0", ["experts.0.training.batch_size=0"]),
    ],
)
def test_overrides_of_single_experts_are_checked(override: str, fragments: list[str]) -> None:
    message = refusal(override)
    assert all(fragment in message for fragment in fragments), message


def test_single_experts_differ_where_they_are_told_to(tmp_path: Path) -> None:
    document = tmp_path / "mixed.yaml"
    overrides = "experts:\n  1: {expert: {prediction: epsilon}, training: {batch_size: 8}}\n"
    document.write_text(
        (Path(__file__).parents[2] / "paris_ray/configs/quickstart.yaml").read_text() + overrides
    )
    config = load(str(document), ["experts.2.training.labels={ray.io/accelerator-type: L40S}"])
    assert expert_setup(config, 0) == replace(config, experts={})
    assert expert_setup(config, 1).expert == replace(config.expert, prediction="epsilon")
    assert expert_setup(config, 1).training == replace(config.training, batch_size=8)
    assert expert_setup(config, 2).training.labels == {"ray.io/accelerator-type": "L40S"}


def test_presets() -> None:
    assert ExpertConfig.preset("XL/2", text_injection="spatial").num_layers == 28
    with pytest.raises(ConfigError, match="preset='M/2' is not allowed: one of S/2, B/2, L/2"):
        ExpertConfig.preset("M/2")


# The model of few steps starts from the student and from nothing else.
STARTING = [f.name for f in fields(Config) if f.type is TrainingConfig]
STARTING.remove("few_step_training")


@pytest.mark.parametrize("training", [*STARTING, "experts.1.training"])
def test_a_start_becomes_absolute(training: str, tmp_path: Path) -> None:
    key = f"{training}.init_from"
    config = load("quickstart", [f"{key}={os.path.relpath(tmp_path)}"])
    assert local_paths(config)[key] == os.path.relpath(tmp_path)
    assert local_paths(with_absolute_paths(config))[key] == str(tmp_path.resolve())


def test_paths_become_absolute_and_hub_names_stay() -> None:
    overrides = ["text.path=openai/clip", "run_dir=runs/x"]
    config = with_absolute_paths(load("quickstart", overrides))
    assert config.text.path == "openai/clip"
    assert config.run_dir == str(Path("runs/x").resolve())


@pytest.mark.parametrize("text", ["corpus: [", "- a\n- b\n", "nonsense: 1\n"])
def test_bad_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert refusal(config=str(tmp_path / "bad.yaml"))


def test_an_absent_file_is_answered_with_the_packaged_names() -> None:
    assert "quickstart" in refusal(config="no such file")


def leaves(section: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key of a configuration, as its path."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name)


def changed(section: Any, path: Sequence[str]) -> Any:
    """The section with another value at a path; the same section if only one value is allowed."""
    name, *rest = path
    value = getattr(section, name)
    hint = next(field.type for field in fields(section) if field.name == name)
    return replace(section, **{name: changed(value, rest) if rest else another(value, hint)})


def kind_of_list(hint: Any) -> str | None:
    """Return which of two types a list's hint names."""
    return next((kind for kind in ("dict", "int") if kind in str(hint)), None)


def another_than_none(hint: Any) -> Any:
    if "list" in str(hint):
        return [{"float": 1.0, "int": 1}.get(get_args(get_args(hint)[0])[0].__name__, "x")]
    return 1 if {int, float} & set(get_args(hint)) else "x"


def another(value: Any, hint: Any) -> Any:
    if "Literal" in str(hint):  # or one that may be null
        literal = hint if get_origin(hint) is Literal else get_args(hint)[0]
        return next((choice for choice in get_args(literal) if choice != value), value)
    if value is None:
        return another_than_none(hint)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return value | {"0": Preset(num_inference_steps=1) if "Preset" in str(hint) else "x"}
    if isinstance(value, list):
        return [*value, {"dict": {"a": "b"}, "int": 0}.get(kind_of_list(hint), "a {}")]
    if isinstance(value, tuple):
        return (0.5, 0.5)
    return value + 1


SKIPPED = ("fleet", "gpus")  # a list of sections, tested by the planning tests
ALTERABLE = [
    path for path in leaves(Config()) if path != SKIPPED and changed(Config(), path) != Config()
]


@pytest.mark.parametrize("path", ALTERABLE, ids=".".join)
def test_the_digest_ignores_resources_and_nothing_else(path: KeyPath) -> None:
    config = Config()
    other = changed(config, path)
    everything = [field.name for field in fields(config)]
    same = digest(config, *everything) == digest(other, *everything)
    assert same == any(part in RESOURCE_KEYS for part in path)


def test_the_digest_depends_on_the_named_sections_only() -> None:
    config = Config()
    other = replace(config, seed=1)
    assert digest(config, "expert") == digest(other, "expert") != digest(config, "router")


def test_from_dict_reads_presets() -> None:
    sampling = SamplingConfig(solver="ab2", presets={"low": Preset(num_inference_steps=3)})
    assert from_dict(SamplingConfig, to_dict(sampling), "config.json") == sampling


def test_presets_have_the_names_of_qualities() -> None:
    given = "sampling.presets.low.num_inference_steps=3"
    assert load("quickstart", [given]).sampling.presets["low"] == Preset(num_inference_steps=3)
    message = refusal("sampling.presets.best.num_inference_steps=3")
    assert message == "sampling.presets='best' is not allowed: only low, medium, high"
    message = refusal("sampling.presets.low.num_inference_steps=0")
    assert message == "sampling.presets.low.num_inference_steps=0 is not allowed: at least 1"


def test_from_dict_reads_what_to_dict_writes() -> None:
    config = ExpertConfig(hidden_size=96, text_injection="spatial")
    assert from_dict(ExpertConfig, to_dict(config), "config.json") == config


@pytest.mark.parametrize(
    ("section", "values", "fragment"),
    [
        (ExpertConfig, [], "mapping"),
        (ExpertConfig, {"hidden": 3}, "'hidden'; allowed here: input_size"),
        (ExpertConfig, {"hidden_size": "wide"}, "hidden_size"),
        (ExpertConfig, {"hidden_size": None}, "hidden_size"),
        (ExpertConfig, {"hidden_size": {"a": 1}}, "hidden_size"),
        (ExpertConfig, {"prediction": "x0"}, "prediction"),
        (RouterConfig, {"num_experts": 2.5}, "num_experts"),
        (SamplingConfig, {"routing": "${oc.env:HOME}"}, "interpolation"),
        (
            SamplingConfig,
            {"solver": "rk4"},
            "'rk4', expected one of ['euler'",
        ),
        (SamplingConfig, {"time_grid": "karras"}, "expected one of ['linspace'"),
        (SamplingConfig, {"presets": {"low": 3}}, "presets.low"),
        (SamplingConfig, {"presets": {"low": {}}}, "presets.low.num_inference_steps"),
        (SamplingConfig, {"presets": {"low": {"steps": 3}}}, "unknown key 'presets.low.steps'"),
        (SamplingConfig, {"routing": ["${oc.env:HOME}"]}, "interpolation"),
    ],
)
def test_from_dict_refuses(section: type, values: object, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(section, values, "there/config.json")
    message = str(caught.value)
    assert "there/config.json" in message
    assert fragment in message
    assert os.environ["HOME"] not in message


def test_random_clusters_have_no_directions_to_remove() -> None:
    assert load("paris_b2", ["cluster.features=random"]).cluster.features == "random"
    message = refusal("cluster.features=random", "cluster.remove_directions=2")
    assert message.startswith("cluster.remove_directions=2 is not allowed: 0 for")


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b"])
def test_the_name_of_an_evaluation_is_a_plain_folder(name: str) -> None:
    assert refusal(f"evaluation.name={name}").startswith("evaluation.name=")


def test_a_configuration_is_changed_as_it_is_loaded() -> None:
    overrides = ["training.steps=7", "training.epochs=null", "cluster.features=both"]
    assert with_overrides(load("quickstart"), overrides) == load("quickstart", overrides)
    for override in ("training.stepz=5", "training.steps=0", "training.steps=x", "training.steps"):
        with pytest.raises(ConfigError) as caught:
            with_overrides(load("quickstart"), [override])
        assert str(caught.value) == refusal(override)
    with pytest.raises(ConfigError, match=r"^an override is not YAML: "):
        with_overrides(load("quickstart"), ["training=[1"])


QUICKSTART_CLIP = ["text.kind=clip", "text.path=openai/clip-vit-large-patch14"]
SILENT = ["training.text_noise=0", "router_training.text_noise=0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experts.2.expert.num_layers=8"],
            "experts.2.expert.num_layers=8 is not allowed: 4, as the seed has it that it starts "
            "from; or its own init_from",
        ),
        (
            ["experts.2.expert.text_injection=spatial"],
            "experts.2.expert.text_injection='spatial' is not allowed: 'both', as the seed has it "
            "that it starts from; or its own init_from",
        ),
        (
            [*QUICKSTART_CLIP, "cluster.features=image"],
            "text.token_states=24 is not allowed: 0 for CLIP, which has no other text",
        ),
        (
            [*QUICKSTART_CLIP, "text.token_states=0"],
            "cluster.features='caption' is not allowed: image or random for text.kind=clip",
        ),
        (
            [*QUICKSTART_CLIP, "text.token_states=0", "cluster.features=image", *SILENT],
            "seed_training.text_noise=0.1 is not allowed: 0 for text.kind=clip",
        ),
        (
            ["corpus.captions_per_row=2", "router_training.caption_weights=[1]"],
            "router_training.caption_weights=[1.0] is not allowed: numbers >= 0, not all of them "
            "0, as many as corpus.captions_per_row=2",
        ),
        (
            ["corpus.captions_per_row=2", "experts.3.training.caption_weights=[0, 0]"],
            "experts.3.training.caption_weights=[0.0, 0.0] is not allowed: numbers >= 0, not all "
            "of them 0, as many as corpus.captions_per_row=2",
        ),
        (
            ["experts.2.expert.text_hidden_size=8"],
            "experts.2.expert.text_hidden_size=8 is not allowed: 256, as the seed has it that it "
            "starts from; or its own init_from",
        ),
        (
            ["cluster.shared_share=0.25", "training.batch_size=1"],
            "training.batch_size=1 is not allowed: at least 2, as cluster.shared_share is not 0",
        ),
        (
            ["cluster.shared_share=0.25", "experts.3.training.batch_size=1"],
            "experts.3.training.batch_size=1 is not allowed: at least 2, as cluster.shared_share "
            "is not 0",
        ),
        (
            ["evaluation.oracle=true"],
            "evaluation.oracle=True is not allowed: false, or true with an evaluation.name: it is "
            "not how the model draws",
        ),
        (["seed_training.steps=-1"], "seed_training.steps=-1 is not allowed: at least 0"),
        (["training.steps=0"], "training.steps=0 is not allowed: at least 1"),
    ],
)
def test_what_does_not_go_together_is_said_in_whole(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["experts.2.expert.num_layers=8", "seed_training.steps=0"],
        ["experts.2.expert.num_layers=8", "experts.2.training.init_from=/other"],
        ["experts.2.expert.prediction=velocity"],  # its tensors are like the seed's
        ["experts.2.training.steps=5"],
    ],
)
def test_experts_that_the_seed_fits_or_that_do_not_need_it(overrides: list[str]) -> None:
    assert expert_setup(load("quickstart", overrides), 2) != expert_setup(load("quickstart"), 2)


@pytest.mark.parametrize("injection", ["cross_attention", "spatial", "both"])
def test_clip_has_a_vector_and_tokens_for_every_injection(injection: str) -> None:
    others = ["text.token_states=0", "cluster.features=image", "router_training.text_noise=0"]
    others += ["training.text_noise=0", "seed_training.text_noise=0"]
    config = load("quickstart", [*QUICKSTART_CLIP, *others, f"expert.text_injection={injection}"])
    assert config.expert.text_injection == injection


def test_unlike_fields_are_those_that_decide_shapes_or_meaning() -> None:
    model = ExpertConfig(num_layers=4)
    assert unlike_fields(model, model) == {}
    other = replace(model, num_layers=8, prediction="epsilon", layer_norm_eps=1e-5)
    assert unlike_fields(model, other) == {"num_layers": (4, 8)}
    narrow = replace(model, text_hidden_size=8)
    assert unlike_fields(narrow, model) == {}  # cross-attention has no such layer
    spatial = replace(model, text_injection="both"), replace(narrow, text_injection="both")
    assert unlike_fields(*spatial) == {"text_hidden_size": (256, 8)}
    router = RouterConfig(text_embed_dim=8)
    assert unlike_fields(router, RouterConfig()) == {"text_embed_dim": (8, 0)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("min_size=0", "min_size=0 is not allowed: at least 1 pixel, or null"),
        ("max_aspect_ratio=0.5", "max_aspect_ratio=0.5 is not allowed: at least 1, the longer"),
        ("max_aspect_ratio=.nan", "max_aspect_ratio=nan is not allowed"),
        ("languages=[english]", "languages=['english'] is not allowed: ISO 639-1 codes"),
        ("languages=[]", "languages=[] is not allowed: ISO 639-1 codes"),
        ("min_clip_score=0.2", "clip.checkpoint=None is not allowed: an open_clip model, which"),
        ("min_clip_score=2", "min_clip_score=2.0 is not allowed: a cosine, between -1 and 1"),
        ("max_nsfw_score=1.1", "max_nsfw_score=1.1 is not allowed: a probability"),
        ("picture_distance=17", "picture_distance=17 is not allowed: between 0 and 16 bits"),
        ("max_similarity=1.5", "max_similarity=1.5 is not allowed: a cosine"),
    ],
)
def test_limits_of_filters_that_are_none_are_refused(given: str, message: str) -> None:
    assert message in refusal(f"corpus.filters.{given}")


def test_filters_that_contradict_each_other_or_lack_a_model_are_refused() -> None:
    lengths = ["corpus.filters.min_caption_length=5", "corpus.filters.max_caption_length=3"]
    with pytest.raises(ConfigError, match="min_caption_length=5 is not allowed: at most max_"):
        load("quickstart", lengths)
    rated = ["corpus.filters.min_aesthetic_score=5", "corpus.filters.clip.checkpoint=openai"]
    with pytest.raises(ConfigError, match=r"aesthetic_model=None is not allowed: a \.safetensors"):
        load("quickstart", rated)


def test_a_lora_has_no_models_to_filter_with() -> None:
    load_lora(overrides=["corpus.filters.min_size=64"])
    with pytest.raises(
        ConfigError, match=r"filters.max_nsfw_score=0.5 is not allowed: null, a LoR"
    ):
        load_lora(overrides=["corpus.filters.max_nsfw_score=0.5"])


BOMB = "\n".join(["l0: &l0 [x]", *(f"l{i}: &l{i} [{f'*l{i - 1}, ' * 9}]" for i in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (BOMB, "has more than 100000 values"),
        ("experts: &e {'0': *e}", "is nested more than 64 times"),
        ("run_dir: " + "[" * 100 + "]" * 100, "is nested more than 64 times"),
        ("run_dir: " + "[" * 100_000, "recursion"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("training: {lr: " + "9" * 400 + "}", "lr"),
    ],
)
def test_hostile_yaml_is_an_error_that_names_the_file(
    tmp_path: Path, text: str, fragment: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert fragment in refusal(config=str(tmp_path / "bad.yaml"))


def test_yaml_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"run_dir: \xff")
    assert "bad.yaml" in refusal(config=str(tmp_path / "bad.yaml"))
