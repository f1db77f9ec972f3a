"""Blocks as newer transformers have them: RMSNorm, normed queries and keys, rotary positions.

Source: RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467); QK-norm, Henry et al. 2020
(arXiv 2010.04245); rotary embeddings, Su et al. 2021 (arXiv 2104.09864), along both axes of the
grid with the base of Heo et al. 2024 (arXiv 2403.13298).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from paris_ray.models.layers import Attention, CrossAttention, attend

EPS = 1e-6
ROTARY_BASE = 100.0


class HeadNorm(nn.RMSNorm):
    """RMSNorm of `(..., c)` in float32, whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., c) -> (..., c)`."""
        weight = self.weight.float()  # of a bundle in bfloat16, too
        return functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x)


class ModernAttention(Attention):
    """Self-attention whose queries and keys are normed, then turned by their places."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.query_norm = HeadNorm(hidden_size // num_heads, EPS)
        self.key_norm = HeadNorm(hidden_size // num_heads, EPS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x (B, N, d)` of a square grid, `mask (B, N)` as in `Attention` -> `(B, N, d)`."""
        query, key, value = self._split(self.in_proj(x), 3).unbind(dim=1)
        query, key = rotate(self.query_norm(query)), rotate(self.key_norm(key))
        return self._merge(attend(query, key, value, mask))


class ModernCrossAttention(CrossAttention):
    """Cross-attention whose queries and keys are normed; text keeps its encoder's positions."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.query_norm = HeadNorm(hidden_size // num_heads, EPS)
        self.key_norm = HeadNorm(hidden_size // num_heads, EPS)

    def keys_values(self, context: Tensor) -> Tensor:
        """`(B, L, d) -> (B, 2, heads, L, c)`."""
        key, value = super().keys_values(context).unbind(dim=1)
        return torch.stack([self.key_norm(key), value], dim=1)

    def _query(self, x: Tensor) -> Tensor:
        return self.query_norm(super()._query(x))


def rotate(x: Tensor) -> Tensor:
    """Turn `(B, heads, N, c)` by the row and the column of each of N tokens of a square grid.

    The first half of the channels is turned by the column, the second by the row, as in the
    position table; channel i of a half goes with i + c / 4.
    """
    grid, quarter = math.isqrt(x.shape[2]), x.shape[3] // 4
    tokens = torch.arange(grid**2, device=x.device)
    places = torch.stack([tokens % grid, tokens // grid], dim=1)[..., None]  # column, row
    exponents = torch.arange(quarter, dtype=torch.float32, device=x.device) / quarter
    angles = places * ROTARY_BASE**-exponents  # (N, 2, c / 4)
    cosine, sine = angles.cos(), angles.sin()
    first, second = x.float().unflatten(3, (2, 2, quarter)).unbind(dim=4)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=4)
    return turned.flatten(3).to(x.dtype)
