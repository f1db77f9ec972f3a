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
    CrossAttention,
    Linear,
    PatchEmbed,
    TimestepEmbed,
    feed_forward,
    initialise_linear,
    modulate,
    position_table,
    run_block,
    unpatchify,
)
from paris_ray.models.modern import ModernAttention, ModernCrossAttention
from paris_ray.models.text_adapter import TextAdapter


@dataclass(frozen=True, slots=True)
class EncodedText:
    """What an expert computes once per image from a caption.

    Attributes:
        keys_values: For cross-attention, `(B, 2, heads, L, c)` of each layer.
        mask: `(B, L)`, False at padding that cross-attention skips; None if it skips none.
        spatial: `(B, N, d)` addition to the patch tokens, or None.
    """

    keys_values: tuple[Tensor, ...]
    mask: Tensor | None
    spatial: Tensor | None

    @staticmethod
    def concatenate(parts: "list[EncodedText]") -> "EncodedText":
        """Join batches of one expert along the first axis."""
        if len(parts) == 1:
            return parts[0]
        layers = zip(*(part.keys_values for part in parts), strict=True)
        return EncodedText(
            tuple(torch.cat(layer) for layer in layers),
            _concatenate([part.mask for part in parts]),
            _concatenate([part.spatial for part in parts]),
        )


def _concatenate(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if len(present) not in (0, len(parts)):
        raise ValueError(f"{len(present)} of {len(parts)} have this part: all or none must")
    return torch.cat(present) if present else None


def _norm(config: ExpertConfig) -> nn.Module:
    """Return the norm before attention, MLP and output, whose scale and shift time decides."""
    norm = nn.RMSNorm if config.blocks == "modern" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)


class ExpertBlock(nn.Module):
    """Gated self-attention, un-gated cross-attention (if any), gated MLP."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        d, modern = config.hidden_size, config.blocks == "modern"
        self.norm = _norm(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, d))
        self.attn = (ModernAttention if modern else Attention)(d, config.num_heads)
        self.cross_attn: CrossAttention | None = None
        if config.text_injection != "spatial":
            cross_attention = ModernCrossAttention if modern else CrossAttention
            self.cross_attn = cross_attention(d, config.num_heads)
        self.mlp = feed_forward(d, config.mlp_ratio)

    def initialise(self) -> None:
        """A random table, and silent text."""
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        if self.cross_attn is not None:
            nn.init.zeros_(self.cross_attn.out_proj.weight)

    def forward(
        self, x: Tensor, modulation: Tensor, keys_values: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`x (B, N, d)`, `modulation (B, 6, d)`, text as in `EncodedText` -> `(B, N, d)`."""
        parts = (self.scale_shift_table + modulation).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attn * self.attn(modulate(self.norm(x), shift_attn, scale_attn))
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, keys_values, mask)
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class ExpertFinalLayer(nn.Module):
    """Modulated norm and projection to patches; modulation = table + raw time embedding."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm = _norm(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, d))
        self.linear = Linear(d, config.patch_size**2 * config.in_channels)

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
        config: Its architecture. `Expert(ExpertConfig.preset("XL/2"))` is the published expert
            with 605,970,448 parameters.

    Attributes:
        gradient_checkpointing: Whether blocks are run again in the backward pass, which saves
            most of the memory of training for a third more computation.
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.grid = config.input_size // config.patch_size
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, d)
        self.pos_embed = nn.Parameter(position_table(self.grid, d), requires_grad=False)
        self.time_embed = TimestepEmbed(d)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        if config.text_injection == "spatial":
            self.text_proj: nn.Module = self._spatial_projection()
        else:
            self.text_proj = Linear(config.text_embed_dim, d)
        if config.text_injection == "both":
            self.pooled_text_proj = self._spatial_projection()
        self.layers: Any = nn.ModuleList(ExpertBlock(config) for _ in range(config.num_layers))
        self.final_layer = ExpertFinalLayer(config)
        self.text_adapter = TextAdapter(config) if config.text_adapter else None
        self.gradient_checkpointing = False
        if not self.pos_embed.is_meta:
            self.initialise()

    def _spatial_projection(self) -> nn.Module:
        """From a text vector to an addition to every patch token: `(B, D) -> (B, N * d)`."""
        config = self.config
        return nn.Sequential(
            Linear(config.text_embed_dim, config.text_hidden_size),
            nn.SiLU(),
            Linear(config.text_hidden_size, self.grid**2 * config.hidden_size),
        )

    def initialise(self) -> None:
        """Start as PixArt-alpha does: small shared modulation, silent text and output paths."""
        self.apply(initialise_linear)
        self.time_embed.initialise()
        nn.init.normal_(self.t_block[1].weight, std=0.02)  # type: ignore[arg-type]
        for block in self.layers:
            block.initialise()
        self.final_layer.initialise()
        if self.text_adapter is not None:
            self.text_adapter.initialise()

    def encode_text(self, text: TextConditioning | Tensor) -> EncodedText:
        """Return what does not depend on the noisy latents, to be computed once per image.

        Args:
            text: A conditioning, or its `text_embeddings (B, L, D)` alone, of which spatial
                injection takes the mean.
        """
        if isinstance(text, Tensor):
            text = TextConditioning(text, text.mean(dim=1))
        embeddings, pooled = (
            part.to(self.pos_embed.dtype) for part in (text.text_embeddings, text.pooled_text)
        )
        if self.config.text_injection == "spatial":
            return EncodedText((), None, self._spatial(self.text_proj, pooled))
        mask = text.text_mask if self.config.text_padding_mask else None
        context = self.text_proj(embeddings)
        if self.text_adapter is not None:
            context = self.text_adapter(context, mask)
        keys_values = tuple(block.cross_attn.keys_values(context) for block in self.layers)
        if self.config.text_injection == "cross_attention":
            return EncodedText(keys_values, mask, None)
        return EncodedText(keys_values, mask, self._spatial(self.pooled_text_proj, pooled))

    def _spatial(self, projection: nn.Module, pooled: Tensor) -> Tensor:
        return projection(pooled).view(len(pooled), self.grid**2, -1)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextConditioning | Tensor | EncodedText,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Return what `config.prediction` names.

        Args:
            latents: `(B, C, H, W)` noisy latents.
            timesteps: `(B,)` in [0, 1000], 1000 = pure noise.
            text: A conditioning, its `text_embeddings (B, L, D)`, or `encode_text`'s result.
            hidden: Receives the tokens `(B, N, d)` after every block.

        Returns:
            `(B, C, H, W)`. With `prediction="preconditioned"` latents must already have unit
            variance; `paris_ray.diffusion.predict_velocity` takes care of all cases.
        """
        encoded = text if isinstance(text, EncodedText) else self.encode_text(text)
        x = self.patch_embed(latents.to(self.pos_embed.dtype)) + self.pos_embed  # (B, N, d)
        if encoded.spatial is not None:
            x = x + encoded.spatial
        time_embedding = self.time_embed(timesteps)  # (B, d)
        modulation = self.t_block(time_embedding).unflatten(1, (6, -1))  # (B, 6, d)
        keys_values = encoded.keys_values or (None,) * len(self.layers)
        for block, text_of_layer in zip(self.layers, keys_values, strict=True):
            x = run_block(
                block,
                x,
                modulation,
                text_of_layer,
                encoded.mask,
                recompute=self.gradient_checkpointing,
            )
            if hidden is not None:
                hidden.append(x)
        x = self.final_layer(x, time_embedding)  # (B, N, p * p * C)
        return unpatchify(x, self.grid, self.config.patch_size)
