"""Exponential moving average of parameters."""

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """A running average of a model's state, which is what is sampled from.

    The decay of step i is min(decay, (1 + i) / (10 + i)), so that a short run is not dominated by
    its random start.

    Args:
        model: The model to follow; its current state is the first average.
        decay: Share of the old average kept in each update, once warmed up.
        device: Where the average is kept; None: where the model is. On the CPU it takes no memory
            of a GPU, and each update copies the whole model there.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {
            name: value.detach().to(device or value.device, copy=True)
            for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model after optimiser step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        averages = list(self.state.values())
        values = [current[name].detach().to(self.state[name]) for name in self.state]
        torch._foreach_lerp_(averages, values, 1 - decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.state.items():
            value.copy_(state[name])
