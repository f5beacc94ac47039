"""Measures weights on a fixed list of held-out clips, beside the best linear codec of their training data.

    python -m leanvae.bench.measure_weights configs/held_out_17x256.csv --config configs/lean_small_c16.yaml
        --checkpoint lean-small-c16

A clip is 17 frames from the first one that the list names; their short side is brought to 256 pixels, and the centre is
cut out. PSNR is that of 8-bit frames, its mean over the frames and then over the clips. The linear codec is the
truncated Karhunen-Loeve transform of samples of the configuration's training files: what training starts at.

`--bits 8` adds JPEG and H.264 at the size of the latents with so many bits a value, to which they are then rounded.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
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

Codec = Callable[[NDArray[np.uint8], int], tuple[int, NDArray[np.uint8]]]  # frames and quality; bytes and frames


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
def measure_clip(vae: LeanVAE, clip: Tensor, bits: int | None = None) -> tuple[float, float | None]:
    """Return the PSNR in dB and the block score of a clip `(1, 3, T, H, W)` in [0, 1]; latents rounded to `bits`."""
    posterior = vae.encode(2 * clip - 1)
    latent = posterior.mean
    if bits:
        step = latent.abs().amax(dim=(0, 2, 3, 4), keepdim=True) / (2 ** (bits - 1) - 1)
        latent = (latent / step).round() * step
    output = (vae.decode(latent, posterior.size).clamp(-1, 1) + 1) / 2
    frames, reference = output[0].movedim(1, 0), clip[0].movedim(1, 0)
    frames = from_bytes(to_bytes(frames))
    steps = ErrorSteps(SIDE, SIDE, vae.config.patch_size[1])
    steps.update(frames, reference)
    return float(psnr(frames, reference).mean()), steps.block_score()


def jpeg(frames: NDArray[np.uint8], quality: int) -> tuple[int, NDArray[np.uint8]]:
    """Return the bytes of frames `(T, H, W, 3)` as JPEG with chroma of full size, and what is decoded."""
    files = [BytesIO() for _ in frames]
    for frame, file in zip(frames, files, strict=True):
        Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return sum(len(file.getvalue()) for file in files), np.stack(
        [np.array(Image.open(file), np.uint8) for file in files]
    )


def h264(frames: NDArray[np.uint8], quality: int) -> tuple[int, NDArray[np.uint8]]:
    """Return the bytes of frames `(T, H, W, 3)` as H.264 with chroma of full size, and what is decoded."""
    file = BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(51 - quality), "preset": "slow"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        packets = [packet for frame in frames for packet in stream.encode(av.VideoFrame.from_ndarray(frame))]
        packets += stream.encode(None)
        size = sum(packet.size for packet in packets)
        container.mux(packets)
    file.seek(0)
    with av.open(file, "r") as container:
        return size, np.stack([np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode()])


def psnr_at(
    size: float, clip: Tensor, codec: Callable[[NDArray[np.uint8], int], tuple[int, NDArray[np.uint8]]]
) -> float:
    """Return the PSNR in dB of a clip `(1, 3, T, H, W)` in [0, 1] by the best codec of up to `size` bytes."""
    frames = to_bytes(clip[0].movedim(1, 0))
    low, high = 0, 96 if codec is jpeg else 51
    while low < high:
        quality = (low + high + 1) // 2
        low, high = (quality, high) if codec(frames, quality)[0] <= size else (low, quality - 1)
    return float(psnr(from_bytes(codec(frames, low)[1]), from_bytes(frames)).mean())


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
    parser.add_argument("--bits", type=int, help="bits of a latent value, for JPEG and H.264 of the same size")
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
            figures[name].append(measure_clip(vae, clip, options.bits))
        if options.bits:
            size = math.prod(codecs["linear"].latent_shape(clip.shape[2:])) * options.bits / 8
            for name, codec in (("JPEG", jpeg), ("H.264", h264)):
                figures.setdefault(name, []).append((psnr_at(size, clip, codec), None))
        print(label, *(f"{name} {values[-1][0]:.2f} dB" for name, values in figures.items()), sep="  ", flush=True)
    for name, values in figures.items():
        blocks = [score for _, score in values if score is not None]
        shown = f", block score {fmean(blocks):.3f}" if blocks else ""
        print(f"{name}: {fmean(value for value, _ in values):.2f} dB{shown}")


if __name__ == "__main__":
    main()
