"""The router: a DiT classifier of noisy latents, in the layout of the released Paris weights.

It estimates the posterior p_t(cluster | x_t) that weighs the experts' velocities.
Source: Paris (arXiv 2510.03434); DDM (arXiv 2501.05450); AdaLN-Zero from DiT (arXiv 2212.09748).
"""

from typing import Any

import torch
from torch import Tensor, nn

from paris_ray.config import RouterConfig
from paris_ray.models.layers import (
    Attention,
    Linear,
    PatchEmbed,
    TimestepEmbed,
    feed_forward,
    initialise_linear,
    modulate,
    position_table,
    run_block,
)


class RouterBlock(nn.Module):
    """A DiT block with its own modulation (AdaLN-Zero)."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps, elementwise_affine=False)
        self.attn = Attention(d, config.num_heads)
        self.mlp = feed_forward(d, config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))

    def initialise(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.adaLN_modulation[1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x (B, N, d)`, `condition (B, d)` -> `(B, N, d)`."""
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attn * self.attn(modulate(self.norm(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class Router(nn.Module):
    """Classifier of (noisy latents, time, optionally text) into clusters.

    Args:
        config: Its architecture. `Router(RouterConfig())` is the released router with
            129,136,904 parameters. With `text_embed_dim > 0` the pooled text joins the time
            embedding: at t = 1 the latents say nothing, so only text can choose an expert.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, d)
        grid = config.input_size // config.patch_size
        self.pos_embed = nn.Parameter(position_table(grid, d), requires_grad=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.time_embed = TimestepEmbed(d)
        self.text_proj = Linear(config.text_embed_dim, d) if config.text_embed_dim else None
        self.layers: Any = nn.ModuleList(RouterBlock(config) for _ in range(config.num_layers))
        self.head = nn.Sequential(
            Linear(d, d),
            nn.GELU(),
            nn.LayerNorm(d, eps=config.layer_norm_eps),
            nn.GELU() if config.head_activation == "gelu" else nn.Identity(),
            Linear(d, config.num_experts),
        )
        self.gradient_checkpointing = False
        if not self.pos_embed.is_meta:
            self.initialise()

    def initialise(self) -> None:
        """Start every block as the identity (AdaLN-Zero) and every expert equally likely."""
        self.apply(initialise_linear)
        nn.init.normal_(self.cls_token, std=0.02)
        self.time_embed.initialise()
        for block in self.layers:
            block.initialise()
        nn.init.zeros_(self.head[4].weight)  # type: ignore[arg-type]

    def forward(
        self, latents: Tensor, timesteps: Tensor, pooled_text: Tensor | None = None
    ) -> Tensor:
        """Return router logits `(B, K)`.

        Args:
            latents: `(B, C, H, W)` noisy latents.
            timesteps: `(B,)` in [0, 1000].
            pooled_text: `(B, D)`; required exactly if the router was built with text.

        Raises:
            ValueError: if text is missing.
        """
        return self.head(self.trunk(latents, timesteps, pooled_text))

    def features(
        self, latents: Tensor, timesteps: Tensor, pooled_text: Tensor | None = None
    ) -> Tensor:
        """Return what the last layer reads, `(B, d)`; arguments and errors as of `forward`."""
        return self.head[:-1](self.trunk(latents, timesteps, pooled_text))

    def trunk(
        self, latents: Tensor, timesteps: Tensor, pooled_text: Tensor | None = None
    ) -> Tensor:
        """Return what the head reads, `(B, d)`; arguments and errors as of `forward`."""
        condition = self.time_embed(timesteps)  # (B, d)
        if self.text_proj is not None:
            if pooled_text is None:
                raise ValueError("this router reads text: pooled_text is missing")
            condition = condition + self.text_proj(pooled_text.to(condition.dtype))
        x = self.patch_embed(latents.to(self.pos_embed.dtype)) + self.pos_embed  # (B, N, d)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, d)
        for block in self.layers:
            x = run_block(block, x, condition, recompute=self.gradient_checkpointing)
        return x[:, 0]
