"""The plan of a run, against measurements of small models and against the configurations' words."""

import re
import weakref
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from itertools import pairwise

import open_clip
import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from paris_ray.config import (
    Config,
    ExpertConfig,
    GpuConfig,
    HiddenOptimizer,
    RouterConfig,
    TrainingConfig,
    load,
)
from paris_ray.encoders.images import register_packaged_models
from paris_ray.errors import ConfigError
from paris_ray.models import Expert, Router
from paris_ray.models.flops import forward_macs, num_tokens, parameter_count
from paris_ray.planning import (
    Fit,
    Memory,
    TrainingPlan,
    activation_bytes,
    plan,
    render,
    training_memory,
)
from paris_ray.planning.disk import FEATURE_WIDTHS, row_bytes
from paris_ray.planning.durations import Duration
from paris_ray.planning.memory import text_tower_parameters
from paris_ray.planning.schedule import schedule
from paris_ray.training.recipes import recipe_of
from paris_ray.training.recipes.muon import optimizers
from paris_ray.training.schedule import with_steps

BATCH_SIZE, TEXT_LENGTH = 8, 20
EXPERT = ExpertConfig(hidden_size=64, num_layers=4, num_heads=4, text_embed_dim=16)
SMALL_MODELS = {
    "expert": EXPERT,
    "expert of spatial text": replace(EXPERT, text_injection="spatial", text_hidden_size=4),
    "expert of both": replace(EXPERT, text_injection="both", text_hidden_size=4),
    "expert with a wide MLP": replace(EXPERT, mlp_ratio=6.0, num_layers=2),
    "modern expert": replace(EXPERT, blocks="modern"),
    "modern expert of spatial text": replace(
        EXPERT, blocks="modern", text_injection="spatial", text_hidden_size=4
    ),
    "expert with a text adapter": replace(EXPERT, text_adapter=True),
    "router": RouterConfig(hidden_size=64, num_layers=4, num_heads=4),
}
models = pytest.mark.parametrize("config", SMALL_MODELS.values(), ids=SMALL_MODELS.keys())
PAPERS = ("paris_b2", "paris_xl2")


# --- Memory, measured ---------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be and have not gone, and their highest sum."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.highest = 0
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        number = id(storage)
        if number not in self._sizes:
            self._sizes[number] = storage.nbytes()
            self.now += storage.nbytes()
            self.highest = max(self.highest, self.now)
            weakref.finalize(storage, self._forget, number)

    def _forget(self, number: int) -> None:
        self.now -= self._sizes.pop(number)


def build(config: ExpertConfig | RouterConfig) -> tuple[Expert | Router, tuple[Tensor, ...]]:
    """Return a model and one batch of inputs."""
    model = Router(config) if isinstance(config, RouterConfig) else Expert(config)
    latents = torch.zeros(BATCH_SIZE, config.in_channels, config.input_size, config.input_size)
    text = torch.zeros(BATCH_SIZE, text_length(config), config.text_embed_dim)
    return model, (latents, torch.zeros(BATCH_SIZE), text)


def text_length(config: ExpertConfig | RouterConfig) -> int:
    is_spatial = isinstance(config, ExpertConfig) and config.text_injection == "spatial"
    return 1 if is_spatial else TEXT_LENGTH


def planned(config: ExpertConfig | RouterConfig, width: int, *, recompute: bool) -> int:
    length = text_length(config)
    return BATCH_SIZE * activation_bytes(config, width, recompute=recompute, text_length=length)


@models
def test_activations_are_what_a_forward_pass_leaves(config: ExpertConfig | RouterConfig) -> None:
    model, inputs = build(config)
    with LiveBytes([*model.parameters(), *inputs]) as memory:
        output = model(*inputs)
        left = memory.now
    assert output.requires_grad
    assert left == pytest.approx(planned(config, 4, recompute=False), rel=0.1)


def test_activations_of_a_text_adapter_are_those_of_a_block_of_text() -> None:
    """Of few patches, beside which it counts."""
    config = replace(EXPERT, text_adapter=True, input_size=8, num_layers=2)
    assert planned(config, 4, recompute=False) > 1.2 * planned(
        replace(config, text_adapter=False), 4, recompute=False
    )
    model, inputs = build(config)
    with LiveBytes([*model.parameters(), *inputs]) as memory:
        output = model(*inputs)
        left = memory.now
    assert output.requires_grad
    assert left == pytest.approx(planned(config, 4, recompute=False), rel=0.1)


