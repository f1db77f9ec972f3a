"""Look at a sample of a corpus in seconds, before anything long is started.

    python -m jobs.inspect corpus.path=/data/mine
    python -m jobs.inspect --config paris_xl2 corpus.path=/data/mine --output mine.html

Says which layout it recognised, which columns or files it took for picture and caption, and what
`prepare` would set aside and why; shows sizes, caption lengths and some rows. The page that it
writes has them as pictures. Without corpus.kind every layout is tried; the one that can read the
path is what other jobs must be told. Starts no Ray, and reads about 10 seconds.
"""

import argparse
import logging
import sys
from pathlib import Path

from jobs.command import fail, refuse_relative_paths
from paris_ray.config import local_paths, packaged_configs
from paris_ray.errors import ArtifactError, ParisError


def main() -> int:
    """Inspect a corpus; return the exit code."""
    arguments = _parser().parse_intermixed_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    try:
        # Imported only now: --help is quick.
        from paris_ray.survey.inspection import inspect_corpus
        from paris_ray.survey.listing import recognise
        from paris_ray.survey.rendering import inspection_page, inspection_text

        listing = recognise(arguments.config, arguments.overrides)
        refuse_relative_paths(local_paths(listing.config) | {"--output": str(arguments.output)})
        found = inspect_corpus(listing)
        _write(arguments.output, inspection_page(found))
    except ParisError as error:
        return fail(error)
    print(f"{inspection_text(found)}\n\nwith pictures: {arguments.output.resolve()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(packaged_configs())
    result.add_argument("--config", default="quickstart", help=f"a YAML file, or one of: {names}")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("corpus.html"),
        metavar="FILE",
        help="the page; default: %(default)s in this folder",
    )
    result.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as corpus.path=/data/mine"
    )
    return result


def _write(path: Path, page: bytes) -> None:
    try:
        path.write_bytes(page)
    except OSError as error:
        raise ArtifactError(f"--output={path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
