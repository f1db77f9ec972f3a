"""The expert: a DiT with AdaLN-Single and text, in the layout of the released Paris weights.

Source: Paris (arXiv 2510.03434); DiT (arXiv 2212.09748); AdaLN-Single and the un-gated
cross-attention are PixArt-alpha's (arXiv 2310.00426).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paris_ray.config import ExpertConfig
from paris_ray.models.conditioning import TextConditioning
from paris_ray.models.layers import (
    Attention,
    PatchEmbed,
    TimestepEmbed,
    feed_forward,
    initialise_linear,
    modulate,
    position_table,
    unpatchify,
)


@dataclass(frozen=True, slots=True)
class EncodedText:
    """What an expert computes once per image from a caption.

    Attributes:
        context: `(B, L, d)` projected tokens for cross-attention, or None.
        spatial: `(B, N, d)` addition to the patch tokens, or None.
    """

    context: Tensor | None
    spatial: Tensor | None


class ExpertBlock(nn.Module):
    """Gated self-attention, un-gated cross-attention (if any), gated MLP."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, d))
        self.attn = Attention(d, config.num_heads)
        self.cross_attn: Attention | None = None
        if config.text_injection == "cross_attention":
            self.cross_attn = Attention(d, config.num_heads)
        self.mlp = feed_forward(d, config.mlp_ratio)

    def initialise(self) -> None:
        """A random table, and silent text."""
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        if self.cross_attn is not None:
            nn.init.zeros_(self.cross_attn.out_proj.weight)

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor | None) -> Tensor:
        """`x (B, N, d)`, `modulation (B, 6, d)`, `context (B, L, d)` -> `(B, N, d)`."""
        parts = (self.scale_shift_table + modulation).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attn * self.attn(modulate(self.norm(x), shift_attn, scale_attn))
        if self.cross_attn is not None and context is not None:
            x = x + self.cross_attn(x, context)
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class ExpertFinalLayer(nn.Module):
    """Modulated norm and projection to patches; modulation = table + raw time embedding."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, d))
        self.linear = nn.Linear(d, config.patch_size**2 * config.in_channels)

    def initialise(self) -> None:
        """A random table, and an output of zero."""
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """`x (B, N, d)`, `time_embedding (B, d)` -> `(B, N, patch * patch * C)`."""
        shift, scale = (self.scale_shift_table + time_embedding[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class Expert(nn.Module):
    """One expert of the ensemble.

    Args:
        config: Its architecture. `Expert(ExpertConfig(hidden_size=1152, num_layers=28,
            num_heads=16))` is Paris XL/2 with 605,970,448 parameters.
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.grid = config.input_size // config.patch_size
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, d)
        self.pos_embed = nn.Parameter(position_table(self.grid, d), requires_grad=False)
        self.time_embed = TimestepEmbed(d)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        if config.text_injection == "cross_attention":
            self.text_proj: nn.Module = nn.Linear(config.text_embed_dim, d)
        else:
            self.text_proj = nn.Sequential(
                nn.Linear(config.text_embed_dim, config.text_hidden_size),
                nn.SiLU(),
                nn.Linear(config.text_hidden_size, self.grid**2 * d),
            )
        self.layers: Any = nn.ModuleList(ExpertBlock(config) for _ in range(config.num_layers))
        self.final_layer = ExpertFinalLayer(config)
        self.initialise()

    def initialise(self) -> None:
        """Start as PixArt-alpha does: small shared modulation, silent text and output paths."""
        self.apply(initialise_linear)
        self.time_embed.initialise()
        nn.init.normal_(self.t_block[1].weight, std=0.02)  # type: ignore[arg-type]
        for block in self.layers:
            block.initialise()
        self.final_layer.initialise()

    def encode_text(self, text: TextConditioning | Tensor) -> EncodedText:
        """Return what does not depend on the noisy latents, to be computed once per image.

        Args:
            text: A conditioning, or its `text_embeddings (B, L, D)` alone.

        Raises:
            ValueError: if spatial injection is given more than one text vector a caption.
        """
        embeddings = text.text_embeddings if isinstance(text, TextConditioning) else text
        if self.config.text_injection == "cross_attention":
            return EncodedText(self.text_proj(embeddings), None)
        if embeddings.shape[1] != 1:
            raise ValueError(
                f"text_injection='spatial' needs one text vector a caption, "
                f"got text_embeddings of shape {tuple(embeddings.shape)}"
            )
        projected = self.text_proj(embeddings[:, 0])
        return EncodedText(None, projected.view(len(embeddings), self.grid**2, -1))

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: TextConditioning | Tensor | EncodedText
    ) -> Tensor:
        """Return what `config.prediction` names.

        Args:
            latents: `(B, C, H, W)` noisy latents.
            timesteps: `(B,)` in [0, 1000], 1000 = pure noise.
            text: A conditioning, its `text_embeddings (B, L, D)`, or `encode_text`'s result.

        Returns:
            `(B, C, H, W)`. With `prediction="preconditioned"` latents must already have unit
            variance; `paris_ray.diffusion.predict_velocity` takes care of both cases.
        """
        encoded = text if isinstance(text, EncodedText) else self.encode_text(text)
        x = self.patch_embed(latents) + self.pos_embed  # (B, N, d)
        if encoded.spatial is not None:
            x = x + encoded.spatial
        time_embedding = self.time_embed(timesteps)  # (B, d)
        modulation = self.t_block(time_embedding).unflatten(1, (6, -1))  # (B, 6, d)
        for block in self.layers:
            x = block(x, modulation, encoded.context)
        x = self.final_layer(x, time_embedding)  # (B, N, p * p * C)
        return unpatchify(x, self.grid, self.config.patch_size)
