"""The evaluation: every clip through every model, resumable and on several ranks, then tables and a page."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from leanvae.data.samples import Cut, cut_picture
from leanvae.distributed import barrier, gather, join_ranks, on_main, rank, world_size
from leanvae.evaluation.candidates import Candidate, load_candidates
from leanvae.evaluation.page import write_page
from leanvae.evaluation.pictures import FrameWriter, picture_paths, write_blocks, write_latent
from leanvae.evaluation.records import SOURCE, Records, Row, record_key
from leanvae.evaluation.summary import Evaluated, summarise, write_tables
from leanvae.media.errors import MediaError
from leanvae.media.folder import open_clip, read_frames
from leanvae.media.info import Frame
from leanvae.media.naming import NamedItem, find_inputs, first_skipped
from leanvae.metrics.clips import ClipFeatures, ClipMeasures, LatentStatistics
from leanvae.metrics.networks import FeatureNetworks, load_feature_networks
from leanvae.progress import Progress
from litevae.errors import NotFinite, WorkIncomplete, extra
from litevae.pixels import from_bytes

with extra("video"):
    import av.error

logger = logging.getLogger("leanvae")

MEDIA, RECORDS = "media", "records"
_MEASURED_AS = 1  # raise it if a measure changes, so that older records are measured again
_DEFAULT_RATE, _FASTEST_RATE = Fraction(25), 120


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure of each file, and what to show.

    Attributes:
        num_frames: most frames of a clip, from its start; None takes all.
        resolution: (height, width) that frames are resized to cover and cropped to; models get the result and are
            compared with it. None leaves frames unchanged.
        chunk: most frames that a model gets at a time; None passes as many as memory allows, and whole clips to models
            without streams.
        tile: most (height, width) in pixels of a tile; None means as memory allows.
        shown: most clips with pictures; if there are more, the worst and the best by the first model's PSNR.
    """

    num_frames: int | None = None
    resolution: tuple[int, int] | None = None
    chunk: int | None = None
    tile: tuple[int, int] | None = None
    shown: int = 100


