"""A configuration from YAML and `key=value` overrides, and the paths in it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from importlib import resources
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from paris_ray.config.checks import check, check_lora_run
from paris_ray.config.conversion import from_dict, to_dict, typed
from paris_ray.config.corpus import with_own_labels
from paris_ray.config.fleet import FleetConfig, GpuConfig
from paris_ray.config.lora import LoRARun
from paris_ray.config.sections import Config
from paris_ray.errors import ConfigError
from paris_ray.folders import absolute_uri
from paris_ray.json_documents import MAX_NESTING

LORA = "lora"  # the one packaged configuration that is a LoRARun
RECIPES, RECIPE_SIGN = "recipes", "+"  # the folder in configs/, and what stands before each
MAX_VALUES = 100_000  # of a file; ours have some hundred
EXPERTS = "experts"  # the section of what differs for single experts

Root = TypeVar("Root", Config, LoRARun)


def packaged_configs() -> list[str]:
    """Return the names that `load` accepts beside paths."""
    folder = resources.files("paris_ray") / "configs"
    names = {entry.name for entry in folder.iterdir()} - {f"{LORA}.yaml"}
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def packaged_recipes() -> list[str]:
    """Return the names of recipes that `load` adds to a configuration."""
    folder = resources.files("paris_ray") / "configs" / RECIPES
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())


def recipe_overrides(recipes: str) -> list[str]:
    """Return what recipes joined by `+` change of a configuration, as overrides.

    Raises:
        ConfigError: if there is no such recipe.
    """
    overrides = []
    for recipe in recipes.split(RECIPE_SIGN):
        if recipe not in packaged_recipes():
            raise ConfigError(
                f"recipe={recipe!r} is not allowed: one of {', '.join(packaged_recipes())}"
            )
        name = f"{RECIPES}/{recipe}"
        sections: Any = OmegaConf.to_container(_read_yaml(name, [name]))
        overrides += [
            f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for section, values in sections.items()
            for key, value in values.items()
        ]
    return overrides


def _read_yaml(name_or_path: str, packaged: Sequence[str], option: str = "config") -> DictConfig:
    where = f"{option}={name_or_path!r}"
    if name_or_path in packaged:
        text = (resources.files("paris_ray") / "configs" / f"{name_or_path}.yaml").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        others = f"neither a file nor one of {packaged}" if packaged else "no file"
        raise ConfigError(f"{where} is {others}")
    _check_size(text)
    loaded = OmegaConf.create(text)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{where} does not hold a mapping")
    experts = loaded.get(EXPERTS)
    if isinstance(experts, DictConfig):  # YAML reads the number of an expert as an integer
        loaded[EXPERTS] = {str(key): value for key, value in experts.items()}
    return loaded


def read_values(text: str) -> dict[str, Any]:
    """Return what a resolved configuration says, of whatever version it is, as plain values.

    Raises:
        ConfigError: if it is no mapping in YAML, or too large.
    """
    try:
        _check_size(text)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the configuration is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("the configuration does not hold a mapping")
    return values


def _check_size(text: str) -> None:
    """Raise ConfigError if YAML has too many values, those again that it names again."""
    _num_values(yaml.compose(text, yaml.SafeLoader), {})


def _num_values(node: yaml.Node | None, known: dict[int, int], depth: int = 0) -> int:
    """Return how many values a document has, those again that it names again.

    Names for values that hold names could stand for more than fits into memory.

    Args:
        node: The document, or a part of it.
        known: Receives the number of values of each part, by its identity.
        depth: In how many others the part is.

    Raises:
        ConfigError: if there are too many, or they are nested too deeply.
    """
    if depth > MAX_NESTING:
        raise ConfigError(f"the configuration is nested more than {MAX_NESTING} times")
    if isinstance(node, yaml.CollectionNode) and id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ((n,) for n in node.value)
        parts = (part for pair in pairs for part in pair)
        known[id(node)] = 1 + sum(_num_values(part, known, depth + 1) for part in parts)
    count = known.get(id(node), 1)
    if count > MAX_VALUES:
        raise ConfigError(f"the configuration has more than {MAX_VALUES} values")
    return count


def _declared(root: type[Any], keys: Sequence[str]) -> Any:
    """Return the type that the tree declares at a path of keys; Any where it declares none."""
    if keys[:1] == [EXPERTS]:
        keys = keys[2:]  # what one expert overrides has the types that it has for all
    declared: Any = root
    for key in keys:
        if is_dataclass(declared):
            declared = {f.name: f.type for f in fields(declared)}.get(key, Any)
        else:
            declared = get_args(declared)[1] if get_origin(declared) is dict else Any
    return declared


def _allowed_keys(root: type[Any], full_key: str) -> list[str]:
    """Return the keys allowed beside a refused one."""
    section = _declared(root, full_key.split(".")[:-1])
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
    except ConfigError:
        raise
    # A list where a mapping belongs or the other way round, what is not UTF-8, endless numbers.
    except (TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_overrides(root: type[Any], overrides: Sequence[str]) -> DictConfig:
    """Return what overrides say: text as it was given, everything else as YAML reads it."""
    changes = OmegaConf.create()
    for override in overrides:
        key, is_given, value = override.partition("=")
        if not is_given:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        declared = _declared(root, key.split("."))
        if declared in (str, str | None):
            OmegaConf.update(changes, key, _read_text(key, value, declared))
        else:
            changes.merge_with_dotlist([override])
    return changes


def _read_text(key: str, value: str, declared: Any) -> str | None:
    """Return a text, which the shell has cut out already: nothing in it is YAML.

    Raises:
        ConfigError: if it is empty, or holds a variable that the shell did not replace.
    """
    if value == "null" and declared is not str:
        return None
    if not value:
        none = "" if declared is str else ", or null for none"
        raise ConfigError(f"{key}= is not allowed: a text{none}; is a variable of the shell unset?")
    if "${" in value:
        raise ConfigError(
            f"{key}={value!r} is not allowed: no ${{...}} here; single quotes keep the shell from "
            "replacing a variable"
        )
    return value


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Return the typed configuration of a YAML file with `key=value` overrides.

    Args:
        name_or_path: A packaged name (`quickstart`) or the path of a YAML file, and recipes that
            are added to it (`quickstart+muon`).
        overrides: For example `["training.steps=50", "corpus.kind=image_folder"]`. What is text
            is taken as it stands, but `null` where text may be absent; the rest is read as YAML.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value that is not allowed.
    """
    if RECIPE_SIGN in name_or_path and not Path(name_or_path).is_file():
        name_or_path, _, recipes = name_or_path.partition(RECIPE_SIGN)
        overrides = [*recipe_overrides(recipes), *overrides]
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
        changes = _read_overrides(Config, overrides)
        changed = typed(Config, OmegaConf.merge(OmegaConf.structured(config), changes))
    check(changed)
    return changed


