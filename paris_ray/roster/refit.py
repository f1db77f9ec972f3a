"""A router for other experts than it was trained for: rows of its last layer come, stay and go.

What is fitted is the head, to features of the frozen trunk, which are computed once for every row
and time; or the whole router. Both from a few rows of every cluster.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from paris_ray.config import TrainingConfig
from paris_ray.config.release import write_document
from paris_ray.diffusion import TIME_SCALE, router_logits, router_text, sample_path
from paris_ray.errors import ConfigError, TrainingError
from paris_ray.folders import Folder
from paris_ray.models import Router, TextConditioning
from paris_ray.roster.sample import Sample
from paris_ray.run import MODEL_CONFIG, ROUTER_WEIGHTS
from paris_ray.seeding import torch_generator
from paris_ray.training.data import Batch, LatentDataset
from paris_ray.training.router_quality import Encode, held_out_quality

Method = Literal["head", "all"]
NUM_FEATURES = 8192  # rows times draws of time and noise, at least
MAX_DRAWS = 64  # of a row
STEPS = 300
BATCH_SIZE = {"head": 256, "all": 128}
FEATURES_AT_ONCE = 256
LEARNING_RATE = {"head": 1e-3, "all": 3e-4}


@dataclass(frozen=True, slots=True)
class Refitted:
    """A router for the new experts.

    Attributes:
        router: In float32.
        rows: To how many it was fitted, those included that its temperature is fitted to.
        temperature: What its logits are to be divided by; None: as before.
        quality: What `held_out_quality` found on the rows that were not fitted to; None: nothing
            was fitted.
    """

    router: Router
    rows: int
    temperature: float | None
    quality: dict[str, Any] | None


def refit(
    router: Router,
    outputs: Sequence[int | None],
    sample: Sample,
    *,
    method: Method,
    config: TrainingConfig,
    encode: Encode,
    seed: int,
) -> Refitted:
    """Return a router for other experts.

    Args:
        router: The router as it is.
        outputs: As of `with_outputs`.
        sample: Rows of the new experts' clusters.
        method: What is fitted: the head, or all.
        config: The router's training, whose times, noise of text and variants are drawn here too.
        encode: From the text of rows to its conditioning.
        seed: Decides what is drawn.

    Raises:
        ConfigError: if text is token ids, to which the router's training adds noise.
        TrainingError: if the loss stops being finite.
    """
    if sample.fitted.has_token_ids and config.text_noise:
        raise ConfigError(f"text_noise={config.text_noise} is not allowed: 0 for token ids")
    changed = with_outputs(router, outputs)
    if method == "head":
        features = routing_features(changed, sample.fitted, config, encode, seed)
        fit_head(changed.head, *features, seed=seed)
    else:
        _fit_all(changed, sample.fitted, config, encode, seed)
    changed = changed.eval().requires_grad_(False)
    quality = held_out_quality(changed, sample.fitted, sample.apart, encode, seed)
    return Refitted(changed, len(sample), quality["temperature"], quality)


def with_outputs(router: Router, outputs: Sequence[int | None]) -> Router:
    """Return a copy of a router with other outputs, in float32, which can be trained.

    Args:
        router: The router.
        outputs: For each output of the copy the one of the router that it is; None: a new one,
            whose logit is 0 whatever comes.
    """
    state = {k: value.to(torch.float32, copy=True) for k, value in router.state_dict().items()}
    for name in ("head.4.weight", "head.4.bias"):
        rows = [torch.zeros_like(state[name][0]) if k is None else state[name][k] for k in outputs]
        state[name] = torch.stack(rows)
    config = replace(router.config, num_experts=len(outputs))
    with torch.device("meta"):
        changed = Router(config)
    changed.load_state_dict(state, assign=True)
    return changed


@torch.no_grad()
def routing_features(
    router: Router, rows: LatentDataset, config: TrainingConfig, encode: Encode, seed: int
) -> tuple[Tensor, Tensor]:
    """Return what the router's head reads of noisy rows, and whose they are.

    Args:
        router: Its trunk alone is asked.
        rows: N rows.
        config: The distributions of times and text.
        encode: From the text of rows to its conditioning.
        seed: Decides what is drawn.

    Returns:
        Features `(M, d)` and clusters `(M,)`, on the router's device; M is N times the fewest draws
        that make NUM_FEATURES, but at most MAX_DRAWS times.
    """
    draws = min(MAX_DRAWS, math.ceil(NUM_FEATURES / len(rows)))
    device, features, clusters = router.pos_embed.device, [], []
    for draw in range(draws):
        generator = torch_generator(seed, "roster features", draw)
        order = torch.randperm(len(rows), generator=generator)  # of a batch the first are at t = 1
        drawn = rows.draw_batch(order, config, generator).to(device)
        for part in drawn.split(math.ceil(len(rows) / FEATURES_AT_ONCE)):
            x_t, t, text = _noisy(part, encode)
            features.append(router.trunk(x_t, TIME_SCALE * t, router_text(router, text)))
            clusters.append(part.clusters)
    return torch.cat(features), torch.cat(clusters)


def fit_head(head: nn.Module, features: Tensor, clusters: Tensor, *, seed: int) -> None:
    """Fit a router's head to features of its trunk, from its present weights.

    Args:
        head: The head, changed in place.
        features: `(M, d)`, of `routing_features`.
        clusters: `(M,)` the output that each should choose.
        seed: Decides the order.

    Raises:
        TrainingError: if the loss stops being finite.
    """

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(features), (BATCH_SIZE["head"],), generator=generator).to(
            features.device
        )
        return functional.cross_entropy(head(features[rows]), clusters[rows])

    _descend(list(head.parameters()), loss, LEARNING_RATE["head"], seed)


def _fit_all(
    router: Router, rows: LatentDataset, config: TrainingConfig, encode: Encode, seed: int
) -> None:
    device = router.pos_embed.device

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(rows), (BATCH_SIZE["all"],), generator=generator)
        batch = rows.draw_batch(chosen, config, generator).to(device)
        logits = router_logits(router, *_noisy(batch, encode))
        return functional.cross_entropy(logits, batch.clusters)

    parameters = [p for p in router.parameters() if p.requires_grad]
    _descend(parameters, loss, LEARNING_RATE["all"], seed)


def _noisy(batch: Batch, encode: Encode) -> tuple[Tensor, Tensor, TextConditioning]:
    path = sample_path(batch.latents, batch.noise, batch.t)
    return path.x_t, path.t, encode(batch.text)


def _descend(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[torch.Generator], Tensor],
    learning_rate: float,
    seed: int,
) -> None:
    """Do STEPS steps of AdamW, whose rate falls along a line to nothing."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        value = loss(torch_generator(seed, "roster step", step))
        if not value.isfinite():
            raise TrainingError(f"the router's loss is {value.item()} at step {step} of its refit")
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def write_router(router: Router, dtype: torch.dtype, folder: Folder) -> None:
    """Write a router in the released layout.

    Args:
        router: The router.
        dtype: Data type to store it in.
        folder: Where to.
    """
    folder.write_json(MODEL_CONFIG, write_document(router.config))
    state = {name: v.to("cpu", dtype).contiguous() for name, v in router.state_dict().items()}
    folder.write(ROUTER_WEIGHTS, safetensors.torch.save(state))
