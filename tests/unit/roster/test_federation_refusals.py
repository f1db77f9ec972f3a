"""What is refused of a federation's folder, and of a submission: both come from strangers."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from paris_ray.artifacts import read_manifest
from paris_ray.config import ExpertConfig
from paris_ray.config.release import read_document
from paris_ray.errors import FederationError
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.roster.federation import assemble, join
from paris_ray.roster.federation.shared_rows import FILE as ROWS_FILE
from paris_ray.roster.federation.statistics import FILE as STATISTICS
from paris_ray.run import BUNDLE, EXPERT_WEIGHTS, ROUTER
from tests.conftest import randomise, write_model
from tests.federations import Federation, resign, write_federation

WEIGHTS = f"expert_2/{EXPERT_WEIGHTS}"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose sites share words and rows; tests change copies."""
    root = tmp_path_factory.mktemp("federation")
    return write_federation(root, share_words=True, share_rows=True)


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)


def edit(path: Path, *keys: str, value: Any) -> None:
    """Change a value in a JSON file."""
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(document))


def change_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a file."""
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


# How a folder is changed after it was signed, and what is said then.
TAMPERED: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "a changed file": (
        lambda root, file: flip(root / file),
        "{file} does not have the digest of {kind}.json",
    ),
    "a file cut short": (
        lambda root, file: os.truncate(root / file, 10),
        r"{file} has 10 bytes, {kind}.json says \d+",
    ),
    "a missing file": (
        lambda root, file: (root / file).unlink(),
        "{file} is missing, but listed in {kind}.json",
    ),
    "a file too many": (
        lambda root, _: (root / "more.txt").write_text("x"),
        "more.txt is not listed in {kind}.json",
    ),
    "a link out of it": (
        lambda root, file: ((root / file).unlink(), (root / file).symlink_to("/etc/passwd")),
        "is a link that leaves the folder",
    ),
    "a changed document": (
        lambda root, _: edit(next(root.glob("*n.json")), "document", "format", value=2),
        "the signature of the {kind} is not one of",
    ),
    "no document": (
        lambda root, _: next(root.glob("*n.json")).unlink(),
        "no {kind} at .*: it has no {kind}.json",
    ),
    "a document of 2 MB": (
        lambda root, _: next(root.glob("*n.json")).write_bytes(b" " * (2 << 20)),
        "has 2097152 bytes, at most 1048576 are allowed",
    ),
    "a listed path out of it": (
        lambda root, _: edit(
            next(root.glob("*n.json")),
            *("document", "files", "../secret"),
            value={"sha256": "0" * 64, "num_bytes": 1},
        ),
        "the signature of the {kind} is not one of",
    ),
}


def rejoin(federation: Federation, folder: Path, run_dir: Path, key: str | None = None) -> None:
    """Join as the eastern site does."""
    join(
        Folder(folder),
        key or federation.coordinator.public_key,
        federation.sites["east"].public_key,
        Folder(run_dir),
        overrides=["corpus.kind=image_folder", f"corpus.path={run_dir}"],
    )


def reassemble(federation: Federation, tmp_path: Path, **options: Any) -> None:
    """Assemble with the submissions, the western one from where `west` of a test is."""
    submissions = federation.submissions | {"west": Folder(tmp_path / "west")}
    assemble(
        federation.config,
        federation.folder,
        federation.coordinator.public_key,
        list(submissions.values()),
        Folder(tmp_path / "out"),
        **options,
    )


@pytest.fixture
def given(federation: Federation, tmp_path: Path) -> Path:
    """A copy of the federation's folder."""
    return Path(shutil.copytree(federation.folder.uri, tmp_path / "given"))


@pytest.fixture
def west(federation: Federation, tmp_path: Path) -> Path:
    """A copy of the western site's submission."""
    return Path(shutil.copytree(federation.submissions["west"].uri, tmp_path / "west"))


