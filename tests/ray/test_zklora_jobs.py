"""The three jobs of ZKLoRA as separate processes, two of them with Ray clusters of their own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import LlamaForCausalLM

from jobs.local_cluster import free_port
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import LoRAConfig
from paris_ray.folders import Folder
from paris_ray.identity import CERTIFICATE, KEY, Identity
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.receipts import Receipt
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import quantise_adapter, read_peft
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.language import token_loss, tokenise
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
from paris_ray.zklora.sessions import SessionJournal
from tests.language_models import TEXTS, write_llama, write_lora
from tests.long_tests import chaos

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = "127.0.0.1"
EXPERT, BUDGET, PRICE = 1, 200, 70
LEVELS = (0.2, 0.8)
TOKENS = 16  # rows of each module that a picture takes at one level
CAPTIONS = ("a red cat", "a blue dog")
START_S, RUN_S = 120, 240
SEARCHED = 32  # bytes of a factor that are looked for

Randomise = Callable[[nn.Module, int], nn.Module]


class Job:
    """A job as a process; its Ray and all else that it starts are its descendants."""

    def __init__(self, log: Path, name: str, *arguments: object) -> None:
        # What other tests' Ray needs must not reach it: it starts a Ray of its own.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"jobs.{name}", *map(str, arguments)],
                cwd=REPOSITORY,
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def wait_for(self, happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text()

    def finish(self) -> int:
        return self.process.wait(RUN_S)

    def kill(self) -> None:
        """End it without a word; what it had started follows, or is ended too."""
        if self.process.poll() is not None:
            return
        family = self.family()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=3)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=15)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts a job, which ends with the test at the latest."""
    jobs: list[Job] = []

    def run(name: str, *arguments: object) -> Job:
        jobs.append(Job(tmp_path / f"{len(jobs)}_{name}.log", name, *arguments))
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()


@pytest.fixture
def adapter(tiny_bundle: Bundle, randomised: Randomise, tmp_path: Path) -> Path:
    config = LoRAConfig(r=2, lora_alpha=8)
    adapter = randomised(Adapter.create(tiny_bundle.expert(EXPERT), config, 0), 7)
    assert isinstance(adapter, Adapter)
    save_adapter(adapter, Folder(tmp_path / "style"))
    return tmp_path / "style"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder, rows = tmp_path / "pictures", []
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spellings(modules: dict[str, QuantisedModule]) -> list[bytes]:
    """Return the first bytes of a module's factors, as integers and as PEFT stores them."""
    found = []
    for module in modules.values():
        for factor, exponent in ((module.a, module.exponent_a), (module.b, module.exponent_b)):
            floats = np.ldexp(factor.astype(np.float32), -exponent)
            found += [factor.tobytes()[:SEARCHED], floats.tobytes(order="F")[:SEARCHED]]
    return found


def in_files(folder: Path, wanted: list[bytes]) -> int:
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return sum(any(spelled in content for content in contents) for spelled in wanted)


def stop(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def go_on(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def in_memory(processes: list[psutil.Process], wanted: list[bytes]) -> int:
    """Return how many are in the memory of any of some processes, or in Ray's store of objects."""
    found: set[bytes] = set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            for content in memory_of(process.pid):
                found |= {spelled for spelled in wanted if spelled in content}
    return len(found)


def memory_of(pid: int) -> Iterator[bytes]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            addresses, mode, _, _, inode, *_ = line.split(maxsplit=5)
            first, last = (int(address, 16) for address in addresses.split("-"))
            if mode.startswith("rw") and inode == "0":
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(first)
                    yield memory.read(last - first)
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "/plasma" in str(file.readlink()):
                yield from data_of(file)


def data_of(sparse: Path) -> Iterator[bytes]:
    """Yield what was written to a file, without its holes."""
    with sparse.open("rb", buffering=0) as file, contextlib.suppress(OSError):  # no more data
        start = 0
        while True:
            start = os.lseek(file.fileno(), start, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            file.seek(start)
            yield file.read(end - start)
            start = end


def receipt_of(user: Identity) -> Receipt:
    (path,) = user.folder.glob("purchases/*/receipt.json")
    return Receipt.read(Folder(path.parent), user.public_key)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=chaos)])
