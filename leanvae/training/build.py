"""The start of a run: its files, its networks under their engines, its perceptual losses."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.checkpoint import build_vae
from leanvae.config import ConfigError, LeanVAEConfig
from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig, DataConfig
from leanvae.data.loader import read_first
from leanvae.data.schedule import Schedule, has_choice, list_training_items, split_held_out
from leanvae.data.shapes import measure_shapes
from leanvae.distributed import on_main, rank
from leanvae.media.item import BUILTIN, Item
from leanvae.model import LeanVAE
from leanvae.progress import Progress
from leanvae.training.config import LossConfig, TrainConfig
from leanvae.training.deepspeed import DeepSpeedEngine
from leanvae.training.engine import Engine, PlainEngine
from leanvae.training.initial import check_freeze, freeze, load_initial
from leanvae.training.losses import Perceptual
from leanvae.training.patch_statistics import ClipStatistics
from leanvae.training.start import LinearStart, linear_start, start_model
from leanvae.training.state import items_digest
from leanvae.training.step import TrainingStep
from litevae.discriminators import build_discriminator
from litevae.errors import InvalidInput, MissingFile
from litevae.files import write_text
from litevae.model import LiteVAE
from litevae.perceptual import (
    Backbone,
    PerceptualDistance,
    find_backbone,
    load_lpips,
    load_vgg_features,
    missing_backbone_message,
)
from litevae.pixels import from_bytes
from litevae.recompute import recompute_activations

logger = logging.getLogger("leanvae")


def check_passes(config: TrainConfig, world_size: int) -> None:
    """Raise `ConfigError` unless every batch divides among the ranks and passes, as the losses need."""
    passes = config.curriculum.all_passes(world_size)
    if config.gan and config.gan.weighting == "adaptive" and max(passes) > 1:
        raise ConfigError(
            "gan.weighting is adaptive: the weight depends on the whole batch, which needs a single pass; "
            "leave training.micro_batch_size out, or make the weight constant"
        )


def count_items(items: Sequence[Item]) -> str:
    """Return a number of clips and images in words."""
    images = sum(item.kind == "image" for item in items)
    parts = [f"{number} {kind}" for number, kind in ((len(items) - images, "clips"), (images, "images")) if number]
    return " and ".join(parts) or "nothing"


def find_items(data: DataConfig) -> tuple[list[Item], list[Item]]:
    """List the sources' clips or images, the same on all ranks, and split off the held-out ones.

    Raises:
        SourceError: a source is missing, empty or wrongly written.
        InvalidInput: nothing is left to train on.
    """
    items: list[Item] = on_main(lambda: list_training_items(data))
    train, held_out = split_held_out(items, data.held_out)
    if not train:
        raise InvalidInput(f"data.held_out is {data.held_out}: of {len(items)} files none is left to train on")
    if rank() == 0:
        if any(source.path == BUILTIN for source in data.sources):
            logger.info("training on built-in photographs; name your own data with --set data.sources=[FOLDER]")
        logger.info("%s to train on, %s held out", count_items(train), count_items(held_out))
        if data.held_out and not held_out:
            logger.warning("nothing is held out: data.held_out is %g of only %s", data.held_out, count_items(items))
    return train, held_out


def make_schedule(config: TrainConfig, items: Sequence[Item], kept: Path | None = None) -> Schedule:
    """Return the schedule of draws, the same on all ranks; measure files first if there are several buckets.

    Args:
        kept: file of a run that keeps the measured shapes; a file that breaks later must not change the order.
    """
    phases = config.curriculum.phases
    shapes = None
    if any(has_choice(phase.batches) for phase in phases):
        shapes = on_main(lambda: _shapes_of_run(config.data, items, kept))
    schedule = Schedule(config.data, items, shapes, phases, config.training.seed)
    if rank() == 0:
        for number, bucket in schedule.empty:
            logger.warning("phase %d: there is no file for the bucket %s", number, bucket)
    return schedule


def _shapes_of_run(data: DataConfig, items: Sequence[Item], kept: Path | None) -> list[Shape | None]:
    rate = f"{data.stride} {data.fps}" if isinstance(data, ClipDataConfig) else ""
    key = f"{items_digest(items)} {rate}"
    if kept and kept.exists() and (tree := json.loads(kept.read_text(encoding="utf-8")))["of"] == key:
        return [shape and Shape(*shape) for shape in tree["shapes"]]
    shapes = measure_shapes(items, data)
    if kept:
        write_text(kept, json.dumps({"of": key, "shapes": [shape and astuple(shape) for shape in shapes]}) + "\n")
    return shapes


def find_start(config: TrainConfig, schedule: Schedule) -> LinearStart | None:
    """Return the closed-form start of a new run, the same on all ranks; None if it begins otherwise.

    The main rank alone takes the statistics, so that they do not depend on the number of ranks.

    Raises:
        InvalidInput: none of the samples can be used.
    """
    model, training = config.model, config.training
    if training.start != "klt" or training.initial_weights or not isinstance(model, LeanVAEConfig):
        return None
    if model.patch_norm:
        if rank() == 0:
            logger.warning("training.start is klt, but model.patch_norm leaves no linear skeleton: random weights")
        return None

    def measure() -> LinearStart:
        statistics = ClipStatistics(model)
        with Progress("statistics of the start", "sample", training.start_samples, stays=False) as progress:
            for sample in read_first(schedule, config.data, training.start_samples):
                frames = from_bytes(sample.frames if sample.frames.ndim == 4 else sample.frames[None])
                statistics.add(2 * frames.movedim(0, 1)[None] - 1)
                progress.add()
        return linear_start(statistics)

    start = on_main(measure)
    if rank() == 0:
        expected = ", ".join(f"{psnr:.2f} dB on {kind} patches" for kind, psnr in start.psnr.items())
        logger.info("start: the linear codec of %d samples, %s", training.start_samples, expected)
        if (lost := max(start.lost.values())) > 0.01:
            logger.warning("start: %.2f dB below the KLT, because a stream is narrower than the latent", lost)
    return start


def start_record(config: TrainConfig, start: LinearStart) -> dict[str, Any]:
    """Return what a checkpoint says of a run's start."""
    samples = config.training.start_samples
    return {"kind": config.training.start, "samples": samples, "psnr": start.psnr, "below_klt": start.lost}


