"""Shows where the error of reconstructions lies: flat areas or edges, motion, frames, spatial scales.

    python -m leanvae.bench.measure_errors configs/held_out_17x256.csv --checkpoint lean-small-c16 --folder data/dev

For each part: its share of the values, its share of the squared error, and the PSNR within it, over all clips of a list
(see `measure_weights`). A part with more error than values is where quality is lost.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from leanvae.bench.measure_weights import read_listed_clips
from leanvae.checkpoint import load_vae
from leanvae.model import LeanVAE
from litevae.errors import InvalidInput
from litevae.wavelet import multilevel_dwt2d

FLAT, EDGE, MOTION = 2 / 255, 12 / 255, 6 / 255

Sums = dict[str, tuple[float, int]]  # part: summed squared error, number of values


def split_error(reference: Tensor, output: Tensor, group: int) -> dict[str, Sums]:
    """Split a clip's squared error in several ways.

    Args:
        reference: `(3, T, H, W)` in [0, 1], H and W divisible by 8, T = 1 + n groups.
        output: the same shape.
        group: frames that share a latent frame.

    Returns:
        Parts by surface (steps of the reference's luma to its neighbours), place of the frame in its group, and scale
        in space (Haar bands), which add up to the whole error; and by motion (change of luma since the frame before)
        and change within the group, which add up to the error after the first frame. Each is a sum of squared errors
        and the number of values in it.
    """
    error = output - reference
    squared = error.square()
    luma = reference.mean(dim=0)
    steps = torch.zeros_like(luma)
    steps[:, :-1] = luma.diff(dim=1).abs()
    steps[..., :-1] = torch.maximum(steps[..., :-1], luma.diff(dim=2).abs())
    change = luma.diff(dim=0).abs()
    pyramid = multilevel_dwt2d(error.movedim(1, 0), 3)  # orthonormal: it keeps the sum of squares
    groups = error[:, 1:].unflatten(1, (-1, group))
    mean = groups.mean(dim=2, keepdim=True).expand_as(groups)
    return {
        "surface": {
            "flat": _sums(squared[:, steps <= FLAT]),
            "texture": _sums(squared[:, (steps > FLAT) & (steps <= EDGE)]),
            "edges": _sums(squared[:, steps > EDGE]),
        },
        "motion": {
            "still": _sums(squared[:, 1:][:, change <= MOTION]),
            "moving": _sums(squared[:, 1:][:, change > MOTION]),
        },
        "frame": {"first": _sums(squared[:, 0])}
        | {f"{index + 1} of its group": _sums(squared[:, 1 + index :: group]) for index in range(group)},
        "scale": {
            f"{2**level} to {2 ** (level + 1)} pixels": _sums(bands[:, 3:].square())
            for level, bands in enumerate(pyramid)
        }
        | {"8 pixels and more": _sums(pyramid[-1][:, :3].square())},
        "time": {
            "mean of its group": _sums(mean.square()),
            "change within its group": _sums((groups - mean).square()),
        },
    }


def _sums(squared: Tensor) -> tuple[float, int]:
    return squared.sum(dtype=torch.float64).item(), squared.numel()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m leanvae.bench.measure_errors", description=__doc__)
    parser.add_argument("list", type=Path, help="CSV with the columns path and first_frame")
    parser.add_argument("--checkpoint", action="append", required=True, help="name or folder; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path(), help="what the list's paths are relative to")
    options = parser.parse_args(arguments)
    for name in options.checkpoint:
        vae = load_vae(name)
        if not isinstance(vae, LeanVAE):
            raise InvalidInput(f"{name}: a video model is needed")
        totals: dict[str, dict[str, tuple[float, int]]] = {}
        for _, clip in read_listed_clips(options.list, options.folder):
            output = (vae(2 * clip - 1)[0].clamp(-1, 1) + 1) / 2
            for way, parts in split_error(clip[0], output[0], vae.config.patch_size[0]).items():
                for part, (error, count) in parts.items():
                    before = totals.setdefault(way, {}).get(part, (0.0, 0))
                    totals[way][part] = before[0] + error, before[1] + count
        print(name)
        for way, parts in totals.items():
            errors, counts = (sum(values) for values in zip(*parts.values(), strict=True))
            for part, (error, count) in parts.items():
                level = f", {-10 * math.log10(error / count):.2f} dB" if way != "time" and error else ""
                values = f"{count / counts:6.1%} of values, " if way != "time" else ""
                print(f"  {way:8}{part:24}{values}{error / errors:6.1%} of the error{level}")


if __name__ == "__main__":
    main()