def test_a_purchase(  # noqa: PLR0915
    start: Callable[..., Job],
    tiny_bundle_path: Path,
    adapter: Path,
    pictures: Path,
    tmp_path: Path,
    killed: bool,
) -> None:
    """The user pays once, and gets the weights; so if every party dies at the worst of times."""
    escrow, seller, user = (
        Identity.create(tmp_path / name) for name in ("escrow", "seller", "user")
    )
    escrow_at, seller_at = f"{HERE}:{free_port()}", f"{HERE}:{free_port()}"
    trusted = ("--escrow", escrow_at, "--escrow-certificate", escrow.folder / CERTIFICATE)
    certificates = [party.folder / CERTIFICATE for party in (seller, user)]

    def start_escrow() -> Job:
        job = start(
            "escrow", "--home", escrow.folder, "--listen", escrow_at, "--clients", *certificates
        )
        job.wait_for(lambda: "escrow ready" in job.said())
        return job

    def start_seller() -> Job:
        wares = ("--bundle", tiny_bundle_path, "--expert", EXPERT, "--adapter", adapter)
        terms = ("--price", PRICE, "--budget-rows", BUDGET, "--max-rows-per-user", BUDGET, *trusted)
        place = ("--home", seller.folder, "--listen", seller_at, "--clients", certificates[1])
        job = start("contribute_lora", *wares, *terms, *place)
        job.wait_for(lambda: "contributor ready" in job.said())
        return job

    manifest_file = seller.folder / "offers" / "style" / MANIFEST

    def start_user() -> Job:
        what = ("--pictures", pictures, "--levels", *LEVELS)
        how = ("--home", user.folder, "--any-gain", *trusted)
        whom = ("--bundle", tiny_bundle_path, "--peer", seller_at, "--manifest", manifest_file)
        return start("verify_lora", *whom, *what, *how)

    holder, contributor = start_escrow(), start_seller()
    manifest = AdapterManifest.read(manifest_file)
    modules = quantise_adapter(read_peft(adapter))
    wanted = spellings(modules)
    assert manifest.adapter == "style" and "a thief who sees them all" in contributor.said()
    # The user is stopped after the inference, before anything is verified.
    buyer = start_user()
    results = "purchases/*/session/result.json"
    buyer.wait_for(lambda: list(user.folder.glob(results)))
    family, others = buyer.family(), contributor.family()
    stop(family)
    assert not {process.pid for process in family} & {process.pid for process in others}
    for tree in (family, others):  # each has a Ray of its own
        assert sum("raylet" in process.name() for process in tree) == 1
    assert in_memory(family, wanted) == 0
    raylets = [process for process in others if "raylet" in process.name()]
    # The search finds what is there: at least the integers, which the store has.
    assert in_memory([others[0], *raylets], wanted) >= len(wanted) // 2
    assert in_files(user.folder, wanted) == 0

    if killed:
        buyer.kill()
        contributor.kill()
        holder.kill()
        holder, contributor = start_escrow(), start_seller()
        assert AdapterManifest.read(manifest_file) == manifest
        buyer = start_user()
    else:
        go_on(family)
    assert buyer.finish() == 0, buyer.said()
    receipt = receipt_of(user)
    assert receipt.state == "OPENED" and receipt.adapter_id == manifest.adapter_id
    assert receipt.session is not None
    assert receipt.escrow_statement is not None
    statement = SignedDocument.from_json(receipt.escrow_statement)
    assert statement.check("escrow", escrow.public_key)["state"] == "SETTLED"
    said = buyer.said()
    for name in modules:
        assert re.search(rf"{re.escape(name)} .* B ", said), said
    assert "loss without" in said and "OPENED" in said and user.public_key in said

    (bought,) = user.folder.glob("purchases/*/adapter")
    opened = quantise_adapter(read_peft(bought))
    assert {k: m.digest for k, m in opened.items()} == {k: m.digest for k, m in modules.items()}
    assert in_files(user.folder, wanted) > 0
    bundle = load_bundle(str(tiny_bundle_path))
    bundle.add_lora("style", str(bought), receipt_key=user.public_key)
    assert bundle.loras == {"style": EXPERT}

    # SIGTERM ends a contributor and its Ray; what was paid for is on disk.
    family = contributor.family()
    contributor.process.send_signal(signal.SIGTERM)
    assert contributor.finish() == 0
    assert not psutil.wait_procs(family[1:], timeout=90)[1]
    spent = len(LEVELS) * len(CAPTIONS) * TOKENS
    with SessionJournal(manifest_file.parent / "sessions.sqlite") as journal:
        assert journal.budget.rows_left(manifest.adapter_id) == dict.fromkeys(
            modules, BUDGET - spent
        )


