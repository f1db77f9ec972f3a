"""The Merkle log: RFC 6962's tree, what its leaves bind, challenges, the file."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paris_ray.errors import ArtifactError, ProtocolError, VerificationError
from paris_ray.zklora.merkle import MerkleTree, check_inclusion
from paris_ray.zklora.transcript import (
    Call,
    LogSummary,
    RowLog,
    Transcript,
    _below,
    challenge_rows,
    closing_statement,
    drawing_digest,
    leaf_index,
    new_nonce,
    proof_context,
    row_leaf,
    session_id,
)

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
rng = np.random.default_rng(0)


def call(seq: int, module: str = "blocks.0.attn", rows: int = 2, exponent: int = 11) -> Call:
    x = rng.integers(-100, 100, (rows, 3), np.int16)
    return Call(seq, module, exponent, x, rng.integers(-(2**60), 2**60, (rows, 5), np.int64))


def tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there: recursively."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + tree_hash(leaves[:k]) + tree_hash(leaves[k:])).digest()


def audit_path(m: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 6962, section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = 1 << (len(leaves) - 1).bit_length() - 1
    if m < k:
        return [*audit_path(m, leaves[:k]), tree_hash(leaves[k:])]
    return [*audit_path(m - k, leaves[k:]), tree_hash(leaves[:k])]


@pytest.mark.parametrize("count", [*range(1, 18), 31, 32, 33])
def test_tree_and_paths_are_those_of_rfc_6962(count: int):
    leaves = [hashlib.sha256(bytes([i])).digest() for i in range(count)]
    tree = MerkleTree(leaves)
    assert tree.root == tree_hash(leaves).hex()
    for index, leaf in enumerate(leaves):
        assert tree.path(index) == audit_path(index, leaves)
        check_inclusion(tree.root, count, index, leaf, tree.path(index))


def test_a_tree_of_a_known_vector():
    # Certificate Transparency's reference vector: the tree over the leaves "", 0x00, 0x10.
    leaves = [hashlib.sha256(b"\x00" + data).digest() for data in (b"", b"\x00", b"\x10")]
    assert leaves[0].hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    root = "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert MerkleTree(leaves).root == root


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_inclusion_is_refused_for_anything_else(count: int):
    leaves = [hashlib.sha256(bytes([i])).digest() for i in range(count)]
    tree = MerkleTree(leaves)
    for index, leaf in enumerate(leaves):
        path = tree.path(index)
        wrong = [
            (tree.root, count, index, hashlib.sha256(leaf).digest(), path),
            (tree.root, count, index, leaf, [*path, leaf]),
            (tree.root, count, -1, leaf, path),
            (tree.root, count, count, leaf, path),
            (A, count, index, leaf, path),
        ]
        wrong += [(tree.root, count, other, leaf, path) for other in range(count) if other != index]
        for place in range(len(path)):
            changed = list(path)
            changed[place] = bytes([path[place][0] ^ 1]) + path[place][1:]
            wrong.append((tree.root, count, index, leaf, changed))
            wrong.append((tree.root, count, index, leaf, path[:place] + path[place + 1 :]))
            wrong.append((tree.root, count, index, leaf, [*path[:place], b"", *path[place + 1 :]]))
        for arguments in wrong:
            with pytest.raises(VerificationError, match="not in the log"):
                check_inclusion(*arguments)


def test_a_node_cannot_be_shown_as_a_leaf():
    leaves = [hashlib.sha256(bytes([i])).digest() for i in range(4)]
    tree = MerkleTree(leaves)
    node = hashlib.sha256(b"\x01" + leaves[0] + leaves[1]).digest()
    check_inclusion(tree.root, 2, 0, node, tree.path(0)[1:])  # why the count is signed
    with pytest.raises(VerificationError):
        check_inclusion(tree.root, 4, 0, node, tree.path(0)[1:])


def test_a_path_outside_the_tree_and_an_empty_log_are_refused():
    with pytest.raises(ProtocolError, match="2 leaves"):
        MerkleTree([b"0" * 32, b"1" * 32]).path(2)
    for log in (Transcript(), RowLog()):
        with pytest.raises(ProtocolError, match="empty log"):
            closing_statement(A, B, log)


def test_a_leaf_is_what_docs_say():
    x, y = np.array([[1, -2]], np.int16), np.array([[3]], np.int64)
    parts = [
        b'{"exponent":4,"label":"paris_ray zklora call","module":"m","seq":0,'
        b'"shapes":{"x":[1,2],"y":[1,1]}}',
        b"\x01\x00\xfe\xff",
        b"\x03" + bytes(7),
    ]
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert Call(0, "m", 4, x, y).leaf == hashlib.sha256(b"\x00" + framed).digest()


def test_every_part_of_a_call_is_in_its_leaf():
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
    assert len({c.leaf for c in calls}) == len(calls)
    assert Call(0, "m", 3, np.asfortranarray(x), y).leaf == calls[0].leaf
    rows = {row_leaf("m", *numbers, x[0], y[0]) for numbers in ((0, 0, 3), (1, 0, 3), (0, 1, 3))}
    assert len(rows | {c.leaf for c in calls}) == 3 + len(calls)


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
    assert transcript.counts == {"m": 5, "n": 1}
    x, y = transcript.rows("m")
    np.testing.assert_array_equal(x, np.concatenate([calls[0].x, calls[2].x]))
    np.testing.assert_array_equal(y, np.concatenate([calls[0].y, calls[2].y]))
    tree = MerkleTree([call.leaf for call in calls])
    assert transcript.root == tree.root
    for index in range(3):
        check_inclusion(transcript.root, 3, index, calls[index].leaf, tree.path(index))
    with pytest.raises(ProtocolError, match="'o' was never called"):
        transcript.rows("o")
    with pytest.raises(ProtocolError, match="the next is 3"):
        transcript.append(call(2))
    narrow = Call(3, "m", 0, np.zeros((1, 2), np.int16), np.zeros((1, 5), np.int64))
    with pytest.raises(ProtocolError, match=r"m has widths \(3, 5\)"):
        transcript.append(narrow)
    statement = closing_statement(A, B, transcript)
    assert statement["rows"] == {"m": 5, "n": 1} and statement["leaves"] == 3
    assert statement["root"] == transcript.root != Transcript(calls[:2]).root


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


def test_a_row_log_finds_every_row_at_its_signed_place():
    log = RowLog()
    shown = {}
    for number, (module, rows) in enumerate([("n", 3), ("m", 2), ("n", 1), ("m", 4)]):
        made = call(0, module, rows)
        before = log.counts.get(module, 0)
        assert log.append(module, 11, made.x, made.y) == (number // 2, before)
        for i in range(rows):
            shown[module, before + i] = (number // 2, made.x[i], made.y[i])
    statement = closing_statement(A, B, log)
    assert statement["rows"] == {"m": 6, "n": 4} and statement["leaves"] == 10
    assert sorted(leaf_index(log.counts, *key) for key in shown) == list(range(10))
    for (module, row), (number, x, y) in shown.items():
        leaf = row_leaf(module, number, row, 11, x, y)
        place = leaf_index(statement["rows"], module, row)
        check_inclusion(statement["root"], 10, place, leaf, log.prove_inclusion(module, row))
        other, way = row_leaf(module, number, row, 11, x, y + 1), log.prove_inclusion(module, row)
        with pytest.raises(VerificationError):
            check_inclusion(statement["root"], 10, place, other, way)
    for wrong in (("m", 6), ("m", -1), ("o", 0)):
        with pytest.raises(ProtocolError, match="is not in the log"):
            leaf_index(log.counts, *wrong)
    root = log.root
    log.append("m", 11, made.x, made.y)
    assert log.root != root


def test_a_statement_binds_what_was_asked_for_and_every_byte_that_came():
    wish = {"prompts": ["a", "b"], "seed": 0, "guidance_scale": None}
    pictures = np.zeros((2, 2, 4, 3), np.uint8)
    changed = pictures.copy()
    changed[1, 1, 3, 2] = 1
    digests = {
        drawing_digest(wish, pictures),
        drawing_digest(wish | {"seed": 1}, pictures),
        drawing_digest(wish | {"prompts": ["a", "c"]}, pictures),
        drawing_digest(wish | {"guidance_scale": 1.0}, pictures),
        drawing_digest(wish, changed),
        drawing_digest(wish, pictures.reshape(2, 4, 2, 3)),
    }
    assert len(digests) == 6
    assert drawing_digest(dict(reversed(wish.items())), pictures) in digests
    log = RowLog()
    log.append("m", 0, *(np.ones((1, 2), dtype) for dtype in (np.int16, np.int64)))
    statement = closing_statement(A, B, LogSummary.of(log, C))
    assert statement["drawing"] == C
    assert statement == closing_statement(A, B, log) | {"drawing": C}
    assert closing_statement(A, B, Transcript([call(0)]))["drawing"] is None


def test_a_large_row_log_is_no_burden():
    leaves = [i.to_bytes(32, "little") for i in range(150_001)]
    tree = MerkleTree(leaves)
    for index in (0, 77_777, 150_000):
        check_inclusion(tree.root, len(leaves), index, leaves[index], tree.path(index))


def test_challenged_rows_are_distinct_reproducible_and_foreseen_by_nobody():
    rows = challenge_rows(A, B, "m", 1000, 64)
    assert rows == sorted(set(rows)) and len(rows) == 64 and rows[0] >= 0 and rows[-1] < 1000
    assert rows == challenge_rows(A, B, "m", 1000, 64)
    others = [(C, B, "m"), (A, C, "m"), (A, B, "n")]
    assert all(challenge_rows(*other, 1000, 64) != rows for other in others)
    assert challenge_rows(A, B, "m", 5, 5) == challenge_rows(A, B, "m", 5, 9) == [0, 1, 2, 3, 4]
    for total, m in ((0, 1), (1, 0)):
        with pytest.raises(ProtocolError, match="at least 1"):
            challenge_rows(A, B, "m", total, m)


def test_challenged_rows_are_uniform():
    nonces = random.Random(0)
    draws = 4000
    hits = np.zeros(7)
    for _ in range(draws):
        hits[challenge_rows(nonces.randbytes(32).hex(), A, "m", 7, 3)] += 1
    # Each row is chosen with probability 3/7; 5 standard deviations.
    assert np.abs(hits - draws * 3 / 7).max() < 5 * (draws * 12 / 49) ** 0.5


def test_a_word_from_the_uneven_end_is_drawn_again():
    assert _below(3, iter([2**64 - 1, 5])) == 2  # 2^64 is 1 more than a multiple of 3
    assert _below(3, iter([2**64 - 2, 5])) == 2


def test_challenged_rows_stay_what_they_are():
    # Both parties derive them on their own: a golden vector.
    assert challenge_rows(A, B, "m", 2**20, 4) == [189463, 220484, 785468, 1007277]


def test_a_transcript_survives_its_file(tmp_path: Path):
    path = tmp_path / "transcript.safetensors"
    transcript = Transcript([call(0, "m", 2), call(1, "n", 1)])
    transcript.save(path)
    transcript.append(call(2))
    transcript.save(path)
    loaded = Transcript.load(path)
    assert loaded.root == transcript.root and loaded.counts == transcript.counts
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    Transcript().save(path)
    assert Transcript.load(path).calls == []


def test_damaged_transcripts_are_refused(tmp_path: Path):
    path = tmp_path / "transcript.safetensors"
    with pytest.raises(ArtifactError, match="holds no transcript"):
        Transcript.load(path)
    Transcript([call(0)]).save(path)
    good, tensors = path.read_bytes(), load_file(path)
    for metadata in (
        None,
        {"calls": "[1]"},
        {"calls": "no"},
        {"calls": '[{"module":"m"}]'},
        {"calls": '[{"exponent":2,"module":"m"},{"exponent":2,"module":"m"}]'},
        {"calls": '[{"exponent":"2","module":"m"}]'},
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ArtifactError, match="holds no transcript"):
            Transcript.load(path)
    path.write_bytes(good[:-1])
    with pytest.raises(ArtifactError, match="holds no transcript"):
        Transcript.load(path)
