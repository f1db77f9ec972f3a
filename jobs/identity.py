"""Make the key and the certificate of a party, or say which there are.

Give certificate.pem to those who shall know you: contributor and escrow put those of their users
into HOME/clients. key.pem stays where it is.

    python -m jobs.identity runs/zklora/user
"""

import argparse
import sys
from pathlib import Path

from jobs.command import fail
from jobs.parties import describe
from paris_ray.errors import ParisError
from paris_ray.identity import Identity


def main() -> int:
    """Print the identity in a folder; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the party's own folder")
    try:
        print(describe(Identity.load_or_create(parser.parse_args().folder)))
    except ParisError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
