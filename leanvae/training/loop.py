"""The course of a run: counts steps, logs, validates, saves and resumes."""

import json
import logging
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from leanvae.checkpoint import WEIGHTS_FILE, save_pretrained
from leanvae.config import ConfigError, load_config
from leanvae.data.loader import Batch, ClipLoader, check_bad_share
from leanvae.data.sources import Clip, list_clips, split_held_out
from leanvae.files import write_text
from leanvae.model import LeanVAE
from leanvae.training.checkpoints import STATE_FILE, checkpoint_folder, commit, find_checkpoint, temporary_folder
from leanvae.training.config import TrainVideoConfig
from leanvae.training.engine import build_engine, start_processes
from leanvae.training.record import RunRecord
from leanvae.training.schedule import ema_decay
from leanvae.training.step import LeCamAverages, TrainingStep, update_average
from leanvae.training.validation import Validation
from litevae.discriminators import PatchDiscriminator
from litevae.perceptual import PerceptualDistance, find_backbone, load_lpips, missing_backbone_message

logger = logging.getLogger("leanvae")

CHECKPOINTS = "checkpoints"
RESOLVED_CONFIG = "train.yaml"
_LONG_RUN_SECONDS = 24 * 3600.0
_STEPS_BEFORE_ESTIMATE = 3


