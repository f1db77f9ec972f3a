"""A configuration from YAML and `key=value` overrides, and the paths in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from importlib import resources
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from paris_ray.artifacts import absolute_uri
from paris_ray.config.checks import check, check_lora_run
from paris_ray.config.conversion import from_dict, to_dict
from paris_ray.config.corpus import with_own_labels
from paris_ray.config.lora import LoRARun
from paris_ray.config.sections import Config
from paris_ray.errors import ConfigError

LORA = "lora"  # the one packaged configuration that is a LoRARun

Root = TypeVar("Root", Config, LoRARun)


def packaged_configs() -> list[str]:
    """Return the names that `load` accepts beside paths."""
    folder = resources.files("paris_ray") / "configs"
    names = {entry.name for entry in folder.iterdir()} - {f"{LORA}.yaml"}
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read_yaml(name_or_path: str, packaged: Sequence[str]) -> DictConfig:
    if name_or_path in packaged:
        text = (resources.files("paris_ray") / "configs" / f"{name_or_path}.yaml").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        raise ConfigError(f"config={name_or_path!r} is neither a file nor one of {packaged}")
    loaded = OmegaConf.create(text)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config={name_or_path!r} does not hold a mapping")
    experts = loaded.get("experts")
    if isinstance(experts, DictConfig):  # YAML reads the number of an expert as an integer
        loaded["experts"] = {str(key): value for key, value in experts.items()}
    return loaded


def _allowed_keys(root: type[Any], full_key: str) -> list[str]:
    """Return the keys allowed beside a refused one."""
    section: Any = root
    for part in full_key.split(".")[:-1]:
        section = {f.name: f.type for f in fields(section)}.get(part)
    return [f.name for f in fields(section)] if is_dataclass(section) else []


@contextmanager
def _explained(root: type[Any], where: str) -> Iterator[None]:
    """Raise what OmegaConf and YAML refuse as a ConfigError in the words of a user."""
    try:
        yield
    except ConfigKeyError as error:
        key = error.full_key or ""
        allowed = ", ".join(_allowed_keys(root, key))
        raise ConfigError(f"unknown key {key!r}; allowed here: {allowed}") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}" if error.full_key else reason) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    return OmegaConf.from_dotlist(list(overrides))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Return the typed configuration of a YAML file with `key=value` overrides.

    Args:
        name_or_path: A packaged name (`quickstart`) or the path of a YAML file.
        overrides: For example `["training.steps=50", "corpus.kind=image_folder"]`.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value that is not allowed.
    """
    config = _load(Config, name_or_path, packaged_configs(), overrides)
    config = replace(config, corpus=with_own_labels(config.corpus))
    check(config)
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration with other values, given as to `load`, checked.

    Raises:
        ConfigError: like `load`.
    """
    with _explained(Config, "an override"):
        changes = _read_overrides(overrides)
        changed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), changes))
    assert isinstance(changed, Config)
    check(changed)
    return changed


def load_lora(name_or_path: str = LORA, overrides: Sequence[str] = ()) -> LoRARun:
    """Return the configuration of `jobs.train_lora`: the packaged `lora`, or a YAML file.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value that is not allowed.
    """
    run = _load(LoRARun, name_or_path, [LORA], overrides)
    check_lora_run(run)
    return run


def _load(
    root: type[Root], name_or_path: str, packaged: Sequence[str], overrides: Sequence[str]
) -> Root:
    with _explained(root, f"config={name_or_path!r} or an override"):
        changes, document = _read_overrides(overrides), _read_yaml(name_or_path, packaged)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(root), document, changes))
    assert isinstance(config, root)
    return config


def local_paths(config: Config) -> dict[str, str]:
    """Return every path that a configuration gives, by its key.

    A model may also be given by a hub name or a tag, which is no path: it counts where it exists.
    """
    models = {
        "text.path": config.text.path,
        "features.checkpoint": config.features.checkpoint,
        "codec.path": config.codec.path,
        "seed_training.init_from": config.seed_training.init_from,
        "training.init_from": config.training.init_from,
        "router_training.init_from": config.router_training.init_from,
        "distil_training.init_from": config.distil_training.init_from,
    }
    for index, overrides in config.experts.items():
        key = f"experts.{index}.training.init_from"
        models[key] = (overrides or {}).get("training", {}).get("init_from")
    paths = {
        "run_dir": config.run_dir,
        "prepared_from": config.prepared_from,
        "corpus.path": config.corpus.path,
    }
    paths |= {key: path for key, path in models.items() if Path(path or "").exists()}
    return {key: path for key, path in paths.items() if path}


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with paths that mean the same in every process."""
    values = to_dict(config)
    for key, path in local_paths(config).items():
        *sections, name = key.split(".")
        reduce(getitem, sections, values)[name] = absolute_uri(path)
    return from_dict(Config, values, "config")


def run_folder(config: Config) -> str:
    """Return `run_dir` in the form that means the same on every node."""
    return absolute_uri(config.run_dir)
