"""One network with its optimizer: under DeepSpeed, or as plain torch in a single process.

Everything that DeepSpeed wants done its way is in this file. The two engines of a GAN each have their own.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from leanvae.config import ConfigError, describe_errors
from leanvae.training.config import OptimizerConfig, TrainConfig


class Engine(Protocol):
    """What the training step needs of a network and its optimizer."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, *args: Any) -> Any:
        """Forward pass through the network."""

    def start_phase(self, batch: int, passes: int) -> None:
        """Tells the samples of all ranks in a step, and the passes that its gradients are accumulated over."""

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one accumulation step's mean loss; after the last one the weights are updated."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in float32, the same on every rank; to be called by all ranks together."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state; to be called by all ranks together."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; to be called by all ranks together."""


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


def build_engine(module: nn.Module, config: TrainConfig, device: torch.device) -> Engine:
    """Puts a network on its device, with AdamW, under the engine that `training.engine` names."""
    build = PlainEngine if config.training.engine == "plain" else DeepSpeedEngine
    return build(module, config, device)


def adam(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


class PlainEngine:
    """Plain torch in float32, one process. What DeepSpeed does is tested against it."""

    dtype = torch.float32

    def __init__(self, module: nn.Module, config: TrainConfig, device: torch.device) -> None:
        if config.deepspeed.get("bf16", {}).get("enabled"):
            raise ValueError("training.engine is plain, which trains in float32: turn deepspeed.bf16 off")
        self.module = module.to(device)
        self._optimizer = adam(module, config.optimizer)
        self._clipping = config.training.gradient_clipping
        self._passes_a_step, self._passes = 1, 0

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def start_phase(self, batch: int, passes: int) -> None:
        self._passes_a_step, self._passes = passes, 0

    def backward(self, loss: Tensor) -> None:
        (loss / self._passes_a_step).backward()
        self._passes += 1
        if self._passes % self._passes_a_step == 0:
            if self._clipping:
                nn.utils.clip_grad_norm_(self.module.parameters(), self._clipping)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def full_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().float() for name, parameter in self.module.named_parameters()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """A DeepSpeed engine: ZeRO stages 0 to 3, float32 or bfloat16."""

    _TAG = "state"

    def __init__(self, module: nn.Module, config: TrainConfig, device: torch.device) -> None:
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
        try:
            self._engine: Any = initialize(model=module, optimizer=adam(module, config.optimizer), config=settings)[0]
        except ValidationError as error:
            raise ConfigError(f"deepspeed block: {describe_errors(error)}") from error
        self._engine.checkpoint_engine = _safe_checkpoint_engine(self._engine.checkpoint_engine)
        self.module: nn.Module = self._engine.module
        self.dtype = torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32
        self._masters: dict[int, Tensor] = {}
        if self.dtype != torch.float32 and not self._engine.zero_optimization_stage():
            # Without ZeRO, the parameters do not know the float32 weights that the optimizer keeps of them.
            wrapped = self._engine.optimizer
            for halves, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                self._masters.update(zip(map(id, halves), masters, strict=True))

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def start_phase(self, batch: int, passes: int) -> None:
        self._engine.set_train_micro_batch_size(batch // (dist.get_world_size() * passes))
        self._engine.set_train_batch_size(batch)
        self._engine.micro_steps = 0  # by which the engine knows the last pass of a step
        if hasattr(self._engine.optimizer, "gradient_accumulation_steps"):
            self._engine.optimizer.gradient_accumulation_steps = passes  # ZeRO's copy

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def full_weights(self) -> dict[str, Tensor]:
        return {name: self._full_weight(parameter) for name, parameter in self.module.named_parameters()}

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

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=self._TAG)
        if path is None:
            raise ValueError(
                f"{folder}: DeepSpeed found no complete checkpoint of this run's ZeRO stage and rank count"
            )


def _safe_checkpoint_engine(original: Any) -> Any:
    """DeepSpeed's own reader of checkpoint files, except that it refuses pickled code."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(_deepspeed_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)

    if type(original) is not TorchCheckpointEngine:
        raise ValueError("deepspeed.checkpoint: only DeepSpeed's standard checkpoint writer can be used here")
    safe = SafeCheckpointEngine()
    safe.zipfile_serialization = original.zipfile_serialization
    return safe


def _deepspeed_classes() -> list[Any]:
    """What DeepSpeed puts into its checkpoints besides tensors and plain containers."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


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
            raise ValueError(f"training.engine is plain: it runs in one process, not in {world_size} ranks")
        return device
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
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
