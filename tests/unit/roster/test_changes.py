"""Experts that come and go: everything else stays as it is, to the byte."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paris_ray.artifacts import IN_PROGRESS, MANIFEST, publish, read_manifest
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.cluster_facts import ClusterFacts
from paris_ray.errors import ArtifactError, BundleError, ConfigError, ParisError, RoutingError
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.model_folder.admissions import (
    KIND,
    VERDICT,
    Admission,
    AdmissionCheck,
    admission_document,
)
from paris_ray.model_folder.history import Entry
from paris_ray.roster.changes import Roster
from paris_ray.roster.newcomer import Newcomer
from paris_ray.roster.successor import Options
from paris_ray.run import BUNDLE, ENCODERS, EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.sampling import generate
from paris_ray.signatures import SignedDocument
from tests.unit.roster.conftest import CAPTIONS, ROWS, Made, publish_expert, write_shard

QUICK = Options(method="none")
HEAD = Options()


def digests(bundle: str | Path) -> dict[str, str]:
    """The digests of a bundle's files by name; those of its experts by what they are."""
    return dict(read_manifest(Folder(bundle), BUNDLE).files)


def expert_files(bundle: str | Path, index: int) -> dict[str, str]:
    prefix = f"expert_{index}/"
    return {k.removeprefix(prefix): v for k, v in digests(bundle).items() if k.startswith(prefix)}


def newcomer(made: Made, index: int) -> Newcomer:
    return Newcomer.open(made.run.expert(index), made.run.shard(index))


def give_other_weights(expert: Folder) -> None:
    path = expert.local_path / EXPERT_WEIGHTS
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


def history(bundle: str | Path) -> tuple[Entry, ...]:
    return load_bundle(str(bundle)).history


def test_a_retired_expert_leaves_nothing_and_others_stay(made: Made, tmp_path: Path) -> None:
    without = str(tmp_path / "without")
    roster = made.roster()
    roster.write(roster.retire(1, "Museum of Cats"), without, HEAD)
    bundle = load_bundle(without)
    assert bundle.num_experts == bundle.router_config.num_experts == 2
    stayed = [expert_files(without, k) for k in (0, 1)]
    assert stayed == [expert_files(made.bundle, k) for k in (0, 2)]
    gone = set(expert_files(made.bundle, 1).values()) - set(expert_files(made.bundle, 0).values())
    assert gone and not gone & set(digests(without).values())
    shared = ("codec/", "text_encoder/")
    old, new = digests(made.bundle), digests(without)
    assert {k: v for k, v in old.items() if k.startswith(shared)}.items() <= new.items()
    assert bundle.facts.example_prompts == (CAPTIONS[0], CAPTIONS[2])
    assert [told.words for told in bundle.clusters] == [["word0"], ["word2"]]
    _, entry = bundle.history
    assert (entry.event, entry.expert, entry.parent) == ("retired", 1, roster.present.digest)
    assert entry.weights_before == expert_files(made.bundle, 1)[EXPERT_WEIGHTS]
    assert entry.rows_before is not None
    assert (entry.rows_before.count, entry.rows_before.whose) == (ROWS, "Museum of Cats")
    assert entry.router == digests(without)["router/pytorch_model.safetensors"]
    (picture,) = generate(bundle, ["a red cat"], seed=0)
    assert picture.size == (32, 32)


def test_the_rows_of_a_retired_expert_are_not_looked_at(
    made: Made, other_run: Callable[[int], Made], tmp_path: Path
) -> None:
    routers, shards = set(), set()
    for number, run in enumerate((made, other_run(0))):
        if number:
            publish_expert(run.run.expert(1), write_shard(run.run.shard(1), 3, seed=7))
        roster, output = run.roster(made.bundle), str(tmp_path / f"{number}")
        roster.write(roster.retire(1), output, HEAD)
        shards.add(history(output)[-1].rows_before)
        routers.add(digests(output)["router/pytorch_model.safetensors"])
    assert (len(shards), len(routers)) == (2, 1)


def write_verdict(folder: Path, expert: Folder, **changes: Any) -> tuple[Folder, str]:
    """Write the verdict on an expert as `jobs.admit_expert` does; return who signed it, too."""
    stated: dict[str, Any] = {
        "outcome": "admitted",
        "cluster": 2,
        "config_sha256": expert.sha256(MODEL_CONFIG),
        "weights_sha256": expert.sha256(EXPERT_WEIGHTS),
        "bundle": None,
        "checks": [AdmissionCheck(name="form", outcome="passed", note="", readings=[])],
        "seed": 0,
        "software": "paris_ray",
        "made_at": "2026-11-30T12:00:00Z",
    }
    document = admission_document(Admission(**stated | changes))
    signed = SignedDocument.sign(KIND, document, Identity.create(folder / "key"))
    Folder(folder).write_json(VERDICT, signed.to_json())
    return Folder(folder), signed.public_key


