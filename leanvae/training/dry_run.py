"""A dry run: a run's configuration, first steps, parameters, and memory on each rank."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.checkpoint import build_vae
from leanvae.data.buckets import Shape
from leanvae.data.schedule import Schedule
from leanvae.training.build import check_passes, find_items, make_schedule
from leanvae.training.config import TrainConfig
from leanvae.training.initial import check_freeze
from leanvae.training.losses import as_images
from leanvae.training.state import resolved_config
from litevae.discriminators import build_discriminator
from litevae.recompute import recompute_activations

NUM_STEPS = 20


def run_summary(config: TrainConfig, world_size: int) -> str:
    """Describe a run as text: resolved configuration, first steps, and estimates for each of `world_size` ranks.

    The data sources are listed and, if there are several buckets, their files measured, as in the run.

    Raises:
        InvalidInput, MissingFile: as in the run.
    """
    check_passes(config, world_size)
    train, _ = find_items(config.data)
    schedule = make_schedule(config, train)
    parts = [
        "# Configuration",
        resolved_config(config).rstrip(),
        f"\n# The first steps, on {world_size} ranks",
        *_steps(config, schedule, world_size),
        f"\n# Parameters, and memory of each of {world_size} ranks (an estimate)",
        *_memory(config, world_size),
    ]
    return "\n".join(parts)


def _steps(config: TrainConfig, schedule: Schedule, world_size: int) -> Iterator[str]:
    curriculum = config.curriculum
    for step in range(min(NUM_STEPS, curriculum.max_steps)):
        draw, phase = schedule.at(step), curriculum.number_at(step)
        passes = curriculum.rules[phase].passes(draw.bucket, world_size)
        share = draw.batch_size // world_size
        yield (
            f"step {step + 1:>3}  phase {phase}  {draw.bucket!s:>12}  batch {draw.batch_size:>4} "
            f"= {world_size} ranks x {passes} passes x {share // passes}"
        )
    for number, phase in enumerate(curriculum.phases):
        shares = schedule.shares(number)
        listed = ", ".join(f"{bucket} {share:.1%}" for bucket, share in shares.items())
        yield f"phase {number}, {phase.steps} steps from step {phase.first_step + 1}: {listed}"


def _memory(config: TrainConfig, world_size: int) -> Iterator[str]:
    with torch.device("meta"):
        vae = build_vae(config.model)
        discriminator = build_discriminator(config.gan.discriminator) if config.gan else None
    check_freeze(vae, config.training.freeze, config.curriculum.freeze)
    if config.training.activation_checkpointing:
        recompute_activations(vae)
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    is_half = bool(config.deepspeed.get("bf16", {}).get("enabled"))
    total = 0.0
    for name, module in (("autoencoder", vae), ("discriminator", discriminator)):
        if module is None:
            continue
        count = sum(parameter.numel() for parameter in module.parameters())
        states = state_bytes(count, stage, is_half, world_size)
        total += sum(states.values())
        listed = ", ".join(f"{part} {_gib(size)}" for part, size in states.items())
        yield f"{name}: {count / 1e6:.2f}M parameters; {listed}"
    average = 4.0 * sum(parameter.numel() for parameter in vae.parameters())
    yield f"averaged weights, on the first rank: {_gib(average)}"
    worst = max(
        (activation_bytes(vae, discriminator, bucket, samples, is_half), str(bucket), samples)
        for bucket, samples in _passes(config, world_size)
    )
    yield f"activations: {_gib(worst[0])} in a pass of {worst[2]} of {worst[1]}, perceptual networks not counted"
    yield f"total: {_gib(total + average + worst[0])} on the first rank"


def _passes(config: TrainConfig, world_size: int) -> set[tuple[Shape, int]]:
    """Return every bucket with the number of samples that a rank takes in one pass."""
    curriculum = config.curriculum
    return {
        (bucket, size // world_size // rule.passes(bucket, world_size))
        for phase, rule in zip(curriculum.phases, curriculum.rules, strict=True)
        for bucket, size in phase.batches.items()
    }


def state_bytes(count: int, stage: int, is_half: bool, world_size: int) -> dict[str, float]:
    """Return the bytes of a network's state on each rank (ZeRO, Section 5), sharded from stage 1, 2 and 3 on.

    Args:
        count: number of its parameters.
        stage: ZeRO's stage.
        is_half: whether it computes in bfloat16, with float32 weights in the optimizer.
        world_size: number of ranks.
    """
    width = 2 if is_half else 4
    keeps_copy = is_half or stage > 0  # a float32 copy of the weights, beside Adam's two moments
    sizes = {"optimizer": (1, 12 if keeps_copy else 8), "gradients": (2, width), "weights": (3, width)}
    return {
        part: count * size / (world_size if stage >= first else 1) for part, (first, size) in reversed(sizes.items())
    }


def activation_bytes(
    vae: nn.Module, discriminator: nn.Module | None, bucket: Shape, samples: int, is_half: bool
) -> float:
    """Return the bytes that a forward pass saves for its backward pass, counted on the meta device.

    Args:
        vae, discriminator: on the meta device.
        bucket: shape of the samples.
        samples: of a rank in one pass.
    """
    dtype = torch.bfloat16 if is_half else torch.float32
    frames = () if bucket.is_image else (bucket.frames,)
    pixels = torch.empty(samples, 3, *frames, *bucket.resolution, device="meta", dtype=dtype)
    model: Any = vae.to(dtype)
    noise = torch.empty(samples, *model.latent_shape(pixels.shape[2:]), device="meta", dtype=dtype)

    def autoencode() -> Tensor:
        return model(pixels, noise)[0]

    kept = _saved_bytes(autoencode)
    if discriminator is not None:
        images = as_images(pixels)
        network = discriminator.to(dtype)
        # The autoencoder's pass saves the discriminator's activations for the reconstruction; the discriminator's own
        # pass, for both inputs, comes later.
        kept = max(
            kept + _saved_bytes(lambda: network(images.requires_grad_())), 2 * _saved_bytes(lambda: network(images))
        )
    return kept


def _saved_bytes(work: Callable[[], Any]) -> float:
    """Return the bytes of the tensors that autograd saves, each storage once, without parameters."""
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = work()
    del output
    return math.fsum(storage.nbytes() for storage in storages.values())


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
