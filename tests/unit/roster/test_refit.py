"""A router for other experts: which outputs it has, what is fitted, what stays as it is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from paris_ray.bundle import load_bundle
from paris_ray.config import TrainingConfig
from paris_ray.errors import ConfigError
from paris_ray.models import Router, TextConditioning
from paris_ray.roster.refit import fit_head, refit, with_outputs
from paris_ray.roster.sample import SAMPLE_SHARE, Sample, Shard, draw_sample
from tests.unit.roster.conftest import ROWS, Made

TRAINING = TrainingConfig(text_noise=0.1)
encode = TextConditioning.from_vectors


@pytest.fixture
def router(made: Made) -> Router:
    return load_bundle(made.bundle).router


@pytest.fixture
def sample(made: Made) -> Sample:
    shards = [Shard.open(made.run.shard(k)) for k in range(3)]
    return draw_sample(shards, SAMPLE_SHARE, seed=0)


def answers(router: Router) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 8, 4, 4, generator=generator)
    text = torch.randn(5, 16, generator=generator)
    return router(latents, torch.linspace(0, 1000, 5), text)


@torch.no_grad()
def test_outputs_stay_go_and_come(router: Router) -> None:
    before, after = answers(router), answers(with_outputs(router, [2, None, 0]))
    torch.testing.assert_close(after[:, [0, 2]], before[:, [2, 0]])
    assert after[:, 1].eq(0).all()
    assert with_outputs(router.bfloat16(), [0]).pos_embed.dtype == torch.float32


def test_a_new_output_learns_from_few_features(router: Router) -> None:
    head = with_outputs(router, [0, 1, None]).head
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(90) % 3
    features = functional.one_hot(clusters, router.config.hidden_size).float() * 4
    features += 0.3 * torch.randn(features.shape, generator=generator)
    fit_head(head, features, clusters, seed=0)
    assert (head(features).argmax(dim=1) == clusters).double().mean() > 0.95


@pytest.mark.parametrize("method", ["head", "all"])
def test_of_the_router_only_that_is_fitted(method: Any, router: Router, sample: Sample) -> None:
    options = {"method": method, "config": TRAINING, "encode": encode, "seed": 0}
    one, other = (refit(router, [1, 2, 0], sample, **options) for _ in range(2))
    state, before = one.router.state_dict(), router.state_dict()
    assert all(torch.equal(state[name], again) for name, again in other.router.state_dict().items())
    changed = {name.split(".")[0] for name in state if not torch.equal(state[name], before[name])}
    assert changed >= {"head"}
    assert (changed == {"head"}) == (method == "head")
    assert one.rows == len(sample) == 3 * 16
    assert one.quality is not None
    assert one.quality["rows"] == len(sample.apart) == 3 * 3
    assert one.temperature == one.quality["temperature"]


def test_token_ids_are_not_noised(router: Router, sample: Sample) -> None:
    ids = replace(sample.fitted, null_text=torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"text_noise=0.1 is not allowed: 0 for token ids"):
        refit(
            router,
            [0],
            Sample(ids, sample.apart),
            method="head",
            config=TRAINING,
            encode=encode,
            seed=0,
        )


def test_a_sample_is_the_same_whatever_stands_beside_a_shard(made: Made) -> None:
    shards = [Shard.open(made.run.shard(k)) for k in range(3)]
    whole, part = draw_sample(shards, 0.05, seed=0), draw_sample(shards[1:], 0.05, seed=0)
    own = whole.fitted.clusters > 0
    assert (whole.fitted.latents[own.numpy()] == part.fitted.latents).all()
    assert part.fitted.clusters.tolist() == [0] * 13 + [1] * 13
    other = draw_sample(shards, 0.05, seed=1)
    assert (other.fitted.latents != whole.fitted.latents).any()
    rows = {row.tobytes() for row in whole.fitted.latents} & {
        row.tobytes() for row in whole.apart.latents
    }
    assert not rows
    assert ROWS * 0.05 < 16 == len(whole) / 3
