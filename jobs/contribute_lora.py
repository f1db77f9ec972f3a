r"""Offer a LoRA: users try it on their own base, verify it and pay, and never see it before.

Quantises and commits the weights once, writes HOME/offers/NAME/zklora.json (the signed manifest:
give it to users) and serves those whose certificates are in HOME/clients, until SIGTERM. Start it
again to continue: commitments, budget and sessions are kept. docs/zklora.md says what the budget of
rows means.

    python -m jobs.contribute_lora --bundle runs/quickstart/bundle --expert 3 --adapter loras/mine \
        --listen 127.0.0.1:7444 --price 100 --budget-rows 64 \
        --escrow 127.0.0.1:7443 --escrow-certificate runs/zklora/escrow/certificate.pem

    python -m jobs.contribute_lora --base models/gpt2 --adapter loras/verse \
        --listen 127.0.0.1:7444 --texts held_out.txt
"""

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import (
    described,
    log_to_stdout,
    paths_of,
    ray_session,
    refuse_relative_paths,
    reported,
    stop_signals,
)
from jobs.parties import (
    Listener,
    add_address,
    add_base,
    add_escrow,
    add_home,
    add_service,
    describe,
    parse_escrow,
    positive,
    subject_of,
)
from paris_ray.errors import ConfigError
from paris_ray.identity import Identity
from paris_ray.zklora.manifest import MANIFEST

if TYPE_CHECKING:
    from paris_ray.zklora.offer import Offer
    from paris_ray.zklora.parties.contributor import Contribution
    from paris_ray.zklora.subjects import Subject

OFFERS = "offers"
STATUS_S = 60.0
USERS = 4  # that a budget is for, unless somebody says what one may see
NEWS_S = 2.0

logger = logging.getLogger("paris_ray")


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _parser().parse_args()
    log_to_stdout()
    with reported():
        refuse_relative_paths(
            paths_of(arguments, "bundle", "base", "adapter", "home", "pictures", "texts")
        )
        parse_escrow(arguments)
        party = Listener.of(arguments)
        if (arguments.bundle is None) != (arguments.expert is None):
            raise ConfigError("--bundle and --expert go together: an expert is one of a bundle")
        subject = subject_of(arguments, arguments.expert)
        name = arguments.name or arguments.adapter.resolve().name
        folder = (arguments.home / OFFERS / name).resolve()
        offer = _offer(arguments, name, folder, party.identity, subject)
        _say_what_leaks(subject, offer, folder)
        with ray_session(arguments.address):
            # Imported only now: ray reads RAY_AUTH_MODE when it is imported, and --help is quick.
            from paris_ray.zklora.parties.contributor import Contribution, Service

            share = max(1, offer.manifest.budget_rows // USERS)
            contribution = Contribution(
                Service(
                    folder=folder,
                    identity=arguments.home.resolve(),
                    host=party.host,
                    port=party.port,
                    clients=party.clients,
                    escrow=arguments.escrow,
                    workers=arguments.workers,
                    max_rows_per_user=arguments.max_rows_per_user or share,
                )
            )
            host, port = contribution.address
            place = f"address={host}:{port} manifest={folder / MANIFEST}"
            print(f"contributor ready: {place} {describe(party.identity)}", flush=True)
            _serve(contribution)


def _offer(
    arguments: argparse.Namespace, name: str, folder: Path, identity: Identity, subject: "Subject"
) -> "Offer":
    """Return the offer in a folder; it is made if there is none."""
    # Imported only now: they import torch, and --help is quick.
    from paris_ray.zklora.adapter import read_peft
    from paris_ray.zklora.inference import check_fits
    from paris_ray.zklora.offer import AskedTerms, open_offer

    terms = AskedTerms(
        base=subject.base(),
        name=name,
        price=arguments.price,
        price_per_row=arguments.price_per_row,
        budget_rows=arguments.budget_rows,
        escrow_certificate=arguments.escrow_certificate,
    )
    offer = open_offer(folder, identity, read_peft(arguments.adapter), terms)
    check_fits(subject.skeleton(), offer.manifest.terms)
    return offer


def _say_what_leaks(subject: "Subject", offer: "Offer", folder: Path) -> None:
    """Log what a thief would have who saw the whole budget: of the adapter's worth, if it is known.

    Real inputs are kept in the folder of the offer, so that the service can tell what was learned.
    """
    from paris_ray.zklora.leakage import INPUTS, assumed_errors, save_inputs

    rows, modules = offer.manifest.budget_rows, offer.modules()
    if not subject.num_examples:
        asked, chosen = assumed_errors(modules, rows)
        said = (
            "If the spectrum of inputs falls as 1/i, a thief who sees them all predicts updates "
            f"with a relative error of {asked:.2f}, with chosen rows {chosen:.2f}; --pictures or "
            "--texts would tell what part of the adapter's worth that is"
        )
    else:
        from paris_ray.zklora.share import Worth

        worth = Worth(subject, modules, offer.manifest.scale)
        save_inputs(folder / INPUTS, worth.inputs)
        said = "The adapter does not lower the loss of your examples"
        if worth.gain > 0:
            thief, choosing = (worth.thief(rows, chooses=chooses) for chooses in (False, True))
            said = (
                f"A thief who sees them all has {thief.share:.0%} of the gain ({worth.gain:.4g} of "
                f"the loss), with chosen rows {choosing.share:.0%}; its relative error is "
                f"{thief.error:.2f}, with chosen rows {choosing.error:.2f}"
            )
    logger.info("budget: %d rows. %s", rows, said)


def _serve(contribution: "Contribution") -> None:
    """Say how it goes, until a signal comes."""
    stopped, said = stop_signals(), time.monotonic()
    while not stopped.wait(NEWS_S):
        for line in contribution.news():
            logger.info("%s", line)
        if time.monotonic() - said > STATUS_S:
            logger.info("%s", contribution.status())
            said = time.monotonic()
    contribution.close()


def _parser() -> argparse.ArgumentParser:
    result = described(__doc__)
    add_base(result, "measures what part of the LoRA's gain the budget gives away")
    result.add_argument("--expert", type=int, metavar="K", help="number of the expert in --bundle")
    result.add_argument(
        "--adapter", type=Path, required=True, metavar="DIR", help="the LoRA, in PEFT's layout"
    )
    add_service(result)
    add_home(result, "contributor")
    result.add_argument(
        "--name", help="what users call it; default: the name of --adapter's folder"
    )
    result.add_argument("--price", type=int, default=0, metavar="N", help="default: %(default)s")
    result.add_argument(
        "--price-per-row",
        type=int,
        metavar="N",
        help="of a row of every module, from a deposit in the escrow, and part of the price if the "
        "LoRA is bought; default: the price over the budget, at least 1; without an escrow 0",
    )
    result.add_argument(
        "--budget-rows",
        type=int,
        metavar="N",
        help="rows of each module that are ever answered, over all users; default: d_in / 64",
    )
    result.add_argument(
        "--max-rows-per-user",
        type=int,
        metavar="N",
        help="of them, what one user may see; default: a quarter",
    )
    add_escrow(result, "who holds key and payment; default: the LoRA is tried, not sold")
    result.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes that answer updates"
    )
    add_address(result)
    return result


if __name__ == "__main__":
    main()
