"""What the jobs of ZKLoRA's parties share: addresses, identities and whom they trust."""

import argparse
import hashlib
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paris_ray.errors import ConfigError, SignatureError
from paris_ray.folders import absolute_uri
from paris_ray.identity import CERTIFICATE, KEY, Identity, public_key_of

if TYPE_CHECKING:
    from paris_ray.zklora.subjects import Subject

HOMES = Path("runs/zklora")
CLIENTS = "clients"
ESCROW_PORT = 7443


def add_home(parser: argparse.ArgumentParser, party: str) -> None:
    """Add the option for a party's own folder."""
    parser.add_argument(
        "--home",
        type=Path,
        default=HOMES / party,
        metavar="DIR",
        help="this party's own folder: key.pem and certificate.pem, made if there are none, and "
        "what it must remember; default: %(default)s",
    )


def add_service(parser: argparse.ArgumentParser, listen: str | None = None) -> None:
    """Add the options of a party that listens."""
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        required=listen is None,
        default=listen,
        help="where to listen; port 0: a free one" + (f"; default: {listen}" if listen else ""),
    )
    parser.add_argument(
        "--clients",
        type=Path,
        nargs="+",
        metavar="FILE_OR_DIR",
        help="certificates of all who may connect, nobody else can; default: HOME/clients/*.pem",
    )


def add_base(parser: argparse.ArgumentParser, examples: str) -> None:
    """Add the options for the base, and for examples that it is tried on.

    Args:
        parser: Of the job.
        examples: What the examples are for.
    """
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--bundle", help="your own copy of the model folder whose expert is adapted")
    base.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="your own folder of a causal language model of transformers: config.json, "
        "tokenizer.json, safetensors in one or several shards; no code of it runs",
    )
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help=f"with --bundle: captioned pictures, a folder with metadata.jsonl: {examples}",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help=f"with --base: held-out texts, one a line: {examples}",
    )


def subject_of(
    arguments: argparse.Namespace, expert: int | None, levels: Sequence[float] | None = None
) -> "Subject":
    """Return the base that the options name, with its examples, if there are any.

    Args:
        arguments: With the options of `add_base`.
        expert: Number of the expert, with --bundle.
        levels: Noise levels of pictures; None: the usual ones.

    Raises:
        ConfigError: if options do not go together, or examples cannot be read.
    """
    # Imported only now: it imports torch, and --help is quick.
    from paris_ray.zklora.subjects import (
        LEVELS,
        PictureSubject,
        TextSubject,
        read_pictures,
        read_texts,
    )

    if arguments.bundle is None:
        if arguments.pictures is not None:
            raise ConfigError("--pictures needs --bundle: they are for an expert of one")
        texts = () if arguments.texts is None else read_texts(arguments.texts)
        return TextSubject(folder=arguments.base.resolve(), texts=texts)
    if arguments.texts is not None:
        raise ConfigError("--texts needs --base: they are for a language model")
    bundle, levels = absolute_uri(arguments.bundle), LEVELS if levels is None else levels
    if arguments.pictures is None:
        return PictureSubject(bundle=bundle, expert=expert, noise=levels)
    pictures, captions = read_pictures(arguments.pictures, bundle)
    return PictureSubject(
        bundle=bundle, expert=expert, pictures=pictures, captions=captions, noise=levels
    )


def add_escrow(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the options for the escrow, which go together."""
    parser.add_argument("--escrow", metavar="HOST:PORT", help=purpose)
    parser.add_argument(
        "--escrow-certificate",
        type=Path,
        metavar="FILE",
        help="certificate.pem of that escrow, which you trust",
    )


def parse_escrow(arguments: argparse.Namespace) -> None:
    """Replace the escrow's options by address and certificate, before anything starts.

    Raises:
        ConfigError: if one is given without the other, or cannot be read.
    """
    if (arguments.escrow is None) != (arguments.escrow_certificate is None):
        raise ConfigError("--escrow and --escrow-certificate go together: give both or none")
    if arguments.escrow is not None:
        pem = certificate("--escrow-certificate", arguments.escrow_certificate)
        arguments.escrow, arguments.escrow_certificate = address("--escrow", arguments.escrow), pem


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the option for the party's Ray cluster."""
    parser.add_argument(
        "--address", help="this party's Ray cluster; default: RAY_ADDRESS, else one of its own"
    )


def positive(text: str) -> int:
    """Return a number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: at least 1")
    return number


class Listener(NamedTuple):
    """A party that listens.

    Attributes:
        identity: Its own.
        host: Address to listen on.
        port: Port; 0 for a free one.
        clients: Certificates, as PEM text, of all who may connect.
    """

    identity: Identity
    host: str
    port: int
    clients: tuple[str, ...]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Listener":
        """Return the party that the options of `add_home` and `add_service` describe.

        Raises:
            ConfigError: naming the option, if one is not allowed.
        """
        identity = Identity.load_or_create(arguments.home)
        clients = _client_certificates(arguments.clients, arguments.home)
        return cls(identity, *address("--listen", arguments.listen), clients)


def address(option: str, value: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        ConfigError: naming the option, if it is none.
    """
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option}={value!r} is not allowed: HOST:PORT, such as 127.0.0.1:7443")
    return host.strip("[]"), int(port)


def certificate(option: str, path: Path) -> str:
    """Return the certificate in a file, as PEM.

    Raises:
        ConfigError: naming the option, if it holds none.
    """
    try:
        pem = path.read_text("ascii")
        public_key_of(pem)
    except (OSError, UnicodeDecodeError, SignatureError) as error:
        raise ConfigError(f"{option}: {path} is no certificate of a party: {error}") from None
    return pem


def _client_certificates(paths: Sequence[Path] | None, home: Path) -> tuple[str, ...]:
    """Return the certificates in files and folders; the key beside one is left alone."""
    if paths is None:
        paths = [home / CLIENTS]
        paths[0].mkdir(parents=True, exist_ok=True)
    files = [file for path in paths for file in (_in_folder(path) if path.is_dir() else [path])]
    return tuple(certificate("--clients", file) for file in files)


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.pem") if file.name != KEY)
    if not files:
        raise ConfigError(
            f"--clients={folder} holds no certificate: put there the certificate.pem of everybody "
            "who may connect (`python -m jobs.identity DIR` makes one)"
        )
    return files


def describe(identity: Identity) -> str:
    """Return where the certificate of a party is, and its fingerprint, in one line."""
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(identity.certificate)).hexdigest()
    path = (identity.folder / CERTIFICATE).resolve()
    return f"certificate={path} sha256={fingerprint} key={identity.public_key}"
