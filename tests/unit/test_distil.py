"""Distillation: what a student is taught, that it is learnt, and a bundle of one expert."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paris_ray.artifacts import CHECKPOINT, METRICS, VerifiedFolder, canonical_json
from paris_ray.bundle import Bundle, load_bundle, load_expert
from paris_ray.config import ExpertConfig, Objective, TrainingConfig, check_distillation, load
from paris_ray.devices import autocast
from paris_ray.diffusion import predict_velocity, router_logits, sample_path
from paris_ray.errors import ArtifactError, ConfigError, RoutingError
from paris_ray.export import student_sampling
from paris_ray.folders import Folder
from paris_ray.model_card import distilled_card
from paris_ray.models import Expert, TextConditioning
from paris_ray.run import EXPERT_WEIGHTS, FEW_STEP, STUDENT
from paris_ray.sampling import generate
from paris_ray.sampling.generation import sample, sample_one_expert
from paris_ray.sampling.routing import expert_weights
from paris_ray.sampling.sampler import initial_noise
from paris_ray.sampling.teacher import EnsembleTeacher
from paris_ray.sampling_options import sampling_options
from paris_ray.training.data import Batch
from paris_ray.training.distil import (
    OBJECTIVES,
    ROUTED,
    consistency,
    progressive,
    round_up,
    velocities,
    write_single_router,
)
from paris_ray.training.expert import ExpertData, Lesson, lesson_loss, train_expert
from paris_ray.training.loop import OnProgress
from tests.training_shards import EXPERT, TRAINING, Stop, carry_on, stop_at, write_shard

PROMPTS = ["a red cat", "blue dog", "a green square", "a circle"]
SEEDS = [3, 14, 15, 92]
T = torch.tensor([1.0, 0.75, 0.5, 0.25])


@pytest.fixture
def text(tiny_bundle: Bundle) -> TextConditioning:
    return tiny_bundle.encode_text(PROMPTS)


@pytest.fixture
def batch(tiny_bundle: Bundle) -> Batch:
    latents, noise = (initial_noise(tiny_bundle.latent_shape, seeds) for seeds in (SEEDS, range(4)))
    return Batch(latents, noise, T, torch.empty(4), torch.tensor([2, 0, 1, 0]))


def teacher_of(bundle: Bundle, **options: Any) -> EnsembleTeacher:
    return EnsembleTeacher(bundle, sampling_options(bundle, **options))


# --- The teacher is the sampler's own field ------------------------------------------------------


def test_a_row_is_taught_by_the_expert_of_its_cluster(
    tiny_bundle: Bundle, text: TextConditioning, batch: Batch
) -> None:
    found = teacher_of(tiny_bundle).of_clusters(batch.latents, T, text, batch.clusters)
    for row, k in enumerate(batch.clusters.tolist()):
        one = slice(row, row + 1)
        alone = predict_velocity(tiny_bundle.expert(k), batch.latents[one], T[one], text.rows(one))
        torch.testing.assert_close(found[one], alone)


@pytest.mark.parametrize("routing", ["top-1", "top-2", "full"])
def test_the_routed_target_is_the_mixture_that_routing_makes(
    tiny_bundle: Bundle, text: TextConditioning, batch: Batch, routing: str
) -> None:
    options = replace(sampling_options(tiny_bundle, routing=routing), router_temperature=0.5)
    found = EnsembleTeacher(tiny_bundle, options).routed(batch.latents, T, text)
    logits = router_logits(tiny_bundle.router, batch.latents, T, text)
    weights = expert_weights(logits / 0.5, options.routing)
    answers = [predict_velocity(tiny_bundle.expert(k), batch.latents, T, text) for k in range(3)]
    mixture = sum(weights[:, k, None, None, None] * answers[k] for k in range(3))
    torch.testing.assert_close(found, mixture)


@pytest.mark.parametrize("routing", ["top-2", "agree:1.4"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_steps_of_the_mean_velocity_end_where_the_sampler_does(
    tiny_bundle: Bundle, text: TextConditioning, guidance_scale: float, routing: str
) -> None:
    options = sampling_options(
        tiny_bundle, num_inference_steps=6, guidance_scale=guidance_scale, routing=routing
    )
    drawn = sample(tiny_bundle, text, SEEDS, options).latents
    teacher = EnsembleTeacher(tiny_bundle, options)
    latents = initial_noise(tiny_bundle.latent_shape, SEEDS)
    for t in (1.0, 2 / 3, 1 / 3):
        latents = latents - teacher.mean_velocity(latents, torch.full((4,), t), text, 2) / 3
    torch.testing.assert_close(latents, drawn, rtol=1e-4, atol=1e-4)


# --- The lessons ---------------------------------------------------------------------------------


def test_a_student_equal_to_its_teacher_has_no_loss(
    tiny_bundle: Bundle, text: TextConditioning, batch: Batch
) -> None:
    lesson = velocities(teacher_of(tiny_bundle), routed_share=0.5)
    batch = batch._replace(clusters=torch.ones(4, dtype=torch.long))
    assert lesson_loss(tiny_bundle.expert(1), batch, text, lesson) < 1e-9
    assert lesson_loss(tiny_bundle.expert(0), batch, text, lesson) > 0


def test_a_student_that_predicts_noise_is_taught_the_noise_of_the_velocity(
    text: TextConditioning, batch: Batch, randomised: Any, tiny_bundle: Bundle
) -> None:
    config = replace(tiny_bundle.expert_configs[0], prediction="epsilon", x0_clamp=None)
    ddpm, other = (randomised(Expert(config), seed) for seed in (1, 2))
    lesson = velocities(PlainTeacher([ddpm]), routed_share=1.0)
    batch = lesson.prepare(0.0, batch._replace(t=torch.tensor([0.9, 0.75, 0.5, 0.25])))
    assert lesson_loss(ddpm, batch, text, lesson) < 1e-9
    assert lesson_loss(other, batch, text, lesson) > 1e-2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_of_as_many_steps_learns_the_guided_velocity(
    single_bundle_path: Path, text: TextConditioning, batch: Batch, objective: Objective
) -> None:
    single = load_bundle(str(single_bundle_path))
    for guidance_scale, equal in ((1.0, True), (3.0, False)):
        options = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
        lesson = OBJECTIVES[objective](teacher_of(single, **options), 4, 4)
        loss = lesson_loss(single.expert(0), lesson.prepare(0.0, batch), text, lesson)
        assert (loss < 1e-9) == equal


def test_clusters_teach_before_the_routed_share_and_the_mixture_in_it(
    tiny_bundle: Bundle, text: TextConditioning, batch: Batch
) -> None:
    teacher = teacher_of(tiny_bundle, routing="full")
    lesson = velocities(teacher, routed_share=0.25)
    early, late = lesson.prepare(0.74, batch), lesson.prepare(0.75, batch)
    assert torch.equal(early.clusters, batch.clusters)
    assert late.clusters.tolist() == [ROUTED] * 4
    of_clusters = teacher.of_clusters(batch.latents, T, text, batch.clusters)
    routed = teacher.routed(batch.latents, T, text)
    assert not torch.allclose(of_clusters, routed)
    for taught, wanted in ((early, of_clusters), (late, routed)):
        args = tiny_bundle.expert(0), batch.latents, T, text, taught.clusters
        assert torch.equal(lesson.target(*args), wanted)


@pytest.mark.parametrize(("share", "first"), [(0.0, [2, 0]), (1.0, [ROUTED] * 2)])
def test_all_of_a_training_may_be_one_lesson(share: float, first: list[int]) -> None:
    drawn = Batch(*(torch.empty(2) for _ in range(4)), torch.tensor([2, 0]))
    lesson = velocities(PlainTeacher([]), share)
    for done in (0.0, 0.999):
        assert lesson.prepare(done, drawn).clusters.tolist() == first


def test_times_are_raised_to_those_at_which_the_student_is_asked() -> None:
    t = torch.tensor([0.0, 0.01, 0.25, 0.2501, 0.75, 0.9, 1.0])
    assert round_up(t, 4).tolist() == [0.25, 0.25, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert round_up(t, 1).tolist() == [1.0] * 7


# --- Consistency ---------------------------------------------------------------------------------


class LinearFlow(nn.Module):
    """The field v(z, t) = RATE z: Euler steps of 1/6 multiply z by a constant, in closed form.

    As a teacher it answers for the ensemble's 6 steps; as a student, of 2 steps of 3, it is the
    right one: at each of the 6 times it answers the mean velocity to the end of its own step.
    """

    RATE = 1.5
    config = replace(EXPERT, prediction="velocity")

    def mean_velocity(
        self, latents: Tensor, t: Tensor, text: TextConditioning, num_steps: int | Tensor
    ) -> Tensor:
        return latents * (1 - (1 - self.RATE / 6) ** num_steps) * 6 / num_steps

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: TextConditioning, hidden: None = None
    ) -> Tensor:
        steps_left = torch.tensor([3, 1, 2])[(timesteps * 6 / 1000).round().long() % 3]
        return self.mean_velocity(latents, timesteps, text, steps_left.view(-1, 1, 1, 1))


@pytest.fixture
def six_times() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(6, 3, 2, 2, generator=generator) for _ in range(2))
    t = torch.arange(1, 7) / 6
    return Batch(latents, noise, t, torch.empty(6), torch.zeros(6, dtype=torch.long))


def test_objectives_teach_the_mean_velocity_of_a_linear_flow(six_times: Batch) -> None:
    flow: Any = LinearFlow()
    latents, text = six_times.noise, TextConditioning.from_vectors(torch.zeros(6, 4))
    for lesson in (consistency(flow, 2, 6), progressive(flow, 2, 6)):
        times = lesson.prepare(0.0, six_times).t
        assert set(times.tolist()) <= set(six_times.t.tolist())
        found = lesson.target(flow, latents, times, text, six_times.clusters)
        # From each time to 1/2 or 0 the right field leads to q^n z, n steps away.
        ends = (times > 0.5 + 1e-6) / 2
        num_steps = ((times - ends) * 6).round()
        factor = (1 - LinearFlow.RATE / 6) ** num_steps
        wanted = latents * ((1 - factor) / (times - ends)).view(-1, 1, 1, 1)
        torch.testing.assert_close(found, wanted)


def test_the_student_answers_for_all_but_the_first_step(six_times: Batch, randomised: Any) -> None:
    flow: Any = LinearFlow()
    student, text = randomised(Expert(EXPERT), 1), TextConditioning.from_vectors(torch.ones(6, 4))
    latents, t = six_times.noise, six_times.t
    found = consistency(flow, 2, 6).target(student, latents, t, text, six_times.clusters)
    first = flow.mean_velocity(latents, t, text, 1)
    rest = predict_velocity(student, latents - first / 6, torch.arange(6) / 6, text)
    share = torch.tensor([0, 1 / 2, 2 / 3, 0, 1 / 2, 2 / 3]).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (1 - share) * first + share * rest)
    assert torch.equal(found[[0, 3]], first[[0, 3]])  # where the steps of both end together


def test_times_of_consistency_are_those_of_the_ensemble(batch: Batch) -> None:
    t = torch.tensor([0.01, 0.3, 0.51, 1.0])
    prepared = consistency(PlainTeacher([]), 2, 4).prepare(0.0, batch._replace(t=t))
    assert prepared.t.tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_flows_through_targets_and_none_is_lost(
    tiny_bundle: Bundle, text: TextConditioning, batch: Batch, randomised: Any, dtype: torch.dtype
) -> None:
    student = randomised(Expert(tiny_bundle.expert_configs[0]), 1)
    lesson = consistency(teacher_of(tiny_bundle, num_inference_steps=4), 1, 4)
    batch = lesson.prepare(0.0, batch)
    path = sample_path(batch.latents, batch.noise, batch.t)
    with autocast(torch.device("cpu"), dtype), torch.no_grad():
        fixed = lesson.target(student, path.x_t, path.t, text, batch.clusters)
    gradients = []
    for taught in (lesson, replace(lesson, target=lambda *_: fixed)):
        student.zero_grad()
        with autocast(torch.device("cpu"), dtype):
            loss = lesson_loss(student, batch, text, taught)
        loss.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


# --- Training ------------------------------------------------------------------------------------


class PlainTeacher:
    """Experts on the CPU, all of which have the same weight in the mixture."""

    def __init__(self, experts: list[Expert]) -> None:
        self.experts = experts

    @torch.no_grad()
    def of_clusters(
        self, latents: Tensor, t: Tensor, text: TextConditioning, clusters: Tensor
    ) -> Tensor:
        answers = torch.stack([predict_velocity(e, latents, t, text) for e in self.experts])
        return answers[clusters, torch.arange(len(clusters))]

    @torch.no_grad()
    def routed(self, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        answers = [predict_velocity(expert, latents, t, text) for expert in self.experts]
        return torch.stack(answers).mean(dim=0)

    def mean_velocity(
        self, latents: Tensor, t: Tensor, text: TextConditioning, num_steps: int
    ) -> Tensor:
        return num_steps * self.routed(latents, t, text)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Folder]:
    root = tmp_path_factory.mktemp("shards")
    return [write_shard(Folder(root / str(i)), 6, mean=i, seed=i) for i in range(3)]


@pytest.fixture
def teacher(randomised: Any) -> PlainTeacher:
    return PlainTeacher([randomised(Expert(EXPERT), k).eval() for k in range(2)])


def train(
    shards: list[Folder],
    output: Folder,
    lesson: Lesson,
    *,
    expert: ExpertConfig = EXPERT,
    config: TrainingConfig = TRAINING,
    on_progress: OnProgress = carry_on,
) -> tuple[bytes, bytes]:
    """Train on two shards, measure on the third; return the bytes of weights and metrics."""
    train_expert(
        expert,
        config,
        lesson=lesson,
        data=ExpertData(shards=shards[:2], digests={"clusters": "two"}, held_out=shards[2:]),
        seed=0,
        output=output,
        on_progress=on_progress,
    )
    return output.read(EXPERT_WEIGHTS), output.read(METRICS)


def switching(teacher: PlainTeacher) -> Lesson:
    return velocities(teacher, routed_share=0.5)  # from step 6 of 12 on


def own_pupil(teacher: PlainTeacher) -> Lesson:
    return consistency(teacher, 1, 4)  # what is learnt depends on the weights so far


@pytest.mark.parametrize("lesson_of", [switching, own_pupil])
@pytest.mark.parametrize("killed_at", [[4], [8], [4, 10]])
def test_resumed_equals_uninterrupted_to_the_bit(
    shards: list[Folder],
    tmp_path: Path,
    teacher: PlainTeacher,
    killed_at: list[int],
    lesson_of: Callable[[PlainTeacher], Lesson],
) -> None:
    lesson = lesson_of(teacher)
    whole = train(shards, Folder(tmp_path / "whole"), lesson)
    output = Folder(tmp_path / "output")
    for step in killed_at:
        with pytest.raises(Stop):
            train(shards, output, lesson, on_progress=stop_at(step))
    assert train(shards, output, lesson) == whole
    assert "held_out_loss" in json.loads(whole[1].splitlines()[-1])


def test_another_lesson_does_not_continue_a_training(
    shards: list[Folder], tmp_path: Path, teacher: PlainTeacher
) -> None:
    output = Folder(tmp_path)
    with pytest.raises(Stop):
        train(shards, output, velocities(teacher, 0.5), on_progress=stop_at(6))
    assert output.exists(CHECKPOINT)
    for other in (velocities(teacher, 0.25), progressive(teacher, 2, 4)):
        with pytest.raises(ArtifactError, match="belongs to another configuration"):
            train(shards, output, other)


def test_the_lessons_differ_and_so_do_their_students(
    shards: list[Folder], tmp_path: Path, teacher: PlainTeacher
) -> None:
    lessons = [velocities(teacher, 0.0), velocities(teacher, 1.0)]
    lessons += [lesson(teacher, 1, 4) for lesson in OBJECTIVES.values()]
    weights = {train(shards, Folder(tmp_path / str(i)), les)[0] for i, les in enumerate(lessons)}
    assert len(weights) == len({canonical_json(les.identity) for les in lessons}) == 4


@pytest.mark.parametrize("prediction", ["preconditioned", "velocity"])
def test_a_student_approaches_its_teacher(
    shards: list[Folder], tmp_path: Path, teacher: PlainTeacher, prediction: Any
) -> None:
    config = replace(TRAINING, steps=150, batch_size=12, learning_rate=1e-2, log_every=15)
    expert, output = replace(EXPERT, prediction=prediction), Folder(tmp_path)
    _, metrics = train(shards, output, velocities(teacher, 1.0), expert=expert, config=config)
    losses = [json.loads(line)["loss"] for line in metrics.splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    student = load_expert(VerifiedFolder(output, None))
    generator = torch.Generator().manual_seed(0)
    latents, vectors = (torch.randn(8, *s, generator=generator) for s in ((3, 2, 2), (4,)))
    t, text = torch.full((8,), 0.6), TextConditioning.from_vectors(vectors)
    wanted = teacher.routed(latents, t, text)
    error = (predict_velocity(student, latents, t, text) - wanted).square().mean()
    assert error < 0.7 * wanted.square().mean()


# --- A bundle of one expert ----------------------------------------------------------------------


def test_a_bundle_of_one_expert_draws_what_that_expert_draws(single_bundle_path: Path) -> None:
    bundle = load_bundle(str(single_bundle_path))
    assert bundle.num_experts == bundle.router_config.num_experts == 1
    first = [image.tobytes() for image in generate(bundle, PROMPTS, seed=5)]
    assert [image.tobytes() for image in generate(bundle, PROMPTS, seed=5)] == first
    assert [image.tobytes() for image in generate(bundle, PROMPTS, seed=5, routing="full")] == first
    text, options = bundle.encode_text(PROMPTS), sampling_options(bundle)
    samples = sample(bundle, text, range(5, 9), options)
    assert samples.expert_usage.tolist() == [[pytest.approx(1.0)]] * 4
    alone = sample_one_expert(
        bundle.expert(0),
        text,
        bundle.null_text,
        seeds=range(5, 9),
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
    )
    torch.testing.assert_close(samples.latents, alone)
    with pytest.raises(RoutingError, match="there are 1 experts"):
        generate(bundle, PROMPTS, routing="top-2")


def test_the_router_of_one_expert_is_the_same_wherever_it_is_written(
    single_bundle_path: Path, tmp_path: Path
) -> None:
    write_single_router(load_bundle(str(single_bundle_path)).expert_configs[0], Folder(tmp_path))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (single_bundle_path / "router" / path.name).read_bytes()


def test_the_card_sets_the_models_beside_each_other(
    tiny_bundle: Bundle, single_bundle_path: Path
) -> None:
    def facts(mean: float) -> dict[str, Any]:
        share = {"mean": mean, "low": 0.0, "high": 1.0}
        shown = {
            "captions": 9,
            "gallery": 10,
            "caption_recall": share,
            "attributes": {"all": share},
        }
        return {"shown": shown, "held_out": {"captions": 3, "attributes": {"all": share}}}

    single = load_bundle(str(single_bundle_path))
    text = distilled_card(
        single,
        tiny_bundle,
        embeddings={"rows": 10, "attribution": None},
        measured={"ensemble": facts(0.75), "student": facts(0.5), "few_step": facts(0.25)},
        sampling={
            "student": tiny_bundle.facts.sampling,
            "few_step": replace(tiny_bundle.facts.sampling, num_inference_steps=1),
        },
    )
    own = sum(p.numel() for p in single.expert(0).parameters())
    assert "|  | ensemble | student | few_step |" in text
    assert f"| parameters of the experts | {3 * own:,} | {own:,} | {own:,} |" in text
    assert "| steps | 3 | 3 | 1 |" in text
    wanted = [f"{x:.4f} (0.0000 to 1.0000)" for x in (0.75, 0.5, 0.25)]
    assert f"| all right over 3 held-out captions | {' | '.join(wanted)} |" in text
    recall = "caption recall over 9 training captions, among 10 pictures"
    assert f"| {recall} | {' | '.join(wanted)} |" in text
    assert "licence" not in text


# --- The configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.routed_share=1.5", "distillation.routed_share=1.5 is not allowed"),
        ("distillation.num_inference_steps=0", "num_inference_steps=0 is not allowed: at least 1"),
        ("distillation.objective=mean", "objective: Invalid value 'mean', expected one of"),
        ("distil_training.steps=0", "distil_training.steps=0 is not allowed: at least 1"),
        ("few_step_training.batch_size=0", "few_step_training.batch_size=0 is not allowed"),
        ("few_step_training.init_from=x", "few_step_training.init_from='x' is not allowed: null"),
    ],
)
def test_values_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("quickstart", [override])


def test_few_steps_must_divide_those_of_the_ensemble() -> None:
    check_distillation(load("quickstart", ["distillation.num_inference_steps=4"]))
    check_distillation(load("quickstart", ["distillation.num_inference_steps=null"]))
    three = load("quickstart", ["distillation.num_inference_steps=3"])
    with pytest.raises(ConfigError, match=r"a divisor of sampling\.num_inference_steps=8, or null"):
        check_distillation(three)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [("sampling.solver=ab2", "euler"), ("sampling.time_grid=half-last", "linspace")],
)
def test_few_steps_are_taught_by_equal_euler_steps(override: str, allowed: str) -> None:
    check_distillation(load("quickstart", [override, "distillation.num_inference_steps=null"]))
    message = f"is not allowed: {allowed}, or null for distillation.num_inference_steps"
    with pytest.raises(ConfigError, match=message):
        check_distillation(load("quickstart", [override]))


def test_only_a_student_of_velocities_has_presets() -> None:
    config = load("quickstart", ["sampling.presets.low.num_inference_steps=3"])
    assert student_sampling(config, STUDENT).presets == config.sampling.presets
    few = student_sampling(config, FEW_STEP)
    assert (few.presets, few.solver, few.num_inference_steps) == ({}, "euler", 4)


def test_an_expert_that_predicts_noise_cannot_learn_few_steps() -> None:
    epsilon = ["expert.prediction=epsilon", "distillation.num_inference_steps=4"]
    with pytest.raises(ConfigError, match=r"null for expert\.prediction=epsilon"):
        check_distillation(load("quickstart", epsilon))


def test_the_oracle_is_refused_as_one_expert_has_no_choice() -> None:
    named = ["evaluation.name=oracle", "evaluation.oracle=true"]
    with pytest.raises(ConfigError, match=r"evaluation\.oracle=True .*: one expert has no choice"):
        check_distillation(load("quickstart", named))
    check_distillation(load("quickstart", named[:1]))
