"""A federation from the coordinator's run to the bundle, and what leaves a site on the way."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.artifacts import publish, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.config import load
from paris_ray.embeddings import NULL_TEXT, write_null_text
from paris_ray.errors import ConfigError, FederationError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.roster.federation import SITE_CONFIG, Site, assemble, found, join, submit
from paris_ray.roster.federation.shared_rows import write_shard
from paris_ray.roster.federation.statistics import bounded_shares
from paris_ray.run import BUNDLE, EMBEDDINGS, EXPERT_WEIGHTS, FEDERATION, ROUTER, Run
from paris_ray.sampling import generate
from paris_ray.training.data import load_dataset
from tests.federations import CLUSTERS_OF, NUM_CLUSTERS, ROWS, WIDTH, Federation, write_federation

LEAST = 10**-0.5  # that a cluster's share may be of the coordinator's own


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose sites share no more than they must."""
    root = tmp_path_factory.mktemp("federation")
    return write_federation(root, share_words=False, share_rows=False)


@pytest.fixture(scope="module")
def open_federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose sites share words and rows."""
    return write_federation(tmp_path_factory.mktemp("open"), share_words=True, share_rows=True)


def assembled(federation: Federation, output: Path, **options: str) -> Bundle:
    """Assemble what the sites submitted."""
    return assemble(
        federation.config,
        federation.folder,
        federation.coordinator.public_key,
        list(federation.submissions.values()),
        Folder(output),
        **options,
    )


def test_one_bundle_of_two_sites_draws(federation: Federation, tmp_path: Path) -> None:
    bundle = assembled(federation, tmp_path)
    (picture,) = generate(bundle, ["a red cat"], num_inference_steps=2)
    assert picture.size == (32, 32)
    for name, clusters in CLUSTERS_OF.items():
        for k in clusters:
            own = Run(federation.runs[name]).expert(k).read(EXPERT_WEIGHTS)
            assert bundle.parts[f"expert_{k}"].read(EXPERT_WEIGHTS) == own
    assert bundle.last_resort == NUM_CLUSTERS, "the seed that all started from"
    assert bundle.facts.attribution == "Pictures by east.; Pictures by west."
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "| 2 | west | 40 | 0.500 | 0.750 (16) |" in card
    assert f"| east | `{federation.sites['east'].public_key}` | nothing |" in card
    parents = read_manifest(Folder(tmp_path) / "bundle", BUNDLE).parents
    assert parents.keys() == {FEDERATION, "site east", "site west"}


def test_of_two_experts_of_a_cluster_the_first_sites_counts_if_it_was_said(tmp_path: Path) -> None:
    both = write_federation(
        tmp_path,
        share_words=False,
        share_rows=False,
        clusters_of={"east": [0, 1], "west": [1, 2]},
        first_site_wins=True,
    )
    bundle = assembled(both, tmp_path / "assembled")
    found = bundle.parts["expert_1"].read(EXPERT_WEIGHTS)
    of = {name: Run(config).expert(1).read(EXPERT_WEIGHTS) for name, config in both.runs.items()}
    assert found == of["east"] != of["west"]


def test_the_router_follows_from_statistics_of_sites_that_have_other_clusters(
    federation: Federation, tmp_path: Path
) -> None:
    bundle = assembled(federation, tmp_path)
    facts = read_manifest(Folder(tmp_path) / "bundle", BUNDLE).facts[ROUTER]
    levels = facts["held_out"]["levels"].values()
    assert min(level["accuracy"] for level in levels) > 0.9
    assert bundle.facts.sampling.router_temperature == facts["held_out"]["temperature"]
    given = safetensors.torch.load(federation.folder.read("router/pytorch_model.safetensors"))
    fitted = bundle.router.state_dict()
    assert not given["head.4.weight"].any(), "which could choose nobody"
    changed = {name for name, value in given.items() if not torch.equal(value, fitted[name])}
    assert changed == {"head.4.weight", "head.4.bias"}


def test_the_router_is_trained_on_rows_that_all_share(
    open_federation: Federation, tmp_path: Path
) -> None:
    bundle = assembled(open_federation, tmp_path, router_from="rows")
    given = safetensors.torch.load(open_federation.folder.read("router/pytorch_model.safetensors"))
    assert not torch.equal(bundle.router.state_dict()["cls_token"], given["cls_token"])
    assert [cluster.words for cluster in bundle.clusters] == [["eastword"]] * 2 + [["westword"]]
    assert [cluster.pictures for cluster in bundle.clusters] == [[]] * NUM_CLUSTERS


@pytest.mark.parametrize(
    ("claimed", "own", "expected"),
    [
        ([15, 20, 65], [1, 1, 1], [0.15, 0.2, 0.65]),
        ([10**12, 40, 40], [40, 40, 40], [1 - 2 / 3 * LEAST, LEAST / 3, LEAST / 3]),
        ([500, 300, 200], [10, 495, 495], [0.01 / LEAST, 0.6 - 0.006 / LEAST, 0.4 - 0.004 / LEAST]),
        ([1, 1], [10**9, 1], [1 - 1e-9 / LEAST, 1e-9 / LEAST]),
    ],
)
def test_shares_are_as_claimed_within_bounds(
    claimed: list[int], own: list[int], expected: list[float]
) -> None:
    assert bounded_shares(claimed, own) == pytest.approx(expected, rel=1e-6)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**12), st.integers(1, 10**6), st.booleans()),
        min_size=2,
        max_size=20,
    )
)
def test_no_claim_changes_the_odds_of_its_clusters_more_than_ten_times(
    clusters: list[tuple[int, int, bool]],
) -> None:
    """Whoever claims what: of some clusters against all others, few or many."""
    claimed, own, theirs = zip(*clusters, strict=True)
    shares = bounded_shares(claimed, own)
    assert sum(shares) == pytest.approx(1)
    if len(set(theirs)) == 1:
        return

    def odds(amounts: Sequence[float]) -> float:
        mine = sum(amount for amount, among in zip(amounts, theirs, strict=True) if among)
        return mine / sum(
            amount for amount, among in zip(amounts, theirs, strict=True) if not among
        )

    assert 0.1 - 1e-6 <= odds(shares) / odds(own) <= 10 + 1e-6


def test_a_site_that_shares_no_rows_is_named(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"^east: shares no rows, which the router is to be"):
        assembled(federation, tmp_path, router_from="rows")


def test_rows_of_token_states_are_trained_on_as_they_came(tmp_path: Path) -> None:
    sent = {
        "latents": np.random.default_rng(0).standard_normal((5, 8, 4, 4)).astype(np.float16),
        "text": np.random.default_rng(1).standard_normal((5, 3, WIDTH)).astype(np.float16),
        "clusters": np.array([0, 1, 0, 1, 1]),
    }
    null = Folder(tmp_path / "null")
    write_null_text(null, np.zeros((3, WIDTH), np.float32))
    write_shard(Folder(tmp_path / "rows"), 1, [sent], null.read(NULL_TEXT))
    dataset = load_dataset([Folder(tmp_path / "rows")])
    assert np.array_equal(dataset.text[:, 0], sent["text"][sent["clusters"] == 1])
    assert np.array_equal(dataset.latents, sent["latents"][sent["clusters"] == 1])


def private_parts(federation: Federation, name: str) -> dict[str, bytes]:
    """Return what of a site's rows could be found again in other bytes, by what it is."""
    table_of = Run(federation.runs[name]).shard(CLUSTERS_OF[name][0])
    from paris_ray.embeddings import read_table, tensor_column

    table = read_table(table_of, ["latents", "text_embedding"])
    return {
        "caption": b"private caption",
        "thumbnail": b"thumbnail",
        "key": f"{name}-key".encode(),
        "word": f"{name}word".encode(),
        # Any row: 32 bytes that no other has.
        **{f"latents {i}": tensor_column(table, "latents")[i].tobytes()[:32] for i in range(ROWS)},
        **{
            f"text {i}": tensor_column(table, "text_embedding")[i].tobytes()[:32]
            for i in range(ROWS)
        },
    }


