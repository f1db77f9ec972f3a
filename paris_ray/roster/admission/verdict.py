"""All checks of a candidate, and the verdict that is signed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite

import numpy as np
import torch

from paris_ray import __version__
from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import Bundle
from paris_ray.bundle.parts import load_expert
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.model_folder.admissions import (
    KIND,
    Admission,
    AdmissionCheck,
    AdmissionReading,
    admission_document,
)
from paris_ray.model_folder.links import check_links
from paris_ray.models import Expert
from paris_ray.roster.admission.agreement import check_agreement
from paris_ray.roster.admission.copies import Shard, check_copies
from paris_ray.roster.admission.drawings import Look, Pictures, check_drawings
from paris_ray.roster.admission.form import check_form
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.losses import check_losses
from paris_ray.roster.admission.panel import HeldOut, Panel
from paris_ray.roster.admission.readings import Check
from paris_ray.roster.admission.triggers import check_triggers
from paris_ray.roster.admission.vocabulary import trigger_words
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.signatures import SignedDocument, Signer

FEWEST_NEIGHBOURS = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """An expert from a stranger, read as hostile files are.

    Attributes:
        expert: The model.
        digests: SHA-256 of the two files that it was read from, by name.
    """

    expert: Expert
    digests: dict[str, str]


def read_candidate(path: str, bundle: Bundle) -> Candidate:
    """Read an expert's `config.json` and weights; nothing else of the folder is looked at.

    Raises:
        BundleError: if a link leaves the folder, the weights do not fit the architecture, or it
            reads other latents or other text than the bundle's experts.
        ArtifactError: if a file is missing.
    """
    folder = Folder(path)
    if folder.is_local:
        check_links(folder)
    digests = {name: folder.sha256(name) for name in (MODEL_CONFIG, EXPERT_WEIGHTS)}
    expert = load_expert(VerifiedFolder(folder, digests))  # the very files of these digests
    own, theirs = expert.config, bundle.expert_configs[0]
    for field in ("in_channels", "input_size", "text_embed_dim"):
        given, expected = getattr(own, field), getattr(theirs, field)
        if given != expected:
            where = f"{folder.uri}/{MODEL_CONFIG}"
            raise BundleError(f"{where}: {field}={given}, the bundle's experts have {expected}")
    return Candidate(expert.float(), digests)


@dataclass(frozen=True, slots=True)
class Findings:
    """What all checks found.

    Attributes:
        checks: In the order of `admission/__init__.py`.
        pictures: `(N, S, S, 3)` that the candidate drew.
    """

    checks: tuple[Check, ...]
    pictures: Pictures

    @property
    def is_flagged(self) -> bool:
        """Whether one of the checks is."""
        return any(check.outcome == "flagged" for check in self.checks)


def open_panel(
    candidate: Candidate, index: int, bundle: Bundle, held_out: HeldOut, seed: int
) -> Panel:
    """Return who is compared with whom.

    Args:
        candidate: The expert from a stranger.
        index: The cluster that it would stand for: in the place of an expert, or one more.
        bundle: The bundle, opened in float32.
        held_out: Pictures of all clusters.
        seed: Decides all that is drawn.

    Raises:
        BundleError: if the index is not one of these, or fewer than two neighbours are left.
    """
    if not 0 <= index <= bundle.num_experts:
        raise BundleError(
            f"index={index} is not allowed: 0 to {bundle.num_experts - 1} replaces an expert, "
            f"{bundle.num_experts} adds one"
        )
    others = [j for j in range(bundle.num_experts) if j != index]
    if len(others) < FEWEST_NEIGHBOURS:
        raise BundleError(f"{len(others)} experts to compare with: {FEWEST_NEIGHBOURS} are needed")
    neighbours = {j: bundle.expert(j) for j in others}
    return Panel(candidate.expert, index, neighbours, bundle, held_out, seed)


@torch.inference_mode(False)
def examine(
    panel: Panel,
    look: Look,
    *,
    shard: Shard | None = None,
    num_words: int,
    limits: Limits | None = None,
    on_check: Callable[[Check], object] = lambda check: None,
) -> Findings:
    """Make all checks.

    Weights that are not finite end them: all numbers of such an expert would be none.

    Args:
        panel: The candidate, its neighbours and held-out pictures.
        look: The run's image model: pictures `(N, S, S, 3)` to features `(N, D)`.
        shard: The candidate's training data, if they were shown.
        num_words: How many words are tried as triggers.
        limits: What is allowed; None: what `limits.py` has.
        on_check: Called after each check.
    """
    limits = limits or Limits()
    nothing = np.empty((0, 1, 1, 3), np.uint8)
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        on_check(check)

    add(check_form(panel.candidate, list(panel.neighbours.values()), limits))
    if checks[0].readings[0].is_flagged:
        return Findings(tuple(checks), nothing)
    add(check_losses(panel, limits))
    add(check_agreement(panel, limits))
    drawings, pictures = check_drawings(panel, look, limits)
    add(drawings)
    add(check_copies(panel, shard, look, limits))
    sources = [panel.held_out.captions] + ([shard.captions] if shard else [])
    words = trigger_words(sources, panel.bundle.text_encoder, num_words, panel.seed)
    add(check_triggers(panel, words, limits))
    return Findings(tuple(checks), pictures)


def sign_verdict(
    findings: Findings,
    candidate: Candidate,
    panel: Panel,
    bundle_digest: str | None,
    signer: Signer,
) -> SignedDocument:
    """Return the signed verdict.

    Args:
        findings: What was found.
        candidate: The expert.
        panel: What it was compared with.
        bundle_digest: Digest of the bundle's manifest; None if it has none.
        signer: Who examined it.
    """
    admission = Admission(
        outcome="flagged" if findings.is_flagged else "admitted",
        cluster=panel.index,
        config_sha256=candidate.digests[MODEL_CONFIG],
        weights_sha256=candidate.digests[EXPERT_WEIGHTS],
        bundle=bundle_digest,
        checks=_stated(findings.checks),
        seed=panel.seed,
        software=f"paris_ray {__version__}, torch {torch.__version__}",
        made_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )
    return SignedDocument.sign(KIND, admission_document(admission), signer)


def _stated(checks: Iterable[Check]) -> list[AdmissionCheck]:
    return [
        AdmissionCheck(
            name=check.name,
            outcome=check.outcome,
            note=check.note,
            readings=[
                AdmissionReading(
                    name=reading.name,
                    measure=reading.measure,
                    value=reading.value if isfinite(reading.value) else None,
                    limit=reading.limit,
                    detail=reading.detail,
                )
                for reading in check.readings
            ],
        )
        for check in checks
    ]
