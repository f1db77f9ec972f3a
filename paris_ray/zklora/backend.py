"""What every proof system for LoRA modules offers, and by which promises they differ."""

from enum import Enum
from typing import ClassVar, Protocol, TypeVar

from paris_ray.zklora import commitment, proof
from paris_ray.zklora.fixed_point import Int16, Int64, QuantisedModule

Commitment = TypeVar("Commitment")
Opening = TypeVar("Opening")


class Guarantee(Enum):
    """A promise beyond soundness; a backend is named and described by those it makes, no others."""

    BINDING = "binding"
    """A commitment fits one module: a proof made with other weights fails under it."""
    HIDING = "hiding"
    """A commitment tells nothing of the weights, not even whether a guess of them is right."""
    ZERO_KNOWLEDGE = "zero-knowledge"
    """A proof tells nothing of the weights beyond what inputs and outputs tell."""
    TRANSPARENT = "transparent"
    """Nobody knows a trapdoor: a proof convinces everyone, not only who made the parameters."""


class Backend(Protocol[Commitment, Opening]):
    """A proof system for `Y = X A B` in exact integers, with A and B committed."""

    @property
    def guarantees(self) -> frozenset[Guarantee]:
        """What it promises."""

    def commit(self, module: QuantisedModule) -> tuple[Commitment, Opening]:
        """Return what binds the contributor to a module, and what the contributor keeps."""

    def prove(self, opening: Opening, x: Int16, y: Int64, context: bytes) -> bytes:
        """Return a proof, for this context alone, that the module gives `y` for `x`.

        Raises:
            ParisError: if it does not, or a type or shape is wrong.
        """

    def verify(
        self, commitment: Commitment, x: Int16, y: Int64, context: bytes, proof: bytes
    ) -> None:
        """Check a proof against a pinned commitment and the verifier's own rows and context.

        Raises:
            VerificationError: unless the proof holds.
        """


class ZeroKnowledgeBackend:
    """The project's own scheme (`commitment.py`, `proof.py`): it makes every promise."""

    guarantees: ClassVar[frozenset[Guarantee]] = frozenset(Guarantee)
    commit = staticmethod(commitment.commit)
    prove = staticmethod(proof.prove)
    verify = staticmethod(proof.verify)