def test_a_verdict_comes_with_its_expert_and_moves_with_it(made: Made, tmp_path: Path) -> None:
    expert, shard = made.run.expert(2), made.run.shard(2)
    roster = made.roster()
    verdict, examiner = write_verdict(tmp_path / "verdict", expert, bundle=roster.present.digest)
    examined = Newcomer.open(expert, shard, verdict, examiner)
    roster.write(roster.replace(2, examined), str(tmp_path / "with"), QUICK)
    roster = made.roster(str(tmp_path / "with"))
    assert list(roster.present.bundle.admissions) == [2]
    roster.write(roster.retire(0), str(tmp_path / "moved"), QUICK)
    moved = load_bundle(str(tmp_path / "moved"))
    assert list(moved.admissions) == [1]
    assert digests(tmp_path / "moved")["admissions/expert_1.json"] == verdict.sha256(VERDICT)
    card = (tmp_path / "moved" / "README.md").read_text()
    assert f"| 1 | admitted |  | 2026-11-30T12:00:00Z | {examiner} |" in card.splitlines()
    roster = made.roster(str(tmp_path / "moved"))
    roster.write(roster.retire(1), str(tmp_path / "gone"), QUICK)
    assert load_bundle(str(tmp_path / "gone")).admissions == {}
    assert not Path(tmp_path / "gone/admissions").exists()
    assert examiner not in (tmp_path / "gone" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"bundle": "0" * 64}, "bundle='000"), ({"cluster": 1}, "cluster=1 is not allowed here: 2")],
)
def test_a_verdict_of_another_examination_is_refused(
    changes: dict[str, Any], message: str, made: Made, tmp_path: Path
) -> None:
    expert, shard, roster = made.run.expert(2), made.run.shard(2), made.roster()
    stated = {"bundle": roster.present.digest} | changes
    newcomer = Newcomer.open(expert, shard, *write_verdict(tmp_path / "verdict", expert, **stated))
    with pytest.raises(BundleError, match=message):
        roster.write(roster.replace(2, newcomer), str(tmp_path / "new"), QUICK)


def test_an_expert_that_was_flagged_or_another_one_does_not_come(
    made: Made, tmp_path: Path
) -> None:
    expert, shard = made.run.expert(2), made.run.shard(2)
    check = AdmissionCheck(name="triggers", outcome="flagged", note="", readings=[])
    flagged = write_verdict(tmp_path / "flagged", expert, outcome="flagged", checks=[check])
    with pytest.raises(BundleError, match="the expert may not enter: flagged by triggers"):
        Newcomer.open(expert, shard, *flagged)
    other = write_verdict(tmp_path / "other", made.run.expert(1))
    with pytest.raises(BundleError, match=r"verdict\.json is the verdict on another expert"):
        Newcomer.open(expert, shard, *other)
    verdict, _ = write_verdict(tmp_path / "own", expert)
    with pytest.raises(
        BundleError, match=r"verdict\.json is signed by \w{64}, not by anybody known"
    ):
        Newcomer.open(expert, shard, verdict)


def test_an_expert_that_comes_back_is_there_again(made: Made, tmp_path: Path) -> None:
    without, again = str(tmp_path / "without"), str(tmp_path / "again")
    roster = made.roster()
    roster.write(roster.retire(2), without, HEAD)
    roster = made.roster(without)
    manifest = roster.write(roster.add(newcomer(made, 2), "Museum of Cats"), again, HEAD)
    old, new = digests(made.bundle), digests(again)
    unlike = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    assert unlike == {
        "README.md",
        "config.json",
        "clusters/clusters.json",
        "history.json",
        "router/pytorch_model.safetensors",
    }
    bundle = load_bundle(again)
    assert bundle.facts.example_prompts[2] == f"{CAPTIONS[2]} {ROWS // 2}"
    assert bundle.clusters[2] == ClusterFacts(
        rows=ROWS, words=["circle", "green"], pictures=["YSBwaWN0dXJl"] * 6
    )
    events = [(entry.event, entry.expert) for entry in bundle.history]
    assert events == [("exported", None), ("retired", 2), ("added", 2)]
    assert bundle.history[2].parent == read_manifest(Folder(without), BUNDLE).digest
    assert manifest.facts["refit"] == "head"
    assert (manifest.facts["rows"], manifest.facts["router"]["rows"]) == (3 * 16, 3 * 3)


