"""A study in small, on a real Ray: every kind of arm, the page, and that all of it is kept."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from paris_ray.artifacts import read_manifest
from paris_ray.config import Config, load, with_overrides
from paris_ray.embeddings import read_table
from paris_ray.errors import ArtifactError, TrainingError
from paris_ray.export import open_trained_parts
from paris_ray.run import EMBEDDINGS, EVALUATION, Run
from paris_ray.sampling.generation import sample_one_expert
from paris_ray.sampling_options import sampling_options
from paris_ray.study.forms import SMALL_FORM
from paris_ray.study.plan import AGREE, study_arms, study_config
from tests.long_tests import chaos

pytestmark = [pytest.mark.ray, chaos]

FORM = replace(
    SMALL_FORM,
    total_steps=48,
    num_experts=3,
    expert_counts=(),
    seed_shares=(),
    rate_factors=(),
    ema_decays=(),
    features=("image",),
    removed_directions=2,
    imbalances=(),
    temperatures=(8.0,),
    shared_shares=(0.25,),
    totals=(Fraction(1, 2),),
    seeds=1,
)
OVERRIDES = ["cluster.features=caption", "router_training.steps=10", "evaluation.max_captions=16"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Config:
    run_dir = tmp_path_factory.mktemp("study") / "runs"
    return load("quickstart", [f"run_dir={run_dir}", *tiny_overrides, *OVERRIDES])


@pytest.fixture(scope="module")
def page(ray_session: None, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished study."""
    from paris_ray.pipeline.study import run_study

    output = tmp_path_factory.mktemp("docs") / "study.md"
    run_study(config, FORM, output, command="a test")
    return output


def manifests(config: Config) -> dict[Path, int]:
    found = Path(config.run_dir).rglob("manifest.json")
    return {path: path.stat().st_mtime_ns for path in found}


def arm_config(config: Config, name: str, *overrides: str) -> Config:
    place = replace(config, run_dir=f"{config.run_dir}/arms/{name}", prepared_from=config.run_dir)
    return with_overrides(place, overrides)


def test_all_arms_are_in_the_results(page: Path) -> None:
    study = json.loads((page.parent / "study.json").read_text())
    arms = {arm["name"]: arm for arm in study["arms"]}
    assert set(arms) == {
        *("dense", "scratch", "seeded", "scratch-random", "seeded-random", "scratch-image"),
        *("dense-x0.5", "scratch-x0.5", "seeded-x0.5", "seeded-image", "scratch-shared-0.25"),
        *("scratch-image-minus-2", "seeded-image-minus-2"),
    }
    full = {arm["samples"] for name, arm in arms.items() if not name.endswith("-x0.5")}
    assert full == {48 * 16}
    ways = {"top-2", "top-1", "full", "threshold:0.1", "top-p:0.9", AGREE, "oracle"}
    assert set(arms["scratch"]["drawn"]) == ways
    assert set(arms["scratch-image"]["drawn"]) == ways | {"top-2 at 8"}
    asked = {way: drawn["experts_asked"] for way, drawn in arms["scratch"]["drawn"].items()}
    assert asked["oracle"] == asked["top-1"] == 1
    assert 1 < asked["top-2"] <= 2 < asked["full"] <= 3
    costs = {way: drawn["flops_per_picture"] for way, drawn in arms["scratch"]["drawn"].items()}
    assert costs["oracle"] < costs["top-1"] < costs["top-2"] < costs["full"]
    for name, arm in arms.items():
        for drawn in arm["drawn"].values():
            assert 0 <= drawn["held_out"]["attributes"]["all"]["mean"] <= 1, name
    assert len(study["arms"]) == len(arms)
    assert set(study["samples_to_target"]) == {"dense", "scratch", "seeded"}
    assert len(study["paris_order"]) == 9  # three kinds of experts by three measures


def test_the_page_and_its_charts_are_there(page: Path) -> None:
    text = page.read_text()
    assert "Written by `a test`" in text
    for link in ("images/study_samples.png", "images/study_experts.png"):
        assert link in text
        assert (page.parent / link).read_bytes().startswith(b"\x89PNG")


