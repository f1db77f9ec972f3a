"""ZKLoRA on one machine: a LoRA is tried, proved, paid for and received, and then drawn with.

    make demo-zklora        or        python -m jobs.demo_zklora

Trains a LoRA for one expert of the quickstart's bundle, which is made first if there is none. Then
an escrow, a contributor and a user do business over loopback: each is a process of its own, and
contributor and user each have a Ray of their own. What is finished already is kept.
"""

import argparse
import re
import shutil
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import described, reported
from jobs.contribute_lora import OFFERS
from jobs.local_cluster import LOOPBACK, LocalCluster
from jobs.parties import CLIENTS
from jobs.processes import run_job, service, stop_on_sigterm
from paris_ray.artifacts import MANIFEST, read_manifest
from paris_ray.config import load, with_absolute_paths
from paris_ray.errors import ParisError
from paris_ray.folders import Folder
from paris_ray.identity import CERTIFICATE, Identity
from paris_ray.receipts import RECEIPT, Receipt
from paris_ray.run import BUNDLE, Run
from paris_ray.zklora.manifest import MANIFEST as OFFER
from paris_ray.zklora.sequential import MIN_GAIN

if TYPE_CHECKING:
    from jobs.demo_pictures import Subject

# Who may connect to whom.
CLIENTS_OF = {"escrow": ("contributor", "user"), "contributor": ("user",)}
ADAPTER = "adapter"  # where jobs.verify_lora leaves the weights, in the folder of a purchase
BUDGET_ROWS = 64  # four pictures at one noise level
LEVEL = 0.5  # pairs of one level vary less than those of several, so fewer of them decide
PRICE = 100
READY_TIMEOUT_S = 120
# Cross-attention sees rows of patches and of words, more than the budget of a session has.
TRAINING = (
    "lora.target_modules=[attn.in_proj,attn.out_proj,final_layer.linear]",
    "training.steps=600",
    "training.batch_size=32",
    "training.learning_rate=8e-3",
    "training.schedule=cosine",
    "training.log_every=50",
)


def main() -> None:
    """Run all steps."""
    arguments = _parser().parse_args()
    stop_on_sigterm()
    try:
        with reported():
            bundle, run_dir = arguments.bundle or _quickstart_bundle(), arguments.run_dir
            overrides, min_gain = arguments.overrides, arguments.min_gain
            _Demo(bundle.resolve(), run_dir.resolve(), overrides, min_gain).run()
    except KeyboardInterrupt:
        print("\nstopped; run it again to continue", file=sys.stderr)
        sys.exit(130)


def _quickstart_bundle() -> Path:
    """Return the quickstart's bundle, made now by a Ray of its own if there is none."""
    run = Run(with_absolute_paths(load("quickstart")))
    if not run.bundle.exists(MANIFEST):
        if LocalCluster(Path(run.folder.uri)).is_running():
            raise ParisError(
                f"{run.bundle.uri} is not finished, but the quickstart's Ray runs: let `make "
                "quickstart` finish it, or stop that with `make stop`"
            )
        print(f"there is no bundle in {run.bundle.uri}: making the quickstart's", flush=True)
        run_job("pipeline", "--config", "quickstart")
    return Path(run.bundle.uri)


