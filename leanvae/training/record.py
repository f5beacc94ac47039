"""What a run leaves to be read: `metrics.jsonl` with every step, and TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

from leanvae.files import write_text
from leanvae.training.validation import ValidationResults

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
SUMMARY_FILE = "summary.txt"


class RunRecord:
    """Writes a run's figures; on the first rank only.

    Args:
        root: the run's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._metrics: Any = None
        self._board: Any = None

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

    def log(self, step: int, logs: dict[str, float], to_board: bool) -> None:
        """Writes a step's figures.

        Args:
            step: number of steps taken.
            logs: scalars by name.
            to_board: whether TensorBoard gets them too.
        """
        self._metrics.write(json.dumps({"step": step, **logs}) + "\n")
        self._metrics.flush()
        if to_board:
            for name, value in logs.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def log_validation(self, step: int, results: ValidationResults) -> None:
        """Writes the held-out PSNR, and the pictures to TensorBoard."""
        with (self._root / VALIDATION_FILE).open("a", encoding="utf-8") as file:
            entry = {"step": step, "psnr": results.mean_psnr, "psnr_by_clip": results.psnr}
            file.write(json.dumps(entry) + "\n")
        self._board.add_scalar("held_out/psnr", results.mean_psnr, step)
        self._board.add_image("held_out/source_and_reconstruction", results.picture, step, dataformats="HWC")
        self._board.flush()

    def write_summary(self) -> str:
        """Writes and returns what training has done to each held-out clip; empty if there are none."""
        path = self._root / VALIDATION_FILE
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        if not entries:
            return ""
        before, after = entries[0]["psnr_by_clip"], entries[-1]["psnr_by_clip"]
        both = [name for name in before if name in after]
        lines = [f"{name}: {before[name]:.2f} dB before, {after[name]:.2f} dB after" for name in both]
        lines.append(f"mean: {entries[0]['psnr']:.2f} dB before, {entries[-1]['psnr']:.2f} dB after")
        text = f"PSNR of held-out clips before training and after {entries[-1]['step']} steps\n" + "\n".join(lines)
        write_text(self._root / SUMMARY_FILE, text + "\n")
        return text

    def close(self) -> None:
        """Closes the files; may be called at any time."""
        if self._metrics:
            self._metrics.close()
        if self._board:
            self._board.close()


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
