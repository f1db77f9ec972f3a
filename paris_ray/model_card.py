"""The model card of a bundle: what it is made of and what was measured on it, nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from paris_ray.bundle import Bundle
from paris_ray.config import PRESETS, ExpertConfig, SamplingConfig
from paris_ray.model_folder.admissions import SignedAdmission
from paris_ray.model_folder.history import Entry, History, Rows

TEMPLATE = """\
# {name}

A Paris-style ensemble of {num_experts} diffusion experts ({parameters} parameters each), trained
apart on one cluster of the data each, and a router ({router_parameters:,} parameters) that chooses
among them at every denoising step. Made with paris_ray.
{last_resort}{unlike_experts}{origin}
{use}

## Data

{rows:,} captioned pictures{set_aside}. Pictures
a cluster: {sizes}.
{attribution}

## Measured

| | |
|---|---|
{measured}
"""
ADMISSION = """
### Experts from elsewhere

Examined by `jobs.admit_expert` before they entered; the verdicts, with every number, are in
`admissions/`. What such an examination cannot find is in paris_ray's docs/admission.md.

{verdicts}
"""
LAST_RESORT = """
All experts started from one model of all the data, `seed/`. A server draws with it in the place of
an expert that is lost.
"""
DISTILLED = """\
# {name}

One diffusion expert ({parameters:,} parameters), distilled with paris_ray from a Paris-style
ensemble of {num_experts} experts ({ensemble_parameters:,} parameters in all) that were trained
apart. Its router has one expert to choose; it is there for the layout.
{origin}
{use}

## Data

{rows:,} captioned pictures.
{attribution}

## Measured

The same captions, from the same noise.

{measured}
"""
USE = """\
## Use

```python
from paris_ray.bundle import load_bundle
from paris_ray.sampling import generate

images = generate(load_bundle("path/to/this/folder"), ["{prompt}"], seed=0)
```

Defaults: {steps} steps of {solver}, guidance_scale {guidance}, routing {routing}; pictures of
{size} x {size} pixels."""
ACCURACY = """
Caption recall is the share of training captions whose drawn picture is nearest to that caption's
own picture (L2, 32x32 RGB): it measures the training set, not new pictures. An attribute is right
if the nearest of all known pictures has it. Held-out captions were never trained on. In brackets:
95 % intervals over the captions.
"""
ROSTER = "\n## Roster\n"
CHANGED = """
What stands above was written when the bundle was exported: how many experts there are, and what was
measured, may have been true then. Since then:

{changes}
{left}{measured}"""
LEFT = """
The weights of an expert that left, its words and its pictures are gone from this folder, and the
router was not fitted to its rows again. What all experts share was made before, of its rows too:
codec, text encoder where it was trained, the router's layers below its head, and the seed, if there
is one.
"""
REFITTED = """
After the last change the router was fitted again to a sample. Of {rows:,} rows that it was not
fitted to, {low:.4f} to {high:.4f} are routed to their own cluster over the noise levels.
"""
# jobs.convert_dit makes such weights; which licence others have, a digest does not tell.
ORIGIN = """
## Origin

{parts}

The licence of those weights holds for what was trained from them. Weights converted from
facebookresearch/DiT are CC BY-NC 4.0.
"""


def model_card(
    bundle: Bundle,
    *,
    embeddings: Mapping[str, Any],
    cluster_sizes: list[int],
    router: Mapping[str, Any],
    losses: list[float],
    evaluation: Mapping[str, Any] | None,
    started_from: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the card as Markdown.

    Args:
        bundle: The model.
        embeddings: Facts of the embeddings: `rows`, `attribution` and, where they are known,
            `quarantined` and `filtered`.
        cluster_sizes: Pictures of every cluster.
        router: Facts of the router: `right_cluster`, by noise level.
        losses: Last logged training loss of every expert.
        evaluation: Facts of the evaluation, or None if there was none.
        started_from: SHA-256 of the weights that parts were started from, by name of the part.
    """
    parameters, router_parameters = bundle.num_parameters()
    least, most = min(parameters), max(parameters)
    attribution = embeddings["attribution"]
    card = TEMPLATE.format(
        name=bundle.facts.model_name,
        num_experts=bundle.num_experts,
        parameters=f"{least:,}" if least == most else f"{least:,} to {most:,}",
        router_parameters=router_parameters,
        last_resort="" if bundle.last_resort is None else LAST_RESORT,
        unlike_experts=_unlike_experts(bundle.expert_configs, parameters),
        origin=_origin(started_from),
        use=_use(bundle),
        rows=embeddings["rows"],
        set_aside=_set_aside(embeddings),
        sizes=", ".join(map(str, cluster_sizes)),
        attribution=f"\n{attribution}" if attribution else "",
        measured=_table(_measurements(router, losses, evaluation)),
    )
    return card if evaluation is None else card + ACCURACY


