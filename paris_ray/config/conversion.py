"""Sections from JSON and back, the setup of single experts, and what a result depends on."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config.fleet import FleetConfig
from paris_ray.config.lora import LoRARun
from paris_ray.config.models import ExpertConfig
from paris_ray.config.recipes import OFF
from paris_ray.config.sections import RESOURCE_KEYS, Config
from paris_ray.config.training import TrainingConfig
from paris_ray.errors import ConfigError

Section = TypeVar("Section")


def from_dict(section: type[Section], values: object, source: str) -> Section:
    """Return one configuration section from parsed JSON that may come from a stranger.

    Args:
        section: The dataclass.
        values: The parsed document.
        source: What to call the document in an error.

    Raises:
        ConfigError: for an unknown key, a wrong type or an interpolation.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source} does not hold a mapping")
    if "${" in str(values):  # OmegaConf would expand it, for example to environment variables
        raise ConfigError(f"{source} holds an interpolation, which is not allowed here")
    try:
        found = typed(section, OmegaConf.merge(OmegaConf.structured(section), values))
    except ConfigKeyError as error:
        allowed = ", ".join(to_dict(section))
        raise ConfigError(
            f"{source}: unknown key {error.full_key!r}; allowed here: {allowed}"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except (TypeError, ValueError, OverflowError) as error:  # such as numbers of hundreds of digits
        raise ConfigError(f"{source}: {error}") from None
    return found


def typed(root: type[Section], merged: Any) -> Section:
    """Return the section that OmegaConf holds.

    Raises:
        ConfigError: if a list has a list or a mapping where it is to have a single value, which
            OmegaConf does not look at.
    """
    found = OmegaConf.to_object(merged)
    assert isinstance(found, root)
    _refuse_nested(found, "")
    return found


def _refuse_nested(section: Any, where: str) -> None:
    for field in fields(section):
        value, name = getattr(section, field.name), f"{where}{field.name}"
        if is_dataclass(value):
            _refuse_nested(value, f"{name}.")
        elif "dict" not in str(field.type) and _has_containers(value):
            raise ConfigError(f"{name}={value!r:.80} is not allowed: a list of single values")


def _has_containers(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(
        isinstance(item, list | tuple | dict) for item in value
    )


def to_yaml(config: Config | LoRARun | FleetConfig) -> str:
    """Return the resolved configuration as YAML that `load`, or `with_fleet`, reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(section: Any) -> dict[str, Any]:
    """Return a configuration section as plain JSON values."""
    container = OmegaConf.to_container(OmegaConf.structured(section))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def expert_setup(config: Config, index: int) -> Config:
    """Return the configuration of expert `index` alone: its overrides applied, no other's left.

    Raises:
        ConfigError: if `experts.<index>` has an unknown key or a wrong type.
    """
    source = f"experts.{index}"
    overrides = config.experts.get(str(index)) or {}
    merged = {"expert": to_dict(config.expert), "training": to_dict(config.training)}
    if not isinstance(overrides, dict) or overrides.keys() - merged.keys():
        raise ConfigError(f"{source}={overrides!r} is not allowed: a mapping of expert, training")
    for name, values in overrides.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{source}.{name}={values!r} is not allowed: a mapping")
        merged[name] |= values
    return replace(
        config,
        expert=from_dict(ExpertConfig, merged["expert"], f"{source}.expert"),
        training=from_dict(TrainingConfig, merged["training"], f"{source}.training"),
        experts={},
    )


def _decisive(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _decisive(v) for k, v in value.items() if not _says_nothing(k, v)}


def _says_nothing(key: str, value: Any) -> bool:
    return key in RESOURCE_KEYS or (key in OFF and value == OFF[key])


def identity(section: Any) -> dict[str, Any]:
    """Return what of a section decides results: all but `RESOURCE_KEYS` and recipes that are off.

    Where and how fast a stage runs does not count: a run may be continued on other machines.
    """
    values: dict[str, Any] = _decisive(to_dict(section))
    return values


def digest(config: Config | LoRARun, *sections: str) -> str:
    """Return the digest of the named top-level sections, which identify a stage's result."""
    tree = identity(config)
    return sha256_hex(canonical_json({name: tree[name] for name in sections}))