def evaluate(
    checkpoints: Sequence[str],
    inputs: str | Path,
    output: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    settings: EvaluationSettings | None = None,
    weights: str | Path | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Evaluate models side by side on clips and images.

    Writes into `output`: `evaluation.json` (totals), `clips.csv` (a line for each clip and model), `frames.csv` (PSNR
    of each frame), `report.html` with its pictures in `media/`, and `records/`, from which an interrupted run resumes.
    Latents are the posterior's means. The decoder's output is measured after clamping to [0, 1], before it is rounded
    or coded; only rFID rounds to 8 bits. Under `torchrun` or `deepspeed` the ranks share the clips; all of them must
    see the output folder.

    Args:
        checkpoints: specifications for `load_candidates`.
        inputs: addresses for `find_inputs`.
        output: folder for the results, created if missing.
        device: device of models and metrics.
        dtype: type of the models; None uses the stored one.
        settings: what to measure; None means all frames, unchanged.
        weights: folder of the feature networks' weights; None uses torch's cache.
        strict: whether a file that cannot be evaluated is an error, raised after the others are done.

    Returns:
        The content of `evaluation.json`.

    Raises:
        FileNotFoundError: an input, checkpoint or folder does not exist.
        MissingPackage: a package is missing.
        ValueError: the input holds no clip or image, a name or setting is wrong, or weights do not fit.
        WorkIncomplete: no file could be evaluated or, with `strict`, not all of them.
        NotFinite: a model's output is infinite or NaN.
    """
    settings = settings or EvaluationSettings()
    with join_ranks():
        jobs = find_inputs(Path(inputs), Path(output))
        networks = load_feature_networks(weights, device)
        if rank() == 0:
            for sentence in networks.missing:
                logger.info(sentence)
        candidates = load_candidates(checkpoints, settings.chunk, settings.tile, device, dtype)
        run = _Run(candidates, networks, jobs, Path(output), settings, torch.device(device))
        skipped = run.measure_all()
        report = on_main(lambda: _report(run, skipped, str(inputs)))
    if skipped and (strict or len(skipped) == len(jobs)):
        raise WorkIncomplete(f"{len(skipped)} of {len(jobs)} files could not be evaluated: {first_skipped(skipped)}")
    return report


def _report(run: "_Run", skipped: list[dict[str, str]], inputs: str) -> dict[str, Any]:
    evaluated = run.evaluated()
    if not evaluated.clips:
        return {}
    report = summarise(evaluated, skipped, inputs)
    write_tables(report, evaluated, run.output)
    write_page(report, evaluated, run.output)
    return report


class _Run:
    """Clips through models; finished work is on disk, and not repeated."""

    def __init__(
        self,
        candidates: list[Candidate],
        networks: FeatureNetworks,
        jobs: list[NamedItem],
        output: Path,
        settings: EvaluationSettings,
        device: torch.device,
    ) -> None:
        self.candidates, self.jobs, self.output = candidates, jobs, output
        self._networks, self._settings, self._device = networks, settings, device
        self._records = Records(output / RECORDS)

    @torch.inference_mode()
    def measure_all(self) -> list[dict[str, str]]:
        """Measure what is missing, each rank its share; return the files that cannot be measured, of all ranks."""
        shown = {job.name for job in self.jobs} if len(self.jobs) <= self._settings.shown else set()
        own = self._measure(self.jobs, shown)
        barrier()
        broken = {entry["input"]: entry for entries in gather(own) for entry in entries}
        if not shown and self._settings.shown:
            chosen = self._worst_and_best([job for job in self.jobs if job.name not in broken])
            self._measure(chosen, {job.name for job in chosen})
            barrier()
        return [broken[job.name] for job in self.jobs if job.name in broken]

    def _worst_and_best(self, jobs: list[NamedItem]) -> list[NamedItem]:
        """Return the clips to show, half of them from each end of the first model's PSNR."""
        first = self.candidates[0]
        rows = [self._records.read(first.name, job.name, self._key(job, first)) for job in jobs]
        order = sorted(
            (row["psnr"] if row and row["psnr"] is not None else float("inf"), index) for index, row in enumerate(rows)
        )
        half = self._settings.shown // 2
        ends = order[: self._settings.shown - half] + order[len(order) - half :]
        return [jobs[index] for _, index in dict.fromkeys(ends)]

    def _measure(self, jobs: list[NamedItem], shown: set[str]) -> list[dict[str, str]]:
        own = list(enumerate(jobs, start=1))[rank() :: world_size()]
        skipped = []
        with Progress("evaluating", "file", len(own), is_shown=rank() == 0, stays=False) as progress:
            for number, job in own:
                progress.note(job.name)
                label = f"[{number}/{len(jobs)}] {job.name}"
                try:
                    line = self._measure_job(job, job.name in shown)
                except MediaError as error:
                    skipped.append({"input": job.name, "reason": error.reason})
                    logger.warning("%s: skipped: %s", label, error.reason)
                else:
                    logger.info("%s: %s", label, line)
                progress.add()
        return skipped

    def _measure_job(self, job: NamedItem, show: bool) -> str:
        """Measure a file, and return the result in a line.

        Raises:
            MediaError: the file cannot be read, or H.264 cannot hold it.
        """
        try:
            return self._measure_models(job, show)
        except (av.error.InvalidDataError, av.error.ArgumentError, av.error.ExternalError) as error:
            raise MediaError(job.item.name, f"cannot be written as H.264: {error.strerror}") from error

    def _measure_models(self, job: NamedItem, show: bool) -> str:
        key = self._key(job)
        info = self._known(SOURCE, job, key, show)
        if info is None:
            info = self._measure_source(job, key, show)
        said = []
        for candidate in self.candidates:
            key = self._key(job, candidate)
            row = self._known(candidate.name, job, key, show)
            if row is None:
                row = self._measure_candidate(candidate, job, info, key, show)
            psnr = "infinite" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
            said.append(f"{candidate.name} PSNR {psnr}")
        return ", ".join(said)

    def _key(self, job: NamedItem, candidate: Candidate | None = None) -> str:
        try:
            state = os.stat(job.item.address)
        except OSError as error:
            raise MediaError(job.item.name, "no such file") from error
        parts = {"chunk": self._settings.chunk, "tile": self._settings.tile}
        return record_key(
            measured_as=_MEASURED_AS,
            file=[job.item.path, state.st_size, state.st_mtime_ns],
            frames=self._settings.num_frames,
            resolution=self._settings.resolution,
            networks=self._networks.names(),
            model=candidate and [candidate.source, candidate.stamp, parts],
        )

    def _read(self, job: NamedItem) -> Iterator[Frame]:
        """Yield the frames, resized, that models get and are compared with."""
        resolution = self._settings.resolution
        for frame in read_frames(job.item, self._settings.num_frames):
            yield frame if resolution is None else replace(frame, image=cut_picture(frame.image, resolution, Cut()))

    def _known(self, model: str, job: NamedItem, key: str, show: bool) -> Row | None:
        """Return the record of a clip, unless it or a required picture is missing."""
        row = self._records.read(model, job.name, key)
        pictures = [self.output / MEDIA / path for path in (row or {}).get("pictures", {}).values()]
        return row if row and (not show or (pictures and all(path.is_file() for path in pictures))) else None

    def _measure_source(self, job: NamedItem, key: str, show: bool) -> Row:
        """Read a file to its end, for its features and pictures."""
        features = ClipFeatures(self._networks)
        fps = _rate(job) if job.is_video else None
        rate = fps if fps and 1 <= fps <= _FASTEST_RATE else _DEFAULT_RATE
        paths = picture_paths(job.name, SOURCE, job.is_video) if show else {}
        size, count = (0, 0), 0
        with FrameWriter(self.output / MEDIA / paths["frames"] if show else None, job.is_video, rate) as writer:
            for frame in self._read(job):
                image = from_bytes(frame.image[None], self._device)
                features.update(image)
                writer.write(image)
                size, count = frame.image.shape[:2], count + 1
        row = {"kind": "video" if job.is_video else "image", "height": size[0], "width": size[1], "frames": count}
        row |= {"rate": float(rate), "shown_frames": writer.num_frames, "pictures": paths}
        self._records.write(SOURCE, job.name, key, row, features.tensors())
        return row

    def _measure_candidate(self, candidate: Candidate, job: NamedItem, info: Row, key: str, show: bool) -> Row:
        height, width = info["height"], info["width"]
        measures = ClipMeasures(height, width, candidate.coder.patch, self._networks)
        latents = LatentStatistics(job.name)
        paths = picture_paths(job.name, candidate.name, job.is_video) if show else {}
        media = self.output / MEDIA
        rate = Fraction(info["rate"]).limit_denominator(1001)
        with FrameWriter(media / paths["frames"] if show else None, job.is_video, rate) as writer:
            try:
                for part in candidate.coder.reconstruct(self._read(job)):
                    measures.update(part.output.to(self._device), part.reference.to(self._device))
                    writer.write(part.output)
                    if part.latent is not None:
                        latents.observe(part.latent)
            except NotFinite as error:
                raise NotFinite(f"{candidate.name}: {error}") from error
        if show and latents.shown is not None:
            write_latent(media / paths["latent"], latents.shown)
        else:
            paths.pop("latent", None)
        if show and measures.steps.blocks.excess > 0:
            write_blocks(media / paths["blocks"], measures.steps.blocks)
        else:
            paths.pop("blocks", None)
        row = measures.row(*candidate.coder.seams(info["frames"], height, width)) | {"pictures": paths}
        if "blocks" in paths:
            blocks = measures.steps.blocks
            row["blocks"] = {"frame": blocks.frame, "top": blocks.top, "left": blocks.left}
        self._records.write(candidate.name, job.name, key, row, measures.features.tensors() | latents.tensors())
        return row

    def evaluated(self) -> Evaluated:
        """Read all measurements from disk, by clip and model."""
        clips: dict[str, Row] = {}
        rows: dict[str, dict[str, Row]] = {candidate.name: {} for candidate in self.candidates}
        for job in self.jobs:
            if not os.path.exists(job.item.address):
                continue
            info = self._records.read(SOURCE, job.name, self._key(job))
            found = {
                candidate.name: self._records.read(candidate.name, job.name, self._key(job, candidate))
                for candidate in self.candidates
            }
            if info is None or None in found.values():
                continue
            clips[job.name] = info
            for name, row in found.items():
                assert row is not None
                rows[name][job.name] = row
        settings = {
            "frames": self._settings.num_frames,
            "resolution": self._settings.resolution and list(self._settings.resolution),
            "chunk": self._settings.chunk,
            "tile": self._settings.tile and list(self._settings.tile),
        }
        sources = {candidate.name: candidate.source for candidate in self.candidates}
        return Evaluated(clips, rows, sources, settings, self._networks.missing, self._records)


def _rate(job: NamedItem) -> Fraction | None:
    """Return a clip's average frames per second."""
    with open_clip(job.item) as reader:
        return reader.info.fps
