"""The base-model user on Ray: its base, run with the contributor's updates."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_ray.identity import Identity
from paris_ray.zklora.inference import Calls, NumericsLog, Together, adapt, trace_calls
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.sequential import Wanted
from paris_ray.zklora.subjects import Scorer, Subject
from paris_ray.zklora.transcript import ROWS


@dataclass(frozen=True, eq=False, slots=True)
class TrialResult:
    """What multi-party inference on one's own base gave.

    Attributes:
        without: `(levels, examples)` losses of the base.
        with_adapter: The same with the adapter.
        numerics: What rounding meant for the inputs.
        num_bytes: Sent and received.
    """

    without: NDArray[np.float32]
    with_adapter: NDArray[np.float32]
    numerics: NumericsLog
    num_bytes: int


@ray.remote
class BaseUser:
    """Holds the base, and runs it with the contributor's updates.

    Args:
        subject: The base, and what its losses are compared on.
        manifest: The pinned one.
        identity: Folder of the user's identity.
        peer: Host and port of the contributor.
        threads: Torch threads.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        subject: Subject,
        manifest: AdapterManifest,
        identity: Path,
        peer: tuple[str, int],
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._subject, self._device, self._manifest = subject, device, manifest
        self._identity, self._peer = Identity.load(identity), peer
        self._session: Session | None = None
        self._loaded: tuple[Scorer, Calls] | None = None

    def num_calls(self) -> int:
        """Return how many calls were answered so far: one a module is all that is needed."""
        return 0 if self._session is None else len(self._session.transcript)

    def rows_an_example(self) -> int:
        """Return how many rows of a module one example takes at most, at all levels."""
        return max(self._load()[1].rows.values())

    def _load(self) -> tuple[Scorer, Calls]:
        """Return the base, and what an example asks for.

        Not when the actor is made: what is raised there, Ray would wrap.
        """
        if self._loaded is None:
            scorer = self._subject.load(self._device)

            def score(view: nn.Module) -> Tensor:
                return scorer.losses(view, scorer.largest)

            self._loaded = scorer, trace_calls(scorer.model, self._manifest.terms, score)
        return self._loaded

    def try_adapter(
        self,
        num_examples: int,
        folder: Path,
        nonce: str,
        wanted: Wanted | None,
        escrow: tuple[str, int] | None,
    ) -> TrialResult:
        """Return the losses with and without the adapter.

        An example after the other is tried, until it is clear whether the adapter is worth it.

        Args:
            num_examples: How many there are at most.
            folder: Where the closed session is written, with its rows.
            nonce: Names the session: with the same one, an interrupted trial goes on.
            wanted: What decides; None: all examples are tried.
            escrow: Host and port; None: rows are free.

        Raises:
            BudgetError: if the contributor has fewer rows left than this takes.
            TradeError: if the deposit for all of it is not covered.
            ParisError: if the contributor refuses or says what does not fit.
        """
        (scorer, calls), manifest = self._load(), self._manifest
        numerics = NumericsLog(last_bits_drawn=True)
        losses: tuple[list[Tensor], list[Tensor]] = [], []
        with Channel(self._identity, self._peer, manifest.contributor_certificate) as channel:
            session = self._session = Session(
                channel, self._identity, manifest, nonce, folder / ROWS
            )
            if escrow is not None and manifest.price_per_row:
                self._deposit(session, escrow, num_examples * self.rows_an_example())
            ask = Together(session.evaluate_all, calls.together)
            view = adapt(scorer.model, manifest.terms, manifest.scale, ask, numerics)
            for number in range(num_examples):
                for model, found in zip((scorer.model, view), losses, strict=True):
                    found.append(scorer.losses(model, number))
                without, with_adapter = (torch.cat(found, 1).numpy() for found in losses)
                if wanted is not None and wanted.verdict(without, with_adapter).is_clear:
                    break
            session.close().save(folder)
        num_bytes = channel.traffic.total
        return TrialResult(without, with_adapter, numerics, num_bytes)

    def _deposit(self, session: Session, escrow: tuple[str, int], rows: int) -> None:
        certificate = self._manifest.escrow_certificate
        assert certificate is not None
        with EscrowClient(self._identity, escrow, certificate) as client:
            session.deposit(client, rows)