def train_video(config: str | Path, overrides: list[str], output: str | Path | None, resume: str = "auto") -> int:
    """Trains a video autoencoder as a YAML file says.

    Args:
        config: the YAML file (`TrainVideoConfig`).
        overrides: dotted `key.path=value` settings.
        output: folder of the run; `training.output` if `None`.
        resume: `auto`, `none` or a checkpoint folder; see `find_checkpoint`.

    Returns:
        Exit status: 0 when done or stopped by SIGTERM (after saving), 130 when interrupted by SIGINT.

    Raises:
        ConfigError, ValueError, FileNotFoundError: the configuration, the data or the checkpoint is wrong.
    """
    settings = load_config(TrainVideoConfig, config, overrides)
    device = start_processes(settings.training.engine)
    root = Path(output or settings.training.output)
    try:
        with Trainer(settings, root, device) as trainer:
            trainer.start(find_checkpoint(root / CHECKPOINTS, resume))
            return trainer.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class Trainer:
    """A run. Every rank makes one; they take the same steps.

    Args:
        config: the run's configuration.
        root: its output folder.
        device: this rank's device.

    Raises:
        ConfigError: the batch does not divide among the ranks and passes.
        ValueError: the data sources hold no clip.
    """

    def __init__(self, config: TrainVideoConfig, root: Path, device: torch.device) -> None:
        self.config = config
        self.root = root
        self.device = device
        self.is_main = _rank() == 0
        self.step = 0
        self.bad_clips: dict[str, str] = {}
        self._signal = 0
        self._first_step, self._started = 0, 0.0
        training = config.training
        training.passes(_world_size())
        root.mkdir(parents=True, exist_ok=True)
        self.train_clips, self.held_out = self._find_clips()
        torch.manual_seed(training.seed)
        model = LeanVAE(config.model)
        discriminator = PatchDiscriminator(**config.gan.discriminator.model_dump()) if config.gan else None
        self.average = {name: value.detach().clone().to(device) for name, value in model.named_parameters()}
        self.perceptual = self._load_perceptual()
        vae = build_engine(model, config.optimizer, training, config.deepspeed, device)
        opponent = discriminator and build_engine(discriminator, config.optimizer, training, config.deepspeed, device)
        self.take_step = TrainingStep(config, vae, opponent or None, self.perceptual, device)
        self.record = RunRecord(root) if self.is_main else None
        self.validation = Validation(config, self.held_out, device) if self.is_main else None
        self.loader: ClipLoader | None = None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.loader:
            self.loader.close()
        if self.record:
            self.record.close()

    def start(self, checkpoint: Path | None) -> None:
        """Goes on from a checkpoint, or begins."""
        if checkpoint:
            self._resume(checkpoint)
        if self.record:
            self.record.start(self.step)
            write_text(self.root / RESOLVED_CONFIG, self._resolved_config())
            write_text(self.root / "held_out.txt", "".join(f"{clip.path}\n" for clip in self.held_out))
        training = self.config.training
        self.loader = ClipLoader(
            self.config.data,
            self.train_clips,
            seed=training.seed,
            batch_size=training.batch_size,
            rank=_rank(),
            world_size=_world_size(),
            start_step=self.step,
            record=self.root / f"quarantine.rank{_rank()}.jsonl",
        )

    def run(self) -> int:
        """Takes the remaining steps; returns the exit status."""
        assert self.loader is not None
        training = self.config.training
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        bar = tqdm(total=training.max_steps, initial=self.step, unit="step", disable=None if self.is_main else True)
        if self.step == 0:
            self._validate()
        self._first_step, self._started = self.step, time.monotonic()
        batches = iter(self.loader)
        try:
            while self.step < training.max_steps:
                waiting = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waiting
                logs = self.take_step(batch.clips, batch.indices, self.step)
                self._update_average()
                self.step += 1
                stopped = self._agree(batch)
                self._log(logs, time.monotonic() - waiting, waited)
                bar.update()
                bar.set_postfix(loss=f"{logs['loss']:.4f}")
                if self.step - self._first_step == _STEPS_BEFORE_ESTIMATE:
                    self._estimate()
                if self.step == training.max_steps or stopped or self.step % training.checkpoint_every == 0:
                    self._save()
                if self.step == training.max_steps or self.step % training.validate_every == 0:
                    self._validate()
                if stopped:
                    logger.info("stopped by a signal after step %d; saved", self.step)
                    return 130 if stopped == signal.SIGINT else 0
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._finish()
        return 0

    def _find_clips(self) -> tuple[list[Clip], list[Clip]]:
        """Lists the sources' clips and splits the held-out ones off."""
        data = self.config.data
        clips = list_clips(data)
        train, held_out = split_held_out(clips, data.held_out)
        if not train:
            raise ValueError(f"data.held_out is {data.held_out}: of {len(clips)} clips none is left to train on")
        if self.is_main:
            if any(source.path == "builtin" for source in data.sources):
                logger.info(
                    "training on the built-in clips (moving photographs); "
                    "name your own with --set data.sources=[FOLDER]"
                )
            logger.info("%d clips to train on, %d held out", len(train), len(held_out))
            if data.held_out and not held_out:
                logger.warning("no clip is held out: data.held_out is %g of only %d clips", data.held_out, len(clips))
        return train, held_out

    def _load_perceptual(self) -> PerceptualDistance | None:
        losses = self.config.losses
        if losses.perceptual == "none" or not losses.lpips:
            return None
        if losses.perceptual == "auto" and find_backbone(losses.perceptual_weights) is None:
            if self.is_main:
                logger.warning("training without the perceptual loss: %s", missing_backbone_message())
            return None
        return load_lpips(losses.perceptual_weights).to(self.device)

    def _update_average(self) -> None:
        weights = self.take_step.vae.full_weights()
        update_average(self.average, weights, ema_decay(self.step, self.config.training.ema_decay))

    def _on_signal(self, number: int, _: object) -> None:
        self._signal = number

    def _agree(self, batch: Batch) -> int:
        """Tells all ranks what one has met: signals and broken clips.

        Returns:
            The signal that stops the run, or 0.

        Raises:
            TooManyBadClips: the share of broken clips is too large; on every rank at once.
        """
        flags = torch.tensor([self._signal, len(batch.rejected)], device=self.device)
        rejected = batch.rejected
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            if flags[1]:
                gathered: list[Any] = [None] * _world_size()
                dist.all_gather_object(gathered, rejected)
                rejected = [rejection for part in gathered for rejection in part]
        for rejection in rejected:
            if rejection.path not in self.bad_clips:
                self.bad_clips[rejection.path] = rejection.reason
                if self.is_main:
                    logger.warning("unusable clip %s: %s", rejection.path, rejection.reason)
        if rejected:
            total = len({clip.path for clip in self.train_clips})
            check_bad_share(self.bad_clips, total, self.config.data.max_bad_share)
        return int(flags[0])

    def _log(self, logs: dict[str, float], seconds: float, waited: float) -> None:
        training = self.config.training
        logs = {
            **logs,
            "seconds_per_step": seconds,
            "data_wait_share": waited / seconds,
            "clips_per_second": training.batch_size / seconds,
            "bad_clips": len(self.bad_clips),
        }
        if not torch.tensor(logs["loss"]).isfinite():
            raise ValueError(
                f"the loss is {logs['loss']} at step {self.step}: the run stops; its checkpoints are from before"
            )
        if self.record:
            self.record.log(self.step, logs, to_board=self.step % training.log_every == 0 or self.step == 1)
        if self.is_main and self.step % training.log_every == 0:
            left = (training.max_steps - self.step) * self._mean_seconds()
            shown = " ".join(f"{name} {value:.4g}" for name, value in logs.items())
            logger.info("step %d/%d %s, about %s left", self.step, training.max_steps, shown, duration(left))

    def _mean_seconds(self) -> float:
        """Mean time of a step since this start of the run, checkpoints and validation included."""
        return (time.monotonic() - self._started) / (self.step - self._first_step)

    def _estimate(self) -> None:
        if not self.is_main:
            return
        seconds = self._mean_seconds()
        total = seconds * (self.config.training.max_steps - self.step)
        logger.info("%.2f s a step, about %s in all", seconds, duration(total))
        if self.device.type == "cpu" and total > _LONG_RUN_SECONDS:
            logger.warning("this is a run for GPUs; configs/demo_cpu.yaml is made for a machine without one")

    def _validate(self) -> None:
        """Measures the averaged weights on held-out clips, on the first rank."""
        if self.validation and self.record and (results := self.validation.run(self.average)):
            self.record.log_validation(self.step, results)
            logger.info("step %d: held-out PSNR %.2f dB (%d clips)", self.step, results.mean_psnr, len(results.psnr))

    def _resolved_config(self) -> str:
        return yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)

    def _save(self) -> None:
        """Writes a checkpoint: averaged weights, both engines, and where the run stands."""
        folder = checkpoint_folder(self.root / CHECKPOINTS, self.step)
        written = temporary_folder(folder)
        if self.is_main:
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
        _barrier()
        self.take_step.vae.save(written / "vae")
        if self.take_step.discriminator:
            self.take_step.discriminator.save(written / "discriminator")
        if self.is_main:
            state = {
                "step": self.step,
                "lecam": asdict(self.take_step.lecam),
                "perceptual": "lpips" if self.perceptual else "none",
                "world_size": _world_size(),
                "torch": torch.__version__,
            }
            model = self.take_step.vae.module
            assert isinstance(model, LeanVAE)
            save_pretrained(model, written, self.average)
            write_text(written / RESOLVED_CONFIG, self._resolved_config())
            write_text(written / STATE_FILE, json.dumps(state, indent=2) + "\n")
        _barrier()
        if self.is_main:
            commit(folder, self.config.training.keep_checkpoints)
        _barrier()

    def _resume(self, folder: Path) -> None:
        """Takes up the run where a checkpoint left it."""
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self._compare_config(folder, state)
        self.take_step.vae.load(folder / "vae")
        if self.take_step.discriminator:
            self.take_step.discriminator.load(folder / "discriminator")
        self.average = {name: value.to(self.device) for name, value in load_file(folder / WEIGHTS_FILE).items()}
        self.take_step.lecam = LeCamAverages(**state["lecam"])
        self.step = state["step"]
        if self.is_main:
            logger.info("resuming from %s (step %d)", folder, self.step)

    def _compare_config(self, folder: Path, state: dict[str, Any]) -> None:
        """Refuses what cannot be resumed, and tells what else has changed."""
        before = yaml.safe_load((folder / RESOLVED_CONFIG).read_text(encoding="utf-8"))
        now = self.config.model_dump(mode="json")
        for key in ("model", "deepspeed"):
            if before[key] != now[key]:
                raise ConfigError(
                    f"{folder} was trained with another {key} block: {before[key]} there, {now[key]} here"
                )
        if (before["gan"] is None) != (now["gan"] is None):
            raise ConfigError(f"{folder} was trained with gan: {before['gan']}, the configuration has {now['gan']}")
        if state["world_size"] != _world_size():
            raise ConfigError(f"{folder} was written by {state['world_size']} ranks: {_world_size()} cannot resume it")
        changed = [
            f"{block}.{field}: {before[block][field]} -> {value}"
            for block in ("data", "losses", "gan", "optimizer", "training")
            for field, value in (now[block] or {}).items()
            if before[block].get(field) != value
        ]
        if changed and self.is_main:
            logger.warning("the configuration has changed since the checkpoint: %s", "; ".join(changed))

    def _finish(self) -> None:
        if self.record:
            if summary := self.record.write_summary():
                logger.info("%s", summary)
            logger.info("done: %s", self.root / CHECKPOINTS / "latest")


def duration(seconds: float) -> str:
    """A duration in words: `3 d 4 h`, `2 h 5 min`, `3 min 20 s` or `45 s`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
