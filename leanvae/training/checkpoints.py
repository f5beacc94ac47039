"""The folder of a run's checkpoints: complete ones only, and `latest` always names one."""

import os
import re
import shutil
from pathlib import Path

from leanvae.files import flush_to_disk

LATEST = "latest"
STATE_FILE = "trainer.json"
_NAME = re.compile(r"step_(\d{8,})(?:_(\d+))?")


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints of a run by age; a folder bears such a name only once all of it is on the disk."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found)]


def new_checkpoint(root: Path, step: int) -> Path:
    """A free name for the checkpoint after `step` steps; a resumed run may come by a step again."""
    name, revision = f"step_{step:08d}", 0
    while (folder := root / (f"{name}_{revision}" if revision else name)).exists():
        revision += 1
    return folder


def temporary_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return folder.with_name(f".{folder.name}.tmp")


def commit(folder: Path, keep: int) -> None:
    """Gives a written checkpoint its name, points `latest` to it and removes old ones.

    Killed at any moment, `latest` names a complete checkpoint.

    Args:
        folder: the checkpoint's name, which must be free; its content stands in `temporary_folder(folder)`.
        keep: how many of the newest checkpoints stay.
    """
    root = folder.parent
    written = temporary_folder(folder)
    for path in [*written.rglob("*"), written]:
        flush_to_disk(path)
    written.rename(folder)
    link = root / f".{LATEST}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, root / LATEST)
    flush_to_disk(root)
    for old in complete_checkpoints(root)[:-keep]:
        if old != folder:
            shutil.rmtree(old)


def clean(root: Path) -> None:
    """Removes what a run that was killed while it wrote has left behind."""
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path)


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """The checkpoint to go on from.

    Args:
        root: folder of the run's checkpoints.
        resume: `auto` takes the newest of the run, if there is one; `none` starts anew; else a checkpoint's path.

    Raises:
        ValueError: `none` where there are checkpoints, which a new run would overwrite.
        FileNotFoundError: the path is no training checkpoint.
    """
    existing = complete_checkpoints(root)
    if resume == "none":
        if existing:
            raise ValueError(
                f"{root} holds checkpoints already (newest: {existing[-1].name}): "
                "go on with --resume auto, or choose another --output"
            )
        return None
    if resume == "auto":
        latest = root / LATEST
        if (latest / STATE_FILE).is_file():
            return latest.resolve()
        return existing[-1] if existing else None
    folder = Path(resume)
    if not (folder / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"--resume {resume}: {STATE_FILE} is missing, so it is no training checkpoint; name one, as in "
            f"RUN/checkpoints/{LATEST}"
        )
    return folder.resolve()
