"""A network with its optimizer under DeepSpeed, and DeepSpeed's checkpoint files.

Everything specific to DeepSpeed is in this file.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from leanvae.config import ConfigError, error_lines
from leanvae.distributed import barrier, on_main
from leanvae.training.checkpoints import temporary_folder
from leanvae.training.config import TrainConfig
from leanvae.training.engine import GradientWatch, Groups, adam
from litevae.errors import InvalidInput, MissingPackage

_TESTED = "deepspeed>=0.19,<0.20"


class DeepSpeedEngine:
    """A DeepSpeed engine: ZeRO stages 0 to 3, float32 or bfloat16."""

    _TAG = "state"

    def __init__(
        self, module: nn.Module, config: TrainConfig, device: torch.device, freeze: Sequence[Sequence[str]] = ()
    ) -> None:
        from deepspeed import initialize

        training = config.training
        settings = {
            "zero_force_ds_cpu_optimizer": False,  # ours is fused, even on CPUs
            **config.deepspeed,
            "train_micro_batch_size_per_gpu": 1,  # of the first phase, told before the first step
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.gradient_clipping,
            "steps_per_print": config.deepspeed.get("steps_per_print", 10**9),
        }
        module.to(device)
        self._groups = Groups(module, freeze)
        optimizer = adam(self._groups, config.optimizer)
        try:
            self._engine: Any = initialize(model=module, optimizer=optimizer, config=settings)[0]
        except ValidationError as error:
            raise ConfigError(f"deepspeed block: {error_lines(error)}") from error
        check_attributes(self._engine)
        self._stage: int = self._engine.zero_optimization_stage()
        self.module: nn.Module = self._engine.module
        self._watch = GradientWatch(self.module)
        self.dtype = torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32
        self._masters: dict[int, Tensor] = {}
        if self.dtype != torch.float32 and not self._stage:
            # Without ZeRO, parameters have no link to the optimizer's float32 weights.
            wrapped = self._engine.optimizer
            for halves, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                self._masters.update(zip(map(id, halves), masters, strict=True))

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def set_batch(self, batch: int, passes: int) -> None:
        self._engine.set_train_micro_batch_size(batch // (dist.get_world_size() * passes))
        self._engine.set_train_batch_size(batch)
        self._engine.micro_steps = 0  # tells the engine which pass is a step's last
        if _is_sharded(self._engine):
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
        # DeepSpeed's step clears the gradients at every ZeRO stage. With an optimizer that does nothing, it only copies
        # the unchanged float32 weights back.
        optimizer = self._engine.basic_optimizer
        optimizer.step = lambda *_, **__: None
        try:
            self._engine.step()
        finally:
            del optimizer.step  # restores the method of its class
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        # ZeRO-3, and offloaded ZeRO-1 and 2, overwrite the previous step's gradients. Weights that a step does not use
        # would keep them.
        if not _is_sharded(self._engine):
            return
        kept = [group.grad for group in getattr(self._engine.optimizer, _GROUPS[self._stage])]
        if self._stage == 3:
            kept.append(self._engine.optimizer.grad_partitions_flat_buffer)
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
        """Return a weight in float32: whole under ZeRO-3; in bfloat16, the optimizer's precise copy."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 3 or (self._stage and self.dtype != torch.float32):
            full = safe_get_full_fp32_param(parameter)
            assert full is not None
            return full.detach()
        return self._masters.get(id(parameter), parameter).detach()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=self._TAG, save_latest=False)

    def load(self, folder: Path, ranks: int) -> None:
        if not self._stage or ranks == dist.get_world_size():
            self._load(folder)
            return
        # Another number of ranks: DeepSpeed's universal checkpoints hold whole tensors, which each rank slices.
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


# Float32 weights that a rank's optimizer updates, by ZeRO stage.
_GROUPS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}


def _is_sharded(engine: Any) -> bool:
    """Return whether ZeRO's own optimizer is in use; at stage 1 with float32 sums (`data_types`) it is not."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return engine.zero_optimization_stage() > 0 and not isinstance(engine.optimizer, BF16_Optimizer)


def check_attributes(engine: Any) -> None:
    """Check that DeepSpeed has the private attributes used here at the engine's ZeRO stage.

    A missing one would otherwise be noticed days into a run, or never.

    Raises:
        MissingPackage: this version of DeepSpeed lacks one.
    """
    import deepspeed

    stage = engine.zero_optimization_stage()
    of_optimizer: tuple[str, ...] = ()
    if _is_sharded(engine):
        of_optimizer = ("gradient_accumulation_steps", _GROUPS[stage])
        of_optimizer += ("grad_partitions_flat_buffer",) if stage == 3 else ()
    elif not stage and engine.bfloat16_enabled():
        of_optimizer = ("fp16_groups", "fp32_groups")
    for owner, names in (
        (engine, ("basic_optimizer", "micro_steps")),
        (engine._config, ("load_universal_checkpoint",)),
        (engine.optimizer, of_optimizer),
    ):
        for name in names:
            if not hasattr(owner, name):
                raise MissingPackage(
                    f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{name}, which training at ZeRO "
                    f"stage {stage} uses: pip install '{_TESTED}'"
                )


def convert_to_universal(source: Path, target: Path) -> None:
    """Join all ranks' shards to whole tensors for any number of ranks, by DeepSpeed's own program.

    Args:
        source: folder of one engine's files, of ZeRO stage 1, 2 or 3.
        target: the universal checkpoint; the content of its parent is removed first.
    """
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    shutil.rmtree(target.parent, ignore_errors=True)
    with refusing_code(), open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        ds_to_universal.main(settings)


@contextmanager
def refusing_code() -> Iterator[None]:
    """Let DeepSpeed unpickle tensors, plain containers and a few classes of its own, but no code.

    DeepSpeed makes torch.load unpickle everything, which an environment variable of torch overrides.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
