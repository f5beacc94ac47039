"""Analysis of image autoencoders side by side: latent space, feature maps, and quality against resolution.

It repeats LiteVAE's Table 6 and Figures 2, 3, 4, 5 and 8 on a user's own images.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leanvae.checkpoint import load_vae
from leanvae.evaluation.analysis_record import Autoencoder, ModelRecord, Study
from leanvae.media.errors import MediaError
from leanvae.media.image import read_image
from leanvae.media.naming import NamedItem, find_inputs, first_skipped
from leanvae.progress import Progress
from litevae.errors import InvalidInput, WorkIncomplete, extra
from litevae.files import write_csv, write_text
from litevae.perceptual import PerceptualDistance, find_backbone, load_lpips, missing_backbone_message

with extra("video"):
    import cv2

logger = logging.getLogger("leanvae")

ANALYSIS_FILE = "analysis.json"
_BATCH_PIXELS = 2**18


def analyse(
    checkpoints: Sequence[str | Path],
    inputs: str | Path,
    output: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    study: Study | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Analyse the autoencoders of checkpoints, such as those with and without SMC, side by side.

    Writes the files of `analyse_models`; models are named by the parts of their checkpoints' paths that differ.

    Args:
        checkpoints: one or several, which `load_vae` reads.
        inputs: a folder of images, or one image.
        output: folder for the results, created if missing.
        device: device of the models.
        dtype: type of the models; None uses the stored one.
        study: what to measure; None means what the paper does.
        strict: whether an unreadable image is an error, raised after everything is written.

    Raises:
        FileNotFoundError: the input or a checkpoint does not exist.
        ValueError: there is no checkpoint, or two are equal, or as in `analyse_models`.
        WorkIncomplete, NotFinite: as in `analyse_models`.
    """
    names = model_names(checkpoints)
    find_images(inputs, output)  # refuses a wrong input before checkpoints are read
    models = {name: load_vae(path, device, dtype) for name, path in zip(names, checkpoints, strict=True)}
    sources = dict(zip(names, map(str, checkpoints), strict=True))
    return analyse_models(models, inputs, output, study, strict, sources)


def model_names(checkpoints: Sequence[str | Path]) -> list[str]:
    """Return short, distinct names for checkpoints: their paths without common beginnings and ends.

    Raises:
        ValueError: there is no checkpoint, or one is given twice.
    """
    paths = [Path(path).resolve() for path in checkpoints]
    if not paths or len(set(paths)) < len(paths):
        raise InvalidInput(
            f"checkpoints are {[str(path) for path in checkpoints]}: expected one or more different ones"
        )
    if len(paths) == 1:
        return [paths[0].name]
    start = _num_shared([path.parts for path in paths])
    end = _num_shared([path.parts[start:][::-1] for path in paths])
    names = ["/".join(path.parts[start : len(path.parts) - end]) for path in paths]
    if not all(names):  # one path is the beginning or the end of another
        names = ["/".join(path.parts[max(0, start - 1) :]) for path in paths]
    return names