def build_networks(
    config: TrainConfig, device: torch.device, resumes: bool = False, start: LinearStart | None = None
) -> tuple[TrainingStep, dict[str, Tensor]]:
    """Build both networks under their engines, and the averaged weights.

    Only the main rank updates the average, unless the LDL loss needs it on every rank.

    Args:
        config: the run's configuration.
        device: device of the networks.
        resumes: whether a checkpoint's weights will replace these, so that initial ones need not be loaded.
        start: of a new run; None means random or initial weights.
    """
    perceptual = load_perceptual(config.losses, device)
    torch.manual_seed(config.training.seed)
    model = build_autoencoder(config, resumes)
    if start:
        assert isinstance(model, LeanVAE)
        start_model(model, start)  # before engines part the weights
    networks: list[nn.Module] = [model]
    if config.gan:
        networks.append(build_discriminator(config.gan.discriminator))
    average = {name: value.detach().clone().to(device) for name, value in model.named_parameters()}
    average_model = None
    if config.losses.ldl.weight:
        with torch.device("meta"):
            average_model = build_vae(config.model)
        # The model shares the average's tensors.
        average_model.load_state_dict(average, strict=True, assign=True)
        average_model.requires_grad_(False)
    vae = build_engine(networks[0], config, device, config.curriculum.freeze)
    discriminator = build_engine(networks[1], config, device) if config.gan else None
    return TrainingStep(config, vae, discriminator, perceptual, average_model, device), average


def build_engine(
    module: nn.Module, config: TrainConfig, device: torch.device, freeze: Sequence[Sequence[str]] = ()
) -> Engine:
    """Put a network on its device, with AdamW, under the engine that `training.engine` names.

    Args:
        freeze: patterns of the parameters that each phase freezes, for `set_frozen`.
    """
    build = PlainEngine if config.training.engine == "plain" else DeepSpeedEngine
    return build(module, config, device, freeze)


def build_autoencoder(config: TrainConfig, resumes: bool) -> LeanVAE | LiteVAE:
    """Build the autoencoder that `training` describes: initial weights, frozen parameters, recomputation, compilation.

    Raises:
        ConfigError: the initial weights do not fit at all, or a pattern of `freeze` is wrong; see `check_freeze`.
    """
    training = config.training
    model = build_vae(config.model)
    if training.initial_weights and not resumes:
        fit = load_initial(model, training.initial_weights)
        if rank() == 0:
            level = logging.INFO if fit.is_complete else logging.WARNING
            logger.log(level, "initial weights from %s: %s", training.initial_weights, fit)
    check_freeze(model, training.freeze, config.curriculum.freeze)
    if training.freeze:
        share = freeze(model, training.freeze)
        if rank() == 0:
            logger.info("training.freeze: %.1f %% of the autoencoder's parameters are frozen", 100 * share)
    if training.activation_checkpointing:
        recompute_activations(model)
    if training.compile:
        model.forward = torch.compile(model.forward)
    return model


def load_perceptual(losses: LossConfig, device: torch.device) -> Perceptual:
    """Load the networks of the perceptual terms that have a weight, according to `losses.perceptual`.

    Raises:
        MissingFile, ImportError: a backbone or package that the configuration requires is missing.
    """
    kinds: dict[str, tuple[Backbone, str | None, Callable[[str | None], Any]]] = {
        "lpips": ("vgg16", losses.lpips_backbone, load_lpips),
        "vgg": ("vgg19", losses.vgg_backbone, load_vgg_features),
    }
    found: dict[str, Any] = {}
    for name, (backbone, path, load) in kinds.items():
        if losses.perceptual == "none" or not getattr(losses, name).weight:
            continue
        try:
            if find_backbone(path, backbone) is None:
                raise MissingFile(missing_backbone_message(backbone))
            found[name] = load(path).to(device)
        except (FileNotFoundError, ImportError) as error:
            if losses.perceptual == "required" or path:
                raise
            if rank() == 0:
                logger.warning("training without the perceptual loss losses.%s: %s", name, error)
    return found


def load_held_out_lpips(losses: LossConfig, perceptual: Perceptual, device: torch.device) -> PerceptualDistance | None:
    """Return LPIPS for held-out files: the loss's own, or one whose weights are found.

    Return None if they are not found, or if `losses.perceptual` is `none`.
    """
    if isinstance(distance := perceptual.get("lpips"), PerceptualDistance):
        return distance
    if losses.perceptual == "none" or find_backbone(losses.lpips_backbone) is None:
        return None
    try:
        return load_lpips(losses.lpips_backbone).to(device)
    except ImportError as error:
        logger.info("LPIPS of held-out files is not measured: %s", error)
        return None
