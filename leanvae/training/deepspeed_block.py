"""Checks of a configuration's `deepspeed` block."""

from collections.abc import Mapping
from typing import Any

# Settings that DeepSpeed also takes, and our fields that set them.
_KEYS_OF_OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "activation_checkpointing": "training.activation_checkpointing",
}
_EXAMPLES = {"bf16": "{enabled: true}", "zero_optimization": "{stage: 2}"}
# The other top-level keys of DeepSpeed's configuration. It ignores unknown keys, which hides misspelt ones.
_DEEPSPEED_KEYS = frozenset(
    """aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_types disable_allgather dump_state elasticity flops_profiler gradient_predivide_factor
    memory_breakdown prescale_gradients seq_parallel_communication_data_type sparse_gradients steps_per_print
    tensorboard timers torch_autocast wall_clock_breakdown wandb zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()
)


def check_block(block: Mapping[str, Any], compiles: bool) -> None:
    """Refuse settings that DeepSpeed would misunderstand.

    Args:
        block: the configuration's block `deepspeed`.
        compiles: whether torch.compile compiles the autoencoder.

    Raises:
        ValueError: a key is unknown, is set by a field of ours, or has a value that training does not support.
    """
    for key, field in _KEYS_OF_OURS.items():
        if key in block:
            raise ValueError(f"deepspeed.{key} is set by {field}: remove it from the deepspeed block")
    if "fp16" in block:
        raise ValueError("deepspeed.fp16: training in float16 is not supported, use bf16")
    for key in ("bf16", "zero_optimization"):
        if not isinstance(value := block.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key} is {value!r}: it must be a mapping, as in {_EXAMPLES[key]}")
    if (stage := block.get("zero_optimization", {}).get("stage", 0)) not in range(4):
        raise ValueError(f"deepspeed.zero_optimization.stage is {stage!r}: it must be 0, 1, 2 or 3")
    if compiles and stage == 3:
        raise ValueError(
            "training.compile: torch.compile cannot see the weights that ZeRO-3 gathers during a pass: use a lower "
            "deepspeed.zero_optimization.stage"
        )
    if unknown := sorted(block.keys() - _DEEPSPEED_KEYS):
        raise ValueError(f"deepspeed.{unknown[0]}: unknown key; DeepSpeed's are {', '.join(sorted(_DEEPSPEED_KEYS))}")
