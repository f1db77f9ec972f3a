"""Muon for the matrices of the blocks, beside AdamW for all else.

Source: K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon), as torch has it. An update is
scaled by 0.2 sqrt(max(rows, columns)), which gives it the size that AdamW's have (Liu et al. 2025,
arXiv:2502.16982, section 2.2): so rate, schedule and weight decay are those of AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paris_ray.config import TrainingConfig

MULTIPLE = "multiple"  # of the learning rate, in a group of parameters


def optimizers(modules: Iterable[nn.Module], config: TrainingConfig) -> tuple[Optimizer, ...]:
    """Return what optimises the parameters of modules together, each by one of them.

    Args:
        modules: The model, and what is trained beside it.
        config: Which optimiser its blocks have, and rates.
    """
    modules = list(modules)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    hidden = _hidden_matrices(modules) if config.hidden_optimizer == "muon" else []
    ids = {id(parameter) for parameter in hidden}
    adamw = torch.optim.AdamW(
        [p for p in trained if id(p) not in ids],
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


def _hidden_matrices(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the weights of linear layers in the blocks, `layers` of experts and routers."""
    return [
        linear.weight
        for module in modules
        for block in getattr(module, "layers", ())
        for linear in block.modules()
        if isinstance(linear, nn.Linear) and linear.weight.requires_grad
    ]
