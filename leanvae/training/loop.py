"""The course of a run: open it, count steps, validate, save, go back, and tell the listeners."""

import errno
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanvae.config import load_config
from leanvae.data.loader import Batch, Loader
from leanvae.data.quarantine import check_bad_share
from leanvae.distributed import (
    StopRequests,
    barrier,
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
    find_start,
    load_held_out_lpips,
    make_schedule,
    start_record,
)
from leanvae.training.checkpoints import RESOLVED_CONFIG, clean, complete_checkpoints, find_checkpoint, is_best
from leanvae.training.comparison import write_comparisons
from leanvae.training.config import TrainConfig, TrainImageConfig, TrainVideoConfig
from leanvae.training.curriculum import ema_decay
from leanvae.training.faults import FaultRecord, bad_values, check_roll_back, checkpoint_to_restore, reason_to_go_back
from leanvae.training.listeners import Listener, StepReport, check_wandb, default_listeners, write_summary
from leanvae.training.profiling import StepTimes, StepTrace, step_costs
from leanvae.training.state import (
    check_same_run,
    items_digest,
    resolved_config,
    restore,
    save_run,
    updates_of_checkpoints,
)
from leanvae.training.step import TrainingStep, update_average
from leanvae.training.validation import Validation, read_validation_samples
from litevae.errors import NotFinite, TrainingDiverged
from litevae.files import write_text

logger = logging.getLogger("leanvae")

CHECKPOINTS = "checkpoints"
HELD_OUT = "held_out.txt"
HELD_OUT_FOLDER = "held_out"
SHAPES = "shapes.json"


