"""A run's checkpoint folder, in which every checkpoint is complete, and `latest` always names one."""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError

from litevae.errors import InvalidInput, MissingFile
from litevae.files import flush_to_disk, write_text
from litevae.pretrained import CONFIG_FILE, STATISTICS_FIELDS, config_text

logger = logging.getLogger("leanvae")

LATEST = "latest"
BEST = "best"
STATE_FILE = "trainer.json"
RESOLVED_CONFIG = "train.yaml"
MANIFEST_FILE = "manifest.json"
FIGURES_FILE = "held_out.json"  # of the averaged weights, if they were evaluated
_BLOCK = 2**24  # bytes read at a time
_ALMOST_NOTHING = 2**20  # bytes free on a full disk
# Messages of torch, whose writers raise RuntimeError, and safetensors.
_OF_WRITING = re.compile(
    r"inline_container\.cc|PytorchStreamWriter|iostream error|write\(\): fd |I/O error|"
    r"Parent directory .* does not exist"
)
_NAME = re.compile(r"step_(\d{8,})(?:_(\d+))?")


def complete_checkpoints(root: Path) -> list[Path]:
    """Return a run's checkpoints by age; a folder gets its name only when all of it is on disk."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found)]


def new_checkpoint(root: Path, step: int) -> Path:
    """Return a free name for the checkpoint after `step` steps; a resumed run may reach a step again."""
    name, revision = f"step_{step:08d}", 0
    while (folder := root / (f"{name}_{revision}" if revision else name)).exists():
        revision += 1
    return folder


def temporary_folder(folder: Path) -> Path:
    """Return where a checkpoint is written before it takes its name."""
    return folder.with_name(f".{folder.name}.tmp")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """If writing a checkpoint fails, remove its parts, and say where and why.

    Other errors, such as of a GPU or another rank, keep their type.

    Raises:
        OSError: with the checkpoint's folder, also for torch's and safetensors' own errors about a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_writing(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        number = getattr(error, "errno", None) or (errno.ENOSPC if free < _ALMOST_NOTHING else errno.EIO)
        shutil.rmtree(temporary_folder(folder), ignore_errors=True)
        message = f"{os.strerror(number)}: this checkpoint cannot be written, those before it are intact ({error})"
        raise OSError(number, message, str(folder)) from error


def _is_of_writing(error: Exception) -> bool:
    """Return whether the error means that a file could not be written."""
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError)  # with another rank
    return _OF_WRITING.search(str(error)) is not None


def commit(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Give a written checkpoint its name, point `latest` to it and `best` to the best, and remove old ones.

    Whenever the process is killed, `latest` names a complete checkpoint.

    Args:
        folder: the checkpoint's name, which must be free; its content is in `temporary_folder(folder)`.
        keep: number of the newest checkpoints that stay.
        keep_every: checkpoints after a multiple of this number of steps stay for good.
    """
    root = folder.parent
    written = temporary_folder(folder)
    sums = {name: list(size_and_sum(written / name)) for name in _files(written)}
    write_text(written / MANIFEST_FILE, json.dumps(sums, indent=2) + "\n")
    for path in [*written.rglob("*"), written]:
        flush_to_disk(path)
    written.rename(folder)
    _point(root / LATEST, folder)
    if best := best_checkpoint(root):
        _point(root / BEST, best)
    flush_to_disk(root)
    for old in complete_checkpoints(root)[:-keep]:
        if old not in (folder, best) and not (keep_every and _step(old) and _step(old) % keep_every == 0):
            # Renamed first, so that a kill half-way leaves nothing with a complete checkpoint's name.
            shutil.rmtree(old.rename(temporary_folder(old)))


def _point(link: Path, folder: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, link)


def best_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint with the highest held-out PSNR, the older of equals; None if none was evaluated."""
    figures = {folder: held_out_psnr(folder) for folder in complete_checkpoints(root)}
    evaluated = {folder: psnr for folder, psnr in figures.items() if psnr is not None}
    return max(evaluated, key=evaluated.__getitem__, default=None)


def is_best(root: Path, psnr: float | None) -> bool:
    """Return whether a PSNR of held-out files is above that of every checkpoint."""
    others = [held_out_psnr(folder) for folder in complete_checkpoints(root)]
    return psnr is not None and all(other is None or psnr > other for other in others)


def held_out_psnr(folder: Path) -> float | None:
    """Return the PSNR in dB of held-out files with a checkpoint's averaged weights; None if it is not known."""
    try:
        return json.loads((folder / FIGURES_FILE).read_text(encoding="utf-8"))["psnr"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match
    return int(match[1])


def size_and_sum(path: Path) -> tuple[int, int]:
    """Return a file's length in bytes and its CRC-32."""
    size = total = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size += len(block)
            total = zlib.crc32(block, total)
    return size, total


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files; None if they are unchanged.

    Statistics of latents, which `encode_clips --update-checkpoint` puts into `config.json`, do not count. Checkpoints
    older than manifests are assumed intact.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        return None
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
        for name, (size, total) in expected.items():
            found = size_and_sum(folder / name)
            if found != (size, total) and not (name == CONFIG_FILE and _sum_as_trained(folder) == (size, total)):
                length = f"has {found[0]} bytes, not {size}" if found[0] != size else "has changed"
                return f"{name} {length}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST_FILE} is not a list of files: {error}"
    return None


def _sum_as_trained(folder: Path) -> tuple[int, int] | None:
    """Return the length and CRC-32 of `config.json` before statistics were added; None if unknown."""
    try:
        tree = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        trained = yaml.safe_load((folder / RESOLVED_CONFIG).read_text(encoding="utf-8"))["model"]
        kept = {name: value for name, value in tree.items() if name not in STATISTICS_FIELDS or name in trained}
        text = config_text(kept | {name: trained[name] for name in STATISTICS_FIELDS if name in trained})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    return len(text.encode()), zlib.crc32(text.encode())


def clean(root: Path) -> None:
    """Remove the remains of a run that was killed while writing."""
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path)


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """Return the checkpoint to resume from; None to begin.

    Args:
        root: folder of the run's checkpoints.
        resume: `auto` takes the run's newest intact checkpoint, if there is one, and warns of damaged ones; `none`
            begins a new run; anything else is a checkpoint's path.

    Raises:
        InvalidInput: `none`, although there are checkpoints, which a new run would overwrite; or `auto`, and all are
            damaged.
        MissingFile: the path is not a training checkpoint.
    """
    existing = complete_checkpoints(root)
    if resume == "none":
        if existing:
            raise InvalidInput(
                f"{root} holds checkpoints already (newest: {existing[-1].name}): "
                "continue with --resume auto, or choose another --output"
            )
        return None
    if resume == "auto":
        for folder in reversed(existing):
            reason = damage(folder)
            if reason is None:
                return folder
            logger.warning("%s is damaged (%s): trying the previous one", folder, reason)
        if existing:
            raise InvalidInput(f"{root}: every checkpoint is damaged, the newest because {damage(existing[-1])}")
        return None
    folder = Path(resume)
    if not (folder / STATE_FILE).is_file():
        raise MissingFile(
            f"--resume {resume}: {STATE_FILE} is missing, so it is not a training checkpoint; name one, as in "
            f"RUN/checkpoints/{LATEST}"
        )
    return folder.resolve()
