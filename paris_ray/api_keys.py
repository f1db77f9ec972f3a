"""The file of API keys: the server reads it, `jobs.new_key` writes it.

A file that ends in .yaml or .yml lists the SHA-256 of each key:

    - name: alice
      sha256: 2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90
      role: user  # the default; or admin, who may cancel requests of others
      quotas: {requests_per_minute: 60, concurrent_pictures: 8, picture_steps_per_minute: 20000}

Any other file holds one key, as it is, without quotas.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from paris_ray.errors import ConfigError

LIST_SUFFIXES = (".yaml", ".yml")
ONLY_KEY = "api_key"  # the client's name where the file holds one key
Role = Literal["user", "admin"]
Quota = Annotated[int, Field(ge=1)]


class Quotas(BaseModel):
    """What one client may ask for; None: no limit of its own.

    Attributes:
        requests_per_minute: Requests, of any kind.
        concurrent_pictures: Pictures that are drawn or wait at the same time.
        picture_steps_per_minute: Pictures times steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Quota | None = None
    concurrent_pictures: Quota | None = None
    picture_steps_per_minute: Quota | None = None


UNLIMITED = Quotas()


class Key(BaseModel):
    """One entry of the file.

    Attributes:
        name: Of the client that holds the key.
        sha256: What `digest_of` returns for it.
        role: `admin` may cancel requests of others.
        quotas: How much its holder may ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    role: Role = "user"
    quotas: Quotas = UNLIMITED


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal; keys are random, so they need no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys in a file of either kind.

    Raises:
        ConfigError: if it cannot be read, holds no key, or an entry is wrong.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file={str(path)!r} cannot be read: {error}") from None
    if path.suffix in LIST_SUFFIXES:
        return parse_keys(path, text)
    secret = text.strip()
    if not secret:
        raise ConfigError(f"api_key_file={str(path)!r} is empty: put the key in it")
    return (Key(name=ONLY_KEY, sha256=digest_of(secret)),)


def parse_keys(path: Path, text: str) -> tuple[Key, ...]:
    """Return the keys that the text of a list has.

    Args:
        path: Where it is, or will be; for the message of an error.
        text: The list, in YAML.

    Raises:
        ConfigError: if it has no key, or an entry is wrong.
    """
    try:
        keys = TypeAdapter(tuple[Key, ...]).validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"api_key_file={str(path)!r} is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"api_key_file={str(path)!r}: {where}: {first['msg']}") from None
    if not keys:
        raise ConfigError(f"api_key_file={str(path)!r} has no key: python -m jobs.new_key NAME")
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ConfigError(f"api_key_file={str(path)!r}: {field} {min(twice)!r} is there twice")
    return keys
