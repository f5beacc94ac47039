"""Observers of a run: the metrics file, TensorBoard, Weights & Biases and the console. None of them controls it."""

import importlib
import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from leanvae.config import ConfigError
from leanvae.data.buckets import Shape
from leanvae.training.comparison import Comparison, animation, picture
from leanvae.training.config import TrainConfig, WandbConfig
from leanvae.training.profiling import StepTimes
from leanvae.training.validation import ValidationResults
from litevae.files import write_text

logger = logging.getLogger("leanvae")

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
SUMMARY_FILE = "summary.txt"
ID_FILE = "wandb_id.txt"
_BESIDE = "held_out/source_and_reconstruction"
_LONG_RUN_SECONDS = 24 * 3600.0
_STEPS_BEFORE_ESTIMATE = 4


@dataclass(frozen=True)
class StepReport:
    """The results of a step.

    Attributes:
        step: steps taken, including this one.
        values: finite losses and rates.
        figures: these, and times, sizes and counts: a line of `metrics.jsonl`.
        bucket: shape of its samples.
        times: seconds that it took.
        is_logged: whether the boards show this step; see `training.log_every`.
    """

    step: int
    values: Mapping[str, float]
    figures: Mapping[str, float]
    bucket: Shape
    times: StepTimes
    is_logged: bool


class Listener(Protocol):
    """An observer of a run, called only on the main rank. An exception in it ends the run.

    A subclass defines only the methods that it needs.
    """

    def started(self, root: Path, config: TrainConfig, step: int | None) -> None:
        """Called before the first step.

        Args:
            root: the run's folder.
            config: its configuration.
            step: steps taken by the checkpoint that the run resumes from; None if it begins. Later steps, which this
                listener may have seen, are repeated.
        """

    def stepped(self, report: StepReport) -> None:
        """Called after each step."""

    def validated(self, step: int, results: ValidationResults, files: Sequence[Path]) -> None:
        """Called after each evaluation of held-out files.

        Args:
            step: steps taken.
            results: figures and reconstructions.
            files: the reconstructions beside their sources, as mp4 or PNG, in the order of `results.comparisons`.
        """

    def closed(self) -> None:
        """Called at the end, even after an error, if `started` has returned."""


def default_listeners(config: TrainConfig) -> list[Listener]:
    """Return the listeners of every run."""
    listeners: list[Listener] = [MetricsFile(), TensorBoard()]
    if config.training.wandb:
        listeners.append(WandbRun(config.training.wandb))
    return [*listeners, Console()]


class MetricsFile:
    """`metrics.jsonl` and `validation.jsonl`: a line for each step, and for each evaluation."""

    def started(self, root: Path, config: TrainConfig, step: int | None) -> None:
        """Open the files, without the lines that will be written again."""
        for name in (METRICS_FILE, VALIDATION_FILE):
            drop_lines_after(root / name, -1 if step is None else step)
        self._root = root
        self._metrics = (root / METRICS_FILE).open("a", encoding="utf-8")

    def stepped(self, report: StepReport) -> None:
        """Write a step's figures."""
        self._metrics.write(json.dumps({"step": report.step, **report.figures}) + "\n")
        self._metrics.flush()

    def validated(self, step: int, results: ValidationResults, files: Sequence[Path]) -> None:
        """Write the figures of held-out files."""
        entry: dict[str, Any] = {"step": step, **results.means}
        entry |= {f"{metric}_by_clip": values for metric, values in results.figures.items()}
        with (self._root / VALIDATION_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def closed(self) -> None:
        """Close the file."""
        self._metrics.close()


class TensorBoard:
    """Figures and reconstructions for TensorBoard."""

    def started(self, root: Path, config: TrainConfig, step: int | None) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(root / "tensorboard"), purge_step=0 if step is None else step + 1)

    def stepped(self, report: StepReport) -> None:
        """Show a step's figures."""
        if report.is_logged:
            self._show(report.step, _of_training(report))

    def validated(self, step: int, results: ValidationResults, files: Sequence[Path]) -> None:
        """Show figures, a picture of all reconstructions, and an animation of the first clip."""
        self._show(step, _of_held_out(results))
        self._board.add_image(_BESIDE, picture(results.comparisons), step, dataformats="HWC")
        if clip := next((each for each in results.comparisons if each.rate), None):
            self._add_animation("held_out/clip", clip, step)
        self._board.flush()

    def closed(self) -> None:
        """Close the event file."""
        self._board.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _add_animation(self, name: str, clip: Comparison, step: int) -> None:
        """Add an animated GIF to TensorBoard's images, which play it; its own add_video needs moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        height, width = clip.frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=animation(clip))
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._board.file_writer.add_summary(summary, step)


def check_wandb(config: WandbConfig | None) -> None:
    """Raise `ConfigError` if Weights & Biases is requested but not installed."""
    if config and importlib.util.find_spec("wandb") is None:
        raise ConfigError("training.wandb needs the package wandb: pip install 'leanvae[wandb]', or leave it out")


class WandbRun:
    """Figures and reconstructions for Weights & Biases; a resumed run continues its W&B run.

    Steps that a resumed run repeats are sent again, with the same values.

    Args:
        config: its project and name.
    """

    def __init__(self, config: WandbConfig) -> None:
        self._config = config

    def started(self, root: Path, config: TrainConfig, step: int | None) -> None:
        """Open the W&B run, whose name is kept in the run's folder."""
        self._wandb: Any = importlib.import_module("wandb")
        id_file = root / ID_FILE
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4) + "\n")
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(root),
            config=config.model_dump(mode="json"),
        )
        # W&B's own counter would drop steps that a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def stepped(self, report: StepReport) -> None:
        """Send a step's figures."""
        if report.is_logged:
            self._run.log({"step": report.step, **_of_training(report)})

    def validated(self, step: int, results: ValidationResults, files: Sequence[Path]) -> None:
        """Send figures, a picture of all reconstructions, and the clips."""
        self._run.log({"step": step, **_of_held_out(results)})
        videos = [self._wandb.Video(str(path), format="mp4") for path in files if path.suffix == ".mp4"]
        images = {_BESIDE: self._wandb.Image(picture(results.comparisons))}
        self._run.log({"step": step, **images, **({"held_out/clips": videos} if videos else {})})

    def closed(self) -> None:
        """End the W&B run for now."""
        self._run.finish()


