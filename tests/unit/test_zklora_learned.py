"""What the contributor logs of all that users have learned, from the journal of their sessions."""

from pathlib import Path

import numpy as np
import pytest

from paris_ray.config import LoRAConfig
from paris_ray.identity import Identity
from paris_ray.zklora.calls import Request
from paris_ray.zklora.commitment import commit
from paris_ray.zklora.fixed_point import Int16, QuantisedModule
from paris_ray.zklora.leakage import describe_leak, save_inputs
from paris_ray.zklora.manifest import AdapterManifest, Base
from paris_ray.zklora.offer import build_manifest
from paris_ray.zklora.sealing import seal
from paris_ray.zklora.sessions import SessionJournal

D_IN = {"narrow": 8, "wide": 16}
D_OUT = 5
USERS = "aa" * 32, "bb" * 32
LINE = "learned by all users so far: at most {} of {} directions of a module"


@pytest.fixture
def manifest(tmp_path: Path) -> AdapterManifest:
    rng = np.random.default_rng(0)
    openings = {}
    for name, d_in in D_IN.items():
        a, b = (rng.integers(-99, 99, size, np.int16) for size in ((d_in, 2), (2, D_OUT)))
        openings[name] = commit(QuantisedModule(a, b, 7, 7))[1]
    sealed, key = seal(openings)
    return build_manifest(
        openings,
        LoRAConfig(r=2, lora_alpha=4.0),
        base=Base(digest="c" * 64, expert=None, router_digest=None),
        adapter="ink",
        price=0,
        budget_rows=100,
        sealed=sealed,
        key=key,
        contributor_certificate=Identity.create(tmp_path / "seller").certificate,
        escrow_certificate=None,
    )


@pytest.fixture
def journal(tmp_path: Path, manifest: AdapterManifest) -> SessionJournal:
    journal = SessionJournal(tmp_path / "sessions.sqlite")
    journal.budget.add_adapter(manifest.adapter_id, manifest.terms, manifest.budget_rows)
    return journal


def answer(
    journal: SessionJournal, manifest: AdapterManifest, user: int, calls: dict[str, Int16]
) -> None:
    """Answer one session of a user."""
    sid = f"{user}" * 64
    journal.open_session(sid, manifest.adapter_id, USERS[user], sid, sid)
    for seq, (module, x) in enumerate(calls.items()):
        y = np.zeros((len(x), D_OUT), np.int64)
        journal.record_calls(sid, USERS[user], seq, [Request(module, 0, x)], lambda y=y: [y])


def unit_rows(d_in: int, *which: int) -> Int16:
    return 100 * np.eye(d_in, dtype=np.int16)[list(which)]


def test_directions_are_counted_over_all_users_and_each_once(
    journal: SessionJournal, manifest: AdapterManifest, tmp_path: Path
) -> None:
    nowhere = tmp_path / "inputs.safetensors"
    assert describe_leak(journal, manifest, nowhere) == LINE.format(0, 16)
    answer(journal, manifest, 0, {"wide": unit_rows(16, 0, 1, 2)})
    assert describe_leak(journal, manifest, nowhere) == LINE.format(3, 16)
    # One that is known, and one that is not; the narrow module is known by a larger part.
    calls = {"wide": unit_rows(16, 2, 3), "narrow": unit_rows(8, 0, 1, 2, 3)}
    answer(journal, manifest, 1, calls)
    assert describe_leak(journal, manifest, nowhere) == LINE.format(4, 8)


def test_what_a_thief_is_off_by_is_said_of_real_inputs(
    journal: SessionJournal, manifest: AdapterManifest, tmp_path: Path
) -> None:
    path = tmp_path / "inputs.safetensors"
    ones = {name: np.full((3, d_in), 50, np.int16) for name, d_in in D_IN.items()}
    save_inputs(path, ones)
    error = "; a thief's updates are off by {:.2f}, relative to the true ones"
    assert describe_leak(journal, manifest, path).endswith(error.format(1))
    answer(journal, manifest, 0, {name: unit_rows(d, *range(d // 2)) for name, d in D_IN.items()})
    # Half of the energy is left, in either module.
    expected = LINE.format(8, 16) + error.format(np.sqrt(0.5))
    assert describe_leak(journal, manifest, path) == expected
    answer(journal, manifest, 1, {"wide": ones["wide"]})
    assert describe_leak(journal, manifest, path).endswith(error.format(np.sqrt(0.5) / 2))