@pytest.mark.parametrize("method", ["head", "all", "none"])
def test_an_expert_takes_the_place_of_another(method: Any, made: Made, tmp_path: Path) -> None:
    output, roster = str(tmp_path / "new"), made.roster()
    change = roster.replace(0, newcomer(made, 2))
    roster.write(change, output, Options(method=method))
    assert expert_files(output, 0) == expert_files(made.bundle, 2)
    assert [expert_files(output, k) for k in (1, 2)] == [
        expert_files(made.bundle, k) for k in (1, 2)
    ]
    router = "router/pytorch_model.safetensors"
    assert (digests(output)[router] == digests(made.bundle)[router]) == (method == "none")
    entry = history(output)[-1]
    assert entry.rows_before is not None
    assert entry.rows_after is not None
    assert entry.rows_before.shard != entry.rows_after.shard


def test_experts_of_two_runs_are_known_by_their_digests(
    made: Made, other_run: Callable[[int], Made], tmp_path: Path
) -> None:
    guest, wider, fewer = other_run(5), str(tmp_path / "wider"), str(tmp_path / "fewer")
    give_other_weights(guest.run.expert(0))
    (guest.run.expert(0).local_path / MANIFEST).unlink()  # a folder of two files will do
    roster = made.roster()
    roster.write(roster.replace(0, newcomer(guest, 0), "the guest"), wider, HEAD)
    assert made.roster(wider).present.shards[0] is None
    roster = made.roster(wider, more=(guest.run.shard(0).uri,))
    assert [shard is not None for shard in roster.present.shards] == [True] * 3
    roster.write(roster.retire(1), fewer, HEAD)
    assert expert_files(fewer, 0) == expert_files(wider, 0)


def test_the_same_again_is_kept_and_another_is_refused(made: Made, tmp_path: Path) -> None:
    output, roster = str(tmp_path / "new"), made.roster()
    first = roster.write(roster.retire(1), output, QUICK)
    assert roster.write(roster.retire(1), output, QUICK) == first
    for change, options in ((roster.retire(0), QUICK), (roster.retire(1), HEAD)):
        with pytest.raises(ArtifactError, match="was made with another configuration"):
            roster.write(change, output, options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="is not empty: choose another folder"):
        roster.write(roster.retire(1), str(tmp_path / "mine"), QUICK)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_change_is_signed_and_told_in_the_card(made: Made, tmp_path: Path) -> None:
    signer, output = Identity.create(tmp_path / "me"), str(tmp_path / "new")
    again = str(tmp_path / "again")
    roster = made.roster()
    roster.write(roster.retire(0, "Museum of Cats"), output, replace(HEAD, signer=signer))
    roster = made.roster(output)
    roster.write(roster.add(newcomer(made, 0)), again, HEAD)
    entry = history(again)[1]
    assert entry.signed_by == signer.public_key
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("# tiny\n\n## Use\n")
    assert card.count("## Roster") == 1
    rows = [line for line in card.splitlines() if line.startswith("| 2")]
    assert len(rows) == 2
    assert f"| retired | 0 | - `{entry.weights_before[:16]}` | - 60 | - Museum of Cats |" in rows[0]
    assert rows[0].endswith(f"| `{signer.public_key[:16]}` |")
    assert rows[1].endswith("| + 60 |  | nobody |")


def test_what_is_not_allowed_names_field_and_value(made: Made, tmp_path: Path) -> None:
    roster, output = made.roster(), str(tmp_path / "new")
    for index in (-1, 3):
        with pytest.raises(ConfigError, match=f"index={index} is not allowed: .* experts 0 to 2"):
            roster.retire(index)
    with pytest.raises(ConfigError, match="refit='none' is not allowed"):
        roster.write(roster.add(newcomer(made, 0)), output, QUICK)
    with pytest.raises(ConfigError, match=r"data_of='a | b' is not allowed: one line"):
        roster.write(roster.retire(0, "a | b"), output, QUICK)
    for share in (0, 0.051, float("nan")):
        with pytest.raises(ConfigError, match=f"sample_share={share} is not allowed: above 0"):
            roster.write(roster.retire(0), output, Options(sample_share=share))
    with pytest.raises(ArtifactError, match="was trained on another shard than"):
        Newcomer.open(made.run.expert(0), made.run.shard(1))
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Roster(f"{made.run.folder.uri}/nothing", made.config)


def test_the_last_expert_stays(made: Made, tmp_path: Path) -> None:
    bundle = made.bundle
    for step in ("two", "one"):
        roster = made.roster(bundle)
        roster.write(roster.retire(0), str(tmp_path / step), QUICK)
        bundle = str(tmp_path / step)
    with pytest.raises(ConfigError, match="index=0 is not allowed: a bundle needs an expert"):
        made.roster(bundle).retire(0)
    (picture,) = generate(load_bundle(bundle), ["a red cat"], seed=0)
    assert picture.size == (32, 32)


