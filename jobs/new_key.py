"""Make an API key for a client of the server, and print it: the only time that anybody sees it.

    python -m jobs.new_key alice --file keys.yaml --requests-per-minute 60

The file gets the key's SHA-256 and is what `api_key_file` in serve/config.yaml names; a running
server reads it again within a second. Delete an entry to revoke its key.
"""

import argparse
import hashlib
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import yaml

from jobs.command import fail
from paris_ray.errors import ConfigError, ParisError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SUFFIXES = (".yaml", ".yml")  # by these the server knows a file of several keys
QUOTAS = ("requests_per_minute", "concurrent_pictures", "picture_steps_per_minute")


def main() -> int:
    """Append a key to the file; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the client: letters, digits, . _ -")
    parser.add_argument(
        "--file", type=Path, required=True, metavar="FILE", help="such as keys.yaml"
    )
    parser.add_argument("--role", choices=("user", "admin"), default="user")
    for quota in QUOTAS:
        parser.add_argument(f"--{quota.replace('_', '-')}", type=int, metavar="N")
    arguments = parser.parse_args()
    quotas = {name: n for name in QUOTAS if (n := getattr(arguments, name)) is not None}
    secret = secrets.token_urlsafe(32)
    entry = {
        "name": arguments.name,
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "role": arguments.role,
        "quotas": quotas,
    }
    try:
        _check(entry)
        _append(arguments.file, entry)
    except ParisError as error:
        return fail(error)
    print(secret)
    return 0


def _check(entry: dict[str, Any]) -> None:
    if not NAME.fullmatch(entry["name"]):
        raise ConfigError(f"NAME={entry['name']!r} is not allowed: 1 to 64 of A-Z a-z 0-9 . _ -")
    for name, n in entry["quotas"].items():
        if n < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={n} is not allowed: at least 1")


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Append text, so that comments stay; what is no list in YAML's block style is refused."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--file={str(path)!r} is not allowed: its name must end in .yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    after = before + yaml.safe_dump([entry], sort_keys=False)
    try:
        keys = yaml.safe_load(after)
        names = [key["name"] for key in keys]
    except (yaml.YAMLError, TypeError, KeyError):
        raise ConfigError(f"{str(path)!r} is not a list of keys: nothing was changed") from None
    if names.count(entry["name"]) > 1:
        raise ConfigError(f"NAME={entry['name']!r} is in {str(path)!r} already")
    partial = path.with_name(f".{path.name}.partial")
    partial.touch(mode=0o600)
    partial.write_text(after)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
