"""Draw a picture file again, from what the file itself tells, and compare.

    python -m jobs.replay FILE.png [--bundle PATH] [--lora PATH] [--output AGAIN.png]

Exit code 0: the pixels are identical. 1: they differ. 2: the file cannot be drawn again, for
example because the bundle is not the one that drew it.
"""

import argparse
import io
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.command import fail
from paris_ray.artifacts import file_sha256
from paris_ray.bundle import Bundle, bundle_digest, load_bundle
from paris_ray.config import load
from paris_ray.config.lora import ADAPTER_WEIGHTS
from paris_ray.errors import ParisError, PictureError
from paris_ray.folders import Folder
from paris_ray.pictures import PictureRecord, encode_picture, read_picture
from paris_ray.run import Run
from paris_ray.sampling import generate

EXIT_DIFFERENT = 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        file = _read(options.file)
        record, output_format = read_picture(file)
        bundle = open_bundle(record, options.bundle or _quickstart(), options.lora)
        torch.set_num_threads(options.threads)
        again = encode_picture(draw_again(record, bundle), record, output_format)
        if options.output is not None:
            options.output.write_bytes(again)
    except ParisError as error:
        return fail(error)
    differing = int((_pixels(file) != _pixels(again)).any(axis=-1).sum())
    print(f"{record.model}, seed {record.seed}: {record.prompt!r}")
    print("identical" if not differing else f"different in {differing} pixels")
    return EXIT_DIFFERENT if differing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a PNG, JPEG or WebP that paris_ray drew")
    parser.add_argument("--bundle", help="path or URI of the bundle; default: the quickstart's")
    parser.add_argument("--lora", help="path or URI of the adapter, if the file names one")
    parser.add_argument("--output", type=Path, help="where to write the new picture")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, as the server's (1)")
    return parser


def open_bundle(record: PictureRecord, path: str, lora_path: str | None) -> Bundle:
    """Return the bundle that drew a picture, with the adapter that did.

    Args:
        record: The picture's.
        path: Path or URI of the bundle.
        lora_path: The same of the adapter, or None.

    Raises:
        PictureError: if the bundle or the adapter is another than the picture's.
    """
    digest = bundle_digest(path)
    if record.bundle != digest:
        raise PictureError(
            f"--bundle={path} has the digest {digest}, the picture was drawn by {record.bundle}"
        )
    bundle = load_bundle(path, dtype=record.dtype)
    if record.lora is not None and record.sampling.lora is not None:
        if lora_path is None:
            name = record.sampling.lora
            raise PictureError(f"the picture was drawn with the adapter {name!r}: give its --lora")
        sha256 = file_sha256(Folder(lora_path), ADAPTER_WEIGHTS)
        if sha256 != record.lora.sha256:
            raise PictureError(f"--lora={lora_path} holds other weights than the picture's adapter")
        expert, merge = record.lora.expert, record.lora.merge
        bundle.add_lora(record.sampling.lora, lora_path, expert=expert, merge=merge)
    return bundle


def draw_again(record: PictureRecord, bundle: Bundle) -> NDArray[np.uint8]:
    """Return the pixels `(S, S, 3)` that a record describes, at their native size.

    Raises:
        PictureError: if the picture is unfinished, or was drawn without some experts.
        ParisError: if the bundle does not allow what the record says.
    """
    if record.unfinished_at is not None:
        raise PictureError(f"the picture is unfinished: it was sent at step {record.unfinished_at}")
    if record.missing_experts:
        lost = ", ".join(map(str, record.missing_experts))
        raise PictureError(f"the picture was drawn without experts that were lost: {lost}")
    (image,) = generate(bundle, [record.prompt], seed=record.seed, **asdict(record.sampling))
    return np.asarray(image)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}") from None


def _quickstart() -> str:
    return str(Run(load("quickstart")).bundle.uri)


def _pixels(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


if __name__ == "__main__":
    sys.exit(main())
