"""Make an API key for a client of the server, and print it: the only time that anybody sees it.

    python -m jobs.new_key alice --file keys.yaml --requests-per-minute 60

The file gets the key's SHA-256 and is what `api_key_file` in serve/config.yaml names; a running
server reads it again within a second. Delete an entry to revoke its key.
"""

import argparse
import secrets
import sys
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from jobs.command import fail
from paris_ray.api_keys import LIST_SUFFIXES, Key, Quotas, Role, digest_of, parse_keys
from paris_ray.errors import ConfigError, ParisError


def main() -> int:
    """Append a key to the file; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the client: letters, digits, . _ -")
    parser.add_argument(
        "--file", type=Path, required=True, metavar="FILE", help="such as keys.yaml"
    )
    parser.add_argument("--role", choices=get_args(Role), default="user")
    for quota in Quotas.model_fields:
        parser.add_argument(f"--{quota.replace('_', '-')}", type=int, metavar="N")
    arguments = parser.parse_args()
    secret = secrets.token_urlsafe(32)
    try:
        _append(arguments.file, _key(arguments, secret))
    except ParisError as error:
        return fail(error)
    print(secret)
    return 0


def _key(arguments: argparse.Namespace, secret: str) -> Key:
    """Return the entry that the options describe."""
    quotas = {name: getattr(arguments, name) for name in Quotas.model_fields}
    entry = {"name": arguments.name, "sha256": digest_of(secret), "role": arguments.role}
    try:
        return Key.model_validate(entry | {"quotas": quotas})
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][-1]).replace("_", "-")
        option = "NAME" if option == "name" else f"--{option}"
        message = f"{option}={first['input']!r} is not allowed: {first['msg']}"
        raise ConfigError(message) from None


def _append(path: Path, key: Key) -> None:
    """Append text, so that comments stay; what would not be read afterwards is not written."""
    if path.suffix not in LIST_SUFFIXES:
        raise ConfigError(f"--file={str(path)!r} is not allowed: its name must end in .yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    after = before + yaml.safe_dump([key.model_dump(exclude_none=True)], sort_keys=False)
    parse_keys(path, after)
    partial = path.with_name(f".{path.name}.partial")
    partial.touch(mode=0o600)
    partial.write_text(after)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
