"""A text adapter: one transformer block between the frozen text encoder and cross-attention.

Source: i1 (arXiv 2606.11289), where one block is what adapts a frozen encoder's states at little
cost. Here it reads projected states, so it has the expert's width and heads.
"""

from typing import Any

from torch import Tensor, nn

from paris_ray.config import ExpertConfig
from paris_ray.models.layers import Attention, feed_forward


class TextAdapter(nn.Module):
    """Self-attention among a caption's tokens and an MLP; it begins by changing nothing."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps, elementwise_affine=False)
        self.attn = Attention(d, config.num_heads)
        self.mlp: Any = feed_forward(d, config.mlp_ratio)

    def initialise(self) -> None:
        """Silent paths."""
        for layer in (self.attn.out_proj, self.mlp[2]):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x (B, L, d)`, `mask (B, L)`, False at tokens that none attends to -> `(B, L, d)`."""
        x = x + self.attn(self.norm(x), mask)
        return x + self.mlp(self.norm(x))
