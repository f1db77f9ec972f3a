"""Change one byte of what a stranger sends: everything must be refused, and by a ParisError.

    python -m tests.zklora_fuzz --mutations 10000      all targets; exit code 1 on any failure

Three things may happen to a changed payload. It is refused. Or it is read and harmless, which is
said for each target: a signed document that was only spelt otherwise; a frame that is read as
another message, every byte of which the layers above see. Anything else is a failure: a change
that was accepted, or an exception that is no ParisError.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import LoRAConfig
from paris_ray.errors import ParisError, VerificationError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.commitment import (
    ModuleCommitment,
    ModuleOpening,
    commit,
    open_commitment,
    open_commitments,
)
from paris_ray.zklora.fixed_point import QuantisedModule, evaluate, quantise
from paris_ray.zklora.log import Call, closing_statement
from paris_ray.zklora.manifest import AdapterManifest, Base
from paris_ray.zklora.offer import build_manifest
from paris_ray.zklora.parties.frames import Message, encode
from paris_ray.zklora.proof import prove, verify
from paris_ray.zklora.sealing import NONCE, seal, unseal
from paris_ray.zklora.transcript import CALLS, ROWS, Transcript, proof_context
from tests.frames import decode

DIGEST = "0f" * 32
CONTEXT = proof_context(DIGEST, DIGEST, DIGEST, "layer", DIGEST)
PROGRESS_S = 5.0
SHOWN = 5  # failures of a target


@dataclass(frozen=True)
class Target:
    """Something that a stranger sends.

    Attributes:
        payload: As an honest party sends it.
        read: What its receiver does with it; raises ParisError to refuse.
        is_harmless: Whether what was read from a changed payload can mislead nobody.
    """

    payload: bytes
    read: Callable[[bytes], Any]
    is_harmless: Callable[[bytes, Any], bool] = lambda changed, result: False


@dataclass
class Report:
    """What became of the changed payloads."""

    refused: int = 0
    harmless: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def mutations(self) -> int:
        return self.refused + self.harmless + len(self.failures)


def fuzz(
    target: Target, mutations: int, seed: int = 0, each: Callable[[Report], None] = lambda _: None
) -> Report:
    """Change one byte of a payload, again and again; the place and the value are seeded."""
    target.read(target.payload)  # what is refused anyway would prove nothing
    rng, report = random.Random(seed), Report()
    for _ in range(mutations):
        place, bits = rng.randrange(len(target.payload)), rng.randrange(1, 256)
        changed = bytearray(target.payload)
        changed[place] ^= bits
        what = (
            f"byte {place} of {len(changed)}: {changed[place] ^ bits:#04x} -> {changed[place]:#04x}"
        )
        _try(target, bytes(changed), what, report)
        each(report)
    return report


def _try(target: Target, changed: bytes, what: str, report: Report) -> None:
    try:
        result = target.read(changed)
    except ParisError:
        report.refused += 1
    except Exception as error:
        report.failures.append(f"{what}: {type(error).__name__}: {error}")
    else:
        if target.is_harmless(changed, result):
            report.harmless += 1
        else:
            report.failures.append(f"{what}: accepted")


# What is attacked; all of it small


def _module(d_in: int = 12, r: int = 3, d_out: int = 10) -> QuantisedModule:
    rng = np.random.default_rng(d_in)
    return quantise(rng.normal(size=(d_in, r)), rng.normal(size=(r, d_out)))


def _rows(d_in: int = 12, rows: int = 7) -> np.ndarray:
    return np.random.default_rng(1).integers(-(2**15), 2**15, (rows, d_in)).astype(np.int16)


def proof(_: Path) -> Target:
    return _proof_of(_module())


def folded_proof(_: Path) -> Target:
    """Wide enough for a round of folding."""
    return _proof_of(_module(130, 1, 2))


def _proof_of(module: QuantisedModule) -> Target:
    commitment, opening = commit(module)
    x = _rows(module.d_in)
    y = evaluate(module, x)
    return Target(
        prove(opening, x, y, CONTEXT), lambda changed: verify(commitment, x, y, CONTEXT, changed)
    )


def statement(_: Path) -> Target:
    """Commitment, inputs, outputs and context, under an honest proof."""
    module = _module()
    commitment, opening = commit(module)
    x = _rows()
    y = evaluate(module, x)
    proof = prove(opening, x, y, CONTEXT)
    sizes = [48 * module.r, 48 * module.r, x.nbytes, y.nbytes]

    def read(changed: bytes) -> None:
        a, b, x_bytes, y_bytes, context = _cut(changed, sizes)
        changed_x = np.frombuffer(x_bytes, np.int16).reshape(x.shape)
        changed_y = np.frombuffer(y_bytes, np.int64).reshape(y.shape)
        verify(_commitment(module, a, b), changed_x, changed_y, context, proof)

    parts = [*commitment.a, *commitment.b, x.tobytes(), y.tobytes(), CONTEXT]
    return Target(b"".join(parts), read)


def opening(_: Path) -> Target:
    """What is delivered, against the commitment; and the commitment."""
    module = _module()
    commitment, secret = commit(module)
    blinders = [b.to_bytes(32, "little") for b in (*secret.blinders_a, *secret.blinders_b)]
    sizes = [48 * module.r, 48 * module.r, module.a.nbytes, module.b.nbytes]

    def read(changed: bytes) -> None:
        points_a, points_b, a_bytes, b_bytes, rest = _cut(changed, sizes)
        a = np.frombuffer(a_bytes, np.int16).reshape(module.a.shape)
        b = np.frombuffer(b_bytes, np.int16).reshape(module.b.shape)
        numbers = [int.from_bytes(rest[i : i + 32], "little") for i in range(0, len(rest), 32)]
        rho, sigma = tuple(numbers[: module.r]), tuple(numbers[module.r :])
        delivered = ModuleOpening(QuantisedModule(a, b, 0, 0), rho, sigma)
        open_commitment(_commitment(module, points_a, points_b), delivered)

    factors = [module.a.tobytes(), module.b.tobytes()]
    return Target(b"".join([*commitment.a, *commitment.b, *factors, *blinders]), read)


def _commitment(module: QuantisedModule, a: bytes, b: bytes) -> ModuleCommitment:
    points = (tuple(part[i : i + 48] for i in range(0, len(part), 48)) for part in (a, b))
    return ModuleCommitment(module.d_in, module.r, module.d_out, *points)


def _cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


def _offer(folder: Path) -> tuple[Identity, AdapterManifest, bytes, bytes]:
    identity = Identity.load_or_create(folder / "contributor")
    openings = {name: commit(_module(6, 2, 4))[1] for name in ("layers.0", "layers.1")}
    sealed, key = seal(openings)
    manifest = build_manifest(
        openings,
        LoRAConfig(r=2, lora_alpha=4.5, target_modules=tuple(openings)),
        base=Base(digest=DIGEST, expert=0, router_digest=DIGEST),
        adapter="fuzz",
        price=100,
        sealed=sealed,
        key=key,
        contributor_certificate=identity.certificate,
        escrow_certificate=Identity.load_or_create(folder / "escrow").certificate,
    )
    return identity, manifest, sealed, key


def manifest(folder: Path) -> Target:
    """The signed file; harmless if the very same manifest is read, signed the same."""
    identity, offered, _, _ = _offer(folder)
    path = folder / "zklora.json"

    def read(changed: bytes) -> Any:
        path.write_bytes(changed)
        AdapterManifest.read(path)
        return canonical_json(SignedDocument.read(path).to_json())

    return _document(offered.sign(identity), read)


def closing(folder: Path) -> Target:
    """The signed end of a session; harmless as a manifest is."""
    identity = Identity.load_or_create(folder / "user")
    signed = SignedDocument.sign("close", _closing(_transcript()), identity)
    path = folder / "close.json"

    def read(changed: bytes) -> Any:
        path.write_bytes(changed)
        document = SignedDocument.read(path)
        document.check("close", identity.public_key)
        return canonical_json(document.to_json())

    return _document(signed, read)


def _document(signed: SignedDocument, read: Callable[[bytes], Any]) -> Target:
    original = canonical_json(signed.to_json())
    payload = json.dumps(signed.to_json(), indent=1).encode()
    return Target(payload, read, lambda changed, result: result == original)


def sealed(folder: Path) -> Target:
    """Envelope and key, as whoever delivers them may change them."""
    _, offered, envelope, key = _offer(folder)

    def read(changed: bytes) -> None:
        unseal(changed[: len(envelope)], changed[len(envelope) :], offered)

    return Target(envelope + key, read)


def envelope(folder: Path) -> Target:
    """What the contributor itself put inside, its digest being right; harmless if it opens.

    Then the integers, blinders and names are those that were committed.
    """
    _, offered, honest, key = _offer(folder)
    cipher = ChaCha20Poly1305(key)

    def read(changed: bytes) -> None:
        resealed = cipher.encrypt(NONCE, changed, None)
        sizes = {"sealed_digest": sha256_hex(resealed), "sealed_bytes": len(resealed)}
        own = AdapterManifest(**offered.to_json() | sizes)
        openings = unseal(resealed, key, own)
        commitments = {terms.name: terms.commitment for terms in offered.modules}
        open_commitments({name: (commitments[name], openings[name]) for name in openings})

    return Target(cipher.decrypt(NONCE, honest, None), read)


def _transcript() -> Transcript:
    module = _module()
    calls = [_rows()[:4], _rows()[4:]]
    return Transcript(Call(i, "layer", 9, x, evaluate(module, x)) for i, x in enumerate(calls))


def _closing(transcript: Transcript) -> dict[str, Any]:
    return closing_statement(DIGEST, DIGEST, transcript.log)


def transcript(folder: Path) -> Target:
    """Both files of all calls, against what was signed; harmless if they are read as the same."""
    signed, files = _closing(_transcript()), (folder / CALLS, folder / ROWS)
    _transcript().save(folder)
    contents = [path.read_bytes() for path in files]
    cut = len(contents[0])

    def read(changed: bytes) -> None:
        for path, content in zip(files, (changed[:cut], changed[cut:]), strict=True):
            path.write_bytes(content)
        if _closing(Transcript.load(folder)) != signed:
            raise VerificationError("the transcript is not the one that was signed")

    return Target(b"".join(contents), read, lambda changed, result: True)  # it refuses all others


def frame(_: Path) -> Target:
    """A call on the wire; harmless if another message is read, of which this is the only frame.

    TLS keeps frames from being changed on their way; here they are a hostile peer's. What is read
    differs from what was sent in what the layers above see, since no message has two frames.
    """
    x = _rows()
    fields = {"session": DIGEST, "seq": 3, "modules": ["layer"], "exponent": 9}
    tensors = {"x": x, "y": evaluate(_module(), x), "some": np.ones((2, 1), np.float32)}
    payload = encode(Message("call", fields, tensors), 7)

    def read(changed: bytes) -> bytes:
        n, message = decode(changed)
        return encode(message, n)

    return Target(payload, read, lambda changed, result: result == changed)


TARGETS: dict[str, Callable[[Path], Target]] = {
    target.__name__: target
    for target in (
        proof,
        folded_proof,
        statement,
        opening,
        manifest,
        sealed,
        envelope,
        closing,
        transcript,
        frame,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.targets:
            report = _fuzz_aloud(name, Path(folder), arguments.mutations, arguments.seed)
            failed += len(report.failures)
    print("every change was refused, or harmless" if not failed else f"{failed} FAILURES")
    return 1 if failed else 0


def _fuzz_aloud(name: str, folder: Path, mutations: int, seed: int) -> Report:
    started = shown = time.monotonic()

    def progress(report: Report) -> None:
        nonlocal shown
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            print(f"{name}: {report.mutations} of {mutations} ...", flush=True)

    report = fuzz(TARGETS[name](folder), mutations, seed, progress)
    print(
        f"{name}: {report.mutations} mutations, {report.refused} refused, {report.harmless} "
        f"harmless, {len(report.failures)} failures, {time.monotonic() - started:.1f} s",
        flush=True,
    )
    for failure in report.failures[:SHOWN]:
        print(f"  {failure}")
    return report


if __name__ == "__main__":
    sys.exit(main())
