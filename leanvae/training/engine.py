"""One network with its optimizer: under DeepSpeed, or as plain torch in a single process.

Everything that DeepSpeed wants done its way is in this file. The two engines of a GAN each have their own.
"""

import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from leanvae.config import ConfigError, describe_errors
from leanvae.distributed import barrier, on_main
from leanvae.training.checkpoints import temporary_folder
from leanvae.training.config import OptimizerConfig, TrainConfig
from leanvae.training.deepspeed_files import convert_to_universal, refusing_code
from leanvae.training.initial import matches_any
from litevae.errors import InvalidInput, MissingPackage


class Engine(Protocol):
    """What the training step needs of a network and its optimizer."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, *args: Any) -> Any:
        """Forward pass through the network."""

    def set_batch(self, batch: int, passes: int) -> None:
        """Tells the samples of all ranks in the next steps, and the passes that gradients are accumulated over."""

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one accumulation step's mean loss; the weights stay as they are."""

    def gradient_size(self) -> Tensor:
        """Sum of the norms of what this rank's backward passes brought; not finite if any of it is not."""
        ...

    def update(self) -> None:
        """Updates the weights after the last backward pass of a step; to be called by all ranks together."""

    def skip_update(self) -> None:
        """Forgets the gradients instead; weights and optimizer state stay untouched."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""

    def set_frozen(self, patterns: Sequence[str]) -> None:
        """Keeps parameters as they are in the next steps: those that a phase freezes by these patterns."""

    def training(self) -> AbstractContextManager[None]:
        """Forward and backward passes happen inside of it; frozen parameters are out of the graph there."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """All weights that are trained, in float32, the same on every rank; to be called by all ranks together."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state; to be called by all ranks together."""

    def load(self, folder: Path, ranks: int) -> None:
        """Reads what `save` of so many ranks wrote; to be called by all ranks together."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Takes the parameters out of the graph, so that a pass through them leaves their gradients alone.

    Under ZeRO it has to happen before the forward pass, and the pass must go through the bare module: its engine
    would expect a backward pass of its own.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def build_engine(
    module: nn.Module, config: TrainConfig, device: torch.device, freeze: Sequence[Sequence[str]] = ()
) -> Engine:
    """Puts a network on its device, with AdamW, under the engine that `training.engine` names.

    Args:
        freeze: patterns of the parameters that each phase freezes, for `set_frozen`.
    """
    build = PlainEngine if config.training.engine == "plain" else DeepSpeedEngine
    return build(module, config, device, freeze)


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are not frozen, with their names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


class _Groups:
    """A network's trained parameters in groups that every phase freezes or trains as a whole.

    A frozen group has no gradient and a rate of 0: the optimizer's state goes on, the weights stay to the last bit.
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
        """Takes the frozen groups out of the graph; not for longer, as DeepSpeed saves what needs no gradient apart."""
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


