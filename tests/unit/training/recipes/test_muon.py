"""Muon: its update against the definition, and which parameters have it."""

import torch
from torch import nn

from paris_ray.config import ExpertConfig, RouterConfig, TrainingConfig
from paris_ray.models import Expert, Router
from paris_ray.training.recipes.muon import MULTIPLE, optimizers

CONFIG = TrainingConfig(hidden_optimizer="muon", learning_rate=0.1, weight_decay=0.0)


class OneBlock(nn.Module):
    """A model with a matrix in a block, a vector there, and a matrix outside."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(columns, rows)])
        self.outside = nn.Linear(rows, rows)


def test_an_update_is_orthogonal_and_of_the_size_of_adamws() -> None:
    """Of a momentum U S V^T it is U V^T, up to what the iteration leaves: S in [0.7, 1.2].

    All entries together then have the root mean square 0.2, as an update of AdamW has.
    """
    generator = torch.Generator().manual_seed(0)
    model = OneBlock(48, 16)
    before = model.layers[0].weight.detach().clone()
    gradient = torch.randn(48, 16, generator=generator)
    _, muon = optimizers([model], CONFIG)
    model.layers[0].weight.grad = gradient.clone()
    muon.step()
    update = (before - model.layers[0].weight.detach()) / CONFIG.learning_rate
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    found = u.T @ update @ v.T / (0.2 * 48**0.5)  # diagonal in the gradient's own directions
    assert (found - torch.diag(found.diagonal())).abs().max() < 0.05
    assert found.diagonal().min() > 0.65
    assert found.diagonal().max() < 1.25
    assert 0.15 < update.square().mean().sqrt() < 0.25


def test_the_momentum_is_nesterovs() -> None:
    """Where the gradient turns round, the update follows (1 - m) g + m b, b the moving average,
    which here still points the other way.
    """
    model = OneBlock(8, 8)
    first, second = torch.eye(8), -0.5 * torch.eye(8)
    _, muon = optimizers([model], CONFIG)
    for gradient in (first, second):
        before = model.layers[0].weight.detach().clone()
        model.layers[0].weight.grad = gradient.clone()
        muon.step()
    m = 0.95
    average = m * (1 - m) * first + (1 - m) * second
    wanted = (1 - m) * second + m * average
    update = before - model.layers[0].weight.detach()
    assert (update.diagonal() < 0).all()
    assert (wanted.diagonal() < 0).all()
    assert (average.diagonal() > 0).all()
    torch.testing.assert_close(muon.state[model.layers[0].weight]["momentum_buffer"], average)


def test_only_matrices_of_blocks_have_it() -> None:
    expert = Expert(ExpertConfig.preset("S/2", num_layers=2, hidden_size=64, num_heads=2))
    router = Router(RouterConfig(hidden_size=32, num_layers=2, num_heads=2))
    for model, count in ((expert, 2 * (2 * 2 + 2)), (router, 2 * (2 + 2 + 1))):
        adamw, muon = optimizers([model], CONFIG)
        names = {parameter: name for name, parameter in model.named_parameters()}
        matrices = [names[p] for group in muon.param_groups for p in group["params"]]
        rest = [names[p] for group in adamw.param_groups for p in group["params"]]
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(matrices) == count
        assert all(name.startswith("layers.") and name.endswith(".weight") for name in matrices)
        assert {*matrices, *rest} == trained
        assert not set(matrices) & set(rest)
        assert any("scale_shift_table" in name for name in rest) == (model is expert)


def test_its_rate_is_a_multiple() -> None:
    config = TrainingConfig(hidden_optimizer="muon", muon_rate=2.5)
    _, muon = optimizers([OneBlock(4, 4)], config)
    assert [group[MULTIPLE] for group in muon.param_groups] == [2.5]


def test_without_it_adamw_has_all_parameters() -> None:
    model = OneBlock(4, 4)
    (adamw,) = optimizers([model], TrainingConfig())
    assert adamw.param_groups[0]["params"] == list(model.parameters())
