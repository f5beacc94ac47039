"""Linear maps made ready for inference: a norm's scale and shift go into the weights, widths become even ones.

Sums are formed in float64 and rounded once, to the dtype of the weights.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH_MULTIPLE = 32  # matrix kernels like widths that it divides; the published 1,365 becomes 1,376


class LinearMap(NamedTuple):
    """A linear map of channels-last tokens.

    Attributes:
        weight: `(O, I)`.
        bias: `(O,)`, or `None`.
    """

    weight: Tensor
    bias: Tensor | None


def fold_norm(weight: Tensor, norm: nn.LayerNorm) -> LinearMap:
    """The map of tokens normalised without scale and shift that equals `weight` after `norm`.

    Args:
        weight: `(O, I)`.
        norm: over I channels.
    """
    scaled = weight.double() * norm.weight.double()
    return LinearMap(scaled.to(weight.dtype), (weight.double() @ norm.bias.double()).to(weight.dtype))


def pad_outputs(linear: LinearMap, multiple: int = WIDTH_MULTIPLE) -> LinearMap:
    """Adds outputs that are always zero until `multiple` divides their number."""
    extra = -len(linear.weight) % multiple
    bias = None if linear.bias is None else F.pad(linear.bias, (0, extra))
    return LinearMap(F.pad(linear.weight, (0, 0, 0, extra)), bias)


def pad_inputs(weight: Tensor, multiple: int = WIDTH_MULTIPLE) -> Tensor:
    """Adds inputs that do not matter until `multiple` divides their number."""
    return F.pad(weight, (0, -weight.shape[1] % multiple))
