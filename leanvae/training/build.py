"""What a run starts with: its files, its networks under their engines, its perceptual losses."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.checkpoint import build_vae
from leanvae.config import ConfigError
from leanvae.data.config import BUILTIN, ClipDataConfig, DataConfig, ImageDataConfig
from leanvae.data.sources import Item, list_clips, list_pictures, split_held_out
from leanvae.training.config import LossConfig, TrainConfig
from leanvae.training.engine import build_engine
from leanvae.training.ranks import on_main, rank
from leanvae.training.step import TrainingStep
from leanvae.training.terms import Perceptual
from litevae.discriminators import build_discriminator
from litevae.perceptual import Backbone, find_backbone, load_lpips, load_vgg_features, missing_backbone_message

logger = logging.getLogger("leanvae")


def check_passes(config: TrainConfig, world_size: int) -> None:
    """Raises `ConfigError` unless every phase's batch divides among the ranks and passes, as the losses need it."""
    config.curriculum.check(world_size)
    numbers = range(len(config.curriculum.phases))
    if (
        config.gan
        and config.gan.weighting == "adaptive"
        and any(config.curriculum.passes(number, world_size) > 1 for number in numbers)
    ):
        raise ConfigError(
            "gan.weighting is adaptive: its weight depends on the whole batch, which takes one pass; "
            "leave training.micro_batch_size out, or make the weight constant"
        )


def find_items(data: DataConfig) -> tuple[list[Item], list[Item]]:
    """Lists the sources' clips or images, the same on all ranks, and splits the held-out ones off.

    Raises:
        SourceError: a source is missing, empty or wrongly written.
        ValueError: nothing is left to train on.
    """
    items: list[Item] = on_main(lambda: _list_items(data))
    train, held_out = split_held_out(items, data.held_out)
    if not train:
        raise ValueError(f"data.held_out is {data.held_out}: of {len(items)} files none is left to train on")
    if rank() == 0:
        kind = "clips" if isinstance(data, ClipDataConfig) else "images"
        if any(source.path == BUILTIN for source in data.sources):
            what = "moving photographs" if kind == "clips" else "photographs"
            logger.info("training on the built-in %s (%s); name your own with --set data.sources=[FOLDER]", kind, what)
        logger.info("%d %s to train on, %d held out", len(train), kind, len(held_out))
        if data.held_out and not held_out:
            logger.warning("nothing is held out: data.held_out is %g of only %d %s", data.held_out, len(items), kind)
    return train, held_out


def _list_items(data: DataConfig) -> list[Item]:
    if isinstance(data, ClipDataConfig):
        return list(list_clips(data))
    assert isinstance(data, ImageDataConfig)
    return list(list_pictures(data))


def build_networks(config: TrainConfig, device: torch.device) -> tuple[TrainingStep, dict[str, Tensor]]:
    """Both networks under their engines, and the averaged weights.

    The main rank keeps the average up; with the LDL loss, whose reference it gives, every rank does.
    """
    perceptual = load_perceptual(config.losses, device)
    torch.manual_seed(config.training.seed)
    model = build_vae(config.model)
    networks: list[nn.Module] = [model]
    if config.gan:
        networks.append(build_discriminator(config.gan.discriminator))
    average = {name: value.detach().clone().to(device) for name, value in model.named_parameters()}
    average_model = None
    if config.losses.ldl.weight:
        with torch.device("meta"):
            average_model = build_vae(config.model)
        # The same tensors: what the average becomes, the model has.
        average_model.load_state_dict(average, strict=True, assign=True)
        average_model.requires_grad_(False)
    engines = [build_engine(network, config, device) for network in networks]
    discriminator = engines[1] if config.gan else None
    return TrainingStep(config, engines[0], discriminator, perceptual, average_model, device), average


def load_perceptual(losses: LossConfig, device: torch.device) -> Perceptual:
    """Networks of the perceptual terms that have a weight, as `losses.perceptual` says.

    Raises:
        FileNotFoundError, ImportError: a backbone or package is missing that the configuration insists on.
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
                raise FileNotFoundError(missing_backbone_message(backbone))
            found[name] = load(path).to(device)
        except (FileNotFoundError, ImportError) as error:
            if losses.perceptual == "required" or path:
                raise
            if rank() == 0:
                logger.warning("training without the perceptual loss losses.%s: %s", name, error)
    return found
