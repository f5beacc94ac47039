"""A network with its optimizer: the interface for the training step, and plain torch in a single process.

The two networks of a GAN each have their own engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from leanvae.training.config import OptimizerConfig, TrainConfig
from leanvae.training.initial import matches_any
from litevae.errors import InvalidInput


class Engine(Protocol):
    """The interface of a network and its optimizer for the training step."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, *args: Any) -> Any:
        """Pass through the network."""

    def set_batch(self, batch: int, passes: int) -> None:
        """Set the samples of all ranks in the next steps, and the passes over which gradients are accumulated."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a pass's mean loss, without changing the weights."""

    def gradient_size(self) -> Tensor:
        """Return the sum of the norms of this rank's gradients; it is finite only if all of them are."""
        ...

    def update(self) -> None:
        """Update the weights after the last backward pass of a step; all ranks together."""

    def skip_update(self) -> None:
        """Drop the gradients instead, without changing weights and optimizer state."""

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next update."""

    def set_frozen(self, patterns: Sequence[str]) -> None:
        """Freeze the parameters that match a phase's patterns, in the next steps."""

    def training(self) -> AbstractContextManager[None]:
        """Open a block for forward and backward passes, in which frozen parameters are out of the graph."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """Return all trained weights in float32, the same on every rank; all ranks together."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; all ranks together."""

    def load(self, folder: Path, ranks: int) -> None:
        """Read what `save` wrote on this number of ranks; all ranks together."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Take the parameters out of the graph, so that a pass through them leaves their gradients alone.

    Under ZeRO this must happen before the forward pass, and the pass must use the bare module, because its engine would
    expect a backward pass.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are not frozen, with their names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


class Groups:
    """A network's trained parameters in groups that every phase freezes or trains as a whole.

    A frozen group has no gradient and a rate of 0: the optimizer's state continues, the weights stay to the last bit.
    """

    def __init__(self, module: nn.Module, freeze: Sequence[Sequence[str]]) -> None:
        groups: dict[tuple[bool, ...], dict[str, nn.Parameter]] = {}
        for name, parameter in trained(module):
            key = tuple(matches_any(name, patterns) for patterns in freeze)
            groups.setdefault(key, {})[name] = parameter
        self._groups = list(groups.values())
        self._frozen = [False] * len(groups)

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        return [list(group.values()) for group in self._groups]

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [pair for group in self._groups for pair in group.items()]

    def freeze(self, patterns: Sequence[str]) -> None:
        self._frozen = [matches_any(next(iter(group)), patterns) for group in self._groups]

    @contextmanager
    def out_of_graph(self) -> Iterator[None]:
        """Take the frozen groups out of the graph for a block; DeepSpeed saves parameters without gradients apart."""
        frozen = [p for group, off in zip(self.parameters, self._frozen, strict=True) if off for p in group]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def set_rate(self, optimizer: Any, rate: float) -> None:
        for group, is_frozen in zip(optimizer.param_groups, self._frozen, strict=True):
            group["lr"] = 0.0 if is_frozen else rate


def adam(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = [{"params": group} for group in groups.parameters]
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


class GradientWatch:
    """The norms of this rank's gradients, taken before an engine reduces, shards or moves them."""

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def take(self) -> Tensor:
        """Return the sum of the norms since the last call."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).sum()


class PlainEngine:
    """Plain torch in float32 and one process, the reference for tests of DeepSpeed."""

    dtype = torch.float32

    def __init__(
        self, module: nn.Module, config: TrainConfig, device: torch.device, freeze: Sequence[Sequence[str]] = ()
    ) -> None:
        if config.deepspeed.get("bf16", {}).get("enabled"):
            raise InvalidInput("training.engine is plain, which trains in float32: turn deepspeed.bf16 off")
        self.module = module.to(device)
        self._groups = Groups(module, freeze)
        self._optimizer = adam(self._groups, config.optimizer)
        self._watch = GradientWatch(module)
        self._clipping = config.training.gradient_clipping
        self._passes = 1

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def set_batch(self, batch: int, passes: int) -> None:
        self._passes = passes

    def backward(self, loss: Tensor) -> None:
        (loss / self._passes).backward()

    def gradient_size(self) -> Tensor:
        return self._watch.take()

    def update(self) -> None:
        # As under DeepSpeed, weights that a step does not use (an image uses none of those for frames) have a gradient
        # of zero, with which the optimizer goes on.
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if self._clipping:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clipping)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def skip_update(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        self._groups.set_rate(self._optimizer, rate)

    def set_frozen(self, patterns: Sequence[str]) -> None:
        self._groups.freeze(patterns)

    def training(self) -> AbstractContextManager[None]:
        return self._groups.out_of_graph()

    def full_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().float() for name, parameter in self._groups.named}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path, ranks: int) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
