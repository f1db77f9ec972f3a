"""The velocity field that the sampler integrates, at a time of each row's own: what to distil."""

import torch
from torch import Tensor
from torch.nn import functional

from paris_ray.bundle import Bundle
from paris_ray.diffusion import predict_velocity, router_logits
from paris_ray.models import TextConditioning
from paris_ray.sampling.guidance import guide
from paris_ray.sampling.routing import expert_weights, mix
from paris_ray.sampling.solvers import euler_step
from paris_ray.sampling_options import SamplingOptions


class EnsembleTeacher:
    """The experts and the router of a bundle, frozen and all loaded.

    Latents `(B, C, H, W)`, times `t (B,)` in [0, 1] and text are on the bundle's device.

    Args:
        bundle: The ensemble.
        options: Its steps, guidance, routing and temperature.

    Raises:
        BundleError: if a part does not fit the others.
    """

    def __init__(self, bundle: Bundle, options: SamplingOptions) -> None:
        self.options = options
        self._experts = [bundle.expert(k) for k in range(bundle.num_experts)]
        self._router = bundle.router
        self._null_text = bundle.null_text.to(bundle.device)

    @torch.no_grad()
    def of_clusters(
        self, latents: Tensor, t: Tensor, text: TextConditioning, clusters: Tensor
    ) -> Tensor:
        """Return the velocity `(B, C, H, W)` of the expert of each row's cluster `(B,)`."""
        weights = functional.one_hot(clusters, len(self._experts)).to(latents.dtype)
        velocities = self._velocities(latents, t, text, weights)
        return velocities[torch.arange(len(clusters), device=clusters.device), clusters]

    @torch.no_grad()
    def routed(self, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """Return the mixture `(B, C, H, W)` that the router chooses, without guidance."""
        weights = self._weights(latents, t, text)
        velocities = self._velocities(latents, t, text, weights)
        return mix(weights, velocities, self.options.routing)[0]

    @torch.no_grad()
    def mean_velocity(
        self, latents: Tensor, t: Tensor, text: TextConditioning, num_steps: int
    ) -> Tensor:
        """Return the mean velocity `(B, C, H, W)` of the sampler's next `num_steps` Euler steps.

        One Euler step with it leads where those steps lead. Guidance is part of it.

        Args:
            latents: Noisy latents of times t.
            t: At least `num_steps / options.num_inference_steps`.
            text: Their text.
            num_steps: How many of the steps.
        """
        size = 1 / self.options.num_inference_steps
        velocities = []
        for step in range(num_steps):
            velocities.append(self._guided(latents, t - step * size, text))
            latents = euler_step(latents, velocities[-1], size, 0.0)
        return torch.stack(velocities).mean(dim=0)

    def _guided(self, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """As in `denoise`, the router's one choice serves both halves."""
        weights, scale = self._weights(latents, t, text), self.options.guidance_scale
        velocities = self._velocities(latents, t, text, weights)
        if scale != 1.0:
            null_text = self._null_text.rows(torch.zeros(len(t), dtype=torch.long, device=t.device))
            unconditional = self._velocities(latents, t, null_text, weights)
            velocities = guide(velocities, unconditional, scale)
        return mix(weights, velocities, self.options.routing)[0]

    def _weights(self, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        logits = router_logits(self._router, latents, t, text)
        return expert_weights(logits / self.options.router_temperature, self.options.routing)

    def _velocities(
        self, latents: Tensor, t: Tensor, text: TextConditioning, weights: Tensor
    ) -> Tensor:
        """Return `(B, K, C, H, W)`; experts are asked of the rows in which `(B, K)` weighs them."""
        velocities = latents.new_zeros(*weights.shape, *latents.shape[1:])
        for k, expert in enumerate(self._experts):
            rows = weights[:, k].nonzero()[:, 0]
            if len(rows):
                velocities[rows, k] = predict_velocity(
                    expert, latents[rows], t[rows], text.rows(rows)
                )
        return velocities