@pytest.mark.parametrize("how", TAMPERED)
def test_a_federation_that_was_tampered_with_is_refused(
    federation: Federation, given: Path, tmp_path: Path, how: str
) -> None:
    change, message = TAMPERED[how]
    change(given, "centroids.safetensors")
    wanted = message.format(file="centroids.safetensors", kind="federation")
    with pytest.raises(FederationError, match=wanted):
        rejoin(federation, given, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing of it was taken over"


@pytest.mark.parametrize("how", TAMPERED)
def test_a_submission_that_was_tampered_with_is_refused(
    federation: Federation, west: Path, tmp_path: Path, how: str
) -> None:
    change, message = TAMPERED[how]
    change(west, WEIGHTS)
    with pytest.raises(FederationError, match=message.format(file=WEIGHTS, kind="submission")):
        reassemble(federation, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_federation_of_somebody_else_is_refused(
    federation: Federation, given: Path, tmp_path: Path
) -> None:
    resign(Folder(given), "federation", federation.sites["west"])
    with pytest.raises(FederationError, match=r"is signed by .*, not by"):
        rejoin(federation, given, tmp_path / "run")


def test_a_site_that_is_not_expected_cannot_join(
    federation: Federation, given: Path, tmp_path: Path
) -> None:
    with pytest.raises(FederationError, match=r"is the key of no site of ours \(east, west\)"):
        join(Folder(given), federation.coordinator.public_key, "0" * 64, Folder(tmp_path / "run"))


# What a coordinator may not sign: the change of the folder or of the document, and what is said.
HOSTILE_TERMS: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "a file of no use": (
        lambda root, _: (root / "encoders" / "run.pickle").write_bytes(b""),
        "files: 'encoders/run.pickle' is not allowed",
    ),
    "a text too large": (
        lambda root, _: os.truncate(root / "encoders" / "codec" / "config.json", 20 << 20),
        "config.json' has 20971520 bytes, at most 16777216 are allowed",
    ),
    "a place on the site's machine": (
        lambda _, terms: terms["run"]["corpus"].update(path="/etc"),
        "run says what is no matter of a federation",
    ),
    "a model by its path": (
        lambda _, terms: terms["run"]["features"].update(checkpoint="/root/model"),
        "features.checkpoint='/root/model' is not allowed in a federation",
    ),
    "an interpolation": (
        lambda _, terms: terms["run"]["features"].update(model="${oc.env:HOME}"),
        "holds an interpolation",
    ),
    "a model of terabytes": (
        lambda _, terms: terms["run"]["expert"].update(hidden_size=10**6),
        "expert.hidden_size=1000000 is not allowed",
    ),
    "another architecture than its seed's": (
        lambda _, terms: terms["run"]["expert"].update(num_layers=2),
        "seed/config.json: num_layers=1, the federation's is 2",
    ),
    "clusters that there are not": (
        lambda _, terms: terms["sites"][0].update(clusters=[0, 3]),
        r"sites: east: clusters=\[3\], allowed: 0 to 2",
    ),
    "a cluster of two sites": (
        lambda _, terms: terms["sites"][0].update(clusters=[0, 1, 2]),
        "sites: cluster 2 is of east and of west, but first_site_wins=false",
    ),
    "two sites of one key": (
        lambda _, terms: terms["sites"][0].update(public_key=terms["sites"][1]["public_key"]),
        "sites: two have the same public_key",
    ),
    "a name with a path": (
        lambda _, terms: terms.update(name="../ours"),
        "federation.json: name: String should match pattern",
    ),
    "a field that nobody knows": (
        lambda _, terms: terms.update(more=1),
        "federation.json: more: Unexpected keyword argument",
    ),
    "centroids of more clusters": (
        lambda root, _: change_tensors(
            root / "centroids.safetensors", lambda t: t["coarse_of_fine"].fill(3)
        ),
        "holds no centres of 3 clusters",
    ),
    "centroids without a tensor": (
        lambda root, _: change_tensors(
            root / "centroids.safetensors", lambda t: t.pop("feature_mean")
        ),
        "centroids.safetensors is damaged",
    ),
    "a router that is none": (
        lambda root, _: change_tensors(
            root / "router" / "pytorch_model.safetensors", lambda t: t.pop("cls_token")
        ),
        "tensor 'cls_token' has shape missing",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_TERMS)
def test_a_coordinator_may_not_give(
    federation: Federation, given: Path, tmp_path: Path, what: str
) -> None:
    change, message = HOSTILE_TERMS[what]
    terms = json.loads((given / "federation.json").read_text())["document"]
    terms.pop("files")
    change(given, terms)
    resign(Folder(given), "federation", federation.coordinator, **terms)
    with pytest.raises(FederationError, match=message):
        rejoin(federation, given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def write_other(west: Path, **changes: Any) -> None:
    """Put an expert of another architecture in the place of the western one."""
    document = json.loads((west / "expert_2" / "config.json").read_text())
    config = replace(read_document(ExpertConfig, document, "it"), **changes)
    write_model(Folder(west / "expert_2"), randomise(Expert(config), 3), EXPERT_WEIGHTS)


def poison(west: Path, file: str, name: str, value: float) -> None:
    """Put a number into a tensor of a file."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] = value

    change_tensors(west / file, change)


def repeat_rows(west: Path, times: int) -> None:
    """Claim more rows than a site shares."""
    change_tensors(
        west / ROWS_FILE,
        lambda tensors: tensors.update({k: np.repeat(v, times, 0) for k, v in tensors.items()}),
    )


# What a site may not sign, and what is said.
HOSTILE_SUBMISSIONS: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "another federation's": (
        lambda _, stated: stated.update(federation="0" * 64),
        "^west: .*submission.json: federation=0{64} is another one",
    ),
    "another site's name": (
        lambda _, stated: stated.update(site="east"),
        "site='east', but its key is that of 'west'",
    ),
    "a cluster of another site": (
        lambda west, stated: (
            stated["experts"][0].update(cluster=0),
            (west / "expert_2").rename(west / "expert_0"),
        ),
        r"experts: \[0\] are not this site's, allowed: \[2\]",
    ),
    "a cluster twice": (
        lambda _, stated: stated["experts"].append(stated["experts"][0]),
        r"experts: \[2, 2\] has a cluster twice",
    ),
    "a file of no use": (
        lambda west, _: (west / "expert_2" / "model.pt").write_bytes(b""),
        "files: 'expert_2/model.pt' is too many",
    ),
    "an expert without weights": (
        lambda west, _: (west / WEIGHTS).unlink(),
        f"files: '{WEIGHTS}' is missing",
    ),
    "negative rows": (
        lambda _, stated: stated["experts"][0].update(rows=-1),
        "experts.0.rows: Input should be greater than or equal to 1",
    ),
    "a wider expert": (
        lambda west, _: write_other(west, hidden_size=64),
        "^west: .*config.json: hidden_size=64, the federation's is 32",
    ),
    "another objective": (
        lambda west, _: write_other(west, prediction="velocity"),
        "config.json: prediction='velocity', the federation's is 'preconditioned'",
    ),
    "weights of another shape": (
        lambda west, _: change_tensors(
            west / WEIGHTS, lambda t: t.update(more=np.zeros(2, np.float32))
        ),
        "^west: .*tensor 'more' has shape",
    ),
    "weights that are no numbers": (
        lambda west, _: poison(west, WEIGHTS, "final_layer.linear.weight", float("nan")),
        "^west: .*tensor 'final_layer.linear.weight' is not finite",
    ),
    "statistics that no router gives": (
        lambda west, _: poison(west, STATISTICS, "means", 1e6),
        "^west: .*means are no means of what the router gives",
    ),
    "statistics that are no numbers": (
        lambda west, _: poison(west, STATISTICS, "covariances", float("nan")),
        "covariances are none of what the router gives",
    ),
    "statistics of no spread": (
        lambda west, _: poison(west, STATISTICS, "covariances", -1.0),
        "covariances are none of what the router gives",
    ),
    "statistics of other clusters": (
        lambda west, _: poison(west, STATISTICS, "clusters", 1),
        r"clusters are not \[2\]",
    ),
    "statistics of another width": (
        lambda west, _: change_tensors(
            west / STATISTICS, lambda t: t.update(means=np.zeros((1, 8)))
        ),
        "tensor 'means' is StoredTensor",
    ),
    "a licence line that is a link": (
        lambda _, stated: stated.update(attribution="[free](http://evil.example)"),
        "submission.json: attribution: String should match pattern",
    ),
    "a licence line of two": (
        lambda _, stated: stated.update(attribution="Pictures\n## Verified"),
        "submission.json: attribution: String should match pattern",
    ),
    "a licence line that is a tag": (
        lambda _, stated: stated.update(attribution="by <script>x</script>"),
        "submission.json: attribution: String should match pattern",
    ),
    "a licence line that is a heading": (
        lambda _, stated: stated.update(attribution="# Verified"),
        "submission.json: attribution: String should match pattern",
    ),
    "words that are tags": (
        lambda west, _: (west / "clusters.json").write_text(
            '[{"rows": 1, "words": ["<b>"], "pictures": []}]'
        ),
        "^west: .*clusters.json: cluster 2: words: '<b>' is not allowed: one line",
    ),
    "words that are none": (
        lambda west, _: (west / "clusters.json").write_text(
            '[{"rows": 1, "words": "x", "pictures": []}]'
        ),
        "^west: .*clusters.json is damaged: 0.words",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_SUBMISSIONS)
def test_a_site_may_not_submit(
    federation: Federation, west: Path, tmp_path: Path, what: str
) -> None:
    change, message = HOSTILE_SUBMISSIONS[what]
    stated = json.loads((west / "submission.json").read_text())["document"]
    stated.pop("files")
    change(west, stated)
    resign(Folder(west), "submission", federation.sites["west"], **stated)
    with pytest.raises(FederationError, match=message):
        reassemble(federation, tmp_path)
    assert not (tmp_path / "out" / "bundle").exists()


HOSTILE_ROWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "more than it shares": (lambda west: repeat_rows(west, 2), "has 4 rows, allowed: 1 to 2"),
    "of another cluster": (
        lambda west: poison(west, ROWS_FILE, "clusters", 0),
        r"clusters are not all among \[2\]",
    ),
    "that are not finite": (
        lambda west: poison(west, ROWS_FILE, "latents", float("inf")),
        "latents or text are not finite",
    ),
    "of another shape": (
        lambda west: change_tensors(
            west / ROWS_FILE, lambda t: t.update(latents=np.zeros((2, 1), np.float16))
        ),
        "tensor 'latents' is StoredTensor",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_ROWS)
def test_a_site_may_not_share_rows(
    federation: Federation, west: Path, tmp_path: Path, what: str
) -> None:
    change, message = HOSTILE_ROWS[what]
    change(west)
    resign(Folder(west), "submission", federation.sites["west"])
    with pytest.raises(FederationError, match=f"^west: .*{ROWS_FILE}.*{message}"):
        reassemble(federation, tmp_path, router_from="rows")


@pytest.mark.parametrize("given", ["run/federation", "run/federation/here", "run/.."])
def test_what_was_given_is_not_cleared_to_be_copied(
    federation: Federation, tmp_path: Path, given: str
) -> None:
    run = tmp_path / "root" / "run"
    run.mkdir(parents=True)
    place = (tmp_path / "root" / given).resolve()
    shutil.copytree(federation.folder.uri, place, dirs_exist_ok=True)
    link = tmp_path / "link"  # another name of the same place
    link.symlink_to(place)
    if given == "run/..":
        run.rmdir()  # nothing but what was signed may lie there
    for folder in (place, link):
        with pytest.raises(FederationError, match=rf"^{place} is to be copied to {run}/federation"):
            rejoin(federation, folder, run)
        assert (place / "federation.json").exists()


def test_rows_that_a_site_only_claims_do_not_give_it_all_prompts(
    federation: Federation, west: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stated = json.loads((west / "submission.json").read_text())["document"]["experts"]
    stated[0]["rows"] = 10**12
    resign(Folder(west), "submission", federation.sites["west"], experts=stated)
    reassemble(federation, tmp_path)
    warned = [each.message for each in caplog.records if each.levelname == "WARNING"]
    numbers = "claims 100 % of all rows, the coordinator has 33.3 %: 78.9 % counts"
    assert f"cluster 2: west {numbers} for the router" in warned
    levels = read_manifest(Folder(tmp_path / "out" / "bundle"), BUNDLE).facts[ROUTER]["held_out"]
    right = [level["accuracy"] for level in levels["levels"].values()]
    assert min(right) > 0.9, right


def test_a_cluster_without_an_expert_is_named(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="no submission has the expert of cluster 2"):
        assemble(
            federation.config,
            federation.folder,
            federation.coordinator.public_key,
            [federation.submissions["east"]],
            Folder(tmp_path),
        )


def test_two_submissions_of_one_site_are_refused(
    federation: Federation, west: Path, tmp_path: Path
) -> None:
    with pytest.raises(FederationError, match="two of the submissions are of one site"):
        assemble(
            federation.config,
            federation.folder,
            federation.coordinator.public_key,
            [*federation.submissions.values(), Folder(west)],
            Folder(tmp_path / "out"),
        )