def test_a_default_that_fewer_experts_do_not_allow_is_refused(made: Made, tmp_path: Path) -> None:
    bundle, path = load_bundle(made.bundle), tmp_path / "top-3"
    facts = replace(bundle.facts, sampling=replace(bundle.facts.sampling, routing="top-3"))
    write_bundle(Bundle(bundle.parts, facts), Folder(path), model_card="")
    publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})
    roster = made.roster(str(path))
    with pytest.raises(RoutingError, match="routing='top-3' is not allowed: there are 2 experts"):
        roster.write(roster.retire(0), str(tmp_path / "new"), QUICK)


def test_rows_of_other_encoders_are_refused(
    made: Made, other_run: Callable[[int], Made], tmp_path: Path
) -> None:
    guest, roster = other_run(5), made.roster()
    digest = write_shard(guest.run.shard(1), 1, null_text=1.0)
    publish_expert(guest.run.expert(1), digest)
    with pytest.raises(ConfigError, match="is of another text encoder than"):
        roster.write(roster.add(newcomer(guest, 1)), str(tmp_path / "b"), HEAD)
    codec = guest.run.encoders.local_path / "codec" / "codec.safetensors"
    codec.write_bytes(codec.read_bytes()[:-4] + b"\0\0\0\1")
    publish(guest.run.encoders, ENCODERS, config_digest="", parents={}, facts={})
    with pytest.raises(BundleError, match=r"codec/codec.safetensors is not the bundle's"):
        roster.write(roster.add(newcomer(guest, 0)), str(tmp_path / "a"), HEAD)
    with pytest.raises(BundleError, match=r"codec/codec.safetensors is not the bundle's"):
        Roster(made.bundle, guest.config)


def test_an_expert_of_another_shape_is_refused(
    made: Made, other_run: Callable[[int], Made], tmp_path: Path
) -> None:
    guest, roster = other_run(5), made.roster()
    config = guest.run.expert(0).local_path / "config.json"
    for field, value in (("text_embed_dim", 17), ("in_channels", 4), ("hidden_size", 64)):
        changed = json.loads((made.run.expert(0).local_path / "config.json").read_text())
        changed[field] = value
        changed["out_channels"] = changed["in_channels"]
        config.write_text(json.dumps(changed))
        shard = read_manifest(guest.run.shard(0), "shard").digest
        publish_expert(guest.run.expert(0), shard)
        with pytest.raises(BundleError, match=field if value != 64 else "has shape"):
            roster.write(roster.add(newcomer(guest, 0)), str(tmp_path / field), HEAD)


def test_rows_that_nobody_has_are_named(
    made: Made, other_run: Callable[[int], Made], tmp_path: Path
) -> None:
    stranger = other_run(5)
    for k in range(3):
        give_other_weights(stranger.run.expert(k))
        publish_expert(stranger.run.expert(k), read_manifest(stranger.run.shard(k), "shard").digest)
    roster = Roster(made.bundle, stranger.config)
    with pytest.raises(ArtifactError, match="the rows of expert 0 are not found: run_dir="):
        roster.write(roster.retire(1), str(tmp_path / "new"), HEAD)
    with pytest.raises(ConfigError, match="data_of='me' is not allowed: its rows are not known"):
        roster.write(roster.retire(1, "me"), str(tmp_path / "new"), QUICK)
    roster.write(roster.retire(1), str(tmp_path / "new"), QUICK)
    assert history(tmp_path / "new")[-1].rows_before is None


def test_damaged_weights_are_not_copied(made: Made, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(made.bundle, damaged)
    give_other_weights(Folder(damaged / "expert_2"))
    roster, output = made.roster(str(damaged)), tmp_path / "new"
    with pytest.raises(ArtifactError, match="does not have the digest of its manifest"):
        roster.write(roster.retire(0), str(output), QUICK)
    with pytest.raises(ParisError):
        load_bundle(str(output))


def _die_at(write: int, made: Made, output: str) -> None:
    """Retire an expert in a process that is killed before it writes for so many a time."""
    import paris_ray.folders as folders

    written, real = 0, folders.replacing

    def replacing(target: Path) -> Any:
        nonlocal written
        if "locks" not in target.parts:
            if written == write:
                os.kill(os.getpid(), signal.SIGKILL)
            written += 1
        return real(target)

    folders.replacing = replacing  # type: ignore[assignment]
    roster = made.roster()
    roster.write(roster.retire(1), output, QUICK)


def test_a_change_that_is_killed_leaves_no_bundle_and_is_done_again(
    made: Made, tmp_path: Path
) -> None:
    output, fork = tmp_path / "new", multiprocessing.get_context("fork")
    killed = 0
    while True:
        process = fork.Process(target=_die_at, args=(killed, made, str(output)))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        with suppress(FileNotFoundError):
            assert not (output / MANIFEST).exists()
        with pytest.raises(BundleError):
            load_bundle(str(output))
    assert killed > 10
    assert not (output / IN_PROGRESS).exists()
    assert load_bundle(str(output)).num_experts == 2
    assert json.loads((output / MANIFEST).read_text())["kind"] == BUNDLE