def leaving(federation: Federation, name: str) -> set[str]:
    """Return what of a site's rows is in its submission."""
    folder = federation.submissions[name]
    payload = b"".join(folder.read(file) for file in folder.files())
    return {what for what, part in private_parts(federation, name).items() if part in payload}


@pytest.mark.parametrize("name", CLUSTERS_OF)
def test_no_row_leaves_a_site(federation: Federation, name: str) -> None:
    assert leaving(federation, name) == set()


@pytest.mark.parametrize("name", CLUSTERS_OF)
def test_a_site_that_opens_up_gives_words_and_latents_of_a_few_rows(
    open_federation: Federation, name: str
) -> None:
    left = leaving(open_federation, name)
    assert "word" in left
    assert len({what for what in left if what.startswith("latents")}) == 0.05 * ROWS
    assert not {"caption", "thumbnail", "key"} & left


def test_no_row_of_the_coordinator_is_given_away(federation: Federation) -> None:
    payload = b"".join(federation.folder.read(file) for file in federation.folder.files())
    for private in (b"private caption", b"thumbnail", b"coordinatorword", b"coordinator-key"):
        assert private not in payload
    assert str(federation.config.run_dir).encode() not in payload, "nor where anything is"


def test_the_configuration_of_a_site_is_read_back(federation: Federation) -> None:
    config = federation.runs["west"]
    again = load(str(Path(config.run_dir) / SITE_CONFIG))
    assert again == config
    assert again.federation.experts == CLUSTERS_OF["west"]
    assert again.training.init_from == f"{config.run_dir}/federation/seed"


