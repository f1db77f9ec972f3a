"""The base-model user on Ray: its base, run with the contributor's updates."""

from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from torch import Tensor, nn

from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.zklora.inference import Calls, NumericsLog, Together, adapt, trace_calls
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.evidence import SESSION
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.sequential import Wanted
from paris_ray.zklora.subjects import Scorer, Subject
from paris_ray.zklora.transcript import ROWS

RESULT = "result.json"  # of a trial, in the folder of its session


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a user wants to try, and with whom.

    Attributes:
        subject: The user's own base, and the examples of which losses are compared.
        peer: Host and port of the contributor.
        manifest: The file of the pinned manifest.
        identity: The user's folder with key and certificate.
        output: The purchase's own folder.
        wanted: What the losses must show for the adapter to be bought, after as few examples as
            make it clear; None: all examples are tried, and it is bought whatever they show.
        escrow: Host and port of the escrow; None: the adapter is tried and verified, not bought.
        escrow_certificate: That of the escrow that the user trusts, as PEM.
        threads: Torch threads.
        num_gpus: GPUs for the user's own base; 0 computes on the CPU.
    """

    subject: Subject
    peer: tuple[str, int]
    manifest: Path
    identity: Path
    output: Path
    wanted: Wanted | None = None
    escrow: tuple[str, int] | None = None
    escrow_certificate: str | None = None
    threads: int = 1
    num_gpus: float = 0


@ray.remote
class BaseUser:
    """Holds the base, and runs it with the contributor's updates.

    Args:
        trial: What is wanted.
        manifest: The pinned one.
    """

    def __init__(self, trial: Trial, manifest: AdapterManifest) -> None:
        torch.set_num_threads(trial.threads)
        self._trial, self._manifest = trial, manifest
        self._identity = Identity.load(trial.identity)
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
            scorer = self._trial.subject.load("cuda" if self._trial.num_gpus else "cpu")

            def score(view: nn.Module) -> Tensor:
                return scorer.losses(view, scorer.largest)

            self._loaded = scorer, trace_calls(scorer.model, self._manifest.terms, score)
        return self._loaded

    def try_adapter(self, num_examples: int, nonce: str) -> None:
        """Compare losses with and without the adapter, and keep them with the closed session.

        An example after the other is tried, until it is clear whether the adapter is worth it.
        RESULT has the losses `(levels, examples)`, what rounding meant for the inputs, and how many
        bytes were sent and received.

        Args:
            num_examples: How many there are at most.
            nonce: Names the session: with the same one, an interrupted trial goes on.

        Raises:
            BudgetError: if the contributor has fewer rows left than this takes.
            TradeError: if the deposit for all of it is not covered.
            ParisError: if the contributor refuses or says what does not fit.
        """
        (scorer, calls), trial, manifest = self._load(), self._trial, self._manifest
        folder, numerics = trial.output / SESSION, NumericsLog(last_bits_drawn=True)
        losses: tuple[list[Tensor], list[Tensor]] = [], []
        with Channel(self._identity, trial.peer, manifest.contributor_certificate) as channel:
            session = self._session = Session(
                channel, self._identity, manifest, nonce, folder / ROWS
            )
            if trial.escrow is not None and manifest.price_per_row:
                certificate = manifest.escrow_certificate
                with EscrowClient(self._identity, trial.escrow, certificate) as escrow:
                    session.deposit(escrow, num_examples * self.rows_an_example())
            ask = Together(session.evaluate_all, calls.together)
            view = adapt(scorer.model, manifest.terms, manifest.scale, ask, numerics)
            for number in range(num_examples):
                for model, found in zip((scorer.model, view), losses, strict=True):
                    found.append(scorer.losses(model, number))
                without, with_adapter = (torch.cat(found, 1).numpy() for found in losses)
                wanted = trial.wanted
                if wanted is not None and wanted.verdict(without, with_adapter).is_clear:
                    break
            session.close().save(folder)
        outcome = {
            "without": without.tolist(),
            "with_adapter": with_adapter.tolist(),
            "numerics": numerics.to_json(),
            "bytes": channel.traffic.total,
        }
        Folder(str(folder)).write_json(RESULT, outcome)