class _Demo:
    """The demo in one folder.

    Args:
        bundle: Of a finished run, whose shards stand beside it.
        folder: For everything that is made.
        overrides: For the training of the LoRA.
        min_gain: That the user wants of it.
    """

    def __init__(self, bundle: Path, folder: Path, overrides: list[str], min_gain: float) -> None:
        self._bundle, self._folder, self._overrides = bundle, folder, overrides
        self._min_gain = min_gain
        self._lora, self._purchase = folder / "night", folder / "purchase"
        self._training, self._held_out = folder / "pictures/training", folder / "pictures/held_out"
        self._started = time.monotonic()

    def run(self) -> None:
        """Go through all steps."""
        self._train()
        key = self._introduce()
        if self._is_bought(key):
            self._say(f"bought already, kept: {self._purchase}")
        else:
            self._trade()
        if not self._is_bought(key):
            raise ParisError(
                f"the user did not buy: what {BUDGET_ROWS} rows show is not clear, or not as much "
                f"as --min-gain={self._min_gain}"
            )
        self._draw(key)
        self._say_what_there_is(key)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:3.0f} s] {text}", flush=True)

    @cached_property
    def _subject(self) -> "Subject":
        """Which expert and prompt the demo is about, as decided when it was begun."""
        # Imported only now: it imports torch, and --help is quick.
        from jobs.demo_pictures import Subject, choose_subject

        folder, digest = Folder(self._folder), read_manifest(Folder(self._bundle), BUNDLE).digest
        if not folder.exists("subject.json"):
            self._say("looking for a prompt that one expert draws alone")
            subject = choose_subject(str(self._bundle))
            folder.write_json("subject.json", {**subject._asdict(), "bundle": digest})
        known = folder.read_json("subject.json")
        if known.pop("bundle") != digest:
            raise ParisError(
                f"{self._folder} holds a demo with another bundle than {self._bundle}: delete it, "
                "or choose another --run-dir"
            )
        return Subject(**known)

    def _train(self) -> None:
        """Teach the expert a style: its own pictures at night."""
        expert, prompt = self._subject
        if (self._lora / MANIFEST).exists():
            self._say(f"trained already, kept: {self._lora}")
            return
        from jobs.demo_pictures import write_night_pictures

        shard = Run(replace(load("quickstart"), run_dir=str(self._bundle.parent))).shard(expert)
        write_night_pictures(shard, prompt, self._training, self._held_out)
        self._say(f"training a LoRA of expert {expert}, which draws {prompt!r}: night pictures")
        run_job(
            "train_lora",
            f"--bundle={self._bundle}",
            f"--expert={expert}",
            f"--data={self._training}",
            f"--output={self._lora}",
            *TRAINING,
            *self._overrides,
        )

    def _introduce(self) -> str:
        """Give every party a key, and its clients' certificates; return the user's key."""
        identities = {
            name: Identity.load_or_create(self._folder / name)
            for name in ("escrow", "contributor", "user")
        }
        for name, clients in CLIENTS_OF.items():
            folder = self._folder / name / CLIENTS
            folder.mkdir(exist_ok=True)
            for client in clients:
                shutil.copy(self._folder / client / CERTIFICATE, folder / f"{client}.pem")
        self._say("escrow, contributor and user know each other's certificates")
        return identities["user"].public_key

    def _is_bought(self, key: str) -> bool:
        adapter = Folder(self._purchase / ADAPTER)
        return adapter.exists(RECEIPT) and Receipt.read(adapter, key).state == "OPENED"

    def _trade(self) -> None:
        """Let the user try, verify and buy the contributor's LoRA through the escrow."""
        with ExitStack() as services:
            ready = services.enter_context(self._party("escrow", "escrow"))
            escrow = (
                f"--escrow={_address(ready)}",
                f"--escrow-certificate={self._folder / 'escrow' / CERTIFICATE}",
            )
            self._say("escrow is ready")
            ready = services.enter_context(
                self._party("contributor", "contribute_lora", *self._offer(), *escrow)
            )
            self._say(f"contributor is ready\n{self._logged('budget:')}")
            run_job("verify_lora", f"--peer={_address(ready)}", *self._trial(), *escrow)
            self._say(f"what was learned, and what it cost\n{self._logged('session', 'learned')}")
        self._say("contributor and escrow are stopped")

    def _party(self, name: str, job: str, *arguments: str) -> AbstractContextManager[str]:
        """Start a party that listens on a free port; what it yields tells which."""
        return service(
            job,
            f"--home={self._folder / name}",
            f"--listen={LOOPBACK}:0",
            *arguments,
            log=self._folder / f"{name}.log",
            ready=f"{name} ready:",
            timeout_s=READY_TIMEOUT_S,
        )

    def _offer(self) -> tuple[str, ...]:
        return (
            f"--bundle={self._bundle}",
            f"--expert={self._subject.expert}",
            f"--adapter={self._lora}",
            f"--budget-rows={BUDGET_ROWS}",
            f"--max-rows-per-user={BUDGET_ROWS}",
            f"--price={PRICE}",
            f"--pictures={self._held_out}",
        )

    def _trial(self) -> tuple[str, ...]:
        return (
            f"--home={self._folder / 'user'}",
            f"--bundle={self._bundle}",
            f"--manifest={self._folder / 'contributor' / OFFERS / self._lora.name / OFFER}",
            f"--pictures={self._held_out}",
            f"--output={self._purchase}",
            f"--levels={LEVEL}",
            f"--min-gain={self._min_gain}",
        )

    def _logged(self, *words: str) -> str:
        """Return the lines of the contributor's log with one of these words."""
        lines = (self._folder / "contributor.log").read_text().splitlines()
        return "\n".join(line for line in lines if any(word in line for word in words))

    def _draw(self, key: str) -> None:
        """Draw a picture without the LoRA, and one with the weights that were bought."""
        from jobs.demo_pictures import draw_pair

        prompt = self._subject.prompt
        draw_pair(str(self._bundle), self._purchase / ADAPTER, key, prompt, self._folder)
        self._say(f"drew {prompt!r} without the LoRA and with it")

    def _say_what_there_is(self, key: str) -> None:
        from jobs.demo_pictures import PAGE, PAIR

        receipt = Receipt.read(Folder(self._purchase), key)
        print(
            f"""
done in {time.monotonic() - self._started:.0f} s

  pictures   {self._folder / PAIR}   (left: without, right: with the LoRA that was bought)
  page       {self._folder / PAGE}
  receipt    {self._purchase / RECEIPT}   (state: {receipt.state})
  adapter    {self._purchase / ADAPTER}
  logs       {self._folder}/escrow.log, contributor.log

The ledger is a stand-in for payment: no money moved. The proof system has not been audited.""",
            flush=True,
        )


def _address(ready: str) -> str:
    """Return the address in the line with which a party says that it is ready."""
    found = re.search(r"address=(\S+)", ready)
    assert found is not None, ready
    return found[1]


def _parser() -> argparse.ArgumentParser:
    result = described(__doc__)
    result.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="the bundle of a finished run, in that run's folder; default: the quickstart's",
    )
    result.add_argument(
        "--min-gain",
        type=float,
        default=MIN_GAIN,
        metavar="G",
        help="part of the loss that the LoRA must save to be bought; default: %(default)s",
    )
    result.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/zklora-demo"),
        metavar="DIR",
        help="for everything that the demo makes; default: %(default)s",
    )
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the LoRA's training, such as training.steps=200",
    )
    return result


if __name__ == "__main__":
    main()
