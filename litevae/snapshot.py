"""A model's twin for inference, which shares the model's tensors except those replaced by prepared ones."""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def make_twin(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Copy modules, not their tensors.

    Args:
        module: the module to copy.
        replace: gives a substitute for a module and everything inside it, or None to copy it.
    """
    if (replacement := replace(module)) is not None:
        return replacement
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else make_twin(child, replace) for name, child in module._modules.items()
    }
    return twin


@dataclass(frozen=True)
class Snapshot:
    """A twin, and the state of the weights when it was made.

    Attributes:
        twin: computes with the weights of that time.
        make: makes another twin.
        state: changes if a weight does.
    """

    twin: Any
    make: Callable[[], Any]
    state: Hashable


class Preparable(nn.Module):
    """A model that may hold a snapshot of itself for inference.

    The snapshot is not part of state dicts and copies. It is dropped if the model trains, moves or loads weights. If
    weights change in place, the next call prepares them again. Only writes through `.data` go unnoticed.
    """

    _snapshot: Snapshot | None = None

    def keep_snapshot(self, make: Callable[[], Any]) -> None:
        """Compute with what `make` returns from now on."""
        with torch.no_grad():
            self._snapshot = Snapshot(make(), make, _state(self))

    @property
    def layers(self) -> Any:
        """The module that computes: the snapshot's twin if there is one, else the model itself.

        Under autocast it is the model, because torch decides for each operation which weights to cast.
        """
        snapshot = self._snapshot
        if snapshot is None or torch.is_autocast_enabled(next(self.parameters()).device.type):
            return self
        if not torch.compiler.is_compiling() and snapshot.state != _state(self):
            self.keep_snapshot(snapshot.make)
            return self.layers
        return snapshot.twin

    def train(self, mode: bool = True) -> Any:
        """Switch modes as `nn.Module.train` does; a model in training drops its snapshot."""
        if mode:
            self._snapshot = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._snapshot = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._snapshot = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_snapshot": None}  # packed weights cannot be copied


def _state(model: nn.Module) -> Hashable:
    return tuple((id(weight), weight.data_ptr(), _version(weight)) for weight in model.parameters())


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # inference tensors do not count their versions
