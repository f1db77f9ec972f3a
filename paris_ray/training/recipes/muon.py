"""Muon for the matrices of the blocks, beside AdamW for all else.

Source: K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon), as torch has it. An update is
scaled by 0.2 sqrt(max(rows, columns)), which gives it the size that AdamW's have (Liu et al. 2025,
arXiv:2502.16982, section 2.2): so rate, schedule and weight decay are those of AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paris_ray.config import HiddenOptimizer, TrainingConfig

MULTIPLE = "multiple"  # of the learning rate, in a group of parameters
# Numbers that an optimiser keeps of a parameter from step to step.
ADAMW_MOMENTS, MUON_MOMENTS = 2, 1


def optimizers(modules: Iterable[nn.Module], config: TrainingConfig) -> tuple[Optimizer, ...]:
    """Return what optimises the parameters of modules together, each by one of them.

    Args:
        modules: The model, and what is trained beside it.
        config: Which optimiser its blocks have, and rates.
    """
    others, hidden = _divided(modules, config.hidden_optimizer)
    adamw = torch.optim.AdamW(
        others,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not hidden:
        return (adamw,)
    muon = torch.optim.Muon(
        [{"params": hidden, MULTIPLE: config.muon_rate}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return adamw, muon


def num_moments(model: nn.Module, hidden_optimizer: HiddenOptimizer) -> int:
    """Return how many numbers the optimisers of a model keep from step to step."""
    others, hidden = _divided([model], hidden_optimizer)
    return sum(ADAMW_MOMENTS * p.numel() for p in others) + sum(
        MUON_MOMENTS * p.numel() for p in hidden
    )


def _divided(
    modules: Iterable[nn.Module], hidden_optimizer: HiddenOptimizer
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that AdamW trains, and those that Muon does."""
    modules = list(modules)
    trained: list[Tensor] = [
        p for module in modules for p in module.parameters() if p.requires_grad
    ]
    hidden = _hidden_matrices(modules) if hidden_optimizer == "muon" else []
    ids = {id(parameter) for parameter in hidden}
    return [p for p in trained if id(p) not in ids], hidden


def _hidden_matrices(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the weights of linear layers in the blocks, `layers` of experts and routers."""
    return [
        linear.weight
        for module in modules
        for block in getattr(module, "layers", ())
        for linear in block.modules()
        if isinstance(linear, nn.Linear) and linear.weight.requires_grad
    ]
