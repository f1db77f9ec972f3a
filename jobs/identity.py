"""Make the key and the certificate of a party, or say which there are.

Give certificate.pem to those who shall know you: contributor and escrow put those of their users
into HOME/clients. key.pem stays where it is.

    python -m jobs.identity runs/zklora/user
"""

from pathlib import Path

from jobs.command import described, reported
from jobs.parties import describe
from paris_ray.identity import Identity


def main() -> None:
    """Print the identity in a folder."""
    parser = described(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the party's own folder")
    arguments = parser.parse_args()
    with reported():
        print(describe(Identity.load_or_create(arguments.folder)))


if __name__ == "__main__":
    main()
