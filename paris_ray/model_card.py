"""The model card of a bundle: what it is made of and what was measured on it, nothing else."""

from collections.abc import Mapping
from typing import Any

from paris_ray.bundle import Bundle

TEMPLATE = """\
# {name}

A Paris-style ensemble of {num_experts} diffusion experts ({parameters:,} parameters each), trained
apart on one cluster of the data each, and a router ({router_parameters:,} parameters) that chooses
among them at every denoising step. Made with paris_ray.

## Use

```python
from paris_ray.bundle import load_bundle
from paris_ray.sampling import generate

images = generate(load_bundle("path/to/this/folder"), ["{prompt}"], seed=0)
```

Defaults: {steps} Euler steps, guidance_scale {guidance}, routing {routing}; pictures of
{size} x {size} pixels.

## Data

{rows:,} captioned pictures; {quarantined:,} rows were set aside as unusable. Pictures a cluster:
{sizes}.
{attribution}

## Measured

| | |
|---|---|
{measured}

Caption accuracy is the share of training captions whose drawn picture is nearest to that caption's
own picture (L2, 32x32 RGB). It measures recall of the training set. The model draws what it has
seen; new combinations of things mostly fail at this size.
"""


def model_card(
    bundle: Bundle,
    *,
    embeddings: Mapping[str, Any],
    cluster_sizes: list[int],
    router: Mapping[str, Any],
    losses: list[float],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """Return the card as Markdown.

    Args:
        bundle: The model.
        embeddings: Facts of the embeddings: `rows`, `quarantined`, `attribution`.
        cluster_sizes: Pictures of every cluster.
        router: Facts of the router: `right_cluster`, by noise level.
        losses: Last logged training loss of every expert.
        evaluation: Facts of the evaluation, or None if there was none.
    """
    defaults = bundle.facts.sampling
    attribution = embeddings["attribution"]
    return TEMPLATE.format(
        name=bundle.facts.model_name,
        num_experts=bundle.num_experts,
        parameters=_count(bundle.expert(0)),
        router_parameters=_count(bundle.router),
        prompt=bundle.facts.example_prompts[0].replace('"', "'"),
        steps=defaults.num_inference_steps,
        guidance=defaults.guidance_scale,
        routing=defaults.routing,
        size=bundle.facts.picture_size,
        rows=embeddings["rows"],
        quarantined=sum(embeddings["quarantined"].values()),
        sizes=", ".join(map(str, cluster_sizes)),
        attribution=f"\n{attribution}" if attribution else "",
        measured="\n".join(_measurements(router, losses, evaluation)),
    )


def _measurements(
    router: Mapping[str, Any], losses: list[float], evaluation: Mapping[str, Any] | None
) -> list[str]:
    rows = [f"| last training loss of the experts | {', '.join(f'{x:.3f}' for x in losses)} |"]
    for t, share in router["right_cluster"].items():
        rows.append(f"| training rows routed to their own cluster at t = {t} | {share:.4f} |")
    if evaluation is not None:
        count = evaluation["captions"]
        rows.append(f"| caption accuracy over {count:,} captions | {evaluation['accuracy']:.4f} |")
        usage = ", ".join(f"{share:.1%}" for share in evaluation["expert_usage"])
        rows.append(f"| expert usage over those pictures | {usage} |")
    return rows


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
