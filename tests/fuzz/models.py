"""Models, adapters, receipts, tokenizers and configurations: valid ones, and who reads them.

What only one kind needs is imported where it is used: the others need not wait for it.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paris_ray.errors import ParisError, ReceiptError
from tests.fuzz.kinds import Kind

PROMPTS = ["a red cat", "", "a b \u2665 \u00e9" * 20]


def _each(read: Callable[[Path], object], paths: Sequence[Path]) -> None:
    """Read all of them, also those after one that is refused."""
    refused = None
    for path in paths:
        try:
            read(path)
        except ParisError as error:
            refused = error
    if refused is not None:
        raise refused


# Models


def _write_bundle(folder: Path) -> None:
    """Ours, without the manifest: a stranger can compute digests."""
    from paris_ray.artifacts import MANIFEST
    from paris_ray.cluster_facts import ClusterFacts, write_clusters
    from paris_ray.folders import Folder
    from tests import conftest

    with tempfile.TemporaryDirectory() as parts:
        conftest.write_parts(Path(parts))
        conftest.publish_bundle(Path(parts), folder)
    clusters = [ClusterFacts(rows=3, words=["cat"], pictures=["aGk="])] * conftest.NUM_EXPERTS
    write_clusters(Folder(folder / "clusters"), clusters)
    (folder / MANIFEST).unlink()


def _write_release(folder: Path) -> None:
    """In the layout of the public release: an autoencoder of diffusers, CLIP."""
    from tests import conftest

    conftest.write_release(folder)


def _draw(folder: Path, _: Any) -> None:
    from paris_ray.bundle import load_bundle
    from paris_ray.errors import SamplingError
    from paris_ray.sampling import generate

    bundle = load_bundle(str(folder))
    assert isinstance(bundle.clusters, list)
    bundle.encode_text(PROMPTS)
    try:
        pictures = generate(bundle, PROMPTS[:1], num_inference_steps=1)
    except SamplingError:  # weights of endless numbers, which nobody's digests refuse
        return
    assert pictures[0].size == (bundle.facts.picture_size,) * 2


def _write_published(folder: Path) -> str:
    """A finished artefact, of which only the manifest is changed; returns its digest."""
    from paris_ray.artifacts import publish
    from paris_ray.folders import Folder

    for name in ("weights.bin", "deep/er/more.bin"):
        Folder(folder).write(name, name.encode())
    identity = {"config_digest": "c" * 64, "parents": {"corpus": "p" * 64}}
    return publish(Folder(folder), "things", **identity, facts={"rows": 2, "of": [1, 2]}).digest


def _open_published(folder: Path, digest: str) -> None:
    from paris_ray.artifacts import find_finished, open_finished, read_manifest
    from paris_ray.folders import Folder

    source = open_finished(Folder(folder), "things")
    for name in ("weights.bin", "deep/er/more.bin"):
        assert source.read(name) == source.verified_file(name).read_bytes() == name.encode()
    manifest = read_manifest(Folder(folder), "things")
    assert isinstance(manifest.digest, str)
    parents = {"corpus": "p" * 64}
    assert find_finished(Folder(folder), "things", config_digest="c" * 64, parents=parents)
    if manifest.digest == digest:
        assert dict(manifest.parents) == parents


def _write_adapter(folder: Path) -> Any:
    from paris_ray.bundle import load_bundle
    from paris_ray.config import LoRAConfig
    from paris_ray.folders import Folder
    from paris_ray.models.lora import Adapter
    from paris_ray.models.peft_layout import save_adapter
    from tests import conftest

    base = Path(tempfile.mkdtemp())
    _write_bundle(base)
    bundle = load_bundle(str(base))
    adapter = Adapter.create(bundle.expert(1), LoRAConfig(r=4), 0)
    save_adapter(conftest.randomise(adapter, 7), Folder(folder), base_model="a/b")
    return bundle


def _adapt(folder: Path, bundle: Any) -> None:
    """Attached and merged, as the expert is drawn with."""
    from paris_ray.bundle.adapters import read_lora

    def digest(index: int) -> str:
        return str(bundle.weights_digest(f"expert_{index}"))

    options = {"expert": 1, "receipt_key": None}
    for merged in (False, True):
        lora = read_lora(str(folder), bundle.expert_configs, digest, merged=merged, **options)
        lora.adapt(bundle.expert(1))


def _write_receipt(folder: Path) -> Any:
    """Returns the buyer, whose receipts are believed."""
    from paris_ray.folders import Folder
    from paris_ray.receipts import RECEIPT
    from tests.unit import test_receipts

    Folder(folder).write_json(RECEIPT, test_receipts.OPENED.sign(test_receipts.BUYER))
    return test_receipts.BUYER


def _read_receipt(folder: Path, buyer: Any) -> None:
    """As it came; and signed anew, as whoever has the key might sign it.

    Links are looked for as where adapters are read.
    """
    from paris_ray.folders import Folder
    from paris_ray.model_folder.links import check_links
    from paris_ray.receipts import KIND, RECEIPT, Receipt
    from paris_ray.signatures import SignedDocument

    check_links(Folder(folder))
    try:
        Receipt.read(Folder(folder), buyer.public_key).require_opened()
    except ReceiptError:
        try:
            fields = json.loads((folder / RECEIPT).read_bytes())
            stated = {k: v for k, v in fields.items() if k not in ("public_key", "signature")}
            signed = SignedDocument.sign(KIND, stated, buyer).to_json()
            payload = json.dumps(stated | {k: signed[k] for k in ("public_key", "signature")})
        except (OSError, ValueError, AttributeError, RecursionError):
            raise ReceiptError("nobody could sign that") from None
        (folder / RECEIPT).write_text(payload)
        Receipt.read(Folder(folder), buyer.public_key).require_opened()


def _write_history(folder: Path) -> Any:
    """Returns the weights of the experts that it leads to."""
    from paris_ray.model_folder.history import FILE, write_history
    from tests.unit import test_bundle_history

    (folder / FILE).write_bytes(write_history(test_bundle_history.HISTORY))
    return test_bundle_history.WEIGHTS


def _tell_history(folder: Path, weights: Any) -> None:
    from paris_ray.artifacts import VerifiedFolder
    from paris_ray.folders import Folder
    from paris_ray.model_card import with_roster
    from paris_ray.model_folder.history import read_history
    from paris_ray.model_folder.links import check_links

    check_links(Folder(folder))
    history = read_history(VerifiedFolder(Folder(folder), None), weights, None)
    assert history[0].event == "exported"
    rows = [row for row in with_roster("", history, {}, None).splitlines() if row[2:6].isdigit()]
    assert len(rows) == len(history) - 1
    assert {row.count("|") for row in rows} <= {8}


def _write_verdict(folder: Path) -> Any:
    """On an expert of these digests; returns who signs."""
    from paris_ray.folders import Folder
    from paris_ray.model_folder import admissions
    from paris_ray.signatures import SignedDocument
    from tests.unit import test_receipts

    reading = admissions.AdmissionReading(
        name="shift", measure="by one word", value=1.5, limit=4.0, detail="'cat'"
    )
    check = admissions.AdmissionCheck(name="form", outcome="passed", note="", readings=[reading])
    verdict = admissions.Admission(
        outcome="admitted",
        cluster=0,
        config_sha256="0" * 64,
        weights_sha256="1" * 64,
        bundle=None,
        checks=[check],
        seed=1,
        software="paris_ray",
        made_at="2026-11-30T12:00:00Z",
    )
    document = admissions.admission_document(verdict)
    signed = SignedDocument.sign(admissions.KIND, document, test_receipts.BUYER)
    Folder(folder).write_json("expert_0.json", signed.to_json())
    return test_receipts.BUYER


def _read_verdict(folder: Path, signer: Any) -> None:
    """As it came; and signed anew, as whoever examined might sign it.

    Links are looked for as where bundles are opened.
    """
    from paris_ray.errors import BundleError
    from paris_ray.folders import Folder
    from paris_ray.model_folder.admissions import KIND, admission_names, parse_admission
    from paris_ray.model_folder.links import check_links
    from paris_ray.signatures import SignedDocument

    check_links(Folder(folder))
    (name,) = admission_names(Folder(folder), 1) or ("expert_0.json",)
    payload = Folder(folder).read(name)
    try:
        parse_admission(payload, name)
    except BundleError:
        try:
            document = json.loads(payload)["document"]
            signed = SignedDocument.sign(KIND, document, signer).to_json()
        except (ValueError, TypeError, KeyError, RecursionError):
            raise BundleError("nobody could sign that") from None
        parse_admission(json.dumps(signed).encode(), name)


def _write_federation(folder: Path) -> Any:
    """Returns the federation, whose coordinator signs whatever there is."""
    from tests.federations import write_federation

    federation = write_federation(Path(tempfile.mkdtemp()), share_words=True, share_rows=True)
    shutil.copytree(federation.folder.local_path, folder, dirs_exist_ok=True)
    return federation


def _read_federation(folder: Path, federation: Any) -> None:
    from paris_ray.folders import Folder
    from paris_ray.roster.federation.terms import read_federation

    key = federation.coordinator.public_key
    _signed_anew(folder, "federation", federation.coordinator)
    read_federation(Folder(folder), key)


def _write_submission(folder: Path) -> Any:
    """Returns the site, which signs whatever there is, and the federation as it was read."""
    from paris_ray.roster.federation.terms import read_federation

    with tempfile.TemporaryDirectory() as beside:
        federation = _write_federation(Path(beside))
    submission = federation.submissions["west"].local_path
    shutil.copytree(submission, folder, dirs_exist_ok=True)
    given = read_federation(federation.folder, federation.coordinator.public_key)
    return federation.sites["west"], given


def _read_submission(folder: Path, beside: Any) -> None:
    from paris_ray.folders import Folder
    from paris_ray.roster.federation.parts import open_router
    from paris_ray.roster.federation.receive import admitted, receive
    from paris_ray.roster.federation.shared_rows import read_rows
    from paris_ray.roster.federation.statistics import RouterStatistics

    site, (terms, source, digest) = beside
    _signed_anew(folder, "submission", site)
    received = receive(Folder(folder), terms, digest)
    for cluster in received.stated.clusters:
        admitted(received, cluster, terms.config())
    router = open_router(source.part("router"), terms.config().router)
    RouterStatistics.load(received.files, router, received.stated.clusters)
    if received.stated.shares_rows:
        sizes = {each.cluster: each.rows for each in received.stated.experts}
        read_rows(received.files, source.folder / "encoders", (8, 4, 4), sizes)


def _signed_anew(folder: Path, kind: str, signer: Any) -> None:
    """List the files as they are, if the document can be signed at all: no digest refuses them."""
    from paris_ray.errors import FederationError
    from paris_ray.folders import Folder
    from paris_ray.model_folder.links import check_links
    from tests.federations import resign

    check_links(Folder(folder))
    try:
        resign(Folder(folder), kind, signer)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise FederationError("nobody could sign that") from None


def _write_dit(folder: Path) -> None:
    """A checkpoint as DiT's trainer saves it, a pickle, and as safetensors."""
    import argparse

    import safetensors.torch
    import torch

    from tests.unit import test_convert

    state = test_convert.random_dit()
    safetensors.torch.save_file(state, folder / "dit.safetensors")
    trained = {"ema": state, "args": argparse.Namespace(model="DiT-S/2")}
    torch.save(trained, folder / "dit.pt")
    torch.save(trained, folder / "old.pt", _use_new_zipfile_serialization=False)


