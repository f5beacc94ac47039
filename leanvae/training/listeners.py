"""What a run leaves to be read: figures as JSON lines, reconstructions as files, TensorBoard and Weights & Biases."""

import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvae.config import ConfigError
from leanvae.training.comparison import Comparison, animation, picture, write_comparisons
from leanvae.training.config import TrainConfig, WandbConfig
from leanvae.training.validation import ValidationResults
from litevae.files import write_text

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
SUMMARY_FILE = "summary.txt"
ID_FILE = "wandb_id.txt"
HELD_OUT_FOLDER = "held_out"
_BESIDE = "held_out/source_and_reconstruction"


class RunRecord:
    """Writes a run's figures; on the first rank only.

    Args:
        root: the run's folder.
        config: the run's configuration.
    """

    def __init__(self, root: Path, config: TrainConfig) -> None:
        self._root = root
        self._config = config
        self._metrics: Any = None
        self._board: Any = None
        self._wandb: WandbRun | None = None

    def start(self, step: int | None) -> None:
        """Opens the files and takes back what will be written again.

        Args:
            step: steps taken by the checkpoint that the run goes on from; `None` where it begins.
        """
        from torch.utils.tensorboard import SummaryWriter

        for name in (METRICS_FILE, VALIDATION_FILE):
            drop_lines_after(self._root / name, -1 if step is None else step)
        self._metrics = (self._root / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._root / "tensorboard"), purge_step=0 if step is None else step + 1)
        if wandb := self._config.training.wandb:
            self._wandb = WandbRun(wandb, self._root, self._config.model_dump(mode="json"))

    def log(self, step: int, logs: dict[str, float], to_board: bool) -> None:
        """Writes a step's figures.

        Args:
            step: number of steps taken.
            logs: scalars by name.
            to_board: whether TensorBoard and Weights & Biases get them too.
        """
        self._metrics.write(json.dumps({"step": step, **logs}) + "\n")
        self._metrics.flush()
        if to_board:
            self._show(step, {f"train/{name}": value for name, value in logs.items()})

    def log_validation(self, step: int, results: ValidationResults) -> None:
        """Writes the held-out figures and reconstructions."""
        entry: dict[str, Any] = {"step": step, **results.means}
        entry |= {f"{metric}_by_clip": values for metric, values in results.figures.items()}
        with (self._root / VALIDATION_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        means = {f"held_out/{metric}": mean for metric, mean in results.means.items() if mean is not None}
        self._show(step, means)
        files = write_comparisons(self._root / HELD_OUT_FOLDER, step, results.comparisons)
        rows = picture(results.comparisons)
        self._board.add_image(_BESIDE, rows, step, dataformats="HWC")
        if clip := next((each for each in results.comparisons if each.rate), None):
            self._add_animation("held_out/clip", clip, step)
        self._board.flush()
        if self._wandb:
            self._wandb.log_reconstructions(step, rows, files)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars to the boards."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(step, values)

    def _add_animation(self, name: str, clip: Comparison, step: int) -> None:
        """Puts an animated GIF among TensorBoard's images, which play it; its own add_video needs moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        height, width = clip.frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=animation(clip))
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Closes the files; may be called at any time."""
        for part in (self._metrics, self._board, self._wandb):
            if part:
                part.close()


def write_summary(root: Path) -> str:
    """Writes and returns what training has done to each held-out file; empty if there are none.

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
    write_text(root / SUMMARY_FILE, text + "\n")
    return text


def _change(before: float | None, after: float | None) -> str:
    shown = ["not finite" if value is None else f"{value:.2f} dB" for value in (before, after)]
    return f"{shown[0]} before, {shown[1]} after"


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of later steps from a JSON-lines file, and a last line that was cut off."""
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


def check_wandb(config: WandbConfig | None) -> None:
    """Raises `ConfigError` where Weights & Biases is asked for and not installed."""
    if config and importlib.util.find_spec("wandb") is None:
        raise ConfigError("training.wandb needs the package wandb: pip install 'leanvae[wandb]', or leave it out")


class WandbRun:
    """Sends figures and reconstructions; a run that resumes goes on in the same W&B run.

    Steps that a resumed run takes again are sent again, with the same values.

    Args:
        config: where to.
        root: the run's folder, which keeps the W&B run's name.
        settings: the run's resolved configuration.
    """

    def __init__(self, config: WandbConfig, root: Path, settings: Mapping[str, Any]) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        id_file = root / ID_FILE
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4) + "\n")
        self._run = self._wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(root),
            config=dict(settings),
        )
        # W&B's own counter takes nothing for a step that it has seen, as a resumed run sends.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars by name."""
        self._run.log({"step": step, **values})

    def log_reconstructions(self, step: int, picture: NDArray[np.uint8], files: Sequence[Path]) -> None:
        """Sends a picture `(H, W, 3)` of all held-out files, and the mp4 files among those given."""
        videos = [self._wandb.Video(str(path), format="mp4") for path in files if path.suffix == ".mp4"]
        images = {"held_out/source_and_reconstruction": self._wandb.Image(picture)}
        self._run.log({"step": step, **images, **({"held_out/clips": videos} if videos else {})})

    def close(self) -> None:
        """Ends the W&B run for now."""
        self._run.finish()
