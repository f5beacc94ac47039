"""A checkpoint's record of a run, and whether a run can resume from it."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from leanvae.config import ConfigError
from leanvae.distributed import barrier, on_main, rank, world_size
from leanvae.media.item import Item
from leanvae.training.checkpoints import (
    FIGURES_FILE,
    RESOLVED_CONFIG,
    STATE_FILE,
    commit,
    complete_checkpoints,
    damage,
    new_checkpoint,
    temporary_folder,
    writing,
)
from leanvae.training.config import TrainConfig
from leanvae.training.faults import FaultRecord
from leanvae.training.step import LeCamAverages, TrainingStep
from litevae.errors import NotFinite
from litevae.files import write_text
from litevae.pretrained import WEIGHTS_FILE, save_pretrained

logger = logging.getLogger("leanvae")

# Errors that are not about the files being read.
_OF_MACHINES = (torch.OutOfMemoryError, dist.DistError, ConnectionError)
_SAID_BY_MACHINES = r"CUDA error|NCCL|gloo/|DefaultCPUAllocator"


@dataclass(frozen=True)
class RunState:
    """Small facts in a checkpoint (`trainer.json`), beside weights and optimizers.

    Attributes:
        step: steps taken.
        perceptual: the perceptual terms in use, of `lpips` and `vgg`.
        clips: digest of the list of training files, which decides on the order of the data.
        world_size: ranks that wrote the engines' state.
        lecam: running averages of the discriminator's logits.
        torch: version.
        faults: bad steps and roll-backs; see `FaultRecord`.
        start: what the closed-form start promised, if there was one; see `leanvae.training.build.start_record`.
    """

    step: int
    perceptual: list[str]
    clips: str
    world_size: int
    lecam: dict[str, list[float]]
    torch: str
    faults: dict[str, Any]
    start: dict[str, Any] | None = None


def items_digest(items: Sequence[Item]) -> str:
    """Return a short hash of a list of clips or images."""
    places = [(item.start, item.end) if item.kind == "clip" else (item.offset, item.size) for item in items]
    text = "\n".join(f"{item.path}\t{start}\t{end}" for item, (start, end) in zip(items, places, strict=True))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def resolved_config(config: TrainConfig) -> str:
    """Return a configuration with all its defaults, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def save_run(
    root: Path,
    config: TrainConfig,
    take_step: TrainingStep,
    average: dict[str, Tensor],
    step: int,
    clips: str,
    faults: FaultRecord,
    figures: Mapping[str, float | None] | None,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint: averaged weights, both engines, and the run's state; all ranks together.

    Args:
        root: folder of the checkpoints.
        config: the run's configuration.
        take_step: holds the engines.
        average: averaged weights; read on the main rank.
        step: steps taken.
        clips: digest of the training files.
        faults: bad steps so far.
        figures: of held-out files, by metric, if they were evaluated after this step; read on the main rank.
        start: what the closed-form start promised.

    Raises:
        NotFinite: an averaged weight is not finite; nothing is written.
        OSError: the checkpoint cannot be written, as on a full disk; earlier ones are intact.
    """
    on_main(lambda: _check_finite(average, step))

    def begin() -> Path:
        folder = new_checkpoint(root, step)
        temporary_folder(folder).mkdir(parents=True)
        return folder

    def finish() -> None:
        state = RunState(
            step,
            sorted(take_step.perceptual),
            clips,
            world_size(),
            asdict(take_step.lecam),
            torch.__version__,
            faults.to_json(),
            dict(start) if start else None,
        )
        save_pretrained(type(take_step.vae.module).__name__, config.model, average, written)
        write_text(written / RESOLVED_CONFIG, resolved_config(config))
        write_text(written / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
        if figures:
            write_text(written / FIGURES_FILE, json.dumps(figures, indent=2) + "\n")
        commit(folder, config.training.keep_checkpoints, config.training.keep_every)

    folder = on_main(begin)
    written = temporary_folder(folder)
    with writing(folder):
        take_step.vae.save(written / "vae")
        if take_step.discriminator:
            take_step.discriminator.save(written / "discriminator")
    barrier()
    with writing(folder):
        on_main(finish)


def read_state(folder: Path) -> RunState:
    """Return the run's state when it wrote a checkpoint."""
    with _naming(folder / STATE_FILE):
        return RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))


