"""The course of a run: counts steps, logs, validates, saves and resumes."""

import errno
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from leanvae.config import load_config
from leanvae.data.loader import Batch, Loader
from leanvae.data.quarantine import check_bad_share
from leanvae.distributed import (
    StopRequests,
    gather,
    lock_folder,
    max_over_ranks,
    on_main,
    rank,
    start_processes,
    stop_processes,
    world_size,
)
from leanvae.training.build import (
    build_networks,
    check_passes,
    find_items,
    load_held_out_lpips,
    make_schedule,
)
from leanvae.training.checkpoints import RESOLVED_CONFIG, clean, complete_checkpoints, damage, find_checkpoint, is_best
from leanvae.training.config import TrainConfig, TrainImageConfig, TrainVideoConfig
from leanvae.training.curriculum import ema_decay
from leanvae.training.faults import FaultRecord, check_roll_back, checkpoint_to_restore
from leanvae.training.listeners import RunRecord, check_wandb, write_summary
from leanvae.training.profiling import StepTimes, StepTrace, memory_in_use
from leanvae.training.state import (
    check_same_run,
    items_digest,
    read_state,
    resolved_config,
    restore,
    save_run,
)
from leanvae.training.step import update_average
from leanvae.training.validation import Validation, read_validation_samples
from litevae.errors import NotFinite, TrainingDiverged
from litevae.files import write_text

logger = logging.getLogger("leanvae")

CHECKPOINTS = "checkpoints"
HELD_OUT = "held_out.txt"
SHAPES = "shapes.json"
_LONG_RUN_SECONDS = 24 * 3600.0
_STEPS_BEFORE_ESTIMATE = 4


