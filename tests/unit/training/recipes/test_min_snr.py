"""Min-SNR against the equation of the paper: a weight of clean data's error, put on noise's."""

import torch

from paris_ray.config import ExpertConfig
from paris_ray.diffusion import ask, sample_path, signal_to_noise
from paris_ray.models import Expert, TextConditioning
from paris_ray.training.data import Batch
from paris_ray.training.recipes import Recipe
from paris_ray.training.recipes.min_snr import MinSnr


def test_the_loss_is_that_of_clean_data_weighed_by_the_limited_ratio() -> None:
    """min(SNR, gamma) |x_0 - x_0_hat|^2, where x_0_hat = (x_t - t eps_hat) / (1 - t)."""
    torch.manual_seed(0)
    config = ExpertConfig(
        input_size=2,
        patch_size=1,
        in_channels=3,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        text_embed_dim=4,
        prediction="epsilon",
    )
    expert, generator = Expert(config), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(expert.final_layer.linear.weight)
    latents, noise = torch.randn(2, 4, 3, 2, 2, generator=generator)
    t = torch.tensor([0.1, 0.2, 0.5, 0.9])
    text = torch.randn(4, 4, generator=generator)
    read = TextConditioning.from_vectors(text)
    batch = Batch(latents, noise, t, text, torch.zeros(4))
    found = Recipe([MinSnr(5.0)]).loss(expert, batch, read)
    path = sample_path(latents, noise, t)
    time, predicted = t.view(-1, 1, 1, 1), ask(expert, path, read).output
    clean = (path.x_t - time * predicted) / (1 - time)
    weight = torch.tensor([5.0, 5.0, 1.0, (0.1 / 0.9) ** 2]).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (weight * (clean - latents) ** 2).mean())


def test_weights_are_at_most_one_and_one_at_pure_noise() -> None:
    t = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(signal_to_noise(t), torch.tensor([0.0, 1.0, 9.0]))
    torch.testing.assert_close(MinSnr(5.0).weights(t), torch.tensor([1.0, 1.0, 5 / 9]))
