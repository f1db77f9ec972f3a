"""EZKL as a second opinion: binding and sound, but neither hiding nor zero-knowledge.

The two matrix products become a Halo2 circuit over the scalar field of BN254; the weights fill a
column of their own, whose KZG commitment is the first point of every proof. Inputs and outputs are
public. Scales are 0 and nothing is range-checked in the circuit, so the integers of the module are
the circuit's own and `Y = X A B` is checked exactly: there is no tolerance.

A proof speaks of one row: all rows combined with powers of a challenge alpha that is drawn from
context, commitment, X and Y. With `Y != X A B` it holds with probability at most rows * 2^-252, and
another context makes other public values, even for a single row. As in the project's own scheme,
only the opening shows that weights have 16 bits; here, to open is to commit again and compare.

What it does not do:

- Hide. The commitment has no blinder: whoever guesses the weights can check the guess. The weights'
  column is also opened at one random point in every proof, which is one linear equation of them.
- Convince others. Whoever makes the structured reference string (SRS) can forge proofs and open
  commitments at will. The verifier makes it, so a proof is worth something to the verifier alone.

`ezkl.verify` believes public values, key and commitment of whoever made the proof. Here only the
bytes of the proof travel: the verifier computes the public values from its own transcript, compiles
circuit and key itself, and compares the first point with the commitment that it pinned.

EZKL's wheel names no licence, so it is an optional extra, and only the benchmark needs it:
`pip install 'paris_ray[ezkl]'`. Sources: Kate, Zaverucha and Goldberg, ASIACRYPT 2010; the Halo2
book.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import ParisError, VerificationError
from paris_ray.zklora.fiat_shamir import FiatShamir
from paris_ray.zklora.fixed_point import (
    Int16,
    Int64,
    QuantisedModule,
    check_dimensions,
    check_statement,
    evaluate,
)

LABEL = "paris_ray zklora ezkl 1"
# Of the scalar field of BN254.
ORDER = 0x30644E72E131A029B85045B68181585D2833E84879B9709143E1F593F0000001
POINT_BYTES = 64  # x, then y, each with its highest byte first
# That of a circuit whose columns are all as long as they must be; EZKL ignores what follows it.
PROOF_BYTES = 1920
# Rows of a circuit that hold no values: at most 8 in EZKL 23.0.5, and some to spare.
SPARE_ROWS = 16
MIN_LOG_ROWS = 7
MAX_LOG_ROWS = 20  # a proving key of about 2 GB


@dataclass(frozen=True, slots=True)
class EzklCommitment:
    """A KZG commitment to all weights of a module under one verifier's SRS; it hides nothing.

    Attributes:
        d_in: Width of the inputs.
        r: Rank.
        d_out: Width of the outputs.
        point: 64 bytes, as in proofs.
    """

    d_in: int
    r: int
    d_out: int
    point: bytes


@dataclass(frozen=True, eq=False, slots=True)
class EzklOpening:
    """What is committed: only the contributor has it.

    Attributes:
        module: The integers.
        commitment: The commitment that this opens.
    """

    module: QuantisedModule
    commitment: EzklCommitment


class BindingEzkl:
    """Commits, proves and verifies with EZKL 23.0.5; see the module for what that is worth.

    Args:
        folder: Where parameters are kept: one SRS per circuit size, keys per module shape (at rank
            16 and width 1152 some 100 MB). The verifier's is its own; a contributor has one folder
            per verifier, into which the verifier's SRS files are copied under their names.

    Raises:
        ParisError: if EZKL is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._ezkl = _optional("ezkl")
        # It warns of scales below 8 bits, which are what makes integers exact.
        logging.getLogger("ezkl").setLevel(logging.ERROR)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def create_srs(self, d_in: int, r: int, d_out: int) -> Path:
        """Return the SRS for modules of these dimensions, made now unless the folder has it.

        For the verifier, before anything is committed; the contributor gets a copy of the file.

        Raises:
            ParisError: if a module of these dimensions does not fit.
        """
        with TemporaryDirectory(dir=self._folder) as temporary:
            log_rows = self._write_settings(_zeros(d_in, r, d_out), Path(temporary))
            path = self._srs_path(log_rows)
            if not path.exists():
                unfinished = Path(temporary, path.name)
                self._ezkl.gen_srs(unfinished, log_rows)
                unfinished.replace(path)
        return path

    def commit(self, module: QuantisedModule) -> tuple[EzklCommitment, EzklOpening]:
        """Return the only commitment to a module that there is, and what opens it.

        Raises:
            ParisError: if the folder lacks the verifier's SRS, or the module does not fit.
        """
        keys = self._keys(module.d_in, module.r, module.d_out)
        weights = [*module.a.ravel().tolist(), *module.b.ravel().tolist()]
        (point,) = self._ezkl.kzg_commit(_hex(weights), keys.verifying, keys.settings, keys.srs)
        encoded = b"".join(bytes.fromhex(value)[::-1] for value in (point.x, point.y))
        commitment = EzklCommitment(module.d_in, module.r, module.d_out, encoded)
        return commitment, EzklOpening(module, commitment)

    def prove(self, opening: EzklOpening, x: Int16, y: Int64, context: bytes) -> bytes:
        """Return a proof that the committed module gives `y` for `x`.

        The weights lie in a private temporary folder, inside that of the parameters, meanwhile.

        Args:
            opening: The secret weights.
            x: `(rows, d_in)` int16.
            y: `(rows, d_out)` int64, what `evaluate` gave for them.
            context: What else the proof is bound to.

        Raises:
            ParisError: if `x` or `y` have other types or shapes, there is no row, or `y` is wrong.
        """
        module, commitment = opening.module, opening.commitment
        check_statement(commitment.d_in, commitment.d_out, x, y)
        if not np.array_equal(evaluate(module, x), y):
            raise ParisError("y is not what the module gives for x: there is nothing to prove")
        inputs, _ = _combine_rows(commitment, x, y, context)
        keys = self._keys(module.d_in, module.r, module.d_out)
        with TemporaryDirectory(dir=self._folder) as temporary:
            folder = Path(temporary)
            data, witness = folder / "data", folder / "witness"
            circuit = self._compile(module, keys.settings, folder)
            data.write_text(json.dumps({"input_data": [_hex(inputs)]}))
            self._ezkl.gen_witness(str(data), circuit, witness, keys.verifying, keys.srs)
            made = self._ezkl.prove(witness, circuit, keys.proving, None, keys.srs)
        return bytes.fromhex(made["proof"].removeprefix("0x"))

    def verify(
        self, commitment: EzklCommitment, x: Int16, y: Int64, context: bytes, proof: bytes
    ) -> None:
        """Check one proof.

        Args:
            commitment: The pinned commitment of the module.
            x: `(rows, d_in)` int16, as the verifier sent them.
            y: `(rows, d_out)` int64, as the verifier received them.
            context: The verifier's own idea of what the proof must be bound to.
            proof: What the prover sent.

        Raises:
            VerificationError: unless the proof holds.
            ParisError: if the folder lacks the verifier's SRS.
        """
        try:
            check_dimensions(commitment.d_in, commitment.r, commitment.d_out)
            check_statement(commitment.d_in, commitment.d_out, x, y)
        except ParisError as error:
            raise VerificationError(str(error)) from None
        if len(proof) != PROOF_BYTES:
            raise VerificationError(f"the proof has {len(proof)} bytes, {PROOF_BYTES} are expected")
        if proof[:POINT_BYTES] != commitment.point:
            raise VerificationError("the proof is about other weights than the committed ones")
        inputs, outputs = _combine_rows(commitment, x, y, context)
        self._verify(commitment, [*inputs, *outputs], proof)

    def _verify(self, commitment: EzklCommitment, public: Sequence[int], proof: bytes) -> None:
        keys = self._keys(commitment.d_in, commitment.r, commitment.d_out)
        with TemporaryDirectory(dir=self._folder) as temporary:
            path = Path(temporary, "proof.json")
            path.write_text(json.dumps({"instances": [_hex(public)], "proof": list(proof)}))
            try:
                holds = self._ezkl.verify(path, keys.settings, keys.verifying, keys.srs)
            except RuntimeError as error:
                raise VerificationError(f"the proof does not hold: {error}") from None
        if not holds:
            raise VerificationError("the proof does not hold")

    def _keys(self, d_in: int, r: int, d_out: int) -> "_Keys":
        """Return the keys for a module's shape, made with weights of zero unless they exist.

        Keys depend on shape and SRS alone, so that both parties make the same.
        """
        finished = self._folder / f"keys_{d_in}_{r}_{d_out}"
        if not finished.exists():
            with TemporaryDirectory(dir=self._folder) as temporary:
                unfinished = Path(temporary, finished.name)
                self._make_keys(_zeros(d_in, r, d_out), unfinished)
                try:
                    unfinished.rename(finished)
                except OSError:
                    if not finished.exists():  # else another process was faster
                        raise
        log_rows = json.loads((finished / "settings").read_bytes())["run_args"]["logrows"]
        return _Keys(finished, self._srs_path(log_rows))

    def _make_keys(self, module: QuantisedModule, folder: Path) -> None:
        folder.mkdir()
        keys = _Keys(folder, self._srs_path(self._write_settings(module, folder)))
        if not keys.srs.exists():
            raise ParisError(
                f"{keys.srs} does not exist: the verifier makes it (create_srs), the contributor "
                "gets a copy"
            )
        circuit = self._compile(module, keys.settings, folder)
        self._ezkl.setup(circuit, keys.verifying, keys.proving, keys.srs)

    def _compile(self, module: QuantisedModule, settings: Path, folder: Path) -> Path:
        circuit = folder / "circuit"
        self._ezkl.compile_circuit(_write_graph(module, folder), circuit, settings)
        return circuit

    def _write_settings(self, module: QuantisedModule, folder: Path) -> int:
        """Write EZKL's settings with the fewest rows that fit; return the logarithm of these."""
        graph, path = _write_graph(module, folder), folder / "settings"
        settings = self._generate_settings(graph, path, MAX_LOG_ROWS)
        num_weights = module.a.size + module.b.size
        if settings["module_sizes"]["polycommit"] != [num_weights]:  # so if all sizes are 1
            raise ParisError(
                f"d_in={module.d_in}, r={module.r}, d_out={module.d_out} is not allowed: EZKL does "
                "not commit to all weights"
            )
        num_rows = max(settings["num_rows"], num_weights, module.d_in + module.d_out)
        log_rows = max(MIN_LOG_ROWS, (num_rows + SPARE_ROWS - 1).bit_length())
        if log_rows > MAX_LOG_ROWS:
            raise ParisError(f"a circuit of {num_rows} rows is not allowed: under 2^{MAX_LOG_ROWS}")
        self._generate_settings(graph, path, log_rows)
        return log_rows

    def _generate_settings(self, graph: Path, path: Path, log_rows: int) -> dict[str, Any]:
        arguments = self._ezkl.PyRunArgs()
        arguments.logrows = log_rows
        arguments.input_visibility = arguments.output_visibility = "public"
        arguments.param_visibility = "polycommit"
        arguments.input_scale = arguments.param_scale = 0
        arguments.ignore_range_check_inputs_outputs = True  # they are any field elements
        arguments.num_inner_cols = 1
        arguments.disable_freivalds = True  # the circuit itself checks without chance
        self._ezkl.gen_settings(graph, path, py_run_args=arguments)
        settings: dict[str, Any] = json.loads(path.read_bytes())
        return settings

    def _srs_path(self, log_rows: int) -> Path:
        return self._folder / f"srs_{log_rows}.bin"


