"""Hold the keys of sealed adapters and the money of their buyers, and swap them: ZKLoRA's escrow.

Sellers and buyers connect with the certificates in HOME/clients, nobody else. All trades are kept
in HOME/journal.sqlite; start it again to continue after an interruption.

The ledger is a STAND-IN FOR PAYMENT: credits that every new account is given, not money.

    python -m jobs.escrow
"""

import argparse
import logging

from jobs.command import described, log_to_stdout, reported, stop_signals
from jobs.local_cluster import LOOPBACK
from jobs.parties import ESCROW_PORT, Listener, add_home, add_service, describe
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.zklora.ledger import OPENING_BALANCE, SQLiteLedger
from paris_ray.zklora.parties.escrow import EscrowService

JOURNAL = "journal.sqlite"

logger = logging.getLogger("paris_ray.jobs.escrow")


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _parser().parse_args()
    log_to_stdout()
    stopped = stop_signals()
    with reported():
        party = Listener.of(arguments)
        journal = open_journal(arguments.home / JOURNAL)
        escrow = Escrow(journal, party.identity, SQLiteLedger(journal, arguments.opening_balance))
        with EscrowService(escrow, party.host, party.port, party.clients) as service:
            logger.info(
                "the ledger is a stand-in for payment: every new account is given %d credits",
                arguments.opening_balance,
            )
            host, port = service.address
            print(f"escrow ready: address={host}:{port} {describe(party.identity)}", flush=True)
            stopped.wait()
        journal.close()


def _parser() -> argparse.ArgumentParser:
    result = described(__doc__)
    add_service(result, f"{LOOPBACK}:{ESCROW_PORT}")
    add_home(result, "escrow")
    result.add_argument(
        "--opening-balance",
        type=int,
        default=OPENING_BALANCE,
        metavar="N",
        help="credits that every new account is given, a stand-in for money; default: %(default)s",
    )
    return result


if __name__ == "__main__":
    main()