@pytest.mark.filterwarnings("ignore:.*is_gradient_check")
def test_a_language_model_in_shards_is_tried_and_bought(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    """Losses of texts, with and without; PEFT loads what was bought, and gives the losses tried."""
    base, lora, texts = tmp_path / "base", tmp_path / "verse", tmp_path / "texts"
    adapted = write_lora(write_llama(base), lora, "q_proj", "k_proj", "v_proj", "down_proj")
    texts.write_text("\n".join(TEXTS))
    escrow, seller, user = (
        Identity.create(tmp_path / name) for name in ("escrow", "seller", "user")
    )
    escrow_at, seller_at = f"{HERE}:{free_port()}", f"{HERE}:{free_port()}"
    trusted = ("--escrow", escrow_at, "--escrow-certificate", escrow.folder / CERTIFICATE)
    certificates = [party.folder / CERTIFICATE for party in (seller, user)]
    place = ("--home", escrow.folder, "--listen", escrow_at, "--clients", *certificates)
    holder = start("escrow", *place)
    holder.wait_for(lambda: "escrow ready" in holder.said())
    contributor = start(
        *("contribute_lora", "--base", base, "--adapter", lora, "--texts", texts, *trusted),
        *("--price", PRICE, "--budget-rows", BUDGET, "--max-rows-per-user", BUDGET),
        *("--home", seller.folder, "--listen", seller_at, "--clients", certificates[1]),
    )
    contributor.wait_for(lambda: "contributor ready" in contributor.said())
    manifest = seller.folder / "offers" / "verse" / MANIFEST
    buyer = start(
        *("verify_lora", "--base", base, "--peer", seller_at, "--manifest", manifest),
        *("--texts", texts, "--any-gain", "--home", user.folder, *trusted),
    )
    assert buyer.finish() == 0, buyer.said()
    receipt = receipt_of(user)
    rows = sum(map(len, TEXTS))
    assert receipt.state == "OPENED" and {module.rows for module in receipt.modules} == {rows}
    assert len(receipt.modules) == 8
    said = re.search(r"nats a token +([\d.]+) +([\d.]+)", buyer.said())
    assert said is not None, buyer.said()
    (bought,) = user.folder.glob("purchases/*/adapter")
    plain = LlamaForCausalLM.from_pretrained(base).eval()
    expected = [mean_loss(model, base) for model in (plain, adapted)]
    opened = PeftModel.from_pretrained(plain, bought).eval()
    assert [float(loss) for loss in said.groups()] == pytest.approx(expected, abs=2e-4)
    assert mean_loss(opened, base) == pytest.approx(expected[1], rel=1e-4)
    assert abs(expected[1] - expected[0]) > 1e-3


def mean_loss(model: nn.Module, base: Path) -> float:
    losses = [token_loss(model, ids, "cpu").item() for ids in tokenise(base, TEXTS)]
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"price": 0}, "signature"),
        ({"price": -1}, "price=-1 is not allowed"),
        ({"modules": []}, r"modules=\[\] is not allowed"),
        ({"protocol": "free"}, "protocol='free'"),
    ],
    ids=str,
)
def test_a_manifest_that_is_not_what_was_signed_ends_the_job(
    start: Callable[..., Job], tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    seller = Identity.create(tmp_path / "seller")
    signed = offer_of(seller, tmp_path)
    signed["document"] |= changed
    (tmp_path / MANIFEST).write_text(json.dumps(signed))
    job = start(
        *("verify_lora", "--home", tmp_path / "user", "--bundle", tmp_path, "--peer", f"{HERE}:1"),
        *("--manifest", tmp_path / MANIFEST, "--pictures", tmp_path),
    )
    assert job.finish() == 2
    assert re.search(f"error: .*{said}", job.said()), job.said()
    assert (tmp_path / "user" / KEY).exists()
    assert not list((tmp_path / "user").glob("purchases/*"))


def offer_of(seller: Identity, folder: Path) -> dict[str, dict[str, object]]:
    """Return the envelope of a manifest of a small adapter."""
    from paris_ray.zklora.adapter import PeftAdapter
    from paris_ray.zklora.manifest import Base
    from paris_ray.zklora.offer import AskedTerms, open_offer

    ones = np.ones((4, 1), np.float32)
    adapter = PeftAdapter(
        LoRAConfig(r=1, lora_alpha=1, target_modules=("a",)), {"a": (ones, ones.T)}
    )
    terms = AskedTerms(
        base=Base(digest="c" * 64, expert=0, router_digest=None), name="small", price=5
    )
    return dict(open_offer(folder / "offer", seller, adapter, terms).signed.to_json())
