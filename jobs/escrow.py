"""Hold the keys of sealed adapters and the money of their buyers, and swap them: ZKLoRA's escrow.

Sellers and buyers connect with the certificates in HOME/clients, nobody else. All trades are kept
in HOME/journal.sqlite; start it again to continue after an interruption.

The ledger is a STAND-IN FOR PAYMENT: credits that every new account is given, not money.

    python -m jobs.escrow
"""

import argparse
import logging
import signal
import sys
import threading

from jobs.command import fail, log_to_stdout
from jobs.parties import (
    ESCROW_PORT,
    LOOPBACK,
    add_home,
    add_service,
    address,
    client_certificates,
    describe,
)
from paris_ray.errors import ParisError
from paris_ray.identity import Identity
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.zklora.ledger import OPENING_BALANCE, SQLiteLedger
from paris_ray.zklora.parties.escrow import EscrowService

JOURNAL = "journal.sqlite"

logger = logging.getLogger("paris_ray.jobs.escrow")


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    arguments = _parser().parse_args()
    log_to_stdout()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        identity = Identity.load_or_create(arguments.home)
        clients = client_certificates(arguments.clients, arguments.home)
        journal = open_journal(arguments.home / JOURNAL)
        escrow = Escrow(journal, identity, SQLiteLedger(journal, arguments.opening_balance))
        host, port = address("--listen", arguments.listen)
        with EscrowService(escrow, host, port, clients) as service:
            logger.info(
                "the ledger is a stand-in for payment: every new account is given %d credits",
                arguments.opening_balance,
            )
            host, port = service.address
            print(f"escrow ready: address={host}:{port} {describe(identity)}", flush=True)
            stopped.wait()
        journal.close()
    except ParisError as error:
        return fail(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    sys.exit(main())
