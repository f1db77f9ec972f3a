"""The model card of a federation's bundle: also whose experts they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from paris_ray.bundle import Bundle
from paris_ray.model_card import model_card
from paris_ray.roster.federation.receive import Received
from paris_ray.roster.federation.terms import Terms

SITES = """
## Sites

The experts of `{name}` were trained apart, by those who hold the pictures. Rows and losses are as
each site signed them; the router was measured on the coordinator's own rows.

| expert | site | rows | last training loss | held-out loss (rows) |
|---|---|---|---|---|
{rows}

| site | key | handed over, beside weights and statistics of router features |
|---|---|---|
{sites}
"""


def federated_card(
    bundle: Bundle, terms: Terms, owners: Mapping[int, Received], router: Mapping[str, Any]
) -> str:
    """Return the card as Markdown.

    Args:
        bundle: The model.
        terms: The federation.
        owners: Whose expert each cluster has, in the order of the clusters.
        router: What `training.router.measure_router` returned.
    """
    facts = [received.facts(k) for k, received in owners.items()]
    card = model_card(
        bundle,
        embeddings={
            "rows": sum(each.rows for each in facts),
            "attribution": bundle.facts.attribution,
        },
        cluster_sizes=[each.rows for each in facts],
        router=router,
        losses=[each.loss for each in facts],
        evaluation=None,
    )
    lines = [
        f"| {each.cluster} | {owner.stated.site} | {each.rows:,} | {each.loss:.3f} "
        f"| {_held_out(each.held_out_loss, each.held_out_rows)} |"
        for owner, each in zip(owners.values(), facts, strict=True)
    ]
    return card + SITES.format(
        name=terms.name, rows="\n".join(lines), sites="\n".join(_sites(terms, owners))
    )


def _held_out(loss: float | None, rows: int) -> str:
    return "none held out" if loss is None else f"{loss:.3f} ({rows:,})"


def _sites(terms: Terms, owners: Mapping[int, Received]) -> Sequence[str]:
    stated = {owner.stated.site: owner.stated for owner in owners.values()}
    lines = []
    for site in terms.sites:
        if site.name in stated:
            own = stated[site.name]
            shared = {"words of captions": own.shares_words, "rows": own.shares_rows}
            names = " and ".join(name for name, given in shared.items() if given) or "nothing"
            lines.append(f"| {site.name} | `{site.public_key}` | {names} |")
    return lines
