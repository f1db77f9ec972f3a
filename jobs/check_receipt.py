r"""Check somebody's purchase of a LoRA afterwards: signatures, payment, and every proof.

Reads what its buyer hands over: receipt.json, the contributor's zklora.json, the folder of the
session, and perhaps that of the weights; all lie in the folder of the purchase. The session's rows
are what the buyer has learned of the LoRA: whoever has them knows as much.

    python -m jobs.check_receipt runs/zklora/user/purchases/mine-0123abcd/receipt.json
"""

import argparse
from pathlib import Path

from jobs.command import described, reported
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.receipts import RECEIPT, Receipt
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest


def main() -> None:
    """Print what holds, and end with an error if something does not."""
    arguments = _parser().parse_args()
    with reported():
        path: Path = arguments.receipt
        if path.name != RECEIPT:
            raise ConfigError(f"{path} is not allowed: a file named {RECEIPT}")
        # Imported only now: it imports torch, and --help is quick.
        from paris_ray.zklora.parties.checking import check_purchase, signer_of
        from paris_ray.zklora.parties.evidence import SESSION

        buyer = arguments.key or signer_of(path.parent)
        receipt = Receipt.read(Folder(str(path.parent)), buyer)
        print(f"receipt: {receipt.state}, signed by {buyer}", flush=True)
        manifest = AdapterManifest.read(arguments.manifest or path.parent / MANIFEST)
        session = None if arguments.without_proofs else arguments.session or path.parent / SESSION
        for line in check_purchase(receipt, buyer, manifest, session, arguments.adapter):
            print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    result = described(__doc__)
    result.add_argument("receipt", type=Path, metavar=RECEIPT, help="the buyer's")
    result.add_argument(
        "--key",
        metavar="HEX",
        help="public key that must have signed it; default: whoever did, which is printed",
    )
    result.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help=f"the contributor's {MANIFEST}; default: beside the receipt",
    )
    result.add_argument(
        "--session",
        type=Path,
        metavar="DIR",
        help="of the purchase: what both have signed, rows and proofs; default: beside the receipt",
    )
    result.add_argument(
        "--without-proofs", action="store_true", help="check signatures and payment alone"
    )
    result.add_argument(
        "--adapter", type=Path, metavar="DIR", help="the weights that were bought; default: none"
    )
    return result


if __name__ == "__main__":
    main()
