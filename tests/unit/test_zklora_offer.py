"""The folder of an offer: who may read it, and what is on disk before what."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from paris_ray.config import LoRAConfig
from paris_ray.errors import ArtifactError
from paris_ray.identity import Identity
from paris_ray.zklora import commitment, evaluate, prove, verify
from paris_ray.zklora.adapter import PeftAdapter
from paris_ray.zklora.manifest import MANIFEST, Base
from paris_ray.zklora.offer import AskedTerms, load_offer, open_offer
from paris_ray.zklora.sealing import KEY, SEALED

TERMS = AskedTerms(
    base=Base(digest="0f" * 32, expert=None, router_digest=None), name="ink", price=3
)


@pytest.fixture
def adapter() -> PeftAdapter:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((8, 2), (2, 5)))
    config = LoRAConfig(r=2, lora_alpha=4, target_modules=("block",))
    return PeftAdapter(config, {"block": (a, b)})


@pytest.mark.parametrize("before", [None, 0o777])
def test_an_offer_is_its_owners_alone(
    tmp_path: Path, adapter: PeftAdapter, before: int | None
) -> None:
    identity = Identity.create(tmp_path / "home")
    folder = tmp_path / "offers" / "ink"
    if before is not None:
        folder.mkdir(parents=True)
        folder.chmod(before)
        (folder / KEY).write_bytes(b"of an offer that was never finished")
    offer = open_offer(folder, identity, adapter, TERMS)
    assert {path.name for path in folder.iterdir()} == {KEY, SEALED, MANIFEST}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / KEY).stat().st_mode & 0o777 == 0o600
    assert list(offer.openings()) == ["block"]
    assert open_offer(folder, identity, adapter, TERMS) == load_offer(folder) == offer
    with pytest.raises(ArtifactError, match="another price"):
        open_offer(folder, identity, adapter, AskedTerms(base=TERMS.base, name="ink", price=4))


def test_the_key_is_on_disk_before_there_is_a_manifest(
    tmp_path: Path, adapter: PeftAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, fsync = Identity.create(tmp_path / "home"), os.fsync
    synced: list[str] = []

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(".tmp")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    open_offer(tmp_path / "ink", identity, adapter, TERMS)
    assert synced == [KEY, "ink", SEALED, MANIFEST]


def test_whoever_proves_does_not_commit_again(
    tmp_path: Path, adapter: PeftAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Openings go to the provers pickled, and bring their commitments along."""
    manifest = open_offer(tmp_path / "ink", Identity.create(tmp_path / "home"), adapter, TERMS)
    sent = pickle.dumps(load_offer(tmp_path / "ink").openings())

    def commit_again(*_: object) -> None:
        raise AssertionError("the commitment is known")

    monkeypatch.setattr(commitment, "commit_small", commit_again)
    opening = pickle.loads(sent)["block"]
    x = np.ones((2, 8), np.int16)
    y = evaluate(opening.module, x)
    proof = prove(opening, x, y, b"context")
    verify(manifest.manifest.module("block").commitment, x, y, b"context", proof)
