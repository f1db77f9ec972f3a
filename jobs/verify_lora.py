r"""Try a LoRA that its contributor does not show, verify what it did, pay, and receive it.

Pins the manifest, compares losses with and without the LoRA on your own base and examples, checks
a zero-knowledge proof of every module, pays through the escrow, opens the weights and compares them
with those that were proved. Run it again to continue after an interruption. docs/zklora.md says
what is proved.

    python -m jobs.verify_lora --bundle runs/quickstart/bundle --peer 127.0.0.1:7444 \
        --manifest zklora.json --pictures PICTURES \
        --escrow 127.0.0.1:7443 --escrow-certificate runs/zklora/escrow/certificate.pem

    python -m jobs.verify_lora --base models/gpt2 --peer 127.0.0.1:7444 \
        --manifest zklora.json --texts held_out.txt
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from jobs.command import (
    described,
    log_to_stdout,
    paths_of,
    ray_session,
    refuse_relative_paths,
    reported,
)
from jobs.parties import (
    add_address,
    add_base,
    add_escrow,
    add_home,
    address,
    describe,
    parse_escrow,
    positive,
    subject_of,
)
from paris_ray.errors import ConfigError
from paris_ray.identity import Identity
from paris_ray.receipts import RECEIPT
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.sequential import ERROR_RATE, MIN_GAIN, Wanted

if TYPE_CHECKING:
    from paris_ray.zklora.parties.buyer import Outcome
    from paris_ray.zklora.parties.user import Trial

PURCHASES = "purchases"


def main() -> None:
    """Try, verify and buy."""
    arguments = _parser().parse_args()
    log_to_stdout()
    with reported():
        names = ("bundle", "base", "manifest", "pictures", "texts", "home", "output")
        refuse_relative_paths(paths_of(arguments, *names))
        identity = Identity.load_or_create(arguments.home)
        print(f"user: {describe(identity)}", flush=True)
        peer = address("--peer", arguments.peer)
        parse_escrow(arguments)
        manifest = AdapterManifest.read(arguments.manifest)
        _say_what_is_offered(manifest)
        subject = subject_of(arguments, manifest.base.expert, arguments.levels)
        if not subject.num_examples:
            raise ConfigError("--pictures or --texts is missing: what losses are compared on")
        wanted = None
        if not arguments.any_gain:
            wanted = Wanted(min_gain=arguments.min_gain, error_rate=arguments.error_rate)
        name = f"{manifest.adapter}-{manifest.adapter_id[:8]}"
        output = arguments.output or arguments.home / PURCHASES / name
        with ray_session(arguments.address):
            # Imported only now: ray reads RAY_AUTH_MODE when it is imported, and --help is quick.
            from paris_ray.zklora.parties.buyer import Buyer
            from paris_ray.zklora.parties.user import Trial

            trial = Trial(
                subject=subject,
                peer=peer,
                manifest=arguments.manifest,
                identity=arguments.home.resolve(),
                output=output.resolve(),
                wanted=wanted,
                escrow=arguments.escrow,
                escrow_certificate=arguments.escrow_certificate,
                threads=arguments.threads,
                num_gpus=arguments.num_gpus,
            )
            with _bars() as show:
                outcome = Buyer(trial, show).run()
        _report(outcome, trial, identity)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows how far a stage is: a progress bar each, one after the other."""
    bars: dict[str, tqdm] = {}
    with ExitStack() as last:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                last.close()
                bars[stage] = last.enter_context(tqdm(desc=stage, total=total, file=sys.stdout))
            bars[stage].update(done - bars[stage].n)

        yield show


def _say_what_is_offered(manifest: AdapterManifest) -> None:
    expert = "" if manifest.base.expert is None else f" of expert {manifest.base.expert}"
    print(
        f"adapter {manifest.adapter} ({manifest.adapter_id}){expert}: {len(manifest.modules)} "
        f"modules of rank {manifest.r}, price {manifest.price}, {manifest.budget_rows} rows a "
        f"module over all users, {manifest.price_per_row} for each\n"
        f"contributor {manifest.contributor}",
        flush=True,
    )


def _report(outcome: "Outcome", trial: "Trial", identity: Identity) -> None:
    """Print what was measured, a line a module, and what to do next."""
    from paris_ray.zklora.inference import PEAK_TO_RMS

    receipt = outcome.receipt
    print(f"\n{'module':40} {'d_in-r-d_out':>16} {'rows':>6} {'proof':>8} {'peak/RMS':>9}")
    for module in receipt.modules:
        size = f"{module.d_in}-{module.r}-{module.d_out}"
        print(
            f"{module.name:40} {size:>16} {module.rows:>6} {module.proof_bytes:>6} B "
            f"{module.peak_to_rms:>9.1f}"
        )
    print(f"\n{'':12} {'loss without':>13} {'loss with':>10}")
    losses = zip(trial.subject.levels, outcome.without, outcome.with_adapter, strict=True)
    for level, without, with_adapter in losses:
        print(f"{level:<12} {without.mean():>13.4f} {with_adapter.mean():>10.4f}")
    if outcome.verdict is not None:
        gain = 1 - np.exp(np.log(outcome.with_adapter / outcome.without).mean())
        print(f"\n{outcome.verdict}, after {outcome.without.size} losses: gain {100 * gain:.1f} %")
    for module in receipt.modules:
        if module.peak_to_rms > PEAK_TO_RMS:
            print(f"{module.name}: inputs with outliers, updates may be off by more than 1e-3")
    totals = ", ".join(
        f"{name} {f'{value:,.1f}'.removesuffix('.0')}" for name, value in receipt.totals.items()
    )
    print(f"\n{totals}\nreceipt {trial.output / RECEIPT}: {receipt.state}")
    if outcome.adapter is not None:
        print(f"adapter {outcome.adapter}")
    if outcome.adapter is not None and receipt.base.expert is not None:
        print(
            "to serve it, under `loras:` in serve/config.yaml:\n"
            f"  {receipt.adapter}: {{path: {outcome.adapter}, receipt_key: {identity.public_key}}}"
        )


def _parser() -> argparse.ArgumentParser:
    result = described(__doc__)
    add_base(result, "losses with and without the LoRA")
    result.add_argument(
        "--peer", required=True, metavar="HOST:PORT", help="where the contributor listens"
    )
    result.add_argument(
        "--manifest", required=True, type=Path, metavar="FILE", help="the contributor's zklora.json"
    )
    result.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=[0.3, 0.7],
        metavar="T",
        help="noise levels of the losses of pictures, between 0 and 1; default: %(default)s",
    )
    result.add_argument(
        "--min-gain",
        type=float,
        default=MIN_GAIN,
        metavar="G",
        help="buy if the LoRA lowers the loss by this part of it, and stop trying it as soon as "
        "that is clear; default: %(default)s",
    )
    result.add_argument(
        "--error-rate",
        type=float,
        default=ERROR_RATE,
        metavar="P",
        help="chance of a wrong decision either way; default: %(default)s",
    )
    result.add_argument(
        "--any-gain", action="store_true", help="try all examples, and buy whatever they show"
    )
    add_escrow(result, "buy through this escrow; default: verify only")
    result.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"the purchase's folder; default: HOME/{PURCHASES}/NAME-ID",
    )
    add_home(result, "user")
    result.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="torch threads of a process"
    )
    result.add_argument(
        "--num-gpus", type=float, default=0, metavar="N", help="for your base; default: the CPU"
    )
    add_address(result)
    return result


if __name__ == "__main__":
    main()
