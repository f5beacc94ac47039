"""Reading YAML configurations, and the video model's configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from litevae.config import AutoencoderConfig, StrictConfig
from litevae.errors import InvalidInput
from litevae.wavelet import check_wavelet

ConfigT = TypeVar("ConfigT", bound=StrictConfig)


class ConfigError(InvalidInput):
    """A configuration file or override is wrong; the message names the key, the value and the rule."""


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted ``key.path=value`` in a nested dictionary, in place.

    Args:
        tree: the configuration as read from YAML.
        override: ``key.path=value``; the value is read as YAML, so lists and mappings work.

    Raises:
        ConfigError: the override has no ``=``, or its path leads through a value that is not a mapping.
    """
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
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
    """Validate a nested dictionary; errors name every bad key with its value and the rule.

    Raises:
        ConfigError: an unknown key, a missing key or a bad value.
    """
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}:{error_lines(error, config_class)}") from error


def error_lines(error: ValidationError, config_class: type[BaseModel] | None = None) -> str:
    """Return a line for each error, with its key, the value and the rule; with the class, also the known keys."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        prefix = f"\n  {key}: " if key else "\n  "
        if item["type"] == "extra_forbidden":
            known = _known_keys(config_class, item["loc"][:-1])
            lines.append(f"{prefix}unknown key" + (f"; expected one of {', '.join(known)}" if known else ""))
        elif item["type"] == "missing":
            lines.append(f"{prefix}missing")
        elif isinstance(item["input"], dict):
            lines.append(f"{prefix}{item['msg']}")
        else:
            lines.append(f"{prefix}got {item['input']!r}: {item['msg']}")
    return "".join(lines)


def _known_keys(config_class: type[BaseModel] | None, path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the block at a path, or none if the path leads through something else than blocks."""
    for part in path:
        field = config_class.model_fields.get(str(part)) if config_class else None
        candidates = [field.annotation, *get_args(field.annotation)] if field else []
        blocks = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        config_class = blocks[0] if blocks else None
    return list(config_class.model_fields) if config_class else []


def load_config(config_class: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply dotted overrides and validate the result.

    The top-level key `base` names another YAML file, relative to this one, whose keys this one overrides.

    Raises:
        ConfigError: a file is missing or not a YAML mapping, or its content or an override is wrong.
    """
    tree = _read_tree(Path(path), ())
    for override in overrides:
        apply_override(tree, override)
    return parse_config(config_class, tree, str(path))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`: nested mappings are merged, other values replaced."""
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key which stands twice in a mapping, of which YAML's takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.value in lines:
                raise yaml.YAMLError(f"{key.value!r} stands twice, in lines {lines[key.value]} and {line}")
            lines[str(key.value)] = line
        return node


def _read_tree(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Return the mapping in a YAML file, merged over that of its base; `readers` are the files that led here."""
    if path.resolve() in readers:
        raise ConfigError(f"{path}: is its own base, through {', '.join(str(reader) for reader in readers)}")
    try:
        tree = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        named_by = f" (the base of {readers[-1]})" if readers else ""
        raise ConfigError(f"{path}{named_by}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of a YAML file, got {base!r}")
    return merge(_read_tree(path.parent / base, (*readers, path.resolve())), tree)


class LeanVAEConfig(AutoencoderConfig):
    """Architecture of `LeanVAE`; the defaults are the published 39.77M-parameter model with 4 latent channels.

    Attributes:
        latent_channels, latent_mean, latent_std: see `AutoencoderConfig`.
        patch_size: pixels (frames, height, width) per latent element, including the wavelet's factor 2.
        wavelet: `haar`, a discrete wavelet of pywt (in space; Haar in time), or `none` for raw pixel patches.
        streams: `separate` keeps low and high bands apart in the first layers, `joint` does not
            (LeanVAE, component ablation). Without bands, `wavelet: none`, there is one stream: `joint`.
        low_channels: width of the low band's stream.
        high_channels: width of the high bands' stream; the fused width is the sum of both.
        num_stream_layers: residual NAF layers on each stream.
        num_fusion_layers: residual NAF layers on the fused tokens.
        bottleneck: `ista` (ISTA-Net+ compressed sensing) or `linear` (an autoencoder's plain linear maps).
        ista_iterations: iterations of ISTA-Net+.
        ista_layers: NAF layers of each learned transform in an iteration.
        decoder_norm: `layer` (published) or `smc` (self-modulated linear maps instead of LayerNorm).
        patch_norm: whether the patch projections have LayerNorm before and after; in the paper it makes blocks visible.
        data_scale: factor from public pixels in [-1, 1] to those that the network was trained on ([-0.5, 0.5]).
    """

    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (4, 8, 8)
    wavelet: str = "haar"
    streams: Literal["separate", "joint"] = "separate"
    low_channels: PositiveInt = 128
    high_channels: PositiveInt = 384
    num_stream_layers: NonNegativeInt = 2
    num_fusion_layers: NonNegativeInt = 4
    bottleneck: Literal["ista", "linear"] = "ista"
    ista_iterations: PositiveInt = 2
    ista_layers: PositiveInt = 2
    decoder_norm: Literal["layer", "smc"] = "layer"
    patch_norm: bool = False
    data_scale: PositiveFloat = 0.5

    @field_validator("wavelet")
    @classmethod
    def _wavelet_is_known(cls, name: str) -> str:
        if name != "none":
            check_wavelet(name)
        return name

    @model_validator(mode="before")
    @classmethod
    def _one_stream_without_bands(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("wavelet") == "none" and "streams" not in fields:
            return {**fields, "streams": "joint"}
        return fields

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.wavelet == "none":
            if self.streams != "joint":
                raise ValueError("wavelet 'none' has no low and high bands to separate: set streams to 'joint'")
        elif any(size % 2 for size in self.patch_size):
            raise ValueError(f"patch_size {self.patch_size} must be even in each direction for a wavelet transform")
        return self

    @property
    def hidden_channels(self) -> int:
        """Width D of the fused tokens."""
        return self.low_channels + self.high_channels
