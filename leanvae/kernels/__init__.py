"""Triton kernels, each a custom operator with its own backward; elsewhere plain torch replaces them.

`LEANVAE_KERNELS=0` in the environment, read when this package is first imported, switches them off.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["usable"]

_ENABLED = os.environ.get("LEANVAE_KERNELS", "1") != "0" and find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(x: Tensor) -> bool:
    """Tell whether the kernels run on the device of `x` and in its dtype; they cannot be launched on empty tensors."""
    return _ENABLED and x.is_cuda and x.dtype in _DTYPES and x.numel() > 0