@models
def test_checkpointing_leaves_the_blocks_inputs_and_one_block(
    config: ExpertConfig | RouterConfig,
) -> None:
    model, inputs = build(config)
    model.gradient_checkpointing = True
    with LiveBytes([*model.parameters(), *inputs]) as memory:
        output = model(*inputs)
        left = memory.now
        output.sum().backward()
    whole = planned(config, 4, recompute=True)
    gradients = 4 * parameter_count(config)
    assert left < whole / 2
    assert memory.highest - gradients == pytest.approx(whole, rel=0.25)


@pytest.mark.parametrize("name", ["expert", "modern expert", "expert with a text adapter"])
def test_autocast_keeps_bfloat16_activations_and_copies_of_the_weights(name: str) -> None:
    config = SMALL_MODELS[name]
    model, inputs = build(config)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(*inputs)
    tensors = [tensor for address, tensor in kept.items() if address not in own]
    # Attention (batch, head, token, channel) runs in float32 on a CPU, and in bfloat16 on a GPU.
    measured = sum(
        tensor.untyped_storage().nbytes() // (2 if is_attention(tensor) else 1)
        for tensor in tensors
    )
    copies = 2 * parameter_count(config)
    assert measured - copies == pytest.approx(planned(config, 2, recompute=False), rel=0.25)


