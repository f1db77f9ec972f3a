"""The exceptions that users can meet; messages name the field, the value and what is allowed.

Those at the end are of a drawing that nothing was wrong with: they are no ParisError. They are here
since they travel between processes, of which some never compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class ParisError(ValueError):
    """Base of everything that wrong input can cause; a programming error of ours is never one."""


class ConfigError(ParisError):
    """A configuration key or value that is not allowed."""


class CorpusError(ParisError):
    """A corpus that cannot be read, or of which too large a share is bad."""


class ArtifactError(ParisError):
    """An artefact that is missing, damaged, or was made by another configuration."""


class LockError(ParisError):
    """An artefact that another job writes."""


class BundleError(ParisError):
    """A model folder whose files, shapes or values do not fit."""


class RoutingError(ParisError):
    """A routing strategy that does not exist or does not fit the number of experts."""


class TrainingError(ParisError):
    """Training that cannot go on: a non-finite loss, an empty shard, failed experts."""


class SpendingCapError(ParisError):
    """A training that has taken all that it may: it is saved, and goes on with a higher cap."""


class EvaluationError(ParisError):
    """Features, pictures, labels or options that a measure is not defined for."""


class FederationError(ParisError):
    """What a federation, or a site of one, handed over is refused."""


class SignatureError(ParisError):
    """A signed document that is malformed, changed, of another kind or by somebody else."""


class ReceiptError(ParisError):
    """A purchased adapter that may not be served: no receipt, not opened, or other weights."""


class VerificationError(ParisError):
    """A commitment, proof or opening that does not hold."""


class ProtocolError(ParisError):
    """What another party sent is not what the protocol allows at this point."""


class BudgetError(ProtocolError):
    """More rows than the contributor's privacy budget has left."""


class TradeError(ParisError):
    """A step of a purchase that the trade's state does not allow."""


class PictureError(ParisError):
    """A file that is no picture, or carries no record of how it was drawn."""


@contextmanager
def naming(what: str, kind: type[ParisError] = ParisError) -> Iterator[None]:
    """Say of a ParisError what it is about, and make it one of a kind."""
    try:
        yield
    except ParisError as error:
        raise kind(f"{what}: {error}") from None


class SamplingError(RuntimeError):
    """The experts gave latents that are no picture."""


class ExpertsLostError(RuntimeError):
    """No expert is left that could draw."""


class QueueFullError(RuntimeError):
    """There is no room for a request now.

    Args:
        reason: For a person.
        position: How many pictures wait already.
        retry_after_s: When there may be room.
    """

    def __init__(self, reason: str, position: int, retry_after_s: float) -> None:
        super().__init__(reason)
        self.reason, self.position, self.retry_after_s = reason, position, retry_after_s

    def __reduce__(self) -> tuple[type["QueueFullError"], tuple[str, int, float]]:
        return type(self), (self.reason, self.position, self.retry_after_s)


class DeadlineError(RuntimeError):
    """A request took longer than it was allowed to."""