def _admissions(admissions: Mapping[int, SignedAdmission]) -> str:
    """Return who examined which expert, and what was not looked at; nothing if nobody did."""
    if not admissions:
        return ""
    rows = [("expert", "outcome", "not checked", "examined", "key of who signed"), ("---",) * 5]
    for index, (verdict, public_key) in admissions.items():
        left_out = [check.name for check in verdict.checks if check.outcome == "not checked"]
        cells = (str(index), verdict.outcome, ", ".join(left_out), verdict.made_at, public_key)
        rows.append(cells)
    return ADMISSION.format(verdicts=_table(rows))


def _set_aside(embeddings: Mapping[str, Any]) -> str:
    if "quarantined" not in embeddings:  # of other sites' corpora
        return ""
    unusable = sum(embeddings["quarantined"].values())
    # Older embeddings tell nothing of filters.
    filtered = _filtered(embeddings.get("filtered", {}))
    return f"; {unusable:,} rows were set aside as unusable{filtered}"


def _filtered(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    reasons = ", ".join(f"{count:,} by {reason}" for reason, count in counts.items())
    return f", {sum(counts.values()):,} were filtered ({reasons})"


def distilled_card(
    bundle: Bundle,
    ensemble: Bundle,
    *,
    embeddings: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any]],
    sampling: Mapping[str, SamplingConfig],
    started_from: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the card of a distilled model as Markdown.

    Args:
        bundle: The model.
        ensemble: What it was distilled from.
        embeddings: Facts of the embeddings: `rows`, `attribution`.
        measured: Facts of the evaluations of the ensemble, first, and of the distilled models.
        sampling: How each of the distilled models draws, by the same names.
        started_from: SHA-256 of the weights that the ensemble's parts, and it, were started from.
    """
    (own,), _ = bundle.num_parameters()
    theirs, _ = ensemble.num_parameters()
    steps = [ensemble.facts.sampling.num_inference_steps]
    steps += [options.num_inference_steps for options in sampling.values()]
    rows = [("", *measured), ("---", *["---"] * len(measured))]
    rows += [("parameters of the experts", f"{sum(theirs):,}", *[f"{own:,}"] * len(sampling))]
    rows += [("steps", *map(str, steps)), *_measured(list(measured.values()))]
    return (
        DISTILLED.format(
            name=bundle.facts.model_name,
            parameters=own,
            num_experts=ensemble.num_experts,
            ensemble_parameters=sum(theirs),
            origin=_origin(started_from),
            use=_use(bundle),
            rows=embeddings["rows"],
            attribution=f"\n{embeddings['attribution']}" if embeddings["attribution"] else "",
            measured=_table(rows),
        )
        + ACCURACY
    )


def _measured(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row a measure that all have, a column a model, from facts of their evaluations."""
    rows = []
    for split, name in (("shown", "training"), ("held_out", "held-out")):
        if split not in models[0]:
            continue
        facts = [model[split] for model in models]
        first, over = facts[0], f"over {facts[0]['captions']:,} {name} captions"
        if "caption_recall" in first:
            what = f"caption recall {over}, among {first['gallery']:,} pictures"
            rows.append((what, *(_interval(f["caption_recall"]) for f in facts)))
        for attribute in first.get("attributes", {}):
            shares = (_interval(f["attributes"][attribute]) for f in facts)
            rows.append((f"{attribute} right {over}", *shares))
        if "frechet" in first:
            what = f"Frechet distance (own features) {over}"
            rows.append((what, *(f"{f['frechet']:.4f}" for f in facts)))
    return rows


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _use(bundle: Bundle) -> str:
    defaults = bundle.facts.sampling
    return USE.format(
        prompt=bundle.facts.example_prompts[0].replace('"', "'"),
        steps=defaults.num_inference_steps,
        solver=defaults.solver,
        guidance=defaults.guidance_scale,
        routing=defaults.routing,
        size=bundle.facts.picture_size,
    )


