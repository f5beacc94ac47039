"""What inference computes with in place of a module's weights, and when it goes away."""

from typing import Any

from torch import nn


class Preparable(nn.Module):
    """A module whose weights can be folded, padded or packed for inference; the weights themselves stay as they are.

    `prepared` stands beside the parameters, in no state dict, and is computed from them once. It is dropped as soon
    as they may change: by `train()`, by a move to another device or dtype, and by loading weights. A copy of the
    module starts without it.
    """

    prepared: Any = None

    def prepare(self) -> None:
        """Computes `prepared` from the weights as they are now."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Preparable":
        """As `nn.Module.train`; training drops what was prepared."""
        if mode:
            self.prepared = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "Preparable":
        self.prepared = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "prepared": None}  # packed weights cannot be copied


def prepare(module: nn.Module) -> None:
    """Prepares what is preparable in a module; of what is inside of it, it needs nothing more."""
    if isinstance(module, Preparable):
        module.prepare()
        if module.prepared is not None:
            return
    for child in module.children():
        prepare(child)