@dataclass(frozen=True, slots=True)
class _Keys:
    """The files of a circuit."""

    folder: Path
    srs: Path

    @property
    def settings(self) -> Path:
        return self.folder / "settings"

    @property
    def proving(self) -> Path:
        return self.folder / "proving_key"

    @property
    def verifying(self) -> Path:
        return self.folder / "verifying_key"


def _optional(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise ParisError(
            f"the EZKL backend needs the package {package}: pip install 'paris_ray[ezkl]'"
        ) from None


def _zeros(d_in: int, r: int, d_out: int) -> QuantisedModule:
    check_dimensions(d_in, r, d_out)
    num_weights = (d_in + d_out) * r
    if num_weights >= 2**MAX_LOG_ROWS:
        raise ParisError(f"{num_weights} weights are not allowed: under 2^{MAX_LOG_ROWS}")
    return QuantisedModule(np.zeros((d_in, r), np.int16), np.zeros((r, d_out), np.int16), 0, 0)


def _write_graph(module: QuantisedModule, folder: Path) -> Path:
    """Write the two products on one row as an ONNX graph of integers."""
    onnx = _optional("onnx")
    helper, integers = onnx.helper, onnx.TensorProto.INT64
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["u"]),
            helper.make_node("MatMul", ["u", "b"], ["y"]),
        ],
        "lora",
        [helper.make_tensor_value_info("x", integers, [1, module.d_in])],
        [helper.make_tensor_value_info("y", integers, [1, module.d_out])],
        [
            onnx.numpy_helper.from_array(factor.astype(np.int64), name)
            for name, factor in (("a", module.a), ("b", module.b))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return path


def _combine_rows(
    commitment: EzklCommitment, x: Int16, y: Int64, context: bytes
) -> tuple[list[int], list[int]]:
    """Return `sum_t alpha^t x_t` and `sum_t alpha^t y_t`, t from 1, modulo ORDER."""
    oracle = FiatShamir(LABEL)
    sizes = (commitment.d_in, commitment.r, commitment.d_out, len(x))
    oracle.absorb("context", context)
    oracle.absorb("sizes", *(size.to_bytes(8, "little") for size in sizes))
    oracle.absorb("commitment", commitment.point)
    oracle.absorb("rows", x.astype("<i2").tobytes(), y.astype("<i8").tobytes())
    alpha = oracle.challenge("alpha")
    powers = np.array([pow(alpha, t + 1, ORDER) for t in range(len(x))], object)
    return _combine(powers, x), _combine(powers, y)


def _combine(coefficients: NDArray[np.object_], rows: Int16 | Int64) -> list[int]:
    return [int(value) % ORDER for value in coefficients @ rows.astype(object)]


def _hex(values: Sequence[int]) -> list[str]:
    """Return field elements as EZKL writes them: 32 bytes, the lowest first."""
    return [(value % ORDER).to_bytes(32, "little").hex() for value in values]
