"""Building blocks that experts and router share, under the released parameter names."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

FREQUENCY_DIM = 256
MAX_PERIOD = 10_000.0
MANY_ROWS = 16  # of a product: from here on libraries compute each as in any longer one


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x * (1 + scale) + shift`; `x (B, N, d)`, the others `(B, 1, d)`."""
    return x * (1 + scale) + shift


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Return `(..., dim)` sinusoidal features, cosines first.

    Source: Vaswani et al. 2017, with the halves ordered as in the released Paris weights.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=positions.device) / (dim // 2)
    angles = positions[..., None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(grid: int, dim: int) -> Tensor:
    """Return the fixed `(1, grid * grid, dim)` 2-D sine-cosine table.

    The first half of the channels encodes the column, the second the row; each is sine first.
    Source: MAE (He et al. 2021), used by DiT.
    """
    if torch.get_default_device().type == "meta":  # computing there imports half of torch
        return torch.empty(1, grid * grid, dim)
    column, row = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="xy")
    halves = []
    for position in (column, row):
        cosine, sine = sinusoid(position.flatten(), dim // 2).chunk(2, dim=-1)
        halves.append(torch.cat([sine, cosine], dim=-1))
    return torch.cat(halves, dim=-1)[None]


def unpatchify(tokens: Tensor, grid: int, patch_size: int) -> Tensor:
    """Return latents `(B, C, H, W)` from tokens `(B, N, patch * patch * C)`."""
    return rearrange(
        tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=patch_size, q=patch_size
    )


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + b`; without gradients, a sample's bits do not depend on its batch.

    Args:
        x: `(B, N, in)` tokens, or `(B, in)`.
        weight: `(out, in)`.
        bias: `(out,)`, or None.

    Libraries sum a row of a product of many rows alike, however many there are, but have other
    ways for few rows: so a sample of few tokens, or of one vector, is a product of its own.
    """
    tokens = x if x.dim() == 3 else x[:, None]
    if torch.is_grad_enabled() or x.dim() > 3 or tokens.shape[1] >= MANY_ROWS:
        return functional.linear(x, weight, bias)
    weights = weight.t().expand(len(tokens), -1, -1)
    if bias is None:
        return torch.bmm(tokens, weights).view(*x.shape[:-1], -1)
    return torch.baddbmm(bias, tokens, weights).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """A linear layer by `apply_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, in) -> (B, N, out)`, or `(B, in) -> (B, out)`."""
        return apply_linear(x, self.weight, self.bias)


class PatchEmbed(nn.Conv2d):
    """Cut latents into patches and project each: `(B, C, H, W) -> (B, N, d)`.

    A convolution in state dicts, as released. It is computed as a product of matrices: what a
    convolution makes of a sample depends on the size of the batch, in the last bits.
    """

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, N, d)`."""
        p = self.kernel_size[0]
        patches = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return apply_linear(patches, self.weight.flatten(1), self.bias)


class TimestepEmbed(nn.Module):
    """Embed timesteps on the 0..1000 scale: `(B,) -> (B, d)`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp: Any = nn.Sequential(
            Linear(FREQUENCY_DIM, hidden_size),
            nn.SiLU(),
            Linear(hidden_size, hidden_size),
        )

    def initialise(self) -> None:
        """Small weights, as DiT."""
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, timesteps: Tensor) -> Tensor:
        """`(B,) -> (B, d)`."""
        return self.mlp(sinusoid(timesteps, FREQUENCY_DIM).to(next(self.parameters()).dtype))


class FusedLinear(Linear):
    """A linear layer whose outputs can also be computed in part."""

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Return output features `start` to `stop`: `(..., in) -> (..., stop - start)`."""
        return apply_linear(x, self.weight[start:stop], self.bias[start:stop])


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection.

    `in_proj` is one linear layer (order query, key, value), so that a LoRA can target it; in state
    dicts it has the names of `nn.MultiheadAttention`, as in the released weights.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.in_proj: Any = FusedLinear(hidden_size, 3 * hidden_size)
        self.out_proj = Linear(hidden_size, hidden_size)
        self.register_state_dict_post_hook(_to_released_names)
        self.register_load_state_dict_pre_hook(_from_released_names)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x (B, N, d)`, `mask (B, N)`, False at tokens that none attends to -> `(B, N, d)`."""
        query, key, value = self._split(self.in_proj(x), 3).unbind(dim=1)
        return self._merge(attend(query, key, value, mask))

    def _split(self, x: Tensor, parts: int) -> Tensor:
        """`(B, N, parts * d) -> (B, parts, heads, N, c)`."""
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(0, 2, 3, 1, 4)

    def _merge(self, mixed: Tensor) -> Tensor:
        """`(B, heads, N, c) -> (B, N, d)`."""
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """Attention of image tokens to text; keys and values are computed apart, once per image."""

    def keys_values(self, context: Tensor) -> Tensor:
        """`(B, L, d) -> (B, 2, heads, L, c)`."""
        return self._split(self.in_proj.rows(context, self.hidden_size, None), 2)

    def forward(  # type: ignore[override]
        self, x: Tensor, keys_values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """`x (B, N, d)`, what `keys_values` returned, `mask (B, L)` or None -> `(B, N, d)`."""
        key, value = keys_values.unbind(dim=1)
        return self._merge(attend(self._query(x), key, value, mask))

    def _query(self, x: Tensor) -> Tensor:
        """`(B, N, d) -> (B, heads, N, c)`."""
        return self._split(self.in_proj.rows(x, 0, self.hidden_size), 1)[:, 0]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of `(B, heads, N, c)`; `mask (B, L)` is False at padding.

    Training on a CPU runs it in float32 even under autocast: the fused bfloat16 backward pass there
    takes nine times as long as the float32 one, a third of a training step of a small expert.
    """
    mask = None if mask is None else mask[:, None, None]
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return functional.scaled_dot_product_attention(query, key, value, mask)
    with torch.autocast("cpu", enabled=False):
        mixed = functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), mask
        )
    return mixed.to(query.dtype)


def _to_released_names(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    for part in ("weight", "bias"):
        if f"{prefix}in_proj.{part}" in state:  # not where a library has wrapped the layer
            state[f"{prefix}in_proj_{part}"] = state.pop(f"{prefix}in_proj.{part}")


def _from_released_names(
    module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any
) -> None:
    for part in ("weight", "bias"):
        if f"{prefix}in_proj_{part}" in state:
            state[f"{prefix}in_proj.{part}"] = state.pop(f"{prefix}in_proj_{part}")


def run_block(block: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """Run a block; `recompute` keeps only its inputs for the backward pass (checkpointing).

    Source: gradient checkpointing, Chen et al. 2016 (arXiv 1604.06174).
    """
    if not recompute:
        return block(*inputs)
    result: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def feed_forward(hidden_size: int, mlp_ratio: float) -> nn.Sequential:
    """Return the two-layer MLP of a block: `(B, N, d) -> (B, N, d)`."""
    inner = int(hidden_size * mlp_ratio)
    return nn.Sequential(
        Linear(hidden_size, inner), nn.GELU(approximate="tanh"), Linear(inner, hidden_size)
    )


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as DiT; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
