"""Totals over clips, with intervals, and tables."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanvae.evaluation.records import SOURCE, Records, Row
from leanvae.metrics.frechet import distance_interval, frechet_distance, mean_interval
from litevae.analysis import mmd
from litevae.files import write_csv, write_text

TOTALS_FILE, CLIPS_FILE, FRAMES_FILE = "evaluation.json", "clips.csv", "frames.csv"
MEASURES = ("psnr", "ssim", "ms_ssim", "lpips", "flicker", "tile_seam", "chunk_seam", "block_score")
DISTANCES = {"rfid": "image", "rfvd": "video"}
_INFO = ("kind", "width", "height", "frames")
_GAUSSIAN_SEED = 0
_MOST_MMD_SAMPLES = 4096


@dataclass(frozen=True)
class Evaluated:
    """The measurements of a run.

    Attributes:
        clips: metadata of each file, by name, in order.
        rows: measures by model and file.
        sources: origin of each model.
        settings: settings of the measurement.
        missing: a sentence for each metric that is left out.
        records: features and latents.
    """

    clips: dict[str, Row]
    rows: dict[str, dict[str, Row]]
    sources: dict[str, str]
    settings: dict[str, Any]
    missing: list[str]
    records: Records


def summarise(evaluated: Evaluated, skipped: list[dict[str, str]], inputs: str) -> dict[str, Any]:
    """Compute the content of `evaluation.json`.

    Each measure has a `value`, the mean over the frames of files with one; `files`, their number; and `interval`, a 95%
    bootstrap interval over files. `rfid` and `rfvd` also have `samples`, the number of samples of each kind.
    """
    clips = evaluated.clips
    return {
        "input": inputs,
        "files": len(clips),
        "frames": sum(info["frames"] for info in clips.values()),
        "skipped": skipped,
        "settings": evaluated.settings,
        "left_out": evaluated.missing,
        "models": [
            {
                "name": name,
                "source": evaluated.sources[name],
                **{measure: _mean(measure, rows, clips) for measure in MEASURES},
                **{distance: _distance(evaluated, name, kind) for distance, kind in DISTANCES.items()},
                "latents": _latents(evaluated, name),
            }
            for name, rows in evaluated.rows.items()
        ],
    }


def _mean(measure: str, rows: dict[str, Row], clips: dict[str, Row]) -> dict[str, Any]:
    known = [(row[measure], clips[name]["frames"]) for name, row in rows.items() if row[measure] is not None]
    if not known:
        return {"value": None, "interval": None, "files": 0}
    values, weights = zip(*known, strict=True)
    value = math.fsum(value * weight for value, weight in known) / sum(weights)
    return {"value": value, "interval": mean_interval(values, weights), "files": len(known)}


def _distance(evaluated: Evaluated, model: str, kind: str) -> dict[str, Any]:
    """Compute the Fréchet distance of all files' features, reference against reconstruction."""
    pairs = [
        (reference[kind], output[kind])
        for reference, output in (
            tuple(evaluated.records.tensors(owner, clip, [kind]) for owner in (SOURCE, model))
            for clip in evaluated.clips
        )
        if reference
    ]
    samples = sum(len(reference) for reference, _ in pairs)
    if samples < 2:
        return {"value": None, "interval": None, "samples": samples}
    value = frechet_distance(*(torch.cat(features) for features in zip(*pairs, strict=True)))
    return {"value": value, "interval": distance_interval(pairs), "samples": samples}


def _latents(evaluated: Evaluated, model: str) -> dict[str, Any] | None:
    """Compute each channel's mean and standard deviation, and the latents' squared MMD to a standard Gaussian.

    A sample is the vector of channels at one position; the kernel's bandwidth is the root of their number. `mmd` is for
    the latents as they are, `mmd_normalised` for channels with mean 0 and standard deviation 1, as diffusion models get
    them.
    """
    names = ["latent_sums", "latent_count", "latent_samples"]
    found = [evaluated.records.tensors(model, clip, names) for clip in evaluated.clips]
    found = [tensors for tensors in found if tensors]
    if not found:
        return None
    count = sum(int(tensors["latent_count"]) for tensors in found)
    sums, squares = torch.stack([tensors["latent_sums"] for tensors in found]).sum(0)
    mean = sums / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    samples = torch.cat([tensors["latent_samples"] for tensors in found]).double()
    generator = torch.Generator().manual_seed(_GAUSSIAN_SEED)
    samples = samples[torch.randperm(len(samples), generator=generator)[:_MOST_MMD_SAMPLES]]
    gaussian = torch.randn(samples.shape, generator=generator, dtype=torch.float64)

    def distance(latents: Tensor) -> float | None:
        return mmd(latents, gaussian, samples.shape[1] ** 0.5).item() if len(latents) > 1 else None

    normalized = (samples - mean) / std.clamp_min(torch.finfo(std.dtype).tiny)
    return {
        "channels": len(mean),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "mmd": distance(samples),
        "mmd_normalised": distance(normalized) if std.min() > 0 else None,
    }


def write_tables(report: dict[str, Any], evaluated: Evaluated, folder: Path) -> None:
    """Write `evaluation.json`, `clips.csv` and `frames.csv`; a value that does not exist is an empty cell."""
    write_text(folder / TOTALS_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    clips = [
        [model, clip, *(evaluated.clips[clip][name] for name in _INFO), *(row[name] for name in MEASURES)]
        for model, rows in evaluated.rows.items()
        for clip, row in rows.items()
    ]
    frames = (
        [model, clip, frame, value]
        for model, rows in evaluated.rows.items()
        for clip, row in rows.items()
        for frame, value in enumerate(row["frame_psnr"])
    )
    write_csv(folder / CLIPS_FILE, ["model", "file", *_INFO, *MEASURES], clips)
    write_csv(folder / FRAMES_FILE, ["model", "file", "frame", "psnr"], frames)