def train(
    config_class: type[TrainVideoConfig] | type[TrainImageConfig],
    config: str | Path,
    overrides: list[str],
    output: str | Path | None,
    resume: str = "auto",
    listeners: Sequence[Listener] = (),
) -> int:
    """Train an autoencoder with a YAML file's configuration.

    Args:
        config_class: class of the configuration: `TrainVideoConfig` or `TrainImageConfig`.
        config: the YAML file.
        overrides: dotted `key.path=value` settings.
        output: folder of the run; None uses `training.output`.
        resume: `auto`, `none` or a checkpoint folder; see `find_checkpoint`.
        listeners: additional listeners, called on the main rank.

    Returns:
        Exit status: 0 if done or stopped by SIGTERM (after saving), 130 if interrupted by SIGINT.

    Raises:
        InvalidInput, MissingFile, MissingPackage: the configuration, the data or the checkpoint is wrong.
        TooManyBadClips: the share of unusable files is too large.
        TrainingDiverged: steps are still not finite after the last rollback.
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
        with open_run(settings, root, device, resume, listeners) as run:
            return run.go_on(requests)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            raise OSError(error.errno, error.strerror, str(root)) from error
        raise
    finally:
        if lock is not None and rank() == 0:
            os.close(lock)
        stop_processes()


@contextmanager
def open_run(
    config: TrainConfig, root: Path, device: torch.device, resume: str, listeners: Sequence[Listener] = ()
) -> Iterator["Run"]:
    """Find a run's files, build its networks, and resume from its checkpoint or begin; all ranks together.

    Args:
        config: the run's configuration.
        root: its output folder.
        device: this rank's device.
        resume: see `find_checkpoint`.
        listeners: in addition to `default_listeners`.

    Raises:
        ConfigError: a batch does not divide among the ranks and passes, or the checkpoint does not fit.
        InvalidInput: the data sources hold nothing to train on.
    """
    check_passes(config, world_size())
    check_wandb(config.training.wandb)
    checkpoint = on_main(lambda: find_checkpoint(root / CHECKPOINTS, resume))
    items, held_out = find_items(config.data)
    digest = items_digest(items)
    schedule = make_schedule(config, items, root / SHAPES)
    start = find_start(config, schedule) if checkpoint is None else None
    take_step, average = build_networks(config, device, resumes=checkpoint is not None, start=start)
    record = start and start_record(config, start)
    validation = None
    if rank() == 0:
        lpips = load_held_out_lpips(config.losses, take_step.perceptual, device)
        validation = Validation(config, read_validation_samples(config, held_out), lpips, device)
    barrier()  # the others wait for the main rank's decoding here, because DeepSpeed's group would give up
    step, faults = 0, FaultRecord()
    if checkpoint:
        check_same_run(checkpoint, config, take_step, digest)
        state = restore(checkpoint, take_step, average)
        step, faults, record = state.step, FaultRecord.from_json(state.faults), state.start
        take_step.gan_factor = faults.gan_factor
        if rank() == 0:
            logger.info("resuming from %s (step %d)", checkpoint, step)
    with ExitStack() as stack:
        listening = []
        if rank() == 0:
            clean(root / CHECKPOINTS)
            write_text(root / RESOLVED_CONFIG, resolved_config(config))
            write_text(root / HELD_OUT, "".join(f"{item.name}\n" for item in held_out))
            listening = [*default_listeners(config), *listeners]
        for listener in listening:
            listener.started(root, config, step if checkpoint else None)
            stack.callback(listener.closed)
        loader = Loader(
            config.data,
            schedule,
            rank=rank(),
            world_size=world_size(),
            start_step=step,
            record=root / f"quarantine.rank{rank()}.jsonl",
        )
        stack.callback(loader.close)
        run = Run(config, root, device, take_step, average, loader, validation, listening, step, faults)
        run.is_new, run.items_digest, run.num_files = checkpoint is None, digest, len({item.name for item in items})
        run.start = record
        for known in gather(dict(loader.rejected_paths)):
            run.bad_clips.update(known)
        yield run


@dataclass(eq=False)
class Run:
    """An open run. Every rank has one, and all take the same steps.

    Attributes:
        config, root, device: as for `open_run`.
        take_step: the networks and their training.
        average: averaged weights, kept on the main rank.
        loader: gives this rank's part of each batch.
        validation: evaluates held-out files; on the main rank only.
        listeners: the run's listeners; on the main rank only.
        step: steps taken.
        faults: bad steps so far.
        is_new: whether the run begins.
        items_digest: short hash of the list of training files.
        num_files: number of training files.
        bad_clips: unusable files, with the reason.
        start: what the closed-form start promised, if there was one.
    """

    config: TrainConfig
    root: Path
    device: torch.device
    take_step: TrainingStep
    average: dict[str, Tensor]
    loader: Loader
    validation: Validation | None
    listeners: Sequence[Listener]
    step: int
    faults: FaultRecord
    is_new: bool = True
    items_digest: str = ""
    num_files: int = 0
    bad_clips: dict[str, str] = field(default_factory=dict)
    start: Mapping[str, Any] | None = None
    _bad_files: dict[int, list[str]] = field(default_factory=dict)  # of the bad steps in a row
    _saved_step: int | None = None
    _figures: tuple[int, dict[str, float | None]] = (0, {})  # of held-out files, after so many steps

    def go_on(self, requests: StopRequests) -> int:
        """Take the remaining steps; return the exit status."""
        training, max_steps = self.config.training, self.config.curriculum.max_steps
        if self.is_new:
            self._validate()
        if on_main(lambda: not complete_checkpoints(self.root / CHECKPOINTS)):
            # For a first rollback; it also shows at once whether checkpoints can be written.
            self._save()
        batches = iter(self.loader)
        with StepTrace(self.root / f"trace.rank{rank()}.json", training.profile) as trace, requests.listening():
            while self.step < max_steps:
                trace.begin(self.step + 1)
                started = time.monotonic()
                batch = next(batches)
                if stop := self._agree(requests, batch):
                    self._save()
                    if rank() == 0:
                        logger.info("stopped by a signal after step %d; saved", self.step)
                    return 130 if stop == signal.SIGINT else 0
                waited = time.monotonic()
                logs = self.take_step(batch.pixels, batch.indices, self.step)
                stepped = time.monotonic()
                if not logs["skipped"]:
                    self._update_average()
                self.step += 1
                self._meet_faults(logs, batch.paths)
                self._report(logs, batch, StepTimes(waited - started, stepped - waited, time.monotonic() - started))
                # In this order, a kill in between repeats the validation instead of omitting it.
                last = self.step == max_steps
                improved = (last or self.step % training.validate_every == 0) and self._validate()
                if last or improved or self.step % training.checkpoint_every == 0:
                    self._save()
        if rank() == 0:
            if summary := write_summary(self.root):
                logger.info("%s", summary)
            logger.info("done: %s", self.root / CHECKPOINTS / "latest")
        return 0

    def _update_average(self) -> None:
        weights = self.take_step.vae.full_weights()
        if rank() == 0 or self.take_step.average:
            update_average(self.average, weights, ema_decay(self.step, self.config.training.ema_decay))

    def _meet_faults(self, logs: Mapping[str, float], paths: list[str]) -> None:
        """Record whether a step was bad, name its files, and go back if there are too many in a row."""
        bad = bool(logs["skipped"])
        self.faults = self.faults.after(self.step, bad)
        if not bad:
            self._bad_files.clear()
            return
        files = self._bad_files[self.step] = sorted({path for part in gather(paths) for path in part})
        if rank() == 0:
            logger.warning("step %d is skipped: %s; its files: %s", self.step, bad_values(logs), ", ".join(files))
        if reason := reason_to_go_back(self.config.training.faults, self.faults, self.step, self._bad_files):
            self._roll_back(reason)

    def _roll_back(self, reason: str) -> None:
        """Set the networks back to an older checkpoint; step numbers continue.

        Raises:
            TrainingDiverged: the run has gone back as often as it may.
        """
        config, root = self.config.training.faults, self.root / CHECKPOINTS
        check_roll_back(config, self.faults, reason)
        folder = on_main(lambda: checkpoint_to_restore(updates_of_checkpoints(root), self.faults.updates))
        if folder is None:
            raise TrainingDiverged(f"{reason}; {root} holds no checkpoint to go back to")
        state = restore(folder, self.take_step, self.average)
        self._bad_files.clear()
        gan_factor = config.gan_weight_factor if self.take_step.gan_weight(self.step - 1) else 1.0
        before = FaultRecord.from_json(state.faults)
        self.faults = self.faults.rolled_back(before, state.step, self.step, gan_factor)
        self.take_step.gan_factor = self.faults.gan_factor
        if rank() == 0:
            logger.warning(
                "%s. Back to the weights of %s (rollback %d of %d); the data continue with step %d; GAN weight x %g",
                reason,
                folder,
                self.faults.roll_backs,
                config.max_rollbacks,
                self.step + 1,
                self.faults.gan_factor,
            )
        self._saved_step = None  # a checkpoint of this step would hold the old weights
        self._save()  # a run killed now would otherwise take the lost steps again

    def _agree(self, requests: StopRequests, batch: Batch) -> int:
        """Share what any rank has met: requests to stop and broken files.

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
                    if rank() == 0:
                        logger.warning("unusable file %s: %s", rejection.path, rejection.reason)
            check_bad_share(self.bad_clips, self.num_files, self.config.data.max_bad_share)
        return stop

    def _report(self, logs: Mapping[str, float], batch: Batch, times: StepTimes) -> None:
        """Report a step to the listeners."""
        if not self.listeners:
            return
        values = {name: value for name, value in logs.items() if math.isfinite(value)}
        counts = {
            "bad_clips": len(self.bad_clips),
            "skipped_steps": len(self.faults.skipped),
            "roll_backs": self.faults.roll_backs,
        }
        figures = values | step_costs(batch.bucket, batch.size, times, self.device) | counts
        is_logged = self.config.training.is_logged(self.step - 1)
        for listener in self.listeners:
            listener.stepped(StepReport(self.step, values, figures, batch.bucket, times, is_logged))

    def _validate(self) -> bool:
        """Measure the averaged weights on held-out data, on the main rank; return whether they are the best yet."""

        def evaluate() -> bool:
            assert self.validation
            results = self.validation.run(self.average)
            if results is None:
                return False
            files = write_comparisons(self.root / HELD_OUT_FOLDER, self.step, results.comparisons)
            for listener in self.listeners:
                listener.validated(self.step, results, files)
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
            save_run(
                root, self.config, self.take_step, self.average, self.step, digest, self.faults, figures, self.start
            )
        except NotFinite as error:
            self._roll_back(str(error))