def updates_of_checkpoints(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield checkpoints that are not damaged, the newest first, and the updates that their weights have had."""
    for folder in reversed(complete_checkpoints(root)):
        if damage(folder) is None:
            yield folder, FaultRecord.from_json(read_state(folder).faults).updates


def check_same_run(folder: Path, config: TrainConfig, take_step: TrainingStep, clips: str) -> None:
    """Refuse a checkpoint that does not fit, and warn of all other changes.

    Args:
        folder: the checkpoint.
        config: the present configuration.
        take_step: has the present perceptual losses.
        clips: digest of the present training files.

    Raises:
        ConfigError: the checkpoint is damaged, or of another model or engine.
    """
    state = read_state(folder)
    with _naming(folder / RESOLVED_CONFIG):
        before = yaml.safe_load((folder / RESOLVED_CONFIG).read_text(encoding="utf-8"))
    now = config.model_dump(mode="json")
    _refuse_others(folder, before, now)
    changes = _changes(before, now)
    perceptual = sorted(take_step.perceptual)
    if state.perceptual != perceptual:
        changes.append(f"perceptual losses: {state.perceptual} -> {perceptual}")
    if state.clips != clips:
        changes.append("the list of training files, and with it the order of the data")
    if state.world_size != world_size():
        changes.append(f"number of ranks: {state.world_size} -> {world_size()}")
    if changes and rank() == 0:
        logger.warning("not the run that wrote %s; changed: %s", folder, "; ".join(changes))


def restore(folder: Path, take_step: TrainingStep, average: dict[str, Tensor]) -> RunState:
    """Set networks, optimizers and averages to a checkpoint's content; all ranks together.

    Args:
        folder: the checkpoint, of any number of ranks.
        take_step: gets weights, optimizer states and LeCam's averages.
        average: gets the averaged weights.

    Returns:
        The run's state.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    state = read_state(folder)
    engines = {"vae": take_step.vae, "discriminator": take_step.discriminator}
    for name, engine in engines.items():
        if engine:
            with _naming(folder / name):
                engine.load(folder / name, state.world_size)
    take_step.lecam = LeCamAverages(**state.lecam)
    with _naming(folder / WEIGHTS_FILE):
        for name, value in load_file(folder / WEIGHTS_FILE).items():
            average[name].copy_(value)
    return state


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the unreadable part of a checkpoint; errors of a device or another rank stay the same."""
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        if isinstance(error, _OF_MACHINES) or re.search(_SAID_BY_MACHINES, str(error)):
            raise
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}): name an older checkpoint with --resume"
        ) from error


def _check_finite(average: dict[str, Tensor], step: int) -> None:
    broken = [name for name, value in average.items() if not value.isfinite().all()]
    if broken:
        raise NotFinite(
            f"step {step}: {len(broken)} of {len(average)} averaged weights are not finite, first {broken[0]}"
        )


def _refuse_others(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint whose state does not fit the networks or the engines."""
    discriminators = [tree["gan"] and tree["gan"]["discriminator"] for tree in (before, now)]
    for name, there, here in (
        ("model", before["model"], now["model"]),
        ("gan.discriminator", *discriminators),
        ("training.engine", before["training"]["engine"], now["training"]["engine"]),
        ("deepspeed", before["deepspeed"], now["deepspeed"]),
        ("training.freeze", before["training"].get("freeze", []), now["training"]["freeze"]),
    ):
        if there != here:
            raise ConfigError(f"{folder} cannot be resumed with another {name}: {there} there, {here} here")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings that differ, as `block.field: old -> new`."""
    changes = [
        f"{block}.{field}: {(before[block] or {}).get(field)} -> {value}"
        for block in ("data", "losses", "gan", "optimizer", "training")
        for field, value in (now[block] or {}).items()
        if (before[block] or {}).get(field) != value
    ]
    if before["phases"] != now["phases"]:
        changes.append(f"phases: {before['phases']} -> {now['phases']}")
    return changes
