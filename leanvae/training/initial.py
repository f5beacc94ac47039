"""Fine-tuning: a new run that starts from trained weights, and frozen parameters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvae.checkpoint import load_vae
from leanvae.config import ConfigError
from leanvae.model import LeanVAE
from litevae.model import LiteVAE


@dataclass(frozen=True)
class Fit:
    """The weights that a model took from a file.

    Attributes:
        loaded: names of these weights.
        share: their share of the model's parameters.
        new: reason for each of the model's weights that starts fresh.
        unused: reason for each of the file's weights that the model cannot use.
        differences: settings of the two architectures that differ, as `field: there -> here`.
    """

    loaded: list[str]
    share: float
    new: dict[str, str]
    unused: dict[str, str]
    differences: list[str]

    @property
    def is_complete(self) -> bool:
        """Whether the file's model is the same as this one."""
        return not (self.new or self.unused or self.differences)

    def __str__(self) -> str:
        lines = [f"{100 * self.share:.1f} % of the model's parameters are loaded"]
        lines += [f"  other architecture: {difference}" for difference in self.differences]
        lines += [f"  {name} starts fresh: {reason}" for name, reason in self.new.items()]
        lines += [f"  {name} is not used: {reason}" for name, reason in self.unused.items()]
        return "\n".join(lines)


def load_initial(model: LeanVAE | LiteVAE, path: str | Path) -> Fit:
    """Load the weights of a file that match one of the model in name, shape and kind.

    Nothing is cut to size. Weights of self-modulated and plain maps are not exchanged, because their meanings differ.
    Weights of the model without a match keep their initial values.

    Args:
        model: the model, with fresh weights.
        path: anything that `load_vae` reads.

    Raises:
        ConfigError: the file cannot be read, has a weight that is not finite, or nothing in it fits.
    """
    try:
        source = load_vae(path)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"training.initial_weights: {error}") from error
    there, here = dict(source.named_parameters()), dict(model.named_parameters())
    reasons = {name: _misfit(name, source, model) for name in {**here, **there}}
    loaded = [name for name, reason in reasons.items() if reason is None]
    if not loaded:
        raise ConfigError(
            f"training.initial_weights: {path} holds a {type(source).__name__} of which nothing fits this "
            f"{type(model).__name__}: no weight has the same name and shape"
        )
    for name in loaded:
        if not there[name].isfinite().all():
            raise ConfigError(f"training.initial_weights: {path}: {name} is not finite")
        with torch.no_grad():
            here[name].copy_(there[name])
    before, now = source.config.model_dump(mode="json"), model.config.model_dump(mode="json")
    return Fit(
        loaded,
        _count(here[name] for name in loaded) / _count(here.values()),
        {name: reason for name, reason in reasons.items() if reason and name in here},
        {name: reason for name, reason in reasons.items() if reason and name not in here},
        [f"{field}: {before[field]} -> {now[field]}" for field in now if before.get(field, now[field]) != now[field]],
    )


def _misfit(name: str, source: nn.Module, model: nn.Module) -> str | None:
    """Return why a weight of the source cannot become the model's; None if it can."""
    there, here = _find(source, name), _find(model, name)
    if there is None or here is None:
        return "it is not in the file" if there is None else "the model has none"
    shapes = ["x".join(map(str, weight.shape)) for _, weight in (there, here)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0]} in the file, {shapes[1]} here"
    if there[0] != here[0]:
        return f"{shapes[0]} of a {there[0]} in the file, of a {here[0]} here"
    return None


def _find(model: nn.Module, name: str) -> tuple[str, Tensor] | None:
    """Return the kind of module that a weight belongs to, and the weight."""
    try:
        weight = model.get_parameter(name)
    except AttributeError:
        return None
    return type(model.get_submodule(name.rpartition(".")[0])).__name__, weight


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns, with wildcards `*` (also across dots), `?` and `[...]`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def frozen_names(model: nn.Module, patterns: Sequence[str], field: str = "training.freeze") -> list[str]:
    """Return the names of the parameters that patterns take out of training.

    Args:
        model: the network.
        patterns: see `matches_any`.
        field: field of the configuration, for errors.

    Returns:
        The names in the model's order.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ConfigError(f"{field}: {pattern!r} matches no parameter; their names begin with {parts}")
    frozen = [name for name in names if matches_any(name, patterns)]
    if len(frozen) == len(names):
        raise ConfigError(f"{field}: {', '.join(patterns)} leave nothing to train")
    return frozen


def check_freeze(model: nn.Module, always: Sequence[str], phases: Sequence[Sequence[str]]) -> None:
    """Check before a run that every phase leaves something to train; otherwise it would fail later.

    Args:
        model: the network.
        always: `training.freeze`.
        phases: `freeze` of each phase.

    Raises:
        ConfigError: a pattern matches no parameter, or a phase and `training.freeze` together leave nothing to train.
    """
    frozen = frozen_names(model, always)
    left = {name for name, _ in model.named_parameters()}.difference(frozen)
    for number, patterns in enumerate(phases):
        field = f"phases.{number}.freeze"
        if left.issubset(frozen_names(model, patterns, field)):
            both = f"{', '.join(patterns)} and training.freeze ({', '.join(always)})"
            raise ConfigError(f"{field}: {both} together leave nothing to train")


def freeze(model: nn.Module, patterns: Sequence[str]) -> float:
    """Freeze parameters: no gradient is computed for them, and no optimizer takes them.

    This must happen before the model gets its engine.

    Args:
        model: the network.
        patterns: see `frozen_names`.

    Returns:
        Frozen share of the model's parameters.
    """
    frozen = [model.get_parameter(name).requires_grad_(False) for name in frozen_names(model, patterns)]
    return _count(frozen) / _count(model.parameters())