def _measurements(
    router: Mapping[str, Any], losses: list[float], evaluation: Mapping[str, Any] | None
) -> Sequence[tuple[str, ...]]:
    rows = [("last training loss of the experts", ", ".join(f"{x:.3f}" for x in losses))]
    for t, level in router.get("held_out", {}).get("levels", {}).items():
        what = f"held-out rows routed to their own cluster at t = {t}"
        rows.append((what, f"{level['accuracy']:.4f}"))
    for t, share in router["right_cluster"].items():
        rows.append((f"training rows routed to their own cluster at t = {t}", f"{share:.4f}"))
    if evaluation is None:
        return rows
    usage = ", ".join(f"{share:.1%}" for share in evaluation["expert_usage"])
    return [*rows, *_measured([evaluation]), ("expert usage over those pictures", usage)]


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})"


def _unlike_experts(configs: Sequence[ExpertConfig], parameters: Sequence[int]) -> str:
    """Return a table of the experts; if all are alike, what the released ones do not have."""
    if len(set(configs)) == 1:
        parts = _newer_parts(configs[0])
        return f"\nAll have {' and '.join(parts)}, which the released ones do not.\n" * bool(parts)
    rows = ["", "| expert | size | prediction | parameters |", "|---|---|---|---|"]
    for k, (config, count) in enumerate(zip(configs, parameters, strict=True)):
        size = ", ".join([_size(config), *_newer_parts(config)])
        rows.append(f"| {k} | {size} | {config.prediction} | {count:,} |")
    return "\n".join([*rows, ""])


def _newer_parts(config: ExpertConfig) -> list[str]:
    """Return what an expert has and those of the public release have not."""
    present = {
        "modern blocks": config.blocks == "modern",
        "a text adapter": config.text_adapter,
    }
    return [part for part, is_there in present.items() if is_there]


def _origin(started_from: Mapping[str, str]) -> str:
    """Return a section on the weights that parts were started from, or nothing if none was."""
    rows = [
        f"- {part} was started from other weights (SHA-256 `{digest}`)."
        for part, digest in started_from.items()
    ]
    return ORIGIN.format(parts="\n".join(rows)) if rows else ""


def _size(config: ExpertConfig) -> str:
    """Return the published name of a size or, for another, its width and depth."""
    numbers = (config.hidden_size, config.num_layers, config.num_heads)
    names = {sizes: name for name, sizes in PRESETS.items() if config.patch_size == 2}
    return names.get(numbers, f"{config.hidden_size} wide, {config.num_layers} layers")


def with_roster(
    card: str,
    history: History,
    admissions: Mapping[int, SignedAdmission],
    quality: Mapping[str, Any] | None,
) -> str:
    """Return a bundle's card with the section that tells of its history.

    Args:
        card: Its card, which may have that section from an earlier change.
        history: What became of its experts, with one change at least.
        admissions: Verdicts on experts that were examined before they joined, by number.
        quality: What was measured of the router after the last change; None: nothing.
    """
    head = ("when (UTC)", "what", "expert", "weights", "rows", "whose data", "signed by")
    rows: list[tuple[str, ...]] = [head, ("---",) * len(head), *map(_roster_row, history[1:])]
    has_left = any(entry.weights_before is not None for entry in history)
    section = CHANGED.format(
        changes=_table(rows),
        left=LEFT if has_left else "",
        measured="" if quality is None else _refitted(quality),
    )
    return f"{card.partition(ROSTER)[0].rstrip()}\n{ROSTER}{section}{_admissions(admissions)}"


def _refitted(quality: Mapping[str, Any]) -> str:
    shares = [level["accuracy"] for level in quality["levels"].values()]
    return REFITTED.format(rows=quality["rows"], low=min(shares), high=max(shares))


def _roster_row(entry: Entry) -> tuple[str, ...]:
    before, after = entry.rows_before, entry.rows_after
    return (
        entry.at or "",
        entry.event,
        str(entry.expert),
        _left_and_came(_short(entry.weights_before), _short(entry.weights_after)),
        _left_and_came(_count(before), _count(after)),
        _left_and_came(_whose(before), _whose(after)),
        _short(entry.signed_by) or "nobody",
    )


def _count(rows: Rows | None) -> str | None:
    return None if rows is None else f"{rows.count:,}"


def _whose(rows: Rows | None) -> str | None:
    return None if rows is None else rows.whose


def _left_and_came(left: str | None, came: str | None) -> str:
    return ", ".join(f"{what} {text}" for what, text in (("-", left), ("+", came)) if text)


def _short(digest: str | None) -> str | None:
    return digest and f"`{digest[:16]}`"