def adam(groups: _Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = [{"params": group} for group in groups.parameters]
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


class _GradientWatch:
    """Keeps the norms of the gradients of this rank's parameters, before an engine reduces, shards or moves them."""

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def take(self) -> Tensor:
        """The sum of the norms since the last call."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).sum()


class PlainEngine:
    """Plain torch in float32, one process. What DeepSpeed does is tested against it."""

    dtype = torch.float32

    def __init__(
        self, module: nn.Module, config: TrainConfig, device: torch.device, freeze: Sequence[Sequence[str]] = ()
    ) -> None:
        if config.deepspeed.get("bf16", {}).get("enabled"):
            raise InvalidInput("training.engine is plain, which trains in float32: turn deepspeed.bf16 off")
        self.module = module.to(device)
        self._groups = _Groups(module, freeze)
        self._optimizer = adam(self._groups, config.optimizer)
        self._watch = _GradientWatch(module)
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
        # As under DeepSpeed, weights that a step does not use, as an image none of those for frames, have a gradient
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


class DeepSpeedEngine:
    """A DeepSpeed engine: ZeRO stages 0 to 3, float32 or bfloat16."""

    _TAG = "state"

    def __init__(
        self, module: nn.Module, config: TrainConfig, device: torch.device, freeze: Sequence[Sequence[str]] = ()
    ) -> None:
        from deepspeed import initialize

        training = config.training
        settings = {
            "zero_force_ds_cpu_optimizer": False,  # ours is fused, also on CPUs
            **config.deepspeed,
            "train_micro_batch_size_per_gpu": 1,  # of the first phase, told before the first step
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.gradient_clipping,
            "steps_per_print": config.deepspeed.get("steps_per_print", 10**9),
        }
        module.to(device)
        self._groups = _Groups(module, freeze)
        optimizer = adam(self._groups, config.optimizer)
        try:
            self._engine: Any = initialize(model=module, optimizer=optimizer, config=settings)[0]
        except ValidationError as error:
            raise ConfigError(f"deepspeed block: {describe_errors(error)}") from error
        self.module: nn.Module = self._engine.module
        self._watch = _GradientWatch(self.module)
        self.dtype = torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32
        self._masters: dict[int, Tensor] = {}
        if self.dtype != torch.float32 and not self._engine.zero_optimization_stage():
            # Without ZeRO, the parameters do not know the float32 weights that the optimizer keeps of them.
            wrapped = self._engine.optimizer
            for halves, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                self._masters.update(zip(map(id, halves), masters, strict=True))

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def set_batch(self, batch: int, passes: int) -> None:
        self._engine.set_train_micro_batch_size(batch // (dist.get_world_size() * passes))
        self._engine.set_train_batch_size(batch)
        self._engine.micro_steps = 0  # by which the engine knows the last pass of a step
        if hasattr(self._engine.optimizer, "gradient_accumulation_steps"):
            self._engine.optimizer.gradient_accumulation_steps = passes  # ZeRO's copy

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the pass

    def gradient_size(self) -> Tensor:
        return self._watch.take()

    def update(self) -> None:
        self._engine.step()
        self._forget_gradients()

    def skip_update(self) -> None:
        # DeepSpeed's step clears the gradients, wherever a ZeRO stage keeps them. With an optimizer that does nothing,
        # it copies the same float32 weights to where they came from.
        optimizer = self._engine.basic_optimizer
        optimizer.step = lambda *_, **__: None
        try:
            self._engine.step()
        finally:
            del optimizer.step  # which hid the method of its class
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        # ZeRO-3, and ZeRO-1 and 2 when offloaded, write each gradient over that of the step before, which weights that
        # a step does not use would get.
        optimizer = self._engine.optimizer
        offloaded = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        kept = [getattr(optimizer, "grad_partitions_flat_buffer", None)]
        kept += [group.grad for name in offloaded for group in getattr(optimizer, name, ())]
        for gradients in kept:
            if gradients is not None:
                gradients.zero_()

    def set_learning_rate(self, rate: float) -> None:
        self._groups.set_rate(self._engine.optimizer, rate)

    def set_frozen(self, patterns: Sequence[str]) -> None:
        self._groups.freeze(patterns)

    def training(self) -> AbstractContextManager[None]:
        return self._groups.out_of_graph()

    def full_weights(self) -> dict[str, Tensor]:
        return {name: self._full_weight(parameter) for name, parameter in self._groups.named}

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        """A weight in float32: whole also under ZeRO-3, and the optimizer's precise one in bfloat16."""
        from deepspeed.utils import safe_get_full_fp32_param

        stage = self._engine.zero_optimization_stage()
        if stage == 3 or (stage and self.dtype != torch.float32):
            full = safe_get_full_fp32_param(parameter)
            assert full is not None
            return full.detach()
        return self._masters.get(id(parameter), parameter).detach()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=self._TAG, save_latest=False)

    def load(self, folder: Path, ranks: int) -> None:
        if not self._engine.zero_optimization_stage() or ranks == dist.get_world_size():
            self._load(folder)
            return
        # The shards of other ranks: DeepSpeed's universal checkpoints hold whole tensors, which each rank slices.
        converted = temporary_folder(folder.parent.with_name(f"{folder.parent.name}_{folder.name}"))
        on_main(lambda: convert_to_universal(folder / self._TAG, converted / self._TAG))
        self._engine._config.load_universal_checkpoint = True
        try:
            self._load(converted)
        finally:
            self._engine._config.load_universal_checkpoint = False
        barrier()
        on_main(lambda: shutil.rmtree(converted))

    def _load(self, folder: Path) -> None:
        with refusing_code():
            path, _ = self._engine.load_checkpoint(str(folder), tag=self._TAG)
        if path is None:
            raise InvalidInput(f"{folder}: DeepSpeed found no complete checkpoint of this run's ZeRO stage")


def start_processes(engine: str) -> torch.device:
    """Joins the ranks that a launcher started, or makes a world of one, and returns this rank's device.

    Works under `deepspeed`, `torchrun` and plain `python`.

    Raises:
        ValueError: `engine` is plain and there are several ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if engine == "plain":
        if world_size > 1:
            raise InvalidInput(f"training.engine is plain: it runs in one process, not in {world_size} ranks")
        return device
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackage(
            "training.engine is deepspeed, which is not installed: pip install 'leanvae[train]', "
            "or --set training.engine=plain"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device