def _of_training(report: StepReport) -> dict[str, float]:
    return {f"train/{name}": value for name, value in report.figures.items()}


def _of_held_out(results: ValidationResults) -> dict[str, float]:
    return {f"held_out/{metric}": mean for metric, mean in results.means.items() if mean is not None}


class Console:
    """A progress bar on a terminal, and a log line every few steps."""

    def started(self, root: Path, config: TrainConfig, step: int | None) -> None:
        """Show the bar."""
        self._config = config
        self._num_steps = config.curriculum.max_steps
        self._taken, self._seconds = 0, 0.0
        self._bar = tqdm(total=self._num_steps, initial=step or 0, unit="step", disable=None)

    def stepped(self, report: StepReport) -> None:
        """Move the bar; report progress now and then, and early how long the run takes."""
        self._taken += 1
        self._seconds += report.times.whole
        mean_seconds = self._seconds / self._taken
        left = (self._num_steps - report.step) * mean_seconds
        if report.step % self._config.training.log_every == 0:
            self._say_how_it_goes(report, left)
        long = left > _LONG_RUN_SECONDS and not torch.cuda.is_available()
        if self._taken == (1 if long else _STEPS_BEFORE_ESTIMATE):
            logger.info("%.2f s per step, about %s in total", mean_seconds, duration(self._num_steps * mean_seconds))
            if long:
                small = self._config.small_config
                logger.warning("this configuration is meant for GPUs; without one, use %s", small)
        self._bar.update()
        self._bar.set_postfix(loss=f"{report.values.get('loss', float('nan')):.4f}")

    def _say_how_it_goes(self, report: StepReport, left: float) -> None:
        shown = " ".join(f"{name} {value:.4g}" for name, value in report.values.items())
        figures, times = report.figures, report.times
        speed = (
            f"{times.whole:.2f} s, {times.wait / times.whole:.0%} of it waiting for data, "
            f"{figures['samples_per_second']:.3g} samples/s, {figures['frames_per_second']:.3g} frames/s, "
            f"{figures['memory_mib']:.0f} MiB"
        )
        step = f"step {report.step}/{self._num_steps} {report.bucket}"
        logger.info("%s: %s; %s; about %s left", step, shown, speed, duration(left))

    def validated(self, step: int, results: ValidationResults, files: Sequence[Path]) -> None:
        """Print the figures of held-out files."""
        logger.info("step %d: held-out %s", step, results)

    def closed(self) -> None:
        """Remove the bar."""
        self._bar.close()


def duration(seconds: float) -> str:
    """Format a duration: `3 d 4 h`, `2 h 5 min`, `3 min 20 s` or `45 s`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def write_summary(root: Path) -> str:
    """Write and return each held-out file's change by training; empty if there are none.

    Args:
        root: the run's folder.
    """
    path = root / VALIDATION_FILE
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if not entries:
        return ""
    first, last = entries[0], entries[-1]
    before, after = first["psnr_by_clip"], last["psnr_by_clip"]
    lines = [f"{name}: {_change(before[name], after[name])}" for name in before if name in after]
    lines.append(f"mean: {_change(first['psnr'], last['psnr'])}")
    text = f"PSNR of held-out clips before training and after {last['step']} steps\n" + "\n".join(lines)
    text = text.encode("utf-8", "backslashreplace").decode()  # names need not be text
    write_text(root / SUMMARY_FILE, text + "\n")
    return text


def _change(before: float | None, after: float | None) -> str:
    shown = ["not finite" if value is None else f"{value:.2f} dB" for value in (before, after)]
    return f"{shown[0]} before, {shown[1]} after"


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and a truncated last line, from a JSON-lines file."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            kept.append(line + os.linesep)
    write_text(path, "".join(kept))
