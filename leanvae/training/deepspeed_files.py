"""DeepSpeed's checkpoint files: read without unpickling code, and converted for another number of ranks."""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch


def convert_to_universal(source: Path, target: Path) -> None:
    """Makes whole tensors of the shards of all ranks, which any number of ranks can load, with DeepSpeed's own program.

    Args:
        source: folder of one engine's files, of ZeRO stage 1, 2 or 3.
        target: the universal checkpoint; what is in its parent is removed first.
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
    """Lets DeepSpeed unpickle tensors, plain containers and a few classes of its own, but no code.

    It tells torch.load to unpickle everything; torch has a variable of the environment against that.
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
