"""Challenges of a proof: each is a hash of everything that was said before it.

Source: Fiat and Shamir, CRYPTO 1986; every public value and message is absorbed ("strong"
Fiat-Shamir; Bernhard, Pereira and Warinschi, ASIACRYPT 2012).
"""

import hashlib
from typing import Protocol

from paris_ray.zklora.field import ORDER

LENGTH_BYTES = 8
# 64 bytes modulo a 255-bit order: within 2^-257 of uniform.
CHALLENGE_BYTES = 64


class Oracle(Protocol):
    """Who answers a prover's messages with challenges."""

    def absorb(self, name: str, *messages: bytes) -> None:
        """Take in messages."""

    def challenge(self, name: str) -> int:
        """Return a non-zero field element that depends on everything absorbed so far."""


class FiatShamir:
    """The oracle of non-interactive proofs: one running SHAKE-256 over length-prefixed messages.

    Args:
        label: What kind of proof this is, and of which version.
    """

    def __init__(self, label: str) -> None:
        self._hash = hashlib.shake_256()
        self.absorb(label)

    def absorb(self, name: str, *messages: bytes) -> None:
        """Take in messages; their number and lengths are part of what is hashed."""
        head = name.encode()
        for message in (head, len(messages).to_bytes(LENGTH_BYTES, "little"), *messages):
            self._hash.update(len(message).to_bytes(LENGTH_BYTES, "little") + message)

    def challenge(self, name: str) -> int:
        """Return a non-zero field element that depends on everything absorbed so far."""
        value = 0
        while value == 0:
            self.absorb(f"challenge {name}")
            value = int.from_bytes(self._hash.digest(CHALLENGE_BYTES), "little") % ORDER
        return value