def test_a_second_call_keeps_everything_and_says_the_same(page: Path, config: Config) -> None:
    from paris_ray.pipeline.study import run_study

    before, said = manifests(config), page.read_text()
    run_study(config, FORM, page, command="a test")
    assert manifests(config) == before
    assert page.read_text() == said


def test_known_arms_are_not_run_again(page: Path, config: Config, tmp_path: Path) -> None:
    """Nor is anything prepared for them; an arm that is drawn otherwise now is another."""
    from paris_ray.pipeline.arms import plan_arms
    from paris_ray.pipeline.study import run_study

    known, elsewhere = json.loads(page.with_suffix(".json").read_text()), tmp_path / "runs"
    moved = replace(config, run_dir=str(elsewhere))
    run_study(moved, FORM, tmp_path / "study.md", command="a test", known=known)
    assert (tmp_path / "study.json").read_text() == page.with_suffix(".json").read_text()
    assert not elsewhere.exists()
    moved, form = study_config(moved), replace(FORM, temperatures=(8.0, 9.0))
    more = plan_arms(moved, study_arms(moved, form))
    digests = {arm["digest"] for arm in known["arms"]}
    new = {arm.arm.name for arm in more if arm.digest not in digests}
    assert new == {"scratch-image"}


def test_arms_read_one_set_of_embeddings(page: Path, config: Config) -> None:
    arms = list((Path(config.run_dir) / "arms").iterdir())
    assert len(arms) == 13
    assert not any((arm / "embeddings").exists() or (arm / "encoders").exists() for arm in arms)


def test_random_clusters_are_decided_by_the_key_alone(page: Path, config: Config) -> None:
    own = arm_config(config, "scratch-random.0", "cluster.features=random")
    run = Run(own)
    keys = [set(read_table(run.shard(k), ["key"])["key"].to_pylist()) for k in range(3)]
    assert all(keys)
    assert sum(map(len, keys)) == read_manifest(run.embeddings, EMBEDDINGS).facts["rows"]
    assert not run.clusters.exists("centroids.safetensors")


def test_the_oracle_asks_the_expert_of_the_captions_cluster(page: Path, config: Config) -> None:
    from paris_ray.pipeline.drawing import sample_own_experts

    run = Run(arm_config(config, "scratch.0", "seed_training.steps=0"))
    bundle = open_trained_parts(run)
    text, options = bundle.encode_text(["a red square", "a blue cross"]), sampling_options(bundle)
    drawn = sample_own_experts(bundle, text, [3, 4], options, np.array([2, 0]))
    for row, (expert, seed) in enumerate(((2, 3), (0, 4))):
        alone = sample_one_expert(
            bundle.expert(expert),
            text.rows(torch.tensor([row])),
            bundle.null_text,
            seeds=[seed],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
        )
        assert torch.allclose(drawn.latents[row], alone[0], atol=1e-5)
    assert drawn.expert_usage.tolist() == [[0, 0, 1], [1, 0, 0]]
    evaluated = arm_config(config, "scratch.0", "evaluation.name=oracle")
    facts = read_manifest(Run(evaluated).evaluation, EVALUATION).facts
    counts = [
        sum(facts[split]["by_cluster"][k]["captions"] for split in ("shown", "held_out"))
        for k in range(3)
    ]
    assert facts["expert_usage"] == pytest.approx([c / sum(counts) for c in counts])


def test_an_arm_that_fails_is_named_after_all_others_are_done(page: Path, config: Config) -> None:
    from paris_ray.pipeline.study import run_study

    broken = Run(arm_config(config, "scratch.0")).evaluation
    whole, said = broken.read("manifest.json"), page.read_text()
    broken.write("manifest.json", whole.replace(b'"config_digest": "', b'"config_digest": "0'))
    with pytest.raises(TrainingError, match=r"1 of 13 arms failed: scratch\.0: .*another config"):
        run_study(config, FORM, page, command="a test")
    broken.write("manifest.json", whole)
    assert page.read_text() == said


def test_embeddings_of_another_corpus_are_refused(page: Path, config: Config) -> None:
    from paris_ray.pipeline.prepare import prepare

    other = arm_config(config, "other", "corpus.image_size=40", "codec.patch_size=10")
    with pytest.raises(ArtifactError, match="its corpus, text, features, codec are not those"):
        prepare(other)