def train(
    config_class: type[TrainVideoConfig] | type[TrainImageConfig],
    config: str | Path,
    overrides: list[str],
    output: str | Path | None,
    resume: str = "auto",
) -> int:
    """Trains an autoencoder as a YAML file says.

    Args:
        config_class: what the file is read as: `TrainVideoConfig` or `TrainImageConfig`.
        config: the YAML file.
        overrides: dotted `key.path=value` settings.
        output: folder of the run; `training.output` if `None`.
        resume: `auto`, `none` or a checkpoint folder; see `find_checkpoint`.

    Returns:
        Exit status: 0 when done or stopped by SIGTERM (after saving), 130 when interrupted by SIGINT.

    Raises:
        ConfigError, ValueError, FileNotFoundError: the configuration, the data or the checkpoint is wrong.
        TooManyBadClips: the share of unusable files is too large.
        TrainingDiverged: steps go on being not finite.
        OSError: the disk is full; the newest checkpoint is intact.
    """
    settings = load_config(config_class, config, overrides)
    device = start_processes(settings.training.engine)
    root = Path(output or settings.training.output)
    requests = StopRequests()
    lock = None

    def take_folder() -> int:
        (root / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        return lock_folder(root)

    try:
        lock = on_main(take_folder)
        with Trainer(settings, root, device, resume) as trainer:
            trainer.start()
            return trainer.run(requests)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            raise OSError(error.errno, error.strerror, str(root)) from error
        raise
    finally:
        if lock is not None and rank() == 0:
            os.close(lock)
        stop_processes()


class Trainer:
    """A run. Every rank makes one; they take the same steps.

    Args:
        config: the run's configuration.
        root: its output folder.
        device: this rank's device.
        resume: see `find_checkpoint`.

    Raises:
        ConfigError: a batch does not divide among the ranks and passes.
        ValueError: the data sources hold nothing to train on.
    """

    def __init__(self, config: TrainConfig, root: Path, device: torch.device, resume: str) -> None:
        self.config = config
        self.root = root
        self.device = device
        self.is_main = rank() == 0
        self.step = 0
        self.faults = FaultRecord()
        self.bad_clips: dict[str, str] = {}
        self._bad_files: dict[int, list[str]] = {}
        self._saved_step: int | None = None
        self._first_step, self._busy_seconds = 0, 0.0
        self.loader: Loader | None = None
        self.curriculum = config.curriculum
        check_passes(config, world_size())
        check_wandb(config.training.wandb)
        self._checkpoint = on_main(lambda: find_checkpoint(root / CHECKPOINTS, resume))
        self.train_items, self.held_out = find_items(config.data)
        self.items_digest = items_digest(self.train_items)
        self.take_step, self.average = build_networks(config, device, resumes=self._checkpoint is not None)
        self.record = self.validation = None
        if self.is_main:
            self.record = RunRecord(root, config)
            lpips = load_held_out_lpips(config.losses, self.take_step.perceptual, device)
            self.validation = Validation(config, read_validation_samples(config, self.held_out), lpips, device)
        self._figures: tuple[int, dict[str, float | None]] = (0, {})  # of held-out files, after so many steps

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.loader:
            self.loader.close()
        if self.record:
            self.record.close()

    def start(self) -> None:
        """Goes on from the checkpoint that was found, or begins."""
        if folder := self._checkpoint:
            check_same_run(folder, self.config, self.take_step, self.items_digest)
            state = restore(folder, self.take_step, self.average)
            self.step, self.faults = state.step, FaultRecord.from_json(state.faults)
            self.take_step.gan_factor = self.faults.gan_factor
            if self.is_main:
                logger.info("resuming from %s (step %d)", folder, self.step)
        if self.record:
            clean(self.root / CHECKPOINTS)
            self.record.start(self.step if folder else None)
            write_text(self.root / RESOLVED_CONFIG, resolved_config(self.config))
            write_text(self.root / HELD_OUT, "".join(f"{item.path}\n" for item in self.held_out))
        self.loader = Loader(
            self.config.data,
            make_schedule(self.config, self.train_items, self.root / SHAPES),
            rank=rank(),
            world_size=world_size(),
            start_step=self.step,
            record=self.root / f"quarantine.rank{rank()}.jsonl",
        )
        for known in gather(dict(self.loader.rejected_paths)):
            self.bad_clips.update(known)

    def run(self, requests: StopRequests) -> int:
        """Takes the remaining steps; returns the exit status."""
        assert self.loader is not None
        training, max_steps = self.config.training, self.curriculum.max_steps
        self._first_step = self.step
        if not self._checkpoint:
            self._validate()
        if on_main(lambda: not complete_checkpoints(self.root / CHECKPOINTS)):
            # What a first roll-back goes to; it also shows now, not in an hour, whether checkpoints can be written.
            self._save()
        batches = iter(self.loader)
        bar = tqdm(total=max_steps, initial=self.step, unit="step", disable=None if self.is_main else True)
        trace = StepTrace(self.root / f"trace.rank{rank()}.json", training.profile)
        with bar, trace, requests.listening():
            while self.step < max_steps:
                trace.begin(self.step + 1)
                started = time.monotonic()
                batch = next(batches)
                if stop := self._agree(requests, batch):
                    self._save()
                    logger.info("stopped by a signal after step %d; saved", self.step)
                    return 130 if stop == signal.SIGINT else 0
                waited = time.monotonic()
                logs = self.take_step(batch.pixels, batch.indices, self.step)
                stepped = time.monotonic()
                if not logs["skipped"]:
                    self._update_average()
                self.step += 1
                self._meet_faults(logs, batch.paths)
                self._log(logs, batch, StepTimes(waited - started, stepped - waited, time.monotonic() - started))
                bar.update()
                bar.set_postfix(loss=f"{logs['loss']:.4f}")
                # In this order a kill in between repeats the validation instead of leaving it out.
                last = self.step == max_steps
                improved = (last or self.step % training.validate_every == 0) and self._validate()
                if last or improved or self.step % training.checkpoint_every == 0:
                    self._save()
        if self.record:
            if summary := write_summary(self.root):
                logger.info("%s", summary)
            logger.info("done: %s", self.root / CHECKPOINTS / "latest")
        return 0

    def _update_average(self) -> None:
        weights = self.take_step.vae.full_weights()
        if self.is_main or self.take_step.average:
            update_average(self.average, weights, ema_decay(self.step, self.config.training.ema_decay))

    def _meet_faults(self, logs: dict[str, float], paths: list[str]) -> None:
        """Takes a bad step into the record, names its files, and goes back when there are too many in a row."""
        bad = bool(logs["skipped"])
        self.faults = self.faults.after(self.step, bad)
        if not bad:
            self._bad_files.clear()
            return
        files = self._bad_files[self.step] = sorted({path for part in gather(paths) for path in part})
        if self.is_main:
            values = [f"{name} is {value}" for name, value in logs.items() if not math.isfinite(value)]
            reason = ", ".join(values) or "a gradient is not finite"
            logger.warning("step %d is skipped: %s; its files: %s", self.step, reason, ", ".join(files))
        if self.faults.bad_in_a_row >= self.config.training.faults.max_bad_steps:
            listed = ", ".join(sorted({file for files in self._bad_files.values() for file in files}))
            first = self.step - self.faults.bad_in_a_row + 1
            self._roll_back(f"steps {first} to {self.step} are not finite; their files: {listed}")

    def _roll_back(self, reason: str) -> None:
        """Sets the networks back to an older checkpoint; the numbers of the steps go on.

        Raises:
            TrainingDiverged: the run has gone back as often as it may.
        """
        config, root = self.config.training.faults, self.root / CHECKPOINTS
        check_roll_back(config, self.faults, reason)
        folder = on_main(lambda: checkpoint_to_restore(_updates_of_checkpoints(root), self.faults.updates))
        if folder is None:
            raise TrainingDiverged(f"{reason}; {root} holds no checkpoint to go back to")
        state = restore(folder, self.take_step, self.average)
        self._bad_files.clear()
        gan_factor = config.gan_weight_factor if self.take_step.gan_weight(self.step - 1) else 1.0
        before = FaultRecord.from_json(state.faults)
        self.faults = self.faults.rolled_back(before, state.step, self.step, gan_factor)
        self.take_step.gan_factor = self.faults.gan_factor
        if self.is_main:
            logger.warning(
                "%s. Back to the weights of %s (roll-back %d of %d); the data go on with step %d; GAN weight x %g",
                reason,
                folder,
                self.faults.roll_backs,
                config.max_rollbacks,
                self.step + 1,
                self.faults.gan_factor,
            )
        self._saved_step = None  # what may have been written of this step is of the weights from before
        self._save()  # else a run killed now would take the lost steps again

    def _agree(self, requests: StopRequests, batch: Batch) -> int:
        """Tells all ranks what one has met: requests to stop and broken files.

        Returns:
            The signal that stops the run, or 0.

        Raises:
            TooManyBadClips: the share of broken files is too large; on every rank at once.
        """
        stop, num_rejected = max_over_ranks([requests.pending(), len(batch.rejected)])
        if num_rejected:
            for rejection in (item for part in gather(batch.rejected) for item in part):
                if rejection.path not in self.bad_clips:
                    self.bad_clips[rejection.path] = rejection.reason
                    if self.is_main:
                        logger.warning("unusable file %s: %s", rejection.path, rejection.reason)
            num_files = len({item.path for item in self.train_items})
            check_bad_share(self.bad_clips, num_files, self.config.data.max_bad_share)
        return stop

    def _log(self, logs: dict[str, float], batch: Batch, times: StepTimes) -> None:
        training, seconds = self.config.training, times.whole
        self._busy_seconds += seconds
        of_step = {name: value for name, value in logs.items() if math.isfinite(value)}
        logs = {
            **of_step,
            "seconds_per_step": seconds,
            "step_seconds": times.step,
            "data_wait_share": times.wait / seconds,
            "frames": batch.bucket.frames,
            "height": batch.bucket.height,
            "width": batch.bucket.width,
            "samples_per_second": batch.size / seconds,
            "frames_per_second": batch.size * batch.bucket.frames / seconds,
            "memory_mib": memory_in_use(self.device) / 2**20,
            "bad_clips": len(self.bad_clips),
            "skipped_steps": len(self.faults.skipped),
            "roll_backs": self.faults.roll_backs,
        }
        if not (self.is_main and self.record):
            return
        self.record.log(self.step, logs, to_board=training.is_logged(self.step - 1))
        taken = self.step - self._first_step
        mean_seconds = self._busy_seconds / taken
        left = (self.curriculum.max_steps - self.step) * mean_seconds
        if self.step % training.log_every == 0:
            shown = " ".join(f"{name} {value:.4g}" for name, value in of_step.items())
            speed = (
                f"{seconds:.2f} s, {times.wait / seconds:.0%} of it waiting for data, "
                f"{logs['samples_per_second']:.3g} samples/s, {logs['frames_per_second']:.3g} frames/s, "
                f"{logs['memory_mib']:.0f} MiB"
            )
            logger.info(
                "step %d/%d %s: %s; %s; about %s left",
                self.step,
                self.curriculum.max_steps,
                batch.bucket,
                shown,
                speed,
                duration(left),
            )
        long = left > _LONG_RUN_SECONDS and self.device.type == "cpu"
        if taken == (1 if long else _STEPS_BEFORE_ESTIMATE):
            in_all = duration(self.curriculum.max_steps * mean_seconds)
            logger.info("%.2f s a step, about %s in all", mean_seconds, in_all)
            if long:
                logger.warning("this is a run for GPUs; %s is made for a machine without one", self.config.small_config)

    def _validate(self) -> bool:
        """Measures the averaged weights on held-out data, on the main rank; tells whether they are the best yet."""

        def evaluate() -> bool:
            assert self.validation
            assert self.record
            results = self.validation.run(self.average)
            if results is None:
                return False
            self.record.log_validation(self.step, results)
            logger.info("step %d: held-out %s", self.step, results)
            self._figures = (self.step, results.means)
            return is_best(self.root / CHECKPOINTS, results.means["psnr"])

        return on_main(evaluate)

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        root, digest = self.root / CHECKPOINTS, self.items_digest
        figures = self._figures[1] if self._figures[0] == self.step else None
        try:
            save_run(root, self.config, self.take_step, self.average, self.step, digest, self.faults, figures)
        except NotFinite as error:
            self._roll_back(str(error))


def _updates_of_checkpoints(root: Path) -> Iterator[tuple[Path, int]]:
    """Checkpoints that are not damaged, the newest first, and the updates that their weights have had."""
    for folder in reversed(complete_checkpoints(root)):
        if damage(folder) is None:
            yield folder, FaultRecord.from_json(read_state(folder).faults).updates


def duration(seconds: float) -> str:
    """A duration in words: `3 d 4 h`, `2 h 5 min`, `3 min 20 s` or `45 s`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
