"""The Merkle tree of a session's log: one root binds all its leaves and their order.

The tree is that of RFC 6962, section 2.1: SHA-256, leaves and nodes under different prefixes, split
at the largest power of two.
"""

import hashlib
from collections.abc import Sequence

from paris_ray.errors import ProtocolError, VerificationError

LEAF, NODE = b"\x00", b"\x01"


def hash_leaf(*parts: bytes) -> bytes:
    """Return SHA-256 of 0x00 and the parts, each after its length in 8 bytes, little-endian."""
    digest = hashlib.sha256(LEAF)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


class MerkleTree:
    """The tree over some leaves.

    Args:
        leaves: 32 bytes each.

    Raises:
        ProtocolError: if there are none: nothing can be proved of nothing.
    """

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ProtocolError("an empty log has no root: there is nothing to prove")
        self._levels = [list(leaves)]
        while len(level := self._levels[-1]) > 1:
            unpaired = level[-1:] if len(level) % 2 else []
            pairs = zip(level[::2], level[1::2], strict=False)
            self._levels.append([_node(left, right) for left, right in pairs] + unpaired)

    @property
    def root(self) -> str:
        """What all leaves and their order are bound by."""
        return self._levels[-1][0].hex()

    def path(self, index: int) -> list[bytes]:
        """Return the siblings on the way from a leaf to the root.

        Raises:
            ProtocolError: if there is no such leaf.
        """
        count = len(self._levels[0])
        if not 0 <= index < count:
            raise ProtocolError(f"index={index} is not allowed: the log has {count} leaves")
        siblings = []
        for level in self._levels:
            if index ^ 1 < len(level):
                siblings.append(level[index ^ 1])
            index //= 2
        return siblings


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(NODE + left + right).digest()


def check_inclusion(root: str, count: int, index: int, leaf: bytes, path: Sequence[bytes]) -> None:
    """Check that a leaf is at this place of the log.

    Args:
        root: Of the log that both parties signed.
        count: Number of its leaves, signed as well.
        index: The leaf's place, from 0.
        leaf: 32 bytes, computed by the caller from what it was shown.
        path: What `MerkleTree.path` or `RowLog.prove_inclusion` returned.

    Raises:
        VerificationError: if it is not.
    """
    refused = VerificationError(f"leaf {index} is not in the log of {count} leaves, root {root}")
    if not 0 <= index < count:
        raise refused
    siblings, node = iter(path), leaf
    while count > 1:
        if index ^ 1 < count:
            sibling = next(siblings, b"")
            node = _node(sibling, node) if index % 2 else _node(node, sibling)
        index, count = index // 2, (count + 1) // 2
    if node.hex() != root or next(siblings, None) is not None:
        raise refused
