"""Paris once more: plain, slow, and written from the paper's description alone.

It shares no code with `paris_ray`, only the fields of its configurations. Nothing is cached, fused
or batched over pictures. The tests hold the package to it; the benchmark measures against it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEGLIGIBLE_WEIGHT = 1e-6

# One encoded caption: `(1, L, D)` token states, and `(1, L)`, False at padding, or None.
Caption = tuple[Tensor, Tensor | None]


class TimeEmbed(nn.Module):
    """Times on the 0..1000 scale, as cosines and then sines of falling frequency."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        frequencies = [math.exp(-math.log(10_000) * i / 128) for i in range(128)]
        angles = timesteps[:, None] * torch.tensor(frequencies)
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=1))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x` is `(B, N, d)`, shift and scale are `(B, d)`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class Network(nn.Module):
    """What expert and router begin with: patches, their positions, and the time."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width, patch = config, config.hidden_size, config.patch_size
        self.side = config.input_size // patch
        self.patch_embed = nn.Conv2d(config.in_channels, width, kernel_size=patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, width), requires_grad=False)
        self.time_embed = TimeEmbed(width)

    def tokens(self, latents: Tensor) -> Tensor:
        return self.patch_embed(latents).flatten(2).transpose(1, 2) + self.pos_embed


class Layer(nn.Module):
    """A DiT block; `six` are shift, scale and gate of the attention, then those of the MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, round(config.hidden_size * config.mlp_ratio)
        self.eps = config.layer_norm_eps
        self.attn = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )

    def forward(
        self, x: Tensor, six: Tensor, text: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = six.unbind(1)
        y = modulated_norm(x, shift1, scale1, self.eps)
        x = x + gate1[:, None] * self.attn(y, y, y, need_weights=False)[0]
        if text is not None:
            x = x + self.cross_attn(x, text, text, key_padding_mask=padding, need_weights=False)[0]
        y = modulated_norm(x, shift2, scale2, self.eps)
        return x + gate2[:, None] * self.mlp(y)


class ExpertLayer(Layer):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width, heads = config.hidden_size, config.num_heads
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)


class FinalLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (time[:, None] + self.scale_shift_table).unbind(1)
        return self.linear(modulated_norm(x, shift, scale, self.eps))


class PlainExpert(Network):
    """DiT with AdaLN-Single and text cross-attention, no mask over padding unless one is given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.text_proj = nn.Linear(config.text_embed_dim, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        time = self.time_embed(timesteps)
        shared = self.t_block(time).reshape(len(latents), 6, -1)
        text = self.text_proj(text)
        padding = None if text_mask is None else ~text_mask
        x = self.tokens(latents)
        for layer in self.layers:
            x = layer(x, shared + layer.scale_shift_table, text, padding)
        x = self.final_layer(x, time)  # (row, column, channel) of a patch in each token
        side, patch = self.side, self.config.patch_size
        cells = x.reshape(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return cells.reshape(latents.shape)


class RouterLayer(Layer):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class PlainRouter(Network):
    """DiT with AdaLN-Zero and a class token, without text; returns a logit an expert."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(RouterLayer(config) for _ in range(config.num_layers))
        self.head = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, eps=config.layer_norm_eps),
            nn.GELU() if config.head_activation == "gelu" else nn.Identity(),
            nn.Linear(width, config.num_experts),
        )

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time_embed(timesteps)
        x = torch.cat([self.cls_token.expand(len(latents), 1, -1), self.tokens(latents)], dim=1)
        for layer in self.layers:
            x = layer(x, layer.adaLN_modulation(time).reshape(len(x), 6, -1))
        return self.head(x[:, 0])


def plain_weights(logits: Tensor, strategy: str) -> list[float]:
    """Weights of the experts for one picture; an expert of weight 0 is not asked."""
    probabilities = torch.softmax(logits, dim=0).tolist()
    if strategy == "full":
        return [p if p >= NEGLIGIBLE_WEIGHT else 0.0 for p in probabilities]
    count = {"top-1": 1, "top-2": 2}[strategy]
    chosen = sorted(range(len(logits)), key=lambda k: probabilities[k], reverse=True)[:count]
    total = sum(probabilities[k] for k in chosen)
    return [p / total if k in chosen else 0.0 for k, p in enumerate(probabilities)]


def plain_sample(
    experts: Sequence[PlainExpert],
    router: PlainRouter,
    noise: Tensor,
    captions: Sequence[Caption],
    null_caption: Caption,
    *,
    num_steps: int,
    strategy: str,
    guidance_scale: float,
) -> Tensor:
    """Latents `(B, C, H, W)` by Euler steps from t = 1 to 0, one picture after the other."""
    pictures = []
    for x, caption in zip(noise[:, None], captions, strict=True):
        for t, t_next in pairwise(1 - step / num_steps for step in range(num_steps + 1)):
            timesteps = torch.tensor([1000 * t])
            weights = plain_weights(router(x, timesteps)[0], strategy)
            velocity = torch.zeros_like(x)
            for expert, weight in zip(experts, weights, strict=True):
                if weight > 0:
                    cond = expert(x, timesteps, *caption)
                    uncond = expert(x, timesteps, *null_caption)
                    velocity += weight * (uncond + guidance_scale * (cond - uncond))
            x = x - (t - t_next) * velocity
        pictures.append(x)
    return torch.cat(pictures)
