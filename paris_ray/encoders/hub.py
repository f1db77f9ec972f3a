"""Model folders: a local one, or a repository of the Hugging Face hub, fetched once."""

import re
from collections.abc import Sequence
from pathlib import Path

from paris_ray.errors import ConfigError

HUB = "https://huggingface.co"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def model_folder(
    name_or_path: str, files: Sequence[str], *, field: str, optional: Sequence[str] = ()
) -> Path:
    """Return the local folder of a model; a hub name is downloaded to the hub's own cache.

    Args:
        name_or_path: A folder, or the name of a hub repository (`org/name`).
        files: What the folder must hold; with `optional`, all that is ever downloaded.
        field: The configuration field that gave the name, for errors.
        optional: Files that are wanted where the model has them.

    Raises:
        ConfigError: if a file cannot be had; it says what to fetch, and where to put it.
    """
    value = f"{field}={name_or_path!r}"
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        missing = _missing(path, files)
        if missing:
            raise ConfigError(f"{value} lacks {missing}; put the files of the model there")
        return path
    if path.exists() or not HUB_NAME.fullmatch(name_or_path):
        raise ConfigError(f"{value} is neither a folder nor the name of a hub model, org/name")
    remedy = (
        f"fetch {', '.join(files)} from {HUB}/{name_or_path}, put them into a folder "
        f"and set {field} to its path"
    )
    folder = _download(name_or_path, [*files, *optional], f"{value} is no folder here", remedy)
    missing = _missing(folder, files)
    if missing:
        raise ConfigError(f"{value}: the download lacks {missing} (no pickle is read); {remedy}")
    return folder


def _download(name: str, patterns: list[str], problem: str, remedy: str) -> Path:
    import huggingface_hub  # here: local folders need none of it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # errors of the hub, the network and a proxy share no narrower class
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{problem} and cannot be downloaded ({reason}); {remedy}") from None


def _missing(folder: Path, files: Sequence[str]) -> str:
    return ", ".join(name for name in files if not (folder / name).is_file())