def with_fleet(config: Config, path: str) -> Config:
    """Return a configuration whose section `fleet` has the values of a YAML file, checked.

    Args:
        config: What the file leaves out stays as it is here.
        path: Of a file with the keys of `FleetConfig`, such as docs/examples/fleet.yaml.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    with _explained(FleetConfig, f"fleet={path!r}"):
        given = _read_yaml(path, (), "fleet")
        values: Any = OmegaConf.to_container(given)
        gpus = values.get("gpus")
        for i, gpu in enumerate(gpus if isinstance(gpus, list) else ()):
            from_dict(GpuConfig, gpu, f"fleet={path!r}: gpus[{i}]")  # tells of which it is
        fleet = typed(FleetConfig, OmegaConf.merge(OmegaConf.structured(config.fleet), given))
    changed = replace(config, fleet=fleet)
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
        changes, document = _read_overrides(root, overrides), _read_yaml(name_or_path, packaged)
        return typed(root, OmegaConf.merge(OmegaConf.structured(root), document, changes))


def local_paths(config: Config) -> dict[str, str]:
    """Return every path that a configuration gives, by its key.

    A model may also be given by a hub name or a tag, which is no path: it counts where it exists.
    """
    models = {
        "text.path": config.text.path,
        "features.checkpoint": config.features.checkpoint,
        "codec.path": config.codec.path,
        "corpus.filters.clip.checkpoint": config.corpus.filters.clip.checkpoint,
        "corpus.filters.aesthetic_model": config.corpus.filters.aesthetic_model,
        "corpus.filters.nsfw_model": config.corpus.filters.nsfw_model,
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
        "federation.folder": config.federation.folder,
        "corpus.path": config.corpus.path,
    }
    paths |= {key: path for key, path in models.items() if path is not None and _is_there(path)}
    return {key: path for key, path in paths.items() if path}


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # its name is too long for one
        return False


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
