"""What a model costs: multiply-accumulates of an image, and parameters, without building weights.

Matrix products and convolutions are counted, attention's included; element-wise work is not. Two
floating-point operations make one multiply-accumulate (MAC).
"""

from functools import cache

import torch

from paris_ray.config import Config, ExpertConfig, RouterConfig
from paris_ray.models.expert import Expert
from paris_ray.models.layers import FREQUENCY_DIM
from paris_ray.models.router import Router

CLIP_TEXT_LENGTH = 77
# A backward pass is two products where the forward pass is one: by the input and by the weight.
PASSES_OF_A_TRAINING_STEP = 3


def text_length(config: Config) -> int:
    """Return how many text tokens a caption has for the experts of a run."""
    return CLIP_TEXT_LENGTH if config.text.kind != "minilm" else max(1, config.text.token_states)


def num_tokens(config: ExpertConfig | RouterConfig) -> int:
    """Return the length of the sequence that the blocks work on."""
    patches = (config.input_size // config.patch_size) ** 2
    return patches + isinstance(config, RouterConfig)  # the router's class token


def forward_macs(config: ExpertConfig | RouterConfig, text_length: int = CLIP_TEXT_LENGTH) -> int:
    """Return the MACs of one forward pass of one image.

    Args:
        config: The model. The expert's text projection, keys and values are included.
        text_length: Text tokens a caption; only cross-attention reads more than one.
    """
    if isinstance(config, RouterConfig):
        return _trunk_macs(config) + _router_macs(config)
    return _trunk_macs(config) + _expert_macs(config, text_length)


def step_macs(config: Config, experts_asked: float) -> float:
    """Return the MACs of one sampling step of one picture: experts, and a router if it chooses.

    Text encoder and codec, which are asked once a picture, are left out; text is counted as if it
    were projected in every step.

    Args:
        config: Of the run that draws.
        experts_asked: Mean number of experts that a step asks.
    """
    passes = 1 if config.sampling.guidance_scale == 1 else 2
    macs = experts_asked * passes * forward_macs(config.expert, text_length(config))
    if config.cluster.num_clusters > 1 and not config.evaluation.oracle:
        macs += forward_macs(config.router)
    return macs


def training_flops_per_image(
    config: ExpertConfig | RouterConfig, text_length: int = CLIP_TEXT_LENGTH
) -> int:
    """Return the FLOPs of a forward and backward pass of one image: 6 for each MAC.

    What gradient checkpointing computes a second time does not count, as is usual for MFU.
    """
    return 2 * PASSES_OF_A_TRAINING_STEP * forward_macs(config, text_length)


@cache
def parameter_count(config: ExpertConfig | RouterConfig) -> int:
    """Return the number of parameters, position table included; nothing is allocated."""
    return sum(parameter.numel() for parameter in outline(config).parameters())


def outline(config: ExpertConfig | RouterConfig) -> Expert | Router:
    """Return a model on the meta device, which has names and shapes but no numbers."""
    with torch.device("meta"):
        return Router(config) if isinstance(config, RouterConfig) else Expert(config)


def _trunk_macs(config: ExpertConfig | RouterConfig) -> int:
    """Patch embedding, time embedding, and self-attention and MLP of all blocks."""
    d, tokens = config.hidden_size, num_tokens(config)
    patch_values = config.patch_size**2 * config.in_channels
    patches = (config.input_size // config.patch_size) ** 2
    embeddings = patches * patch_values * d + FREQUENCY_DIM * d + d * d
    return embeddings + config.num_layers * _block_macs(config, tokens)


def _block_macs(config: ExpertConfig | RouterConfig, tokens: int) -> int:
    """Self-attention and MLP of one block on so many tokens."""
    d = config.hidden_size
    attention = 4 * tokens * d * d + 2 * tokens * tokens * d
    return attention + 2 * tokens * d * int(d * config.mlp_ratio)


def _expert_macs(config: ExpertConfig, text_length: int) -> int:
    """Shared modulation, text and output."""
    d, tokens = config.hidden_size, num_tokens(config)
    shared = 6 * d * d + tokens * d * config.patch_size**2 * config.in_channels
    if config.text_injection != "cross_attention":
        shared += config.text_hidden_size * (config.text_embed_dim + tokens * d)
    if config.text_injection == "spatial":
        return shared
    if config.text_adapter:
        shared += _block_macs(config, text_length)
    products = 2 * tokens * d * d + 2 * text_length * d * d + 2 * tokens * text_length * d
    return shared + text_length * config.text_embed_dim * d + config.num_layers * products


def _router_macs(config: RouterConfig) -> int:
    """Modulation of each block, text and head."""
    d = config.hidden_size
    head = d * d + d * config.num_experts
    return config.num_layers * 6 * d * d + config.text_embed_dim * d + head
