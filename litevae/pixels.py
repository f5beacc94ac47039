"""Pixels at a model's boundary: what it accepts, and how sizes are padded and cropped."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from litevae.errors import InvalidInput

_SHAPES = {4: "(B, 3, H, W)", 5: "(B, 3, T, H, W)"}
_LARGEST = 1.5  # resizing overshoots edges, and decoded pixels are not clamped; other scales lie far outside


def check_pixels(x: Tensor, num_axes: Collection[int] = (4, 5)) -> None:
    """Raise `InvalidInput` unless `x` holds floating-point images or clips of three colours, about in [-1, 1].

    Args:
        x: `(B, 3, H, W)` or `(B, 3, T, H, W)`; up to 1.5 passes, since resizing overshoots edges.
        num_axes: which of the two are allowed, by their number of axes.
    """
    if x.ndim not in num_axes or x.shape[1] != 3 or 0 in x.shape:
        expected = " or ".join(_SHAPES[number] for number in num_axes)
        raise InvalidInput(f"input has shape {tuple(x.shape)}: expected {expected}{_remedy_of_shape(x, num_axes)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise InvalidInput(f"input has dtype {x.dtype}: expected floating point in [-1, 1]")
    # Reading values would break a compiled graph; on the meta device there are none.
    is_blind = torch.compiler.is_compiling() or x.is_meta
    # The smallest and the largest are enough, since NaN is both; a mask would be as large as the input.
    lowest, highest = (0, 0) if is_blind else torch.stack(x.detach().aminmax()).tolist()
    if not x.is_floating_point():
        raise InvalidInput(
            f"input has dtype {x.dtype} and values from {lowest} to {highest}: expected floating point in [-1, 1]; "
            "if white is 255, pass x.float() / 127.5 - 1"
        )
    if not math.isfinite(highest - lowest):
        raise InvalidInput("input holds values that are not finite: expected pixels in [-1, 1]")
    if max(-lowest, highest) > _LARGEST:
        raise InvalidInput(
            f"input holds values from {lowest:.4g} to {highest:.4g}: expected pixels in [-1, 1]"
            f"{_remedy_of_range(lowest, highest)}"
        )


def _remedy_of_shape(x: Tensor, num_axes: Collection[int]) -> str:
    """Return advice for inputs that are not batches, have their colours last or are empty."""
    if 0 in x.shape:
        return ", each at least 1"
    if x.ndim + 1 in num_axes and x.shape[0] == 3:
        return "; x[None] makes it a batch of one"
    if x.ndim in num_axes and x.shape[-1] == 3:
        return "; x.movedim(-1, 1) brings its colours there"
    if x.ndim == 5 and x.shape[2] == 3 and 5 in num_axes:
        return "; x.transpose(1, 2) swaps time and colours"
    return ""


def _remedy_of_range(lowest: float, highest: float) -> str:
    """Return the division for pixels that are still 8-bit or 16-bit numbers."""
    for peak in (255, 65535):
        if lowest >= 0 and highest <= peak:
            return f"; if white is {peak}, pass x / {peak / 2} - 1"
    return ""


def check_dtype(x: Tensor, weight: Tensor, name: str = "input") -> None:
    """Raise `InvalidInput` unless a tensor has the dtype of the weights, or autocast converts it."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise InvalidInput(
            f"{name} has dtype {x.dtype} and the model {weight.dtype}: convert one of them, as in x.to({weight.dtype})"
        )


def pad_to_multiple(x: Tensor, step: int) -> Tensor:
    """Replicate the last row and column of `(B, C, H, W)` until `step` divides H and W."""
    right, bottom = -x.shape[3] % step, -x.shape[2] % step
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if right or bottom else x


def crop(x: Tensor, size: Sequence[int], step: Sequence[int]) -> Tensor:
    """Cut off the padding at the end of the last axes.

    Args:
        x: `(B, C, H, W)` or `(B, C, T, H, W)`, padded.
        size: true size of these axes, `(H, W)` or `(T, H, W)`.
        step: bound of each axis's padding; less than this is cut.

    Raises:
        ValueError: this size is not padded to the shape of `x`.
    """
    padded = tuple(x.shape[2:])
    if len(size) != len(padded) or any(
        not 0 <= have - want < most for have, want, most in zip(padded, size, step, strict=True)
    ):
        raise InvalidInput(
            f"size {tuple(size)} does not fit this latent: it decodes to {padded} before cropping, "
            f"and less than {tuple(step)} can be cropped away"
        )
    return x[(..., *(slice(length) for length in size))]


def to_bytes(frames: Tensor) -> NDArray[np.uint8]:
    """Round frames `(N, 3, H, W)` in [0, 1] to bytes `(N, H, W, 3)`."""
    return (255 * frames).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def from_bytes(images: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """Convert bytes `(N, H, W, 3)` to float32 frames `(N, 3, H, W)` in [0, 1] on a device."""
    return torch.from_numpy(images).to(device).movedim(-1, 1).float() / 255
