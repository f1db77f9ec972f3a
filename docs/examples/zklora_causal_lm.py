"""Try, verify and buy a LoRA of a causal language model, before its contributor shows the weights.

    python docs/examples/zklora_causal_lm.py [NEW_FOLDER]

Three parties on this machine: a contributor (a process with a Ray of its own), an escrow (a
process), and this script, the user, which needs no Ray: see `try_and_buy`. The model is a small
GPT-2 with random weights, so nothing is downloaded; any other goes the same way. PEFT and
transformers are in the extra `test`: pip install -e '.[test]'
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from paris_ray.identity import CERTIFICATE, Identity
from paris_ray.receipts import Receipt, State
from paris_ray.zklora.inference import NumericsLog, adapt
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
from paris_ray.zklora.offer import base_of_file
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.purchase import Receipts, complete, new_receipt, verified_facts
from paris_ray.zklora.parties.session import Session

WIDTH = 128
TOKENS = torch.tensor(list(b"Once upon a time"))  # 16 rows of each module
PRICE = 25

Address = tuple[str, int]


def main() -> None:
    """Play all parties."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    model = make_base(folder / "base")
    make_lora(model, folder / "lora")
    # Each party makes its identity at home (`python -m jobs.identity`) and hands out certificates.
    homes = {party: folder / party for party in ("user", "contributor", "escrow")}
    user, *_ = (Identity.load_or_create(home) for home in homes.values())
    certificates = {party: str(home / CERTIFICATE) for party, home in homes.items()}

    with (
        running(
            "escrow", "--home", homes["escrow"], "--listen", "127.0.0.1:0",
            "--clients", certificates["user"], certificates["contributor"],
        ) as escrow,
        running(
            "contribute_lora", "--home", homes["contributor"], "--listen", "127.0.0.1:0",
            "--clients", certificates["user"],
            "--base", folder / "base" / "model.safetensors", "--adapter", folder / "lora",
            "--price", PRICE, "--budget-rows", len(TOKENS), "--max-rows-per-user", len(TOKENS),
            "--escrow", "{}:{}".format(*escrow),
            "--escrow-certificate", certificates["escrow"],
        ) as contributor,
    ):  # fmt: skip
        manifest = homes["contributor"] / "offers" / "lora" / MANIFEST
        tried = try_and_buy(folder, user, manifest, contributor, escrow)

    bought = PeftModel.from_pretrained(load_base(folder), folder / "bought")
    error = relative_error(tried, compute_logits(bought))
    print(f"\nPEFT with the bought weights gives the logits that were tried, within {error:.1e}")
    if not error < 1e-3:
        sys.exit("they differ")


def try_and_buy(
    folder: Path, user: Identity, manifest_file: Path, contributor: Address, escrow: Address
) -> Tensor:
    """Do all that a user does; return the logits `(tokens, vocabulary)` with the LoRA."""
    started, model = time.perf_counter(), load_base(folder)
    numerics = NumericsLog(last_bits_drawn=True)
    manifest = AdapterManifest.read(manifest_file)
    if manifest.base != base_of_file(folder / "base" / "model.safetensors"):
        sys.exit("the LoRA is for another base")
    trusted = (folder / "escrow" / CERTIFICATE).read_text()
    if manifest.escrow_certificate != trusted:
        sys.exit("the LoRA is sold through an escrow that we do not trust")

    with (
        Channel(user, contributor, manifest.contributor_certificate) as channel,
        EscrowClient(user, escrow, trusted) as trade,
    ):
        session = Session(channel, user, manifest)
        session.deposit(trade, len(TOKENS))  # of the balance; what is not used comes back
        view = adapt(model, manifest.terms, manifest.scale, session.evaluate, numerics)
        logits = compute_logits(view)
        print(f"\nperplexity without the LoRA: {perplexity(compute_logits(model)):.2f}")
        print(f"perplexity with it: {perplexity(logits):.2f}")
        evidence = session.verify()  # from here on, no other LoRA can have given these logits

        receipts = Receipts(folder, user, new_receipt(manifest))
        receipts.advance(State.VERIFIED, **verified_facts(manifest, evidence, numerics))
        complete(trade, channel, manifest, evidence, folder / "bought", receipts)
    report(receipts.receipt, channel, time.perf_counter() - started)
    return logits


def compute_logits(model: torch.nn.Module) -> Tensor:
    """Return the logits `(tokens, vocabulary)` of the prompt."""
    with torch.no_grad():
        return model(input_ids=TOKENS[None]).logits[0]


def perplexity(logits: Tensor) -> float:
    """Return the perplexity of the prompt."""
    return cross_entropy(logits[:-1], TOKENS[1:]).exp().item()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def report(receipt: Receipt, channel: Channel, seconds: float) -> None:
    """Print a line a module, and what all of it cost."""
    print(f"\n{'module':28} {'d_in-r-d_out':>14} {'rows':>5} {'proof':>8}")
    for module in receipt.modules:
        size = f"{module.d_in}-{module.r}-{module.d_out}"
        print(f"{module.name:28} {size:>14} {module.rows:>5} {module.proof_bytes:>6} B")
    traffic = channel.traffic
    print(
        f"\nall proofs hold; receipt: {receipt.state}, {receipt.price} credits paid\n"
        f"{traffic.bytes_sent:,} B to the contributor, {traffic.bytes_received:,} B from there, "
        f"{seconds:.1f} s"
    )


def make_base(folder: Path) -> GPT2LMHeadModel:
    """Write a GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def load_base(folder: Path) -> GPT2LMHeadModel:
    """Return the user's own copy."""
    return GPT2LMHeadModel.from_pretrained(folder / "base").eval()


def make_lora(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write a LoRA as the contributor would after training; its weights are random too."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    get_peft_model(model, config).save_pretrained(folder)


@contextmanager
def running(job: str, *arguments: object) -> Iterator[Address]:
    """Run a party as a process of its own; gives its address once it listens."""
    command = [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield ready_address(process)
        finally:
            process.terminate()


def ready_address(process: "subprocess.Popen[str]") -> Address:
    """Return the address that a party prints when it is ready, showing what else it says."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := re.search(r" ready: address=(\S+):(\d+) ", line):
            return found[1], int(found[2])
    sys.exit("a party has ended before it was ready")


if __name__ == "__main__":
    main()
