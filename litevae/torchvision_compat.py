"""The one work-around for a torchvision that was built for CUDA beside a torch that was not.

Such a torchvision cannot load its operators, then fails to import because `torchvision::nms` has no schema,
and takes `lpips` and `torchmetrics` down with it. Neither uses these operators: with the schemas alone, all
three import.
"""

import importlib
from functools import cache

import torch

_MISSING_SCHEMAS = ("nms", "qnms")


@cache
def _define_missing_schemas() -> torch.library.Library:
    """Declares the operators without kernels; the returned library must stay alive, so it is cached."""
    library = torch.library.Library("torchvision", "DEF")
    for name in _MISSING_SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def prepare_torchvision() -> bool:
    """Makes `import torchvision`, and all that imports it, work where only its operators are missing.

    Call it before importing `lpips`, `torchmetrics` or `torchvision` itself. A torchvision that imports by
    itself is left alone; one that fails for another reason raises its own error.

    Returns:
        True when torchvision can be imported, False when it is not installed.
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
