"""HDR and wide-gamut video as sRGB: tone mapping by ITU-R BT.2390, and conversion of primaries; free of torch.

The rule: PQ says how many nits each of R, G and B has, and HLG is shown on a display of 1,000 nits (ITU-R BT.2100).
Each of the three then goes through the curve of ITU-R BT.2390-11, section 5.4.1, from a peak of 1,000 nits, above
which all is white, to one of 203, the reference white of ITU-R BT.2408, with black at 0. The result goes from its
primaries to BT.709, is clipped there, and is coded by sRGB's curve with 203 nits as white. What a file says about its
mastering display is not used: the same light is the same pixel in all files. SDR of other primaries is read and coded
by sRGB's curve.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from litevae.errors import extra

with extra("video"):
    import cv2

# ITU-T H.273 code points.
UNSPECIFIED = 2
PQ, HLG = 16, 18
HDR_TRANSFERS = {PQ: "PQ (SMPTE ST 2084)", HLG: "HLG (ARIB STD-B67)"}
_BT709, _BT2020, _DCI_P3, _DISPLAY_P3 = 1, 9, 11, 12
_CHROMATICITIES = {  # x and y of red, green and blue; the white of all is taken as D65, so that white stays white
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    _DCI_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    _DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
WIDE_PRIMARIES = {_BT2020: "BT.2020", _DCI_P3: "DCI P3", _DISPLAY_P3: "Display P3"}
_D65 = (0.3127, 0.3290)

PEAK, WHITE = 1000.0, 203.0  # nits of the brightest source, and of SDR's white
_PQ_PEAK = 10_000.0
_M1, _M2, _C1, _C2, _C3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128  # SMPTE ST 2084
_HLG_A, _HLG_B, _HLG_C, _HLG_GAMMA = 0.17883277, 0.28466892, 0.55991073, 1.2  # ITU-R BT.2100, for 1,000 nits
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_STEPS = 65535


def to_srgb(pixels: NDArray[np.uint16], white: int, transfer: int, primaries: int) -> NDArray[np.uint8]:
    """Convert (H, W, 3) R'G'B' to 8-bit sRGB.

    Args:
        white: the largest code; black is 0.
        transfer: H.273 code point; all but PQ and HLG are taken for sRGB's.
        primaries: H.273 code point; all but the wide ones are taken for BT.709's, and those of HDR, if they are not
            specified, for BT.2020's.
    """
    if transfer in HDR_TRANSFERS and primaries == UNSPECIFIED:
        primaries = _BT2020
    light = _to_light(white, transfer)[pixels]
    if transfer == HLG:  # from the scene's light to the display's
        luminance = light @ _BT2020_LUMINANCE
        light *= PEAK * luminance[..., None] ** np.float32(_HLG_GAMMA - 1)
    if transfer in HDR_TRANSFERS:
        light = _tone_curve()[_to_index(light / np.float32(_PQ_PEAK))]
    if primaries in WIDE_PRIMARIES:
        light = np.asarray(cv2.transform(light, _to_bt709(primaries)), np.float32)
    return _srgb_codes()[_to_index(light)]


def _to_index(light: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Find light of 0 to 1 in a table whose steps are as even to the eye."""
    return (np.sqrt(np.sqrt(np.clip(light, 0, 1))) * _STEPS + 0.5).astype(np.uint16)


def _table() -> NDArray[np.float64]:
    """Compute the light, from 0 to 1, for each index."""
    return (np.arange(_STEPS + 1) / _STEPS) ** 4


@lru_cache
def _to_light(white: int, transfer: int) -> NDArray[np.float32]:
    """Compute light by 16-bit code: nits of PQ, the scene's light from 0 to 1 of HLG, the display's of others."""
    code = np.minimum(np.arange(2**16) / white, 1)
    if transfer == PQ:
        light = _PQ_PEAK * pq_to_light(code)
    elif transfer == HLG:
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - _HLG_C) / _HLG_A) + _HLG_B) / 12)
    else:
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@lru_cache
def _tone_curve() -> NDArray[np.float32]:
    """Compute SDR light from 0 to 1, for each index of light from 0 to 10,000 nits."""
    return (_PQ_PEAK / WHITE * pq_to_light(compress(light_to_pq(_table())))).astype(np.float32)


@lru_cache
def _srgb_codes() -> NDArray[np.uint8]:
    light = _table()
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * code).astype(np.uint8)


@lru_cache
def _to_bt709(primaries: int) -> NDArray[np.float32]:
    """Compute the matrix that brings linear light to BT.709's primaries."""
    return np.linalg.solve(_to_xyz(_BT709), _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: int) -> NDArray[np.float64]:
    """Compute the matrix from linear light to CIE XYZ (SMPTE RP 177)."""
    x, y = np.transpose((*_CHROMATICITIES[primaries], _D65))
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


def pq_to_light(code: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert a PQ code from 0 to 1 to light from 0 to 1, for 10,000 nits (SMPTE ST 2084)."""
    power = code ** (1 / _M2)
    return (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def light_to_pq(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Invert `pq_to_light`."""
    power = light**_M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def compress(code: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring PQ codes up to that of the source's peak below that of SDR's white (BT.2390, 5.4.1, black at 0)."""
    peak, white = light_to_pq(np.array([PEAK, WHITE]) / _PQ_PEAK)
    e1 = np.minimum(code / peak, 1)
    largest = white / peak
    knee = 1.5 * largest - 0.5
    t = (e1 - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * largest
    return peak * np.where(e1 < knee, e1, spline)