def is_attention(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.dtype == torch.float32


def test_memory_is_the_sum_of_what_the_options_ask_for() -> None:
    training = TrainingConfig(batch_size=64, accumulation_steps=4)
    count = parameter_count(EXPERT)
    memory = training_memory(EXPERT, training, text_encoder_parameters=1000)
    expected = (4 + 4 + 4 + 2) * count + memory.optimizer + 4000 + memory.activations
    assert memory.total == expected
    assert memory.activations == 16 * activation_bytes(EXPERT, 2, recompute=False, text_length=77)
    assert training_memory(EXPERT, replace(training, ema_device="cpu")).ema == 0
    in_float32 = training_memory(EXPERT, replace(training, precision="float32"))
    assert in_float32.autocast == 0
    assert in_float32.activations > memory.activations
    recomputed = training_memory(EXPERT, replace(training, gradient_checkpointing=True))
    assert recomputed.activations < memory.activations


@models
@pytest.mark.parametrize("hidden_optimizer", ["adamw", "muon"])
def test_optimisers_keep_what_is_planned(
    config: ExpertConfig | RouterConfig, hidden_optimizer: HiddenOptimizer
) -> None:
    model, _ = build(config)
    training = TrainingConfig(hidden_optimizer=hidden_optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept = 0
    for optimizer in optimizers([model], training):
        optimizer.step()
        moments = (m for state in optimizer.state.values() for m in state.values())
        kept += sum(4 * moment.numel() for moment in moments if moment.dim() > 0)  # no step counts
    assert training_memory(config, training).optimizer == kept


def test_a_plan_has_one_moment_of_what_muon_trains_in_memory_and_on_disk() -> None:
    trainings = ("seed_training", "training")
    adamw = [f"{training}.hidden_optimizer=adamw" for training in trainings]
    without, result = plan(load("quickstart", adamw)), plan(load("quickstart"))
    config = load("quickstart").expert
    width, ratio = config.hidden_size, config.mlp_ratio
    matrices = config.num_layers * round((2 * 4 + 2 * ratio) * width**2)
    less = [
        before.memory.total - after.memory.total
        for before, after in zip(without.trainings, result.trainings, strict=True)
    ]
    seed_and_experts = len(result.trainings) - 1
    assert less == [4 * matrices] * seed_and_experts + [0]  # the router has AdamW
    on_disk = without.run_bytes["checkpoints"] - result.run_bytes["checkpoints"]
    assert on_disk == seed_and_experts * 4 * matrices


def test_a_plan_counts_the_projector_of_alignment_while_it_is_trained() -> None:
    config = load("quickstart+alignment")
    without, result = plan(load("quickstart")), plan(config)
    expert, training, num_features = config.expert, config.training, 128
    recipe = recipe_of(training, expert, num_features)
    count = sum(p.numel() for p in recipe.heads.parameters())
    before, after = without.trainings[-2], result.trainings[-2]
    assert (before.stage, after.stage) == ("expert", "expert")
    assert (before.projector_parameters, after.projector_parameters) == (0, count)
    assert after.num_parameters == before.num_parameters, "it is no part of the expert"
    macs = num_tokens(expert) * 9 * expert.hidden_size * num_features
    flops = round(6 * training.alignment_share * macs)
    assert after.flops_per_image - before.flops_per_image == flops
    adamw = optimizers([recipe.heads], training)
    for parameter in recipe.heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw[0].step()
    moments = sum(4 * m.numel() for s in adamw[0].state.values() for m in s.values() if m.dim() > 0)
    memory = training_memory(expert, replace(training, precision="float32"))
    more = training_memory(
        expert, replace(training, precision="float32"), projector_parameters=count
    )
    assert more.projector == 8 * count + moments
    images = training.batch_size // training.accumulation_steps
    tokens = 4 * num_tokens(expert) * expert.hidden_size
    assert more.activations - memory.activations == images * tokens
    assert after.on_disk.checkpoint - before.on_disk.checkpoint == 4 * count + moments
    assert after.on_disk.weights == before.on_disk.weights
    rows = after.num_rows
    assert after.temporary_bytes - before.temporary_bytes == rows * 4 * num_features
    assert without.trainings[-1].memory == result.trainings[-1].memory  # the router's


@pytest.mark.parametrize(
    ("width", "layers", "heads"), [(512, 12, 8), (768, 12, 12), (1280, 32, 20)]
)
def test_text_towers_have_their_size(width: int, layers: int, heads: int) -> None:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        tower = CLIPTextModel(config)
    assert text_tower_parameters(width) == sum(p.numel() for p in tower.parameters())


# --- Disk ---------------------------------------------------------------------------------------


def test_feature_widths_are_those_of_the_libraries() -> None:
    register_packaged_models()
    open_clip_names = {"paris-tiny": "paris-tiny", "ViT-B-": "ViT-B-32", "ViT-H-": "ViT-H-14"}
    for prefix, name in ({"ViT-L-": "ViT-L-14"} | open_clip_names).items():
        assert FEATURE_WIDTHS[prefix] == open_clip.get_model_config(name)["vision_cfg"]["width"]
    for prefix in ("vit_small_", "vit_base_", "vit_large_"):
        with torch.device("meta"):
            model = timm.create_model(f"{prefix}patch14_dinov2.lvd142m", num_classes=0)
        assert FEATURE_WIDTHS[prefix] == model.num_features


def test_rows_of_the_paper_and_of_the_quickstart() -> None:
    paper = row_bytes(load("paris_xl2"))
    assert paper["latents"] == paper["latents of the mirror image"] == 8192
    assert paper["token ids"] == 154
    assert paper["features"] == 4096
    unflipped = row_bytes(load("paris_xl2", ["corpus.horizontal_flip=false"]))
    assert "latents of the mirror image" not in unflipped
    quickstart = row_bytes(load("quickstart"))
    assert quickstart["latents"] == 96 * 4 * 4 * 2
    assert quickstart["text embedding"] == 25 * 384 * 2  # a sentence vector and 24 token states
    templates = load("quickstart", ["corpus.caption_templates=['{}', 'a {}']"])
    assert row_bytes(templates)["text embedding"] == 2 * 25 * 384 * 2


def test_features_of_an_unknown_model_are_said_to_be_unknown() -> None:
    config = load("quickstart", ["features.model=convnext_base", "features.checkpoint=/features"])
    assert re.search(r"features +unknown\n", render(plan(config)))


# --- Steps --------------------------------------------------------------------------------------


def test_epochs_are_turned_into_the_steps_that_training_takes() -> None:
    config = load("quickstart", ["training.epochs=2.5", "fleet.num_images=8000"])
    _, expert, *_, router = plan(config).trainings
    assert expert.num_rows == 1000
    assert expert.num_steps == with_steps(config.training, 1000).steps == 40
    assert router.num_rows == 8000
    assert router.num_steps == config.router_training.steps


def test_a_limited_corpus_has_fewer_rows() -> None:
    config = load("quickstart", ["corpus.limit=80", "fleet.num_images=1000"])
    assert plan(config).num_rows == 80


def test_experts_are_planned_with_their_own_overrides() -> None:
    changes = ["experts.2.expert.num_layers=8", "experts.5.training.steps=10"]
    changes.append("seed_training.steps=0")  # from which only experts like it could start
    changes.append("seed_training.steps=0")  # another expert could not start from the seed
    common, *_ = plan(load("quickstart", ["seed_training.steps=0"])).trainings
    trainings = plan(load("quickstart", changes)).trainings
    assert trainings[2].num_parameters > common.num_parameters
    assert trainings[5].num_steps == 10
    assert replace(trainings[7], expert=0) == common
    assert "\nexpert 0-1, 3-4, 6-7 " in render(plan(load("quickstart", changes)))


# --- Distillation -------------------------------------------------------------------------------

DISTILLED = ["distillation.routed_share=0.25", "distillation.num_inference_steps=2"]


@pytest.mark.parametrize("objective", ["progressive", "consistency"])
@pytest.mark.parametrize(("guidance_scale", "passes"), [(1.0, 1), (3.0, 2)])
def test_a_distillation_costs_its_teachers_too(
    guidance_scale: float, passes: int, objective: str
) -> None:
    own = (f"sampling.guidance_scale={guidance_scale}", f"distillation.objective={objective}")
    config = load("quickstart", [*DISTILLED, *own])
    without, result = plan(config), plan(config, distilled_from=3)
    *others, student, few_step = result.trainings
    assert others == without.trainings
    assert (student.num_rows, few_step.num_steps) == (8064, config.few_step_training.steps)
    expert = 2 * forward_macs(config.expert, config.text.token_states)
    router = 2 * forward_macs(config.router)
    taught = 0.75 * expert + 0.25 * (3 * expert + router)  # by one expert, then by the mixture
    assert student.flops_per_image == 3 * expert + taught
    step = passes * 3 * expert + router
    targets = {"progressive": 4 * step, "consistency": step + expert}  # of 8 steps, each of 2
    assert few_step.flops_per_image == 3 * expert + targets[objective]
    assert result.num_parameters == without.num_parameters
    for training in (student, few_step):
        assert training.memory.teachers == 4 * result.num_parameters
    size = sum(result.run_bytes.values()) - sum(without.run_bytes.values())
    weights = 4 * student.num_parameters
    checkpoint = 2 * weights + student.memory.optimizer
    assert size == 2 * (checkpoint + weights) + weights  # of two students; the bundle


def test_a_distillation_is_rendered_where_it_is_planned() -> None:
    config = load("quickstart", DISTILLED)
    text = render(plan(config, distilled_from=2))
    assert re.search(r"\nrouter .*\nstudent .*\nfew_step .*\nin all ", text)
    assert re.search(r"autocast +teachers +activations", text)
    assert not re.search("student|few_step|teachers|distilled", render(plan(config)))
    alone = load("quickstart", ["distillation.num_inference_steps=null"])
    assert [t.name for t in plan(alone, distilled_from=2).trainings][-2:] == ["router", "student"]


def test_a_distillation_that_is_refused_is_not_planned() -> None:
    config = load("quickstart", ["distillation.num_inference_steps=3"])
    assert plan(config)
    with pytest.raises(ConfigError, match="a divisor of"):
        plan(config, distilled_from=2)


def test_students_wait_for_the_router_and_for_each_other() -> None:
    result = plan(load("quickstart", [*DISTILLED, fleet_of(48)]), distilled_from=2)
    assert result.schedule is not None
    last = result.schedule.assignments[-3:]
    assert [a.name for a in last] == ["router", "student", "few_step"]
    assert all(after.start == pytest.approx(before.end) for before, after in pairwise(last))


def test_the_teachers_of_xl2_take_what_the_guide_says() -> None:
    result = plan(load("paris_xl2"), distilled_from=2)
    assert round(result.trainings[-1].memory.teachers / 1e9) == 20


# --- Fleet --------------------------------------------------------------------------------------

NOTHING = Memory(
    weights=0, gradients=0, optimizer=0, ema=0, autocast=0, text_encoder=0, activations=0
)
STEPS_OF_A_DAY = 86_400  # of one image of 1 TFLOP, on a GPU that reaches 1 TFLOP/s


def training(
    expert: int | None, days: float, fits: tuple[bool, ...], speeds: tuple[float, ...] | None = None
) -> TrainingPlan:
    """A training of so many days on a GPU of speed 1; GPUs have this speed if nothing is said."""
    return TrainingPlan(
        stage="router" if expert is None else "expert",
        expert=expert,
        num_parameters=1,
        num_rows=1,
        batch_size=1,
        accumulation_steps=1,
        num_steps=round(days * STEPS_OF_A_DAY),
        flops_per_image=10**12,
        memory=NOTHING,
        temporary_bytes=0,
        fits=tuple(Fit(answer) for answer in fits),
        durations=tuple(
            Duration(work=days / speed, interval=days / speed)
            for speed in speeds or (1.0,) * len(fits)
        ),
    )


def gpu(name: str, tflops: float, count: int = 1) -> GpuConfig:
    return GpuConfig(name=name, count=count, peak_tflops=2 * tflops, mfu=0.5, dollars_per_hour=0.5)


def test_experts_wait_for_the_seed_and_it_counts_no_parameters() -> None:
    seed = replace(training(None, days=2.0, fits=(True,)), stage="seed")
    trainings = [seed, training(0, days=1.0, fits=(True,)), training(None, days=1.0, fits=(True,))]
    found = schedule(trainings, [GpuConfig(count=2, peak_tflops=1.0, mfu=1.0)])
    assert [a.name for a in found.assignments] == ["seed", "expert 0", "router"]
    assert [a.start for a in found.assignments] == pytest.approx([0.0, 2.0, 3.0])
    without = plan(load("quickstart", ["seed_training.steps=0"]))
    with_seed = plan(load("quickstart", ["seed_training.steps=10"]))
    assert with_seed.num_parameters == without.num_parameters
    more = sum(with_seed.run_bytes.values()) - sum(without.run_bytes.values())
    seed = with_seed.trainings[0].on_disk
    assert more == seed.checkpoint + 2 * seed.weights  # its folder; the bundle
    assert [t.name for t in with_seed.trainings] == ["seed", *(t.name for t in without.trainings)]
    assert "\nseed " in render(with_seed)
    assert "\nseed " not in render(without)


def test_experts_go_where_they_end_first_and_the_router_waits_for_all() -> None:
    speeds = (1.0, 0.75)
    experts = [training(k, 1.0, (True, True), speeds) for k in range(3)]
    fleet = [gpu("fast", 1.0), gpu("slow", 0.75)]
    result = schedule([*experts, training(None, 0.5, (True, True), speeds)], fleet)
    places = [(a.name, a.gpu, a.start) for a in result.assignments]
    assert places == [
        ("expert 0", "fast 1", 0.0),
        ("expert 1", "slow 1", 0.0),
        ("expert 2", "fast 1", 1.0),
        ("router", "fast 1", 2.0),
    ]
    assert result.days == pytest.approx(2.5)
    assert result.gpu_days == pytest.approx(3 + 4 / 3 - 0.5)
    assert result.dollars == pytest.approx(12 * (3 + 4 / 3 - 0.5))


def test_the_longest_expert_starts_first() -> None:
    lengths = [1.0, 2.0, 3.0]
    experts = [training(k, days, (True,)) for k, days in enumerate(lengths)]
    result = schedule([*experts, training(None, 0.25, (True,))], [gpu("equal", 1.0, count=2)])
    assert [a.name for a in result.assignments] == ["expert 2", "expert 1", "expert 0", "router"]
    assert result.assignments[2].gpu == "equal 2"
    assert result.days == pytest.approx(3.25)


def test_nothing_is_placed_where_it_does_not_fit() -> None:
    experts = [training(0, 1.0, (False, True)), training(1, 1.0, (False, False))]
    fleet = [gpu("small", 9.0), gpu("large", 1.0)]
    result = schedule([*experts, training(None, 0.5, (True, True))], fleet)
    assert [(a.name, a.gpu) for a in result.assignments] == [
        ("expert 0", "large 1"),
        ("router", "small 1"),
    ]
    assert result.unplaced == ("expert 1",)
    assert result.days is result.gpu_days is result.dollars is None


def test_without_a_fleet_days_and_dollars_are_unknown() -> None:
    config = load("quickstart")
    assert plan(config).schedule is None
    assert "Days: unknown, dollars: unknown" in render(plan(config))


def fleet_of(memory_gb: float) -> str:
    return f"fleet.gpus=[{{name: GPU, count: 8, memory_gb: {memory_gb}}}]"


@pytest.mark.parametrize("memory_gb", [16, 24, 32])
def test_following_the_advice_makes_an_expert_fit(memory_gb: float) -> None:
    overrides = [fleet_of(memory_gb), "training.gradient_checkpointing=false"]
    (fit,) = plan(load("paris_xl2", overrides)).trainings[0].fits
    assert not fit.fits
    overrides += [f"training.{option}" for option in fit.advice.split()]
    config = load("paris_xl2", overrides)
    assert plan(config).trainings[0].fits == (Fit(True),)
    # Fewer images at once would leave a GPU idle.
    assert config.training.batch_size // config.training.accumulation_steps >= 8


def test_an_expert_that_nothing_makes_fit_needs_to_be_smaller() -> None:
    result = plan(load("paris_xl2", [fleet_of(12)]))
    assert result.trainings[0].fits == (Fit(False, "a smaller model"),)
    assert result.schedule is not None
    assert result.schedule.unplaced == tuple(f"expert {k}" for k in range(8))
    assert re.search(
        "expert 0-7: does not fit: needs 17.8 GB in bfloat16; would with a smaller model",
        render(result),
    )


# --- The configurations of the paper ------------------------------------------------------------


@pytest.fixture(params=PAPERS)
def paper(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def header(name: str) -> str:
    """Return the comment that a packaged configuration opens with, as one line."""
    text = (resources.files("paris_ray") / "configs" / f"{name}.yaml").read_text()
    comment = text.partition("\n\n")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in comment)


def test_the_header_says_what_the_dry_run_says(paper: str) -> None:
    result = plan(load(paper))
    assert result.schedule is not None
    *experts, router = result.schedule.assignments
    memory = max(training.memory.total for training in result.trainings)
    expected = (
        f"GPU memory {memory / 1e9:.1f} GB, disk {sum(result.run_bytes.values()) / 1e9:.0f} GB, "
        f"experts {max(a.end for a in experts):.1f} days, router {router.days:.1f} days, "
        f"{result.schedule.dollars:,.0f} dollars"
    )
    assert expected in header(paper)


def test_the_headers_commands_name_the_configuration(paper: str) -> None:
    config = load(paper)
    assert f"python -m jobs.pipeline --config {paper} corpus.path={config.corpus.path}" in header(
        paper
    )
    assert f"--config {paper} corpus.path={config.corpus.path} --dry-run" in header(paper)


def test_everything_fits_the_fleet_it_is_planned_for(paper: str) -> None:
    config = load(paper)
    for training in plan(config).trainings:
        assert all(fit.fits for fit in training.fits)
    assert config.cluster.num_clusters == sum(gpu.count for gpu in config.fleet.gpus) == 8


def test_sizes_are_the_published_ones() -> None:
    assert load("paris_xl2").expert == ExpertConfig.preset("XL/2")
    assert load("paris_b2").expert == ExpertConfig.preset("B/2")
    for name in PAPERS:
        assert load(name).router == RouterConfig()


def test_xl2_is_trained_for_the_published_120_a40_days() -> None:
    schedule = plan(load("paris_xl2")).schedule
    assert schedule is not None
    *experts, _ = schedule.assignments
    assert sum(a.days for a in experts) == pytest.approx(120, rel=0.02)


def test_xl2_also_trains_on_24_gb_and_without_checkpointing_on_48() -> None:
    small = plan(load("paris_xl2", [fleet_of(24)]))
    assert small.trainings[0].fits == (Fit(True),)
    changes = ["training.gradient_checkpointing=false", "training.accumulation_steps=8"]
    assert plan(load("paris_xl2", changes)).trainings[0].fits == (Fit(True),)


def test_the_two_configurations_differ_in_scale_alone() -> None:
    b2, xl2 = load("paris_b2"), load("paris_xl2")
    for section in ("text", "features", "codec", "cluster", "router", "sampling", "evaluation"):
        assert getattr(b2, section) == getattr(xl2, section), section
    scale = {
        "steps": b2.training.steps,
        "checkpoint_every": b2.training.checkpoint_every,
        "sample_every": b2.training.sample_every,
        "gradient_checkpointing": b2.training.gradient_checkpointing,
    }
    assert replace(xl2.training, **scale) == b2.training
    assert xl2.router_training == b2.router_training


def test_a_plan_is_the_same_every_time(paper: str) -> None:
    config: Config = load(paper)
    assert render(plan(config)) == render(plan(config))


def test_tables_are_aligned_and_name_their_units(paper: str) -> None:
    text = render(plan(load(paper)))
    first, *_ = text.split("Training", 1)[1].split("\n\n")
    widths = {len(line) for line in f"Training{first}".splitlines()}
    assert len(widths) == 1
    for unit in ("GFLOP", "EFLOP", "GB", "bytes", "days", "dollars"):
        assert unit in text
