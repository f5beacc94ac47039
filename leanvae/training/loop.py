"""The course of a run: counts steps, logs, validates, saves and resumes."""

import logging
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from leanvae.config import load_config
from leanvae.data.loader import Batch, Loader
from leanvae.data.order import phase_at
from leanvae.data.quarantine import check_bad_share
from leanvae.files import write_text
from leanvae.training.build import build_networks, check_passes, find_items
from leanvae.training.checkpoints import clean, find_checkpoint
from leanvae.training.config import TrainConfig, TrainImageConfig, TrainVideoConfig
from leanvae.training.engine import start_processes
from leanvae.training.ranks import StopRequests, gather, highest, lock_folder, on_main, rank, world_size
from leanvae.training.record import RunRecord
from leanvae.training.schedule import ema_decay
from leanvae.training.state import RESOLVED_CONFIG, items_digest, load_run, resolved_config, save_run
from leanvae.training.step import update_average
from leanvae.training.validation import Validation

logger = logging.getLogger("leanvae")

CHECKPOINTS = "checkpoints"
HELD_OUT = "held_out.txt"
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
        with Trainer(settings, root, device) as trainer:
            trainer.start(resume)
            return trainer.run(requests)
    finally:
        if lock is not None and rank() == 0:
            os.close(lock)
        if dist.is_initialized():
            dist.destroy_process_group()


class Trainer:
    """A run. Every rank makes one; they take the same steps.

    Args:
        config: the run's configuration.
        root: its output folder.
        device: this rank's device.

    Raises:
        ConfigError: a batch does not divide among the ranks and passes.
        ValueError: the data sources hold nothing to train on.
    """

    def __init__(self, config: TrainConfig, root: Path, device: torch.device) -> None:
        self.config = config
        self.root = root
        self.device = device
        self.is_main = rank() == 0
        self.step = 0
        self.bad_clips: dict[str, str] = {}
        self._first_step, self._busy_seconds = 0, 0.0
        self.loader: Loader | None = None
        self.curriculum = config.curriculum
        check_passes(config, world_size())
        self.train_items, self.held_out = find_items(config.data)
        self.take_step, self.average = build_networks(config, device)
        self.record = RunRecord(root) if self.is_main else None
        self.validation = Validation(config, self.held_out, device) if self.is_main else None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.loader:
            self.loader.close()
        if self.record:
            self.record.close()

    def start(self, resume: str) -> None:
        """Goes on from a checkpoint, or begins; see `find_checkpoint` for `resume`."""
        folder = on_main(lambda: find_checkpoint(self.root / CHECKPOINTS, resume))
        if folder:
            self.step, average = load_run(
                folder, self.config, self.take_step, items_digest(self.train_items), self.device
            )
            for name, value in average.items():
                self.average[name].copy_(value)
        if self.record:
            clean(self.root / CHECKPOINTS)
            self.record.start(self.step if folder else None)
            write_text(self.root / RESOLVED_CONFIG, resolved_config(self.config))
            write_text(self.root / HELD_OUT, "".join(f"{item.path}\n" for item in self.held_out))
        self.loader = Loader(
            self.config.data,
            self.train_items,
            seed=self.config.training.seed,
            phases=self.curriculum.phases,
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
        if self.step == 0:
            self._validate()
        batches = iter(self.loader)
        bar = tqdm(total=max_steps, initial=self.step, unit="step", disable=None if self.is_main else True)
        with bar, requests.listening():
            while self.step < max_steps:
                started = time.monotonic()
                batch = next(batches)
                if stop := self._agree(requests, batch):
                    self._save()
                    logger.info("stopped by a signal after step %d; saved", self.step)
                    return 130 if stop == signal.SIGINT else 0
                waited = time.monotonic() - started
                logs = self.take_step(batch.pixels, batch.indices, self.step)
                self._update_average()
                self.step += 1
                self._log(logs, time.monotonic() - started, waited)
                bar.update()
                bar.set_postfix(loss=f"{logs['loss']:.4f}")
                # In this order a kill in between repeats the validation instead of leaving it out.
                if self.step == max_steps or self.step % training.validate_every == 0:
                    self._validate()
                if self.step == max_steps or self.step % training.checkpoint_every == 0:
                    self._save()
        if self.record:
            if summary := self.record.write_summary():
                logger.info("%s", summary)
            logger.info("done: %s", self.root / CHECKPOINTS / "latest")
        return 0

    def _update_average(self) -> None:
        weights = self.take_step.vae.full_weights()
        if self.is_main or self.take_step.average:
            update_average(self.average, weights, ema_decay(self.step, self.config.training.ema_decay))

    def _agree(self, requests: StopRequests, batch: Batch) -> int:
        """Tells all ranks what one has met: requests to stop and broken files.

        Returns:
            The signal that stops the run, or 0.

        Raises:
            TooManyBadClips: the share of broken files is too large; on every rank at once.
        """
        stop, num_rejected = highest([requests.pending(), len(batch.rejected)], self.device)
        if num_rejected:
            for rejection in (item for part in gather(batch.rejected) for item in part):
                if rejection.path not in self.bad_clips:
                    self.bad_clips[rejection.path] = rejection.reason
                    if self.is_main:
                        logger.warning("unusable file %s: %s", rejection.path, rejection.reason)
            num_files = len({item.path for item in self.train_items})
            check_bad_share(self.bad_clips, num_files, self.config.data.max_bad_share)
        return stop

    def _log(self, logs: dict[str, float], seconds: float, waited: float) -> None:
        training = self.config.training
        self._busy_seconds += seconds
        logs = {
            **logs,
            "seconds_per_step": seconds,
            "data_wait_share": waited / seconds,
            "samples_per_second": phase_at(self.curriculum.phases, self.step - 1).batch_size / seconds,
            "bad_clips": len(self.bad_clips),
        }
        if not torch.tensor(logs["loss"]).isfinite():
            raise ValueError(
                f"the loss is {logs['loss']} at step {self.step}: the run stops; its last checkpoint is from before"
            )
        if not (self.is_main and self.record):
            return
        self.record.log(self.step, logs, to_board=training.is_logged(self.step - 1))
        taken = self.step - self._first_step
        mean_seconds = self._busy_seconds / taken
        left = (self.curriculum.max_steps - self.step) * mean_seconds
        if self.step % training.log_every == 0:
            shown = " ".join(f"{name} {value:.4g}" for name, value in logs.items())
            logger.info("step %d/%d %s, about %s left", self.step, self.curriculum.max_steps, shown, duration(left))
        long = left > _LONG_RUN_SECONDS and self.device.type == "cpu"
        if taken == (1 if long else _STEPS_BEFORE_ESTIMATE):
            in_all = duration(self.curriculum.max_steps * mean_seconds)
            logger.info("%.2f s a step, about %s in all", mean_seconds, in_all)
            if long:
                logger.warning("this is a run for GPUs; %s is made for a machine without one", self.config.small_config)

    def _validate(self) -> None:
        """Measures the averaged weights on held-out data, on the main rank."""
        if self.validation and self.record and (results := self.validation.run(self.average)):
            self.record.log_validation(self.step, results)
            logger.info("step %d: held-out PSNR %.2f dB (%d files)", self.step, results.mean_psnr, len(results.psnr))

    def _save(self) -> None:
        digest = items_digest(self.train_items)
        save_run(self.root / CHECKPOINTS, self.config, self.take_step, self.average, self.step, digest)


def duration(seconds: float) -> str:
    """A duration in words: `3 d 4 h`, `2 h 5 min`, `3 min 20 s` or `45 s`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
