"""What models cost: the published figures, and torch's own count of what a model computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paris_ray.config import ExpertConfig, RouterConfig
from paris_ray.models import Expert, Router
from paris_ray.models.flops import forward_macs, parameter_count, training_flops_per_image

BATCH_SIZE = 2
SMALL = {"input_size": 16, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
MODELS = {
    "cross-attention": ExpertConfig(**SMALL, text_embed_dim=48),
    "spatial text": ExpertConfig(**SMALL, text_injection="spatial", text_hidden_size=24),
    "both": ExpertConfig(**SMALL, text_embed_dim=48, text_injection="both", text_hidden_size=24),
    "single pixels as patches": ExpertConfig(**SMALL, patch_size=1, mlp_ratio=2.5),
    "router": RouterConfig(**SMALL, num_experts=5),
    "router with text": RouterConfig(**SMALL, text_embed_dim=48),
}


def text_length(config: ExpertConfig | RouterConfig) -> int:
    is_spatial = isinstance(config, ExpertConfig) and config.text_injection == "spatial"
    return 1 if is_spatial else 20


def torch_flops(config: ExpertConfig | RouterConfig, *, train: bool) -> float:
    """Return what torch counts for one image.

    On the meta device attention is two matrix products, as everywhere in theory; of the fused
    kernel of a CPU torch counts nothing.
    """
    with torch.device("meta"):
        latents = torch.empty(BATCH_SIZE, config.in_channels, config.input_size, config.input_size)
        timesteps = torch.empty(BATCH_SIZE)
        text = torch.empty(BATCH_SIZE, text_length(config), config.text_embed_dim)
        if isinstance(config, RouterConfig):
            text, model = text[:, 0], Router(config)
        else:
            model = Expert(config)
        with FlopCounterMode(display=False) as counter:
            output = model(latents, timesteps, text)
            if train:
                output.sum().backward()
    return counter.get_total_flops() / BATCH_SIZE


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_the_forward_pass_is_what_torch_counts(config: ExpertConfig | RouterConfig) -> None:
    assert 2 * forward_macs(config, text_length(config)) == torch_flops(config, train=False)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_training_is_three_times_the_forward_pass(config: ExpertConfig | RouterConfig) -> None:
    ours, counted = (
        training_flops_per_image(config, text_length(config)),
        torch_flops(config, train=True),
    )
    # Nobody needs the gradients of latents, captions and times, which torch does not compute.
    assert counted <= ours <= 1.02 * counted


def test_the_published_sizes_cost_what_the_reference_says() -> None:
    xl2 = ExpertConfig.preset("XL/2")
    d, layers, tokens, words = xl2.hidden_size, xl2.num_layers, 256, 77
    text = words * xl2.text_embed_dim * d
    text += layers * (2 * tokens * d**2 + 2 * words * d**2 + 2 * tokens * words * d)
    assert round(forward_macs(xl2) / 1e9, 1) == 144.5
    adaln_zero = (layers - 1) * 6 * d**2  # DiT has a modulation a block, Paris one for all
    assert (
        round((forward_macs(xl2) - text + adaln_zero) / 1e9, 1) == 118.6
    )  # DiT-XL/2 (arXiv 2212.09748)
    assert round(forward_macs(ExpertConfig.preset("B/2")) / 1e9, 1) == 28.1
    assert round(forward_macs(RouterConfig()) / 1e9, 1) == 23.1
    assert training_flops_per_image(xl2) / 1e9 == pytest.approx(866, rel=2e-3)


def test_parameters_are_counted_without_being_allocated() -> None:
    assert parameter_count(ExpertConfig.preset("XL/2")) == 605_970_448
    assert parameter_count(RouterConfig()) == 129_136_904
