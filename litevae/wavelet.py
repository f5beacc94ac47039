"""Wavelet transforms on tensors: Haar as a butterfly, other wavelets by boundary-wavelet matrices.

In the channel axis, the band is the outer part and the colour the inner one. All transforms halve each transformed axis
exactly and are exactly invertible; Haar is orthonormal.
"""

import warnings
from functools import cache

import pywt
import torch
from torch import Tensor

HAAR = "haar"
_SQRT_HALF = 0.5**0.5


@cache
def _float64_matrices(wavelet: str, length: int) -> tuple[Tensor, Tensor]:
    """Return the analysis matrix of ptwt's boundary wavelets and its inverse, both `(length, length)` float64."""
    from ptwt.matmul_transform import construct_boundary_a

    # Made outside inference mode, because gradients of later calls may flow through the cached matrices.
    with torch.inference_mode(False), warnings.catch_warnings():
        # torch warns about the sparse tensors that ptwt uses.
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        analysis = construct_boundary_a(wavelet, length, dtype=torch.float64).to_dense()
        # Not ptwt's synthesis matrix, which does not invert biorthogonal wavelets.
        return analysis, torch.linalg.inv(analysis)


@cache
def _matrices(wavelet: str, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    analysis, synthesis = _float64_matrices(wavelet, length)
    with torch.inference_mode(False):
        return analysis.to(device, dtype), synthesis.to(device, dtype)


def _apply_along(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """Multiply `matrix` onto one axis of `x` in the matrix's precision; return `x`'s dtype."""
    return (x.movedim(axis, -1).to(matrix.dtype) @ matrix.T).to(x.dtype).movedim(-1, axis)


def _matrix_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_wavelet(wavelet: str) -> None:
    """Raise `ValueError` unless pywt knows a discrete wavelet of this name."""
    if wavelet != HAAR and wavelet not in pywt.wavelist(kind="discrete"):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"wavelet {wavelet!r} is not one of pywt's discrete wavelets (haar, db2, sym4, ...)")


def _analyse(x: Tensor, axis: int, wavelet: str) -> tuple[Tensor, Tensor]:
    """Split one axis into its low and high half-band, each half as long."""
    length = x.shape[axis]
    if length % 2:
        raise ValueError(f"axis {axis} of shape {tuple(x.shape)} has odd length {length}: pad it to an even one")
    if wavelet == HAAR:
        even, odd = x.unflatten(axis, (length // 2, 2)).unbind(axis if axis < 0 else axis + 1)
        return (even + odd) * _SQRT_HALF, (even - odd) * _SQRT_HALF
    shortest = pywt.Wavelet(wavelet).dec_len  # pyright: ignore[reportAttributeAccessIssue]
    if length < shortest:
        raise ValueError(
            f"axis {axis} of shape {tuple(x.shape)} has length {length}: wavelet {wavelet!r} needs at least {shortest}"
        )
    analysis, _ = _matrices(wavelet, length, _matrix_dtype(x), x.device)
    low, high = _apply_along(analysis, x, axis).chunk(2, dim=axis)
    return low, high


def _synthesise(low: Tensor, high: Tensor, axis: int, wavelet: str) -> Tensor:
    """Invert `_analyse` exactly."""
    if wavelet == HAAR:
        pair = torch.stack(((low + high) * _SQRT_HALF, (low - high) * _SQRT_HALF), dim=axis if axis < 0 else axis + 1)
        return pair.flatten(axis - 1, axis) if axis < 0 else pair.flatten(axis, axis + 1)
    bands = torch.cat((low, high), dim=axis)
    _, synthesis = _matrices(wavelet, bands.shape[axis], _matrix_dtype(bands), bands.device)
    return _apply_along(synthesis, bands, axis)


def _split(x: Tensor, axes: tuple[tuple[int, str], ...]) -> Tensor:
    """Split axes in turn into bands in binary order, the first axis most significant, low before high."""
    bands = [x]
    for axis, wavelet in axes:
        bands = [half for band in bands for half in _analyse(band, axis, wavelet)]
    return torch.cat(bands, dim=1)


def _merge(x: Tensor, axes: tuple[tuple[int, str], ...]) -> Tensor:
    """Invert `_split` exactly."""
    num_bands = 2 ** len(axes)
    if x.shape[1] % num_bands:
        raise ValueError(f"{x.shape[1]} channels are not divisible by {num_bands} bands")
    bands = list(x.chunk(num_bands, dim=1))
    for axis, wavelet in reversed(axes):
        bands = [_synthesise(low, high, axis, wavelet) for low, high in zip(bands[::2], bands[1::2], strict=True)]
    return bands[0]


def _axes2d(wavelet: str) -> tuple[tuple[int, str], ...]:
    # Width first gives pywt's order of bands: LL, (W low, H high), (W high, H low), HH.
    return ((-1, wavelet), (-2, wavelet))


def _axes3d(wavelet: str) -> tuple[tuple[int, str], ...]:
    return ((-3, HAAR), (-2, wavelet), (-1, wavelet))


def dwt2d(x: Tensor, wavelet: str = HAAR) -> Tensor:
    """Apply one level of the 2D wavelet transform to the last two axes.

    Args:
        x: `(B, C, ..., H, W)`, H and W even; float32, bfloat16 or float64.
        wavelet: `haar` or any discrete wavelet of pywt.

    Returns:
        `(B, 4C, ..., H/2, W/2)`: bands LL, (W low, H high), (W high, H low), HH.

    Raises:
        ValueError: H or W is odd, or shorter than the wavelet.
    """
    return _split(x, _axes2d(wavelet))


def idwt2d(bands: Tensor, wavelet: str = HAAR) -> Tensor:
    """Invert `dwt2d` exactly: `(B, 4C, ..., H, W)` to `(B, C, ..., 2H, 2W)`."""
    return _merge(bands, _axes2d(wavelet))


def dwt3d(x: Tensor, wavelet: str = HAAR) -> Tensor:
    """Apply one level of the 3D wavelet transform, Haar in time and `wavelet` in space.

    Args:
        x: `(B, C, T, H, W)`, T, H and W even.
        wavelet: the wavelet of the two spatial axes.

    Returns:
        `(B, 8C, T/2, H/2, W/2)`: bands in binary order over (T, H, W), T most significant, low before high.

    Raises:
        ValueError: T, H or W is odd, or H or W is shorter than the wavelet.
    """
    return _split(x, _axes3d(wavelet))


def idwt3d(bands: Tensor, wavelet: str = HAAR) -> Tensor:
    """Invert `dwt3d` exactly: `(B, 8C, T, H, W)` to `(B, C, 2T, 2H, 2W)`."""
    return _merge(bands, _axes3d(wavelet))


def multilevel_dwt2d(x: Tensor, levels: int, wavelet: str = HAAR) -> list[Tensor]:
    """Return the 2D bands of every level; each level transforms the low band of the previous one.

    Args:
        x: `(B, C, ..., H, W)`, H and W divisible by `2**levels`.
        levels: number of levels, at least 1.
        wavelet: as in `dwt2d`.

    Returns:
        `levels` tensors, the l-th (from 1) `(B, 4C, ..., H/2**l, W/2**l)`, its own low band included.

    Raises:
        ValueError: `levels` is below 1, or a size is odd or too short on the way.
    """
    return _multilevel(x, levels, _axes2d(wavelet))


def multilevel_idwt2d(pyramid: list[Tensor], wavelet: str = HAAR) -> Tensor:
    """Invert `multilevel_dwt2d` exactly; of all but the deepest level only the high bands are read."""
    return _multilevel_inverse(pyramid, _axes2d(wavelet))


def multilevel_dwt3d(x: Tensor, levels: int, wavelet: str = HAAR) -> list[Tensor]:
    """Return the 3D bands of every level, as `multilevel_dwt2d`: the l-th `(B, 8C, T/2**l, H/2**l, W/2**l)`.

    Args:
        x: `(B, C, T, H, W)`, T, H and W divisible by `2**levels`.
        levels: number of levels, at least 1.
        wavelet: as in `dwt3d`.

    Raises:
        ValueError: `levels` is below 1, or a size is odd or too short on the way.
    """
    return _multilevel(x, levels, _axes3d(wavelet))


def multilevel_idwt3d(pyramid: list[Tensor], wavelet: str = HAAR) -> Tensor:
    """Invert `multilevel_dwt3d` exactly; of all but the deepest level only the high bands are read."""
    return _multilevel_inverse(pyramid, _axes3d(wavelet))


def _multilevel(x: Tensor, levels: int, axes: tuple[tuple[int, str], ...]) -> list[Tensor]:
    if levels < 1:
        raise ValueError(f"levels is {levels}: expected at least 1")
    pyramid = []
    low = x
    for _ in range(levels):
        bands = _split(low, axes)
        low = bands.narrow(1, 0, low.shape[1])
        pyramid.append(bands)
    return pyramid


def _multilevel_inverse(pyramid: list[Tensor], axes: tuple[tuple[int, str], ...]) -> Tensor:
    x = _merge(pyramid[-1], axes)
    for bands in reversed(pyramid[:-1]):
        channels = x.shape[1]
        x = _merge(torch.cat((x, bands.narrow(1, channels, bands.shape[1] - channels)), dim=1), axes)
    return x