def _convert(folder: Path, _: Any) -> None:
    from paris_ray.models.convert import convert_dit, read_dit
    from tests.unit.test_convert import CLASSES, HEADS

    def convert(path: Path) -> object:
        return convert_dit(read_dit(path).state, num_heads=HEADS, num_classes=CLASSES)

    _each(convert, sorted(folder.iterdir()))


# Texts


def _write_word_pieces(folder: Path) -> None:
    from tests import conftest

    conftest.write_text_encoder(folder)


def _encode(folder: Path, _: Any) -> None:
    from paris_ray.encoders.text import MiniLM

    encoder = MiniLM(folder)
    for ids in encoder.tokenize(PROMPTS):
        encoder.encode_tokens(ids[None])


def _write_byte_pairs(folder: Path) -> None:
    """In both layouts: of vocabulary and merges, and of one file."""
    from tests import conftest

    with tempfile.TemporaryDirectory() as root:
        conftest.write_clip(Path(root))
        shutil.copytree(Path(root) / "tokenizer", folder / "one")
    shutil.copytree(folder / "one", folder / "two")
    model = json.loads((folder / "two" / "tokenizer.json").read_bytes())["model"]
    (folder / "two" / "tokenizer.json").unlink()
    (folder / "two" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "two" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _tokenize(folder: Path, _: Any) -> None:
    from paris_ray.encoders.tokenizers import ClipTokenizer

    def tokenize(path: Path) -> None:
        assert ClipTokenizer(path, 77)(PROMPTS).shape == (len(PROMPTS), 77)

    _each(tokenize, [folder / "one", folder / "two"])


def _write_config(folder: Path) -> None:
    from paris_ray.config import load
    from paris_ray.config.conversion import to_yaml

    (folder / "resolved_config.yaml").write_text(to_yaml(load("quickstart")))


def _load_config(folder: Path, _: Any) -> None:
    from paris_ray.config import expert_setup, load
    from paris_ray.config.conversion import digest, to_yaml
    from paris_ray.config.loading import with_absolute_paths

    config = load(str(folder / "resolved_config.yaml"))
    digest(config, "expert", "training", "corpus")
    to_yaml(with_absolute_paths(config))
    for index in config.experts:
        expert_setup(config, int(index))


MODELS: Mapping[str, Kind] = {
    "bundle": Kind(_write_bundle, _draw),
    "release": Kind(_write_release, _draw),
    "manifest": Kind(_write_published, _open_published, changed="manifest.json"),
    "adapter": Kind(_write_adapter, _adapt),
    "history": Kind(_write_history, _tell_history),
    "receipt": Kind(_write_receipt, _read_receipt),
    "verdict": Kind(_write_verdict, _read_verdict),
    "federation": Kind(_write_federation, _read_federation),
    "submission": Kind(_write_submission, _read_submission),
    "dit": Kind(_write_dit, _convert, may_lead_out=True),
    "word_pieces": Kind(_write_word_pieces, _encode, changed="tokenizer.json", may_lead_out=True),
    "byte_pairs": Kind(_write_byte_pairs, _tokenize, may_lead_out=True),
    "config": Kind(_write_config, _load_config, may_lead_out=True),
}
