"""Weights in an envelope: delivered before they are paid for, readable once the key is released.

The envelope holds, as safetensors, the integers and blinders of every module; its digest and that
of its key are in the manifest.
"""

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray
from safetensors import SafetensorError

from paris_ray.artifacts import sha256_hex
from paris_ray.errors import ParisError, VerificationError, naming
from paris_ray.zklora.commitment import ModuleOpening, open_commitments
from paris_ray.zklora.field import ORDER, SCALAR_BYTES
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.manifest import MAX_SEALED_BYTES, AdapterManifest, ModuleTerms

KEY_BYTES = 32
TAG_BYTES = 16
# A nonce keeps apart what one key encrypts. A key here is random and encrypts one envelope.
NONCE = bytes(12)

SEALED, KEY = "sealed.bin", "key.bin"  # in the folder of an offer

Tensors = Mapping[str, NDArray[Any]]


def seal(openings: Mapping[str, ModuleOpening]) -> tuple[bytes, bytes]:
    """Return the weights of an adapter, encrypted with a new key, and that key (32 bytes).

    Raises:
        ParisError: if it is too large to be sold.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for name, opening in openings.items():
        tensors |= {
            f"{name}.a": np.ascontiguousarray(opening.module.a),
            f"{name}.b": np.ascontiguousarray(opening.module.b),
            f"{name}.blinders_a": _encode(opening.blinders_a),
            f"{name}.blinders_b": _encode(opening.blinders_b),
        }
    plain = safetensors.numpy.save(tensors)
    size = len(plain) + TAG_BYTES
    if size > MAX_SEALED_BYTES:
        raise ParisError(
            f"the sealed weights have {size} bytes: what can be sold has at most {MAX_SEALED_BYTES}"
        )
    key = secrets.token_bytes(KEY_BYTES)
    return ChaCha20Poly1305(key).encrypt(NONCE, plain, None), key


def unseal(sealed: bytes, key: bytes, manifest: AdapterManifest) -> dict[str, ModuleOpening]:
    """Return the weights in an envelope; that they are the committed ones is checked elsewhere.

    Returns:
        What is said to open the commitment of each module, in the manifest's order.

    Raises:
        VerificationError: if envelope or key is not that of the manifest, or if a tensor is
            missing, unknown, or has a shape, type or value that is not allowed.
    """
    if len(sealed) != manifest.sealed_bytes or sha256_hex(sealed) != manifest.sealed_digest:
        raise VerificationError("the sealed weights do not have the digest of the manifest")
    if sha256_hex(key) != manifest.key_digest:
        raise VerificationError("the key does not have the digest of the manifest")
    if len(key) != KEY_BYTES:
        raise VerificationError(f"the key has {len(key)} bytes, not {KEY_BYTES}")
    tensors = _decrypt(sealed, key)
    expected = {
        tensor: form for terms in manifest.modules for tensor, form in _forms(terms).items()
    }
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise VerificationError(
                f"sealed tensor {name!r:.300} is {found.get(name, 'missing')}, "
                f"the manifest means {expected.get(name, 'no such tensor')}"
            )
    return {terms.name: _opening(terms, tensors) for terms in manifest.modules}


def check_opening(manifest: AdapterManifest, sealed: bytes, key: bytes) -> dict[str, ModuleOpening]:
    """Return the weights of a sealed adapter, if they are the committed ones.

    Raises:
        ParisError: if key, ciphertext, names, shapes or values are not those of the manifest.
    """
    openings = unseal(sealed, key, manifest)
    open_commitments(
        {terms.name: (terms.commitment, openings[terms.name]) for terms in manifest.modules}
    )
    return openings


def _decrypt(sealed: bytes, key: bytes) -> Tensors:
    """Return the tensors; none is larger than the envelope."""
    try:
        return safetensors.numpy.load(ChaCha20Poly1305(key).decrypt(NONCE, sealed, None))
    except InvalidTag:
        raise VerificationError("the key does not fit the sealed weights") from None
    # KeyError: a type that numpy does not have.
    except (SafetensorError, KeyError, ValueError) as error:
        raise VerificationError(f"the sealed weights are damaged: {error}") from None


def _forms(terms: ModuleTerms) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return type and shape of each tensor of a module."""
    factor, blinders = np.dtype(np.int16), (np.dtype(np.uint8), (terms.r, SCALAR_BYTES))
    return {
        f"{terms.name}.a": (factor, (terms.d_in, terms.r)),
        f"{terms.name}.b": (factor, (terms.r, terms.d_out)),
        f"{terms.name}.blinders_a": blinders,
        f"{terms.name}.blinders_b": blinders,
    }


def _opening(terms: ModuleTerms, tensors: Tensors) -> ModuleOpening:
    a, b, blinders_a, blinders_b = (tensors[name] for name in _forms(terms))
    with naming(terms.name, VerificationError):
        module = QuantisedModule(a, b, terms.exponent_a, terms.exponent_b)
    opening = ModuleOpening(module, _decode(blinders_a), _decode(blinders_b))
    if max(opening.blinders_a + opening.blinders_b) >= ORDER:
        raise VerificationError(f"{terms.name}: a blinder is not below the group's order")
    return opening


def _encode(blinders: tuple[int, ...]) -> NDArray[np.uint8]:
    encoded = b"".join(blinder.to_bytes(SCALAR_BYTES, "little") for blinder in blinders)
    return np.frombuffer(encoded, np.uint8).reshape(-1, SCALAR_BYTES)


def _decode(blinders: NDArray[np.uint8]) -> tuple[int, ...]:
    return tuple(int.from_bytes(row.tobytes(), "little") for row in blinders)
