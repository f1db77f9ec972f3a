"""Experts with modern blocks and a text adapter, all the way: trained, exported, drawn, adapted.

The engine's bytes are held in test_batches.py and serve/test_sampler.py, which draw with them too.
"""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paris_ray.artifacts import METRICS, VerifiedFolder
from paris_ray.bundle import MODEL_INDEX, Bundle, load_bundle, load_expert
from paris_ray.config import LoRAConfig
from paris_ray.diffusion import predict_velocity
from paris_ray.errors import ConfigError
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.model_card import model_card
from paris_ray.models import Expert
from paris_ray.roster.admission.form import check_form
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.verdict import examine, open_panel, read_candidate
from paris_ray.roster.newcomer import Newcomer
from paris_ray.roster.successor import Options
from paris_ray.run import EXPERT_WEIGHTS
from paris_ray.sampling import generate
from paris_ray.sampling.teacher import EnsembleTeacher
from paris_ray.sampling_options import sampling_options
from paris_ray.training.distil import velocities
from paris_ray.training.expert import ExpertData, train_expert
from paris_ray.training.lora import train_lora
from tests.admission_panels import held_out, look
from tests.conftest import GEOMETRY, WIDTH, write_model
from tests.newer_experts import TRAINING, newer_experts, train_newer, write_newer_shard
from tests.training_shards import carry_on
from tests.unit.roster.conftest import write_run

EXPERTS = newer_experts(GEOMETRY, WIDTH)
PROMPTS = ["a red cat", "a blue dog a green circle", ""]
WITH_BOTH = 0

pytestmark = pytest.mark.usefixtures("replica_threads")


@pytest.fixture
def bundle(newer_bundle_path: Path) -> Bundle:
    return load_bundle(str(newer_bundle_path))


@pytest.fixture
def shard(tmp_path: Path) -> Folder:
    return write_newer_shard(Folder(tmp_path / "shard"), GEOMETRY, WIDTH["text_embed_dim"])


def draw(bundle: Bundle, **options: Any) -> list[bytes]:
    options = {"num_inference_steps": 3, "routing": "full", "guidance_scale": 2.0} | options
    return [image.tobytes() for image in generate(bundle, PROMPTS, seed=3, **options)]


def adapter_spoke(expert: Expert) -> bool:
    assert expert.text_adapter is not None
    return bool(expert.text_adapter.mlp[2].weight.abs().max() > 0.01)


def test_what_is_trained_is_what_a_bundle_has(bundle: Bundle, newer_parts: Path) -> None:
    assert bundle.expert_configs == EXPERTS
    for k in range(len(EXPERTS)):
        assert adapter_spoke(bundle.expert(k)), "or the tests below are about nothing"
        trained = load_expert(VerifiedFolder(Folder(newer_parts / f"expert_{k}"), None))
        state = bundle.expert(k).state_dict()
        assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())
    assert len(set(draw(bundle))) == len(PROMPTS)


def test_a_bundle_is_written_as_it_was_read(bundle: Bundle, tmp_path: Path) -> None:
    write_bundle(bundle, Folder(tmp_path), model_card="")
    again = load_bundle(str(tmp_path))
    for k in range(len(EXPERTS)):
        name = f"expert_{k}"
        assert again.weights_digest(name) == bundle.weights_digest(name)
    assert draw(again) == draw(bundle)