def rejoined(federation: Federation, run_dir: Path, *overrides: str, **options: object) -> object:
    given = (federation.folder, federation.coordinator.public_key)
    key = federation.sites["east"].public_key
    own = ["corpus.kind=image_folder", f"corpus.path={run_dir}", *overrides]
    return join(*given, key, Folder(run_dir), overrides=own, **options)


def test_joining_again_keeps_what_is_there(federation: Federation, tmp_path: Path) -> None:
    rejoined(federation, tmp_path)
    before = read_manifest(Folder(tmp_path) / FEDERATION, FEDERATION).digest
    rejoined(federation, tmp_path, "training.threads=2")
    assert read_manifest(Folder(tmp_path) / FEDERATION, FEDERATION).digest == before


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["training.steps=7"], {}, "training.steps cannot be changed: all sites of ours have it"),
        (["seed=1"], {}, "^seed cannot be changed"),
        (["corpus.image_size=64"], {}, "corpus.image_size|input_size"),
        ([], {"clusters": [2]}, r"--clusters: \[2\] are not of east, allowed: \[0, 1\]"),
        (["corpus.path=null"], {}, "corpus.path=None is not allowed"),
    ],
)
def test_what_a_site_cannot_choose_is_said(
    federation: Federation,
    tmp_path: Path,
    overrides: list[str],
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        rejoined(federation, tmp_path, *overrides, **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.init_from=elsewhere", "training.init_from='elsewhere' is not allowed in a fed"),
        ("features.checkpoint=/", "features.checkpoint='/' is not allowed in a federation"),
        ("cluster.features=random", "cluster.features='random' is not allowed in a federation"),
    ],
)
def test_a_run_that_other_sites_cannot_follow_is_refused(
    federation: Federation, tmp_path: Path, override: str, message: str
) -> None:
    options = [f"run_dir={federation.config.run_dir}", f"corpus.path={tmp_path}"]
    from tests.federations import OPTIONS

    config = load("quickstart", [*options, *OPTIONS, override])
    site = Site(name="east", public_key=federation.sites["east"].public_key, clusters=None)
    with pytest.raises(ConfigError, match=message):
        found(config, federation.coordinator, Folder(tmp_path / "f"), name="ours", sites=[site])


def test_nothing_is_written_over(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="holds a submission already"):
        submit(federation.runs["east"], federation.sites["east"], federation.submissions["east"])
    site = Site(name="east", public_key=federation.sites["east"].public_key, clusters=None)
    with pytest.raises(FederationError, match="holds a federation already"):
        found(federation.config, federation.coordinator, federation.folder, name="x", sites=[site])
    assembled(federation, tmp_path)
    with pytest.raises(FederationError, match="exists already"):
        assembled(federation, tmp_path)


def test_what_an_interrupted_submission_left_is_written_anew(
    federation: Federation, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(federation.submissions["west"].uri, half)
    whole = (half / "expert_2" / EXPERT_WEIGHTS).read_bytes()
    (half / "submission.json").unlink()
    (half / "expert_2" / EXPERT_WEIGHTS).write_bytes(whole[:100])
    submit(federation.runs["west"], federation.sites["west"], Folder(half))
    assert (half / "expert_2" / EXPERT_WEIGHTS).read_bytes() == whole


def test_a_licence_line_that_breaks_the_card_does_not_leave(
    federation: Federation, tmp_path: Path
) -> None:
    copied = shutil.copytree(federation.runs["west"].run_dir, tmp_path / "west")
    config = replace(federation.runs["west"], run_dir=str(copied))
    facts = {"rows": ROWS, "quarantined": {}, "attribution": "[free](http://elsewhere.example)"}
    publish(Run(config).embeddings, EMBEDDINGS, config_digest="", parents={}, facts=facts)
    with pytest.raises(FederationError, match=r"corpus.attribution='\[free.* is not allowed: one"):
        submit(config, federation.sites["west"], Folder(tmp_path / "submission"))
    assert not (tmp_path / "submission").exists()


def test_a_run_that_joined_nothing_submits_nothing(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="this run joined no federation"):
        submit(federation.config, federation.coordinator, Folder(tmp_path))
    stranger = Identity.create(tmp_path / "key")
    with pytest.raises(FederationError, match="is the key of no site of ours"):
        submit(federation.runs["east"], stranger, Folder(tmp_path / "s"))