def _num_shared(sequences: Sequence[Sequence[str]]) -> int:
    """Count the leading parts that all sequences share."""
    shared = 0
    for parts in zip(*sequences, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return shared


def find_images(inputs: str | Path, output: str | Path) -> list[NamedItem]:
    """List the images below a folder, sorted by name; clips are ignored.

    Raises:
        FileNotFoundError: `inputs` does not exist.
        ValueError: the folder holds no image, or is the output folder.
    """
    jobs = [job for job in find_inputs(Path(inputs), Path(output)) if not job.is_video]
    if not jobs:
        raise InvalidInput(f"{inputs}: no file has the name of an image")
    return jobs


def analyse_models(
    models: Mapping[str, Autoencoder],
    inputs: str | Path,
    output: str | Path,
    study: Study | None = None,
    strict: bool = False,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Analyse autoencoders side by side on the images of a folder.

    Images are cropped to their central square and shrunk by area to each resolution. They are never enlarged; smaller
    images are left out of a resolution and counted. Quality is measured on the decoded mean of the posterior, clamped
    to [0, 1] and not quantized. Latents for MMD are samples of the posterior, as diffusion models get them. It writes

    - `analysis.json`: every number;
    - `mmd.csv`: squared MMD of the latents (of at most 2048 images) to a standard Gaussian (Table 6), mean and
      standard deviation over draws of the Gaussian;
    - `resolution.csv` and `resolution.png`: PSNR, SSIM and, if its backbone is found, LPIPS against resolution
      (Figures 5 and 8);
    - `features.png`: magnitude of the decoder's last feature maps (Figure 3), for models that have them (LiteVAE);
    - `latents.png`: reconstructions, and three latent channels as colours (Figures 2 and 4).

    Args:
        models: models by name, all on one device.
        inputs: a folder of images, or one image.
        output: folder for the results, created if missing.
        study: what to measure; None means what the paper does.
        strict: whether an unreadable image is an error, raised after everything is written.
        sources: origin of each model, for the report.

    Returns:
        The content of `analysis.json`.

    Raises:
        FileNotFoundError: `inputs` does not exist.
        ValueError: there is no model, no image, or none as large as `study.size`; or a model does not work at this
            size.
        WorkIncomplete: no image could be read or, with `strict`, not all of them.
        NotFinite: a model's output is infinite or NaN.
    """
    from leanvae.evaluation import analysis_plots as plots  # here, so that a missing matplotlib shows before the work

    study = study or Study()
    if not models:
        raise InvalidInput("models is empty: expected one or more")
    jobs, output = find_images(inputs, output), Path(output)
    notes: list[str] = []
    lpips = _find_lpips(notes)
    if lpips is not None:
        lpips = lpips.to(next(next(iter(models.values())).parameters()).device)
    records = [ModelRecord(name, vae, study, lpips) for name, vae in models.items()]
    skipped: list[dict[str, str]] = []
    with torch.inference_mode():
        pictures, counts = _measure(records, jobs, study, skipped)
        drawn = {record.name: [record.picture(image) for image in pictures] for record in records}
        summaries = [record.summary() for record in records]
    num_read = len(jobs) - len(skipped)
    left_out = {side: num_read - count for side, count in counts.items()}
    notes += [
        f"{count} of {num_read} images are smaller than {side} pixels and left out at that size"
        for side, count in left_out.items()
        if count
    ]
    for note in notes:
        logger.info(note)
    report: dict[str, Any] = {
        "input": str(inputs),
        "images": num_read,
        "size": study.size,
        "resolutions": list(study.resolutions),
        "left_out": {str(side): count for side, count in left_out.items()},
        "notes": notes,
        "models": [
            {"name": name, "checkpoint": (sources or {}).get(name), **summary}
            for name, summary in zip(models, summaries, strict=True)
        ],
        "skipped": skipped,
    }
    output.mkdir(parents=True, exist_ok=True)
    _write_tables(report, output)
    plots.plot_resolutions(output / "resolution.png", report["models"])
    plots.plot_features(output / "features.png", pictures, drawn)
    plots.plot_latents(output / "latents.png", pictures, drawn)
    if strict and skipped:
        raise WorkIncomplete(f"{len(skipped)} of {len(jobs)} images could not be read: {first_skipped(skipped)}")
    return report


def _measure(
    records: Sequence[ModelRecord], jobs: list[NamedItem], study: Study, skipped: list[dict[str, str]]
) -> tuple[list[NDArray[np.uint8]], dict[int, int]]:
    """Add all images to the records; return those to show, and the number of images as large as each side."""
    pictures: list[NDArray[np.uint8]] = []
    counts = dict.fromkeys(study.sides, 0)
    for images in read_squares(jobs, study.sides, skipped):
        side = len(images[0])
        counts[side] += len(images)
        if side == study.size:
            pictures += images[: study.num_pictures - len(pictures)]
        for record in records:
            record.update(images)
    num_read = len(jobs) - len(skipped)
    if not num_read:
        raise WorkIncomplete(f"none of {len(jobs)} images could be read: {first_skipped(skipped)}")
    if not pictures:
        raise InvalidInput(f"size is {study.size}: none of the {num_read} images is that large; choose a smaller size")
    return pictures, counts


def _find_lpips(notes: list[str]) -> PerceptualDistance | None:
    """Load LPIPS if its backbone and package are available; otherwise note what is missing."""
    if find_backbone(None) is None:
        notes.append(f"LPIPS is left out: {missing_backbone_message()}")
        return None
    try:
        return load_lpips()
    except ModuleNotFoundError as error:
        notes.append(f"LPIPS is left out: {error}")
        return None


def read_squares(
    jobs: list[NamedItem], sides: list[int], skipped: list[dict[str, str]]
) -> Iterator[list[NDArray[np.uint8]]]:
    """Read images once and yield them in batches of one size, `(side, side, 3)` each.

    Args:
        jobs: the images.
        sides: sizes to shrink each image to; smaller images are left out.
        skipped: gets `input` and `reason` of unreadable images.
    """
    waiting: dict[int, list[NDArray[np.uint8]]] = {side: [] for side in sides}
    with Progress("analysing", "image", len(jobs), stays=False) as progress:
        for number, job in enumerate(jobs, start=1):
            progress.add()
            try:
                image = read_image(job.item)
            except MediaError as error:
                skipped.append({"input": job.name, "reason": error.reason})
                logger.warning("[%d/%d] %s: skipped: %s", number, len(jobs), job.name, error.reason)
                continue
            for side in sides:
                if min(image.shape[:2]) >= side:
                    waiting[side].append(shrink_square(image, side))
                if len(waiting[side]) * side**2 >= _BATCH_PIXELS:
                    yield waiting[side]
                    waiting[side] = []
    yield from filter(None, waiting.values())


def shrink_square(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Crop the central square of `(H, W, 3)` and shrink it to `(side, side, 3)` by averaging over areas."""
    height, width = image.shape[:2]
    whole = min(height, width)
    top, left = (height - whole) // 2, (width - whole) // 2
    cut = image[top : top + whole, left : left + whole]
    return np.asarray(cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _write_tables(report: dict[str, Any], output: Path) -> None:
    """Write `analysis.json`, `resolution.csv` and `mmd.csv`."""
    write_text(output / ANALYSIS_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    models = report["models"]
    measured = [{"model": model["name"], **row} for model in models for row in model["resolution"]]
    write_csv(output / "resolution.csv", list(measured[0]), (row.values() for row in measured))
    distances = ([model["name"], *row.values()] for model in models for row in model["mmd"]["values"])
    write_csv(output / "mmd.csv", ["model", "sigma", "mean", "std"], distances)