def test_words_of_a_caption_reach_the_picture_through_the_adapter(bundle: Bundle) -> None:
    """Which tells that it is not left out: without it the same weights draw something else."""
    expert = bundle.expert(1)
    text = bundle.encode_text(PROMPTS[:2])
    latents, t = torch.ones(2, 8, 4, 4), torch.full((2,), 0.5)
    with_it = predict_velocity(expert, latents, t, text)
    plain = load_bundle(bundle.parts["router"].folder.uri.rpartition("/")[0]).expert(1)
    plain.text_adapter = None
    assert not torch.equal(predict_velocity(plain, latents, t, text), with_it)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_they_draw_in_half_precision_without_a_warning(
    newer_bundle_path: Path, bundle: Bundle, dtype: Any
) -> None:
    half = load_bundle(str(newer_bundle_path), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = draw(half)
    whole = (np.frombuffer(picture, np.uint8).astype(int) for picture in draw(bundle))
    halves = (np.frombuffer(picture, np.uint8).astype(int) for picture in pictures)
    assert max(abs(a - b).mean() for a, b in zip(whole, halves, strict=True)) < 8


def test_only_a_bundle_of_released_tensors_says_that_the_public_pipeline_reads_it(
    release_bundle: Bundle, tmp_path: Path
) -> None:
    released = release_bundle.expert_configs[0]
    kinds = []
    for changes in ({}, {"blocks": "modern"}, {"text_adapter": True}):
        config = replace(released, **changes)
        part = tmp_path / "part"
        write_model(Folder(part), Expert(config), EXPERT_WEIGHTS)
        parts = dict(release_bundle.parts) | {"expert_1": VerifiedFolder(Folder(part), None)}
        defaults = {"input_size": config.input_size, "num_experts": len(EXPERTS)}
        written = Folder(tmp_path / f"bundle-{len(kinds)}")
        bundle = Bundle(parts, release_bundle.facts, defaults=defaults)
        write_bundle(bundle, written, model_card="")
        kinds.append(written.read_json(MODEL_INDEX)["_class_name"])
    assert kinds == ["DDMPipeline", "Bundle", "Bundle"]


def test_the_model_card_tells_what_released_experts_do_not_have(bundle: Bundle) -> None:
    def card(bundle: Bundle) -> str:
        embeddings = {"rows": 10, "quarantined": {}, "attribution": None}
        facts: dict[str, Any] = {"embeddings": embeddings, "router": {"right_cluster": {}}}
        return model_card(bundle, cluster_sizes=[1], losses=[], evaluation=None, **facts)

    assert "| 1 | 32 wide, 1 layers, modern blocks, a text adapter | velocity |" in card(bundle)
    assert "| 2 | 32 wide, 1 layers, a text adapter | velocity |" in card(bundle)
    alike = {f"expert_{k}": bundle.parts["expert_1"] for k in range(len(EXPERTS))}
    told = "All have modern blocks and a text adapter, which the released ones do not."
    assert told in card(Bundle(dict(bundle.parts) | alike, bundle.facts))


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("targets", [("in_proj", "out_proj"), ("text_adapter.mlp.0",)])
def test_a_lora_trained_on_one_changes_what_it_draws_and_no_more(
    bundle: Bundle, shard: Folder, tmp_path: Path, targets: tuple[str, ...], merge: bool
) -> None:
    before = draw(bundle)
    weights = {n: value.clone() for n, value in bundle.expert(WITH_BOTH).state_dict().items()}
    output = Folder(tmp_path / "lora")
    train_lora(
        bundle.expert(WITH_BOTH),
        LoRAConfig(r=2, lora_alpha=8, target_modules=targets),
        TRAINING,
        shard=shard,
        inputs={},
        seed=0,
        output=output,
        on_progress=carry_on,
    )
    bundle.add_lora("mine", output.uri, expert=WITH_BOTH, merge=merge)
    assert all(a != b for a, b in zip(draw(bundle, lora="mine"), before, strict=True))
    assert draw(bundle) == before
    state = bundle.expert(WITH_BOTH).state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


# -- Those who read experts ------------------------------------------------------------------------


def test_one_joins_a_roster_and_one_leaves_it(
    newer_parts: Path, shard: Folder, tmp_path: Path
) -> None:
    made = write_run(newer_parts, tmp_path / "run")
    roster = made.roster()
    newcomer = Newcomer.open(made.run.expert(0), made.run.shard(0))
    joined = str(tmp_path / "joined")
    roster.write(roster.add(newcomer), joined, Options())
    bundle = load_bundle(joined)
    assert bundle.expert_configs == (*EXPERTS, EXPERTS[0])
    assert bundle.weights_digest("expert_3") == roster.present.bundle.weights_digest("expert_0")
    roster = made.roster(joined)
    roster.write(roster.retire(1), str(tmp_path / "left"), Options())
    left = load_bundle(str(tmp_path / "left"))
    assert left.expert_configs == (EXPERTS[0], EXPERTS[2], EXPERTS[0])
    assert len(set(draw(left))) == len(PROMPTS)


def test_one_passes_an_examination_beside_its_like(
    newer_bundle_path: Path, newer_parts: Path
) -> None:
    bundle = load_bundle(str(newer_bundle_path))
    candidate = read_candidate(str(newer_parts / "expert_1"), bundle)
    seen = open_panel(candidate, 1, bundle, held_out(bundle), seed=0)
    findings = examine(seen, look, num_words=5)
    assert len(findings.checks) == 6
    readings = [reading for check in findings.checks for reading in check.readings]
    assert all(np.isfinite(reading.value) for reading in readings)
    like = [candidate.expert] * 3
    (form, norms) = check_form(candidate.expert, like, Limits()).readings
    assert (form.value, norms.value) == (0, 0)
    spoilt = copy.deepcopy(candidate.expert)
    spoilt.layers[0].attn.key_norm.weight *= 1000
    worst = check_form(spoilt, like, Limits()).readings[1]
    assert worst.is_flagged and worst.detail == "layers.0.attn.key_norm.weight"


def test_a_student_of_them_learns_from_them(bundle: Bundle, shard: Folder, tmp_path: Path) -> None:
    teacher = EnsembleTeacher(bundle, sampling_options(bundle, routing="full"))
    output = Folder(tmp_path / "student")
    train_expert(
        EXPERTS[WITH_BOTH],
        replace(TRAINING, learning_rate=0.01, steps=30, log_every=10),
        data=ExpertData(shards=[shard], digests={}),
        seed=0,
        output=output,
        on_progress=carry_on,
        lesson=velocities(teacher, routed_share=1.0),
    )
    losses = [json.loads(line)["loss"] for line in output.read(METRICS).splitlines()]
    assert losses[-1] < losses[0]
    student = load_expert(VerifiedFolder(output, None))
    assert student.config == EXPERTS[WITH_BOTH]


@pytest.mark.parametrize("changes", [{"blocks": "released"}, {"text_adapter": False}])
def test_one_starts_from_its_like_alone(
    newer_parts: Path, shard: Folder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    start = replace(TRAINING, init_from=str(newer_parts / "expert_1"), steps=1)
    train_newer(EXPERTS[1], shard, Folder(tmp_path / "like"), seed=0, config=start)
    ((field, value),) = changes.items()
    with pytest.raises(ConfigError, match=rf"init_from=.*: its {field} is .*, of .* {value!r}"):
        train_newer(
            replace(EXPERTS[1], **changes), shard, Folder(tmp_path / "other"), seed=0, config=start
        )
