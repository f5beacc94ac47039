"""Work-around for a torchvision built for CUDA beside a torch that was not.

Such a torchvision cannot load its operators. Its import then fails because `torchvision::nms` has no schema, and so do
those of `lpips` and `torchmetrics`. They do not use these operators, so the schemas suffice to import all three.
"""

import importlib
from functools import cache

import torch

_MISSING_SCHEMAS = ("nms", "qnms")


@cache
def _define_missing_schemas() -> torch.library.Library:
    """Declare the operators without kernels; the returned library must stay alive, so it is cached."""
    library = torch.library.Library("torchvision", "DEF")
    for name in _MISSING_SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def prepare_torchvision() -> bool:
    """Make `import torchvision`, and everything that imports it, work if only its operators are missing.

    Call it before importing `lpips`, `torchmetrics` or `torchvision`. A torchvision that imports without help is left
    alone; one that fails for another reason raises its own error.

    Returns:
        True if torchvision can be imported, False if it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or "does not exist" not in str(error):
            raise
        _define_missing_schemas()
        importlib.import_module("torchvision")
    return True
