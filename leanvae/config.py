"""Reading of YAML configurations, and the video model's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from litevae.config import StrictConfig

ConfigT = TypeVar("ConfigT", bound=StrictConfig)


class ConfigError(ValueError):
    """A configuration file or override is wrong; the message names the key, the value and the rule."""


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted ``key.path=value`` in a nested dictionary, in place.

    Args:
        tree: the configuration as read from YAML.
        override: ``key.path=value``; the value is read as YAML, so lists and mappings work.

    Raises:
        ConfigError: the override has no ``=``, or its path runs through a value that is no mapping.
    """
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is no valid YAML: {error}") from error
    node = tree
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(keys[: depth + 1])} is {child!r}, not a mapping")
        node = child
    node[keys[-1]] = value


def parse_config(config_class: type[ConfigT], tree: dict[str, Any], origin: str) -> ConfigT:
    """Validates a nested dictionary; errors name every bad key with its value and what is allowed.

    Raises:
        ConfigError: an unknown key, a missing key or a bad value.
    """
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole configuration)"
            if item["type"] == "extra_forbidden":
                lines.append(f"  {key}: unknown key")
            elif item["type"] == "missing":
                lines.append(f"  {key}: missing")
            else:
                lines.append(f"  {key}: got {item['input']!r}: {item['msg']}")
        raise ConfigError(f"{origin}:\n" + "\n".join(lines)) from error


def load_config(config_class: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file, applies dotted overrides and validates the result.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or its content or an override is wrong.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, got {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(config_class, tree, str(path))
