"""The log of a session: what its root binds, identifiers, the file."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from paris_ray.errors import ArtifactError, ProtocolError
from paris_ray.zklora.log import Call, closing_statement
from paris_ray.zklora.transcript import (
    CALLS,
    ROWS,
    Transcript,
    new_nonce,
    proof_context,
    session_id,
)

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
rng = np.random.default_rng(0)


def call(seq: int, module: str = "blocks.0.attn", rows: int = 2, exponent: int = 11) -> Call:
    x = rng.integers(-100, 100, (rows, 3), np.int16)
    return Call(seq, module, exponent, x, rng.integers(-(2**60), 2**60, (rows, 5), np.int64))


def test_the_root_is_what_docs_say():
    x, y = np.array([[1, -2]], np.int16), np.array([[3]], np.int64)
    parts = [
        b'{"exponent":4,"label":"paris_ray zklora call","module":"m","seq":0,'
        b'"shapes":{"x":[1,2],"y":[1,1]}}',
        b"\x01\x00\xfe\xff",
        b"\x03" + bytes(7),
    ]
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    first, second = Call(0, "m", 4, x, y), Call(1, "m", 4, x, y)
    assert first.digest == hashlib.sha256(framed).digest()
    log = b"paris_ray zklora log" + first.digest + second.digest
    assert Transcript([first, second]).log.root == hashlib.sha256(log).hexdigest()
    with pytest.raises(ProtocolError, match="empty log"):
        _ = Transcript().log


def test_every_part_of_a_call_is_in_its_digest():
    x, y = np.arange(6, dtype=np.int16).reshape(2, 3), np.arange(6, dtype=np.int64).reshape(2, 3)
    changed_x, changed_y = x.copy(), y.copy()
    changed_x[1, 2] += 1
    changed_y[0, 0] -= 1
    calls = [
        Call(0, "m", 3, x, y),
        Call(1, "m", 3, x, y),
        Call(0, "n", 3, x, y),
        Call(0, "m", 4, x, y),
        Call(0, "m", 3, changed_x, y),
        Call(0, "m", 3, x, changed_y),
        Call(0, "m", 3, x[::-1], y[::-1]),
        Call(0, "m", 3, x.reshape(2, 3), y.reshape(2, 3)[:, :1]),
        Call(0, "m", 3, x.reshape(3, 2), y.reshape(3, 2)),
        Call(0, "m", 3, x.reshape(1, 6), y.reshape(1, 6)),
    ]
    assert len({c.digest for c in calls}) == len(calls)
    assert Call(0, "m", 3, np.asfortranarray(x), y).digest == calls[0].digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq": -1}, "seq=-1"),
        ({"seq": True}, "seq=True"),
        ({"seq": 2**31}, "seq="),
        ({"seq": "0"}, "seq='0'"),
        ({"module": 3}, "module=3"),
        ({"module": "\ud800"}, "module="),
        ({"module": "a\x1b[2J"}, "module="),
        ({"exponent": 1.5}, "exponent=1.5"),
        ({"exponent": 1001}, "exponent=1001"),
        ({"x": np.zeros((2, 3), np.int32)}, "x must be a matrix of int16"),
        ({"x": np.zeros((0, 3), np.int16)}, "x must be"),
        ({"x": np.zeros(3, np.int16)}, "x must be"),
        ({"y": np.zeros((2, 3), np.float64)}, "y must be a matrix of int64"),
        ({"y": np.zeros((3, 3), np.int64)}, "2 rows, 3 answers"),
    ],
)
def test_malformed_calls_are_refused(change: dict, message: str):
    good = {"seq": 0, "module": "m", "exponent": 0, "x": np.zeros((2, 3), np.int16)}
    with pytest.raises(ProtocolError, match=message):
        Call(**(good | {"y": np.zeros((2, 3), np.int64)} | change))


def test_a_transcript_counts_stacks_and_orders():
    calls = [call(0, "m", 2), call(1, "n", 1), call(2, "m", 3)]
    transcript = Transcript(calls)
    assert transcript.log.rows == {"m": 5, "n": 1}
    x, y = transcript.rows("m")
    np.testing.assert_array_equal(x, np.concatenate([calls[0].x, calls[2].x]))
    np.testing.assert_array_equal(y, np.concatenate([calls[0].y, calls[2].y]))
    assert transcript.log == Transcript(calls).log
    again = [Call(i, c.module, c.exponent, c.x, c.y) for i, c in enumerate(reversed(calls))]
    assert transcript.log.root != Transcript(again).log.root
    with pytest.raises(ProtocolError, match="'o' was never called"):
        transcript.rows("o")
    with pytest.raises(ProtocolError, match="the next is 3"):
        transcript.append(call(2))
    narrow = Call(3, "m", 0, np.zeros((1, 2), np.int16), np.zeros((1, 5), np.int64))
    with pytest.raises(ProtocolError, match=r"m has widths \(3, 5\)"):
        transcript.append(narrow)
    statement = closing_statement(A, B, transcript.log)
    assert statement["rows"] == {"m": 5, "n": 1} and statement["calls"] == 3
    assert statement["root"] == transcript.log.root != Transcript(calls[:2]).log.root


def test_identifiers_depend_on_everything_and_refuse_other_forms():
    names = [("v1", A, B, C, D), ("v2", A, B, C, D), ("v1", A, B, D, C), ("v1", B, A, C, D)]
    assert len({session_id(*arguments) for arguments in names}) == 4
    contexts = {
        proof_context(A, B, C, "m", D),
        proof_context(B, B, C, "m", D),
        proof_context(A, A, C, "m", D),
        proof_context(A, B, D, "m", D),
        proof_context(A, B, C, "n", D),
        proof_context(A, B, C, "m", C),
    }
    assert len(contexts) == 6
    for wrong in ("A" * 64, "a" * 63, "a" * 64 + "\n", 3, None):
        with pytest.raises(ProtocolError, match="nonce_v="):
            proof_context(A, B, C, "m", wrong)
        with pytest.raises(ProtocolError, match="nonce_u="):
            session_id("v1", A, B, wrong, D)
    assert new_nonce() != new_nonce()


@pytest.mark.parametrize("named", [False, True])
def test_a_transcript_survives_in_its_folder(tmp_path: Path, named: bool):
    path = tmp_path / ROWS if named else None
    calls = [call(0, "m", 2), call(1, "n", 1)]
    transcript = Transcript(calls, path)
    transcript.save(tmp_path)
    third = call(2, "m")
    transcript.append(third)
    transcript.save(tmp_path)
    loaded = Transcript.load(tmp_path)
    assert loaded.log == transcript.log and len(loaded) == 3
    np.testing.assert_array_equal(loaded.rows("m")[1], np.concatenate([calls[0].y, third.y]))
    assert [loaded.call(seq).digest for seq in range(3)] == [c.digest for c in (*calls, third)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([ROWS, CALLS])
    rows = sum(c.x.nbytes + c.y.nbytes for c in (*calls, third))
    assert (tmp_path / ROWS).stat().st_size == rows  # once
    Transcript().save(tmp_path / "empty")
    assert len(Transcript.load(tmp_path / "empty")) == 0


def test_a_transcript_that_is_begun_anew_is_not_written_by_the_old_one(tmp_path: Path):
    old = Transcript([call(0)], tmp_path / ROWS)
    new = Transcript([call(0)], tmp_path / ROWS)
    old.append(call(1))
    new.save(tmp_path)
    assert Transcript.load(tmp_path).log == new.log != old.log


def test_memory_does_not_grow_with_the_calls(tmp_path: Path):
    """Of arrays that take 2 MB, a transcript of hundreds keeps none."""
    x, y = np.zeros((64, 1024), np.int16), np.zeros((64, 4096), np.int64)
    transcript = Transcript(path=tmp_path / ROWS)
    tracemalloc.start()
    for seq in range(100):
        transcript.append(Call(seq, f"m{seq}", 0, x, y))
    transcript.save(tmp_path)
    loaded = Transcript.load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.log == transcript.log
    assert peak < 8 * (x.nbytes + y.nbytes)


def test_damaged_transcripts_are_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="holds no transcript"):
        Transcript.load(tmp_path)
    Transcript([call(0)]).save(tmp_path)
    good = json.loads((tmp_path / CALLS).read_text())
    for calls in (
        3,
        [1],
        [{"module": "m"}],
        [*good, *good],
        [],
        [good[0] | {"exponent": "2"}],
        [good[0] | {"rows": -1}],
        [good[0] | {"rows": 10**400}],
        [good[0] | {"d_in": "3"}],
        [good[0] | {"d_out": good[0]["d_out"] + 1}],
    ):
        (tmp_path / CALLS).write_text(json.dumps(calls))
        with pytest.raises(ArtifactError, match="holds no transcript"):
            Transcript.load(tmp_path)
    (tmp_path / CALLS).write_text(json.dumps(good))
    log = Transcript.load(tmp_path).log
    rows = (tmp_path / ROWS).read_bytes()
    for damaged in (rows[:-1], rows + b"0"):
        (tmp_path / ROWS).write_bytes(damaged)
        with pytest.raises(ArtifactError, match="holds no transcript"):
            Transcript.load(tmp_path)
    (tmp_path / ROWS).write_bytes(bytes([rows[0] ^ 1]) + rows[1:])
    assert Transcript.load(tmp_path).log.root != log.root
