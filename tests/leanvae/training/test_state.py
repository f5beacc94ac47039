"""Errors about a checkpoint that cannot be read."""

import pickle

import pytest
import torch

from leanvae.config import ConfigError
from leanvae.training.state import _naming


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
        RuntimeError("Error(s) in loading state_dict for LeanVAE: size mismatch for logvar.weight"),
        pickle.UnpicklingError("invalid load key"),
        TypeError("RunState.__init__() missing 1 required positional argument: 'step'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_damage_names_the_part(tmp_path, error):
    with pytest.raises(ConfigError, match=r"vae is damaged .*--resume"), _naming(tmp_path / "vae"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_a_device_or_of_another_rank_are_no_damage(tmp_path, error):
    with pytest.raises(type(error)) as caught, _naming(tmp_path / "vae"):
        raise error
    assert caught.value is error
