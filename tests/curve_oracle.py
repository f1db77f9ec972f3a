"""py_ecc, a plain and slow implementation of the curve, to compare with.

Importing it raises the recursion limit of the whole process to 100,000, with which Python's JSON
parser overflows the stack on deep nesting instead of refusing it: so the limit is put back.
"""

import sys

_limit = sys.getrecursionlimit()

from py_ecc.bls.hash_to_curve import hash_to_G1  # noqa: E402
from py_ecc.bls.point_compression import compress_G1, decompress_G1  # noqa: E402
from py_ecc.optimized_bls12_381 import Z1, add, multiply  # noqa: E402

sys.setrecursionlimit(_limit)

__all__ = ["Z1", "add", "compress_G1", "decompress_G1", "hash_to_G1", "multiply"]
