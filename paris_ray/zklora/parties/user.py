"""The base-model user on Ray: its expert, run with the contributor's updates, and verified."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.util.metrics import Histogram
from torch import Tensor

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.errors import ProtocolError, VerificationError
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.identity import Identity
from paris_ray.models import Expert
from paris_ray.zklora.curve import Equation, check_equations
from paris_ray.zklora.inference import NumericsLog, adapt, count_rows
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.offer import base_of_expert
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.evidence import ClosedSession, Evidence, Progress
from paris_ray.zklora.parties.results import result
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.proof import Claim, proof_equation
from paris_ray.zklora.sequential import Wanted

MODULES_AT_ONCE = 8
SEED = 0  # of the first picture's noise: both runs see the same


@dataclass(frozen=True, eq=False, slots=True)
class TrialResult:
    """What multi-party inference on one's own expert gave.

    Attributes:
        closed: The session, signed by both.
        without: `(levels, pictures)` losses of the base.
        with_adapter: The same with the adapter.
        numerics: What rounding meant for the inputs.
        num_bytes: Sent and received.
    """

    closed: ClosedSession
    without: NDArray[np.float32]
    with_adapter: NDArray[np.float32]
    numerics: NumericsLog
    num_bytes: int


def check_base(bundle: Bundle, manifest: AdapterManifest) -> int:
    """Return the number of the expert that an adapter is for.

    Raises:
        ProtocolError: if the bundle has another expert or router than the adapter is for.
    """
    expert, found = manifest.base.expert, bundle.num_experts
    if expert is None or expert >= found:
        raise ProtocolError(f"base.expert={expert} is not allowed: the bundle has {found}")
    if base_of_expert(bundle, expert) != manifest.base:
        raise ProtocolError(
            f"base: the adapter is for another expert {expert}, or router, than the bundle has"
        )
    return expert


@ray.remote
class BaseUser:
    """Holds the base expert, and runs it with the contributor's updates.

    Args:
        bundle: Where the base is.
        manifest: The pinned one.
        identity: Folder of the user's identity.
        peer: Host and port of the contributor.
        threads: Torch threads.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        bundle: str,
        manifest: AdapterManifest,
        identity: Path,
        peer: tuple[str, int],
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._bundle, self._manifest = load_bundle(bundle, device=device), manifest
        self._identity, self._peer = Identity.load(identity), peer
        self._session: Session | None = None

    def num_calls(self) -> int:
        """Return how many calls were answered so far: one a module is all that is needed."""
        return 0 if self._session is None else len(self._session.transcript.calls)

    def rows_a_pair(self) -> int:
        """Return how many rows of a module one picture at one noise level takes at most."""
        latents = torch.zeros(1, *self._bundle.latent_shape)
        return max(self._count_rows(latents, [""], [0.5]).values())

    def try_adapter(
        self,
        pictures: NDArray[np.uint8],
        captions: Sequence[str],
        levels: Sequence[float],
        nonce: str,
        wanted: Wanted | None,
        escrow: tuple[str, int] | None,
    ) -> TrialResult:
        """Return the losses at fixed noise levels with and without the adapter.

        A picture after the other is tried, until it is clear whether the adapter is worth it.

        Args:
            pictures: `(n, S, S, 3)`.
            captions: One a picture.
            levels: Noise levels in [0, 1].
            nonce: Names the session: with the same one, an interrupted trial goes on.
            wanted: What decides; None: all pictures are tried.
            escrow: Host and port; None: rows are free.

        Raises:
            BudgetError: if the contributor has fewer rows left than this takes.
            TradeError: if the deposit for all of it is not covered.
            ParisError: if the contributor refuses or says what does not fit.
        """
        latents = self._bundle.codec.encode(pictures)
        text, expert = self._bundle.encode_text(captions), self._expert()
        manifest, numerics = self._manifest, NumericsLog(last_bits_drawn=True)
        losses: tuple[list[Tensor], list[Tensor]] = [], []
        with Channel(self._identity, self._peer, manifest.contributor_certificate) as channel:
            session = self._session = Session(channel, self._identity, manifest, nonce)
            if escrow is not None and manifest.price_per_row:
                self._deposit(session, escrow, len(pictures) * len(levels) * self.rows_a_pair())
            view = adapt(expert, manifest.terms, manifest.scale, session.evaluate, numerics)
            for i in range(len(pictures)):
                picture = latents[i : i + 1], text.rows(slice(i, i + 1)), levels
                for model, found in zip((expert, view), losses, strict=True):
                    found.append(denoising_losses(model, *picture, seed=SEED + i))
                without, with_adapter = (torch.cat(found, 1).numpy() for found in losses)
                if wanted is not None and wanted.verdict(without, with_adapter).is_clear:
                    break
            closed = session.close()
        num_bytes = channel.traffic.bytes_sent + channel.traffic.bytes_received
        return TrialResult(closed, without, with_adapter, numerics, num_bytes)

    def _deposit(self, session: Session, escrow: tuple[str, int], rows: int) -> None:
        certificate = self._manifest.escrow_certificate
        assert certificate is not None
        with EscrowClient(self._identity, escrow, certificate) as client:
            session.deposit(client, rows)

    def _expert(self) -> Expert:
        return self._bundle.expert(check_base(self._bundle, self._manifest))

    def _count_rows(
        self, latents: Tensor, captions: Sequence[str], levels: Sequence[float]
    ) -> dict[str, int]:
        text = self._bundle.encode_text(captions)
        return count_rows(
            self._expert(),
            self._manifest.terms,
            lambda view: denoising_losses(view, latents, text, levels, seed=SEED),
        )


@ray.remote(num_cpus=1)
def check_proofs(claims: Mapping[str, Claim]) -> dict[str, Equation]:
    """Return the equation of each proof; they are checked together.

    Raises:
        VerificationError: naming a module whose proof is malformed.
    """
    seconds = Histogram(
        "paris_zklora_verify_seconds",
        "Time to check a module's proof, without the multiplication that all share.",
        boundaries=[0.003, 0.01, 0.03, 0.1, 0.3, 1, 3],
    )
    equations = {}
    for name, claim in claims.items():
        start = time.perf_counter()
        try:
            equations[name] = proof_equation(*claim)
        except VerificationError as error:
            raise VerificationError(f"{name}: {error}") from None
        seconds.observe(time.perf_counter() - start)
    return equations


def verify_evidence(
    evidence: Evidence,
    manifest: AdapterManifest,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Check every proof of a session: tasks over chunks of modules, then one multiplication.

    Args:
        evidence: Rows and proofs.
        manifest: The pinned one.
        on_progress: Is told how many modules are done, and of how many.

    Raises:
        VerificationError: if something is left out, or naming the modules that do not hold.
    """
    claims = evidence.claims(manifest)
    names = list(claims)
    equations: dict[str, Equation] = {}
    waiting = []
    for start in range(0, len(names), MODULES_AT_ONCE):
        chunk = {name: claims[name] for name in names[start : start + MODULES_AT_ONCE]}
        waiting.append(check_proofs.remote(chunk))
    while waiting:
        ready, waiting = ray.wait(waiting)
        equations |= result(ready[0])
        on_progress(len(equations), len(names))
    check_equations(equations, "the proof")
