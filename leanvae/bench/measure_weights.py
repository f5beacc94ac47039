"""Measures weights on a fixed list of held-out clips, beside the best linear codec of their training data.

    python -m leanvae.bench.measure_weights configs/held_out_17x256.csv --config configs/lean_small_c16.yaml
        --checkpoint lean-small-c16

A clip is 17 frames from the first one that the list names; their short side is brought to 256 pixels, and the centre is
cut out. PSNR is that of 8-bit frames, its mean over the frames and then over the clips. The linear codec is the
truncated Karhunen-Loeve transform of samples of the configuration's training files: what training starts at.
"""

import argparse
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from leanvae.checkpoint import build_vae, load_vae
from leanvae.config import load_config
from leanvae.data.samples import Cut, cut_picture
from leanvae.media.errors import MediaError
from leanvae.media.folder import open_clip
from leanvae.media.item import Item
from leanvae.metrics.artefacts import ErrorSteps
from leanvae.metrics.frames import psnr
from leanvae.model import LeanVAE
from leanvae.training.build import find_items, find_start, make_schedule
from leanvae.training.config import TrainVideoConfig
from leanvae.training.start import start_model
from litevae.errors import InvalidInput
from litevae.pixels import from_bytes, to_bytes

NUM_FRAMES, SIDE = 17, 256


def read_listed_clips(path: Path, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the clips of a list, `(1, 3, 17, 256, 256)` in [0, 1], with a name each.

    Args:
        path: CSV with the columns `path` and `first_frame`.
        folder: what the paths are relative to.

    Raises:
        MediaError: a file is missing, cannot be decoded or ends before.
    """
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            first, address = int(row["first_frame"]), str(folder / row["path"])
            with open_clip(Item(address, "clip")) as reader:
                frames = list(itertools.islice(reader.frames(), first, first + NUM_FRAMES))
            if len(frames) < NUM_FRAMES:
                raise MediaError(address, f"too short: {first + NUM_FRAMES} frames needed")
            pictures = [cut_picture(frame.image, (SIDE, SIDE), Cut(), SIDE) for frame in frames]
            yield f"{row['path']}@{first}", from_bytes(np.stack(pictures)).movedim(0, 1)[None]


@torch.no_grad()
def measure_clip(vae: LeanVAE, clip: Tensor) -> tuple[float, float | None]:
    """Return the PSNR in dB and the block score of a clip `(1, 3, T, H, W)` in [0, 1]."""
    posterior = vae.encode(2 * clip - 1)
    output = (vae.decode(posterior.mean, posterior.size).clamp(-1, 1) + 1) / 2
    frames, reference = output[0].movedim(1, 0), clip[0].movedim(1, 0)
    frames = from_bytes(to_bytes(frames))
    steps = ErrorSteps(SIDE, SIDE, vae.config.patch_size[1])
    steps.update(frames, reference)
    return float(psnr(frames, reference).mean()), steps.block_score()


def linear_codec(config: TrainVideoConfig) -> LeanVAE:
    """Return the best linear codec of a configuration's training files.

    Raises:
        InvalidInput: the model has no linear skeleton, or no sample can be used.
    """
    items, _ = find_items(config.data)
    start = find_start(config, make_schedule(config, items))
    model = build_vae(config.model)
    if start is None or not isinstance(model, LeanVAE):
        raise InvalidInput(f"training.start is {config.training.start}: a linear codec needs klt")
    start_model(model, start)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each clip and the means."""
    parser = argparse.ArgumentParser(prog="python -m leanvae.bench.measure_weights", description=__doc__)
    parser.add_argument("list", type=Path, help="CSV with the columns path and first_frame")
    parser.add_argument("--config", required=True, help="what the weights were trained with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a setting")
    parser.add_argument("--checkpoint", action="append", default=[], help="name or folder; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path(), help="what the list's paths are relative to")
    options = parser.parse_args(arguments)
    codecs = {"linear": linear_codec(load_config(TrainVideoConfig, options.config, options.set))}
    for name in options.checkpoint:
        vae = load_vae(name)
        if not isinstance(vae, LeanVAE):
            raise InvalidInput(f"{name}: a video model is needed")
        codecs[name] = vae.eval()
    figures: dict[str, list[tuple[float, float | None]]] = {name: [] for name in codecs}
    for label, clip in read_listed_clips(options.list, options.folder):
        for name, vae in codecs.items():
            figures[name].append(measure_clip(vae, clip))
        print(label, *(f"{name} {values[-1][0]:.2f} dB" for name, values in figures.items()), sep="  ", flush=True)
    for name, values in figures.items():
        blocks = [score for _, score in values if score is not None]
        print(f"{name}: {fmean(value for value, _ in values):.2f} dB, block score {fmean(blocks):.3f}")


if __name__ == "__main__":
    main()
