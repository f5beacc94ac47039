"""The training step against the same step written out in plain torch."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanvae.config import ConfigError
from leanvae.data.buckets import Shape
from leanvae.model import LeanVAE
from leanvae.patchify import to_bands
from leanvae.training.build import build_networks
from leanvae.training.config import TrainVideoConfig
from leanvae.training.curriculum import posterior_noise
from leanvae.training.engine import PlainEngine, frozen
from leanvae.training.losses import as_images, band_l1, border_steps, select_frames
from leanvae.training.step import LeCamAverages, TrainingStep, update_average
from litevae.discriminators import build_discriminator
from litevae.wavelet import dwt2d, dwt3d

CPU = torch.device("cpu")
LOSSES = {"l1": 2.0, "low_bands": 0.1, "high_bands": 0.2, "kl": 1e-4, "perceptual": "none"}


def make_config(gan=None, **training):
    return TrainVideoConfig.model_validate(
        {
            "model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1},
            "data": {"num_frames": 5, "resolution": [32, 32]},
            "losses": LOSSES,
            "gan": gan and {"discriminator": {"base_channels": 8, "num_layers": 2}, "learning_rate": 1e-3, **gan},
            "optimizer": {"learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup_steps": 0},
            "training": {"engine": "plain", "batch_size": 4, "max_steps": 10, "gradient_clipping": 0.5, **training},
        }
    )


def make_step(config):
    torch.manual_seed(0)
    vae = LeanVAE(config.model)
    discriminator = build_discriminator(config.gan.discriminator) if config.gan else None
    engines = [module and PlainEngine(module, config, CPU) for module in (vae, discriminator)]
    return TrainingStep(config, engines[0], engines[1], {}, None, CPU)


def clips_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (4, 3, 5, 32, 32), generator=generator, dtype=torch.uint8)


def frames_of(clip):
    return clip.transpose(1, 2).flatten(0, 1)


def reference_steps(config, num_steps):
    """Plain torch: explicit losses, two Adam optimizers, clipping; returns the losses of each step."""
    torch.manual_seed(0)
    vae = LeanVAE(config.model)
    discriminator = build_discriminator(config.gan.discriminator)
    adam = {"betas": (0.5, 0.9)}
    vae_optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, **adam)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, **adam)
    average_real = average_fake = 0.0
    losses = []
    for step in range(num_steps):
        rate = 1e-4 + 0.9e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 9))).item()
        for optimizer in (vae_optimizer, discriminator_optimizer):
            optimizer.param_groups[0]["lr"] = rate
        x = clips_of(step).float() / 127.5 - 1
        posterior = vae.encode(x)
        noise = posterior_noise(posterior.mean.shape[1:], 0, step, [0, 1, 2, 3])
        y = vae.decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise)
        difference = y - x
        image = dwt2d(difference[:, :, :1]).abs() * 2
        video = dwt3d(difference[:, :, 1:]).abs() * 8**0.5
        kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / 4
        loss = 2 * difference.abs().mean() + 1e-4 * kl
        loss = loss + 0.1 * (image[:, :3].mean() + video[:, :3].mean())
        loss = loss + 0.2 * (image[:, 3:].mean() + video[:, 3:].mean())
        (fake_logits,) = discriminator(frames_of(y))
        adversarial = F.softplus(-fake_logits).mean()
        loss = loss + config.gan.weight * adversarial
        vae_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        vae_optimizer.step()
        discriminator_optimizer.zero_grad()
        (real,), (fake,) = discriminator(frames_of(x)), discriminator(frames_of(y.detach()))
        d_loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        lecam = (real - average_fake).relu().square().mean() + (average_real - fake).relu().square().mean()
        (d_loss + 0.3 * lecam).backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 0.5)
        discriminator_optimizer.step()
        average_real = 0.9 * average_real + 0.1 * real.mean().item()
        average_fake = 0.9 * average_fake + 0.1 * fake.mean().item()
        losses.append(
            {
                "loss": loss.item(),
                "kl": kl.item(),
                "adversarial": adversarial.item(),
                "discriminator": d_loss.item(),
                "lecam": lecam.item(),
            }
        )
    return losses


GAN = {"loss": "logistic", "generator_loss": "non_saturating", "weight": 0.2, "lecam": 0.3, "lecam_decay": 0.9}


@pytest.mark.parity
@pytest.mark.parametrize("micro_batch_size", [None, 2, 1])
def test_step_equals_plain_torch(micro_batch_size):
    config = make_config(GAN, micro_batch_size=micro_batch_size)
    take_step = make_step(config)
    for step, expected in enumerate(reference_steps(config, 4)):
        logs = take_step(clips_of(step), [0, 1, 2, 3], step)
        for name, value in expected.items():
            assert logs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, name)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the floating-point tensors that are made inside and still held, and remembers the most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size):
        self.now -= size


@pytest.mark.parametrize("gan", [None, GAN], ids=["alone", "gan"])
def test_memory_is_bounded_by_one_micro_batch(gan):
    """However many there are of them in a step: neither targets nor reconstructions of others wait on the device.

    From the second on, there are gradients to add to, which the first makes.
    """
    peaks = {}
    for passes in (2, 8):
        config = make_config(gan, batch_size=passes, micro_batch_size=1)
        take_step = make_step(config)
        pixels = torch.zeros(passes, 3, 5, 32, 32, dtype=torch.uint8)
        take_step(pixels, list(range(passes)), 0)  # makes the optimizers' state
        with LiveBytes() as live:
            take_step(pixels, list(range(passes)), 1)
        peaks[passes] = live.peak
    one_sample = 4 * pixels[0].numel()
    assert peaks[8] <= peaks[2] + one_sample / 4, (peaks, one_sample)


def test_generator_pass_leaves_no_gradient_in_the_discriminator():
    config = make_config(GAN)
    take_step = make_step(config)
    seen = []
    train = take_step._train_discriminator

    def look_and_train(*args):
        seen.append([parameter.grad for parameter in take_step.discriminator.module.parameters()])
        train(*args)

    take_step._train_discriminator = look_and_train
    take_step(clips_of(0), [0, 1, 2, 3], 0)
    assert seen
    assert all(gradient is None for gradient in seen[0])


def test_frozen_gives_back_only_what_it_took():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[0].requires_grad_(False)
    with frozen(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module[0].weight.requires_grad
    assert module[1].weight.requires_grad


def test_gan_waits_for_its_start_step():
    take_step = make_step(make_config({"start_step": 1, "warmup_steps": 1}))
    before = [parameter.clone() for parameter in take_step.discriminator.module.parameters()]
    assert "discriminator" not in take_step(clips_of(0), [0, 1, 2, 3], 0)
    assert all(torch.equal(a, b) for a, b in zip(before, take_step.discriminator.module.parameters(), strict=True))
    assert take_step(clips_of(1), [0, 1, 2, 3], 1)["discriminator"] > 0


def test_training_without_a_gan_learns():
    take_step = make_step(make_config(max_steps=60))
    clips = clips_of(0) // 4 + torch.arange(0, 192, 6, dtype=torch.uint8)
    losses = [take_step(clips, [0, 1, 2, 3], step)["loss"] for step in range(40)]
    assert losses[-1] < 0.6 * losses[0]


def test_border_steps_are_those_of_the_error_from_patch_to_patch():
    x, y = torch.rand(2, 1, 3, 5, 16, 24)
    error = (x - y).double()
    down = error[..., 8, :] - error[..., 7, :]
    right = torch.stack([error[..., column] - error[..., column - 1] for column in (8, 16)])
    expected = torch.cat([down.flatten(), right.flatten()]).abs().mean()
    assert border_steps(x, y, (4, 8, 8)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert border_steps(x[..., :8, :8], y[..., :8, :8], (4, 8, 8)).item() == 0
    assert border_steps(x, x + 0.5, (4, 8, 8)).item() < 1e-6  # no steps


def test_band_l1_is_the_mean_absolute_band():
    x, y = torch.randn(2, 2, 3, 5, 8, 8, dtype=torch.float64).unbind()
    bands_x, bands_y = to_bands(x), to_bands(y)
    low, high = band_l1(x, y)
    image, video = (bands_x.image - bands_y.image).abs(), (bands_x.video - bands_y.video).abs()
    torch.testing.assert_close(low, image[:, :3].mean() + video[:, :3].mean())
    torch.testing.assert_close(high, image[:, 3:].mean() + video[:, 3:].mean())
    image_low, _ = band_l1(x[:, :, :1], y[:, :, :1])
    torch.testing.assert_close(image_low, image[:, :3].mean())


def test_selected_frames_are_those_asked_for():
    clip = torch.randn(2, 3, 9, 4, 6)
    frames = torch.tensor([[0, 5, 6], [0, 1, 2]])
    images = select_frames(clip, frames)
    assert images.shape == (6, 3, 4, 6)
    torch.testing.assert_close(images[1], clip[0, :, 5])
    torch.testing.assert_close(images[5], clip[1, :, 2])
    torch.testing.assert_close(as_images(clip)[10], clip[1, :, 1])


def test_averages_move_by_the_decay():
    average = {"w": torch.tensor([1.0, 2.0])}
    update_average(average, {"w": torch.tensor([3.0, 2.0])}, 0.75)
    torch.testing.assert_close(average["w"], torch.tensor([1.5, 2.0]))
    lecam = LeCamAverages()
    assert lecam.of_output(1) == (0.0, 0.0)
    lecam.update([10.0, 20.0], [-10.0, -20.0], 0.9)
    lecam.update([0.0, 0.0], [0.0, 0.0], 0.9)
    assert lecam.of_output(1) == pytest.approx((1.8, -1.8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deepspeed": {"train_batch_size": 3}}, r"deepspeed\.train_batch_size is set by training\.batch_size"),
        ({"deepspeed": {"zero_optimization": 2}}, r"zero_optimization is 2: it must be a mapping, as in \{stage: 2\}"),
        ({"deepspeed": {"bf16": None}}, r"deepspeed\.bf16 is None: it must be a mapping, as in \{enabled: true\}"),
        ({"deepspeed": {"zero_optimization": {"stage": "two"}}}, r"stage is 'two': it must be 0, 1, 2 or 3"),
        ({"data": {"num_frames": 7}}, "num_frames"),
        ({"data": {"resolution": [60, 64]}}, "divisible by"),
        ({"losses": {"l3": 1}}, "l3"),
    ],
)
def test_bad_training_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainVideoConfig.model_validate(fields)


@pytest.mark.parametrize(("world", "micro", "passes"), [(1, None, 1), (1, 2, 4), (2, 2, 2), (4, 2, 1), (8, 2, 1)])
def test_passes_divide_the_batch(world, micro, passes):
    config = make_config(batch_size=8, micro_batch_size=micro)
    assert config.curriculum.all_passes(world) == [passes]


@pytest.mark.parametrize(("world", "micro", "message"), [(3, None, "number of ranks, 3"), (2, 3, "share")])
def test_batches_that_do_not_divide_are_refused(world, micro, message):
    with pytest.raises(ValueError, match=message):
        make_config(batch_size=8, micro_batch_size=micro).curriculum.all_passes(world)


def joint_config(buckets=("17x64x64", "33x32x32", "1x64x64", "1x128x128"), **training):
    sources = [{"path": "clips"}, {"path": "images", "kind": "images"}]
    return TrainVideoConfig.model_validate({"data": {"sources": sources, "buckets": buckets}, "training": training})


def test_tokens_set_the_batch_and_the_passes_of_each_bucket():
    config = joint_config(tokens_per_batch=5000, batch_multiple=4, tokens_per_micro_batch=640)
    rule, batches = config.curriculum.rules[0], config.curriculum.phases[0].batches
    assert [rule.tokens(bucket) for bucket in batches] == [5 * 64, 9 * 16, 64, 256]
    assert list(batches.values()) == [12, 32, 76, 16]
    for world in (1, 2, 4):
        for bucket, passes in zip(batches, config.curriculum.all_passes(world), strict=True):
            share = batches[bucket] // world
            assert share % passes == 0
            assert share // passes * rule.tokens(bucket) <= 640
    with pytest.raises(ConfigError, match=r"a step of 12 of 17x64x64, which 8 ranks cannot share: set .*multiple to 8"):
        config.curriculum.all_passes(8)
    with pytest.raises(ConfigError, match=r"tokens_per_batch is 1000: 4 of 17x64x64 have 1280"):
        _ = joint_config(tokens_per_batch=1000, batch_multiple=4).curriculum


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (["16x64x64", "1x64x64"], "bucket 16x64x64 has 16 frames: model.patch_size needs 4n"),
        (["17x60x64", "1x64x64"], r"resolution \(60, 64\) is not divisible"),
        (["17x64x64"], "there is a source of images, but no bucket of them"),
        (["1x64x64"], "there is a source of clips, but no bucket of them"),
    ],
)
def test_buckets_fit_the_model_and_the_sources(buckets, message):
    with pytest.raises(ValueError, match=message):
        joint_config(buckets)


def test_phases_change_shapes_the_gan_and_what_is_frozen():
    phases = [
        {"steps": 10, "resolution": 64, "batch": 8, "gan": False},
        {"steps": 5, "buckets": ["9x32x32"], "batch": 4, "gan": False},
        {"steps": 7, "freeze": ["encoder.*"]},
    ]
    config = TrainVideoConfig.model_validate({"phases": phases, "gan": {"start_step": 3, "warmup_steps": 1}})
    curriculum = config.curriculum
    assert [dict(phase.batches) for phase in curriculum.phases] == [
        {Shape(17, 64, 64): 8},
        {Shape(9, 32, 32): 4},
        {Shape(17, 256, 256): 40},
    ]
    assert (curriculum.gan_from, curriculum.max_steps) == (15, 22)
    assert curriculum.freeze == ((), (), ("encoder.*",))
    phases[0]["gan"] = True
    with pytest.raises(ConfigError, match="gan may be false only in the first phases"):
        _ = TrainVideoConfig.model_validate({"phases": phases}).curriculum


def test_images_train_a_video_model_as_clips_of_one_frame():
    config = make_config(GAN)
    take_step, other = make_step(config), make_step(config)
    images = clips_of(0)[:, :, 0]
    logs = take_step(images, [0, 1, 2, 3], 0)
    assert all(torch.tensor(value).isfinite() for value in logs.values())
    assert logs == pytest.approx(other(images.unsqueeze(2), [0, 1, 2, 3], 0), rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_phase_keeps_what_it_freezes_to_the_last_bit(decay):
    phases = [{"steps": 2}, {"steps": 2, "freeze": ["encoder.*", "logvar.*"]}, {"steps": 2}]
    config = make_config(GAN)
    optimizer = config.optimizer.model_copy(update={"weight_decay": decay})
    config = TrainVideoConfig.model_validate({**config.model_dump(), "phases": phases, "optimizer": optimizer})
    torch.manual_seed(0)
    vae, discriminator = LeanVAE(config.model), build_discriminator(config.gan.discriminator)
    engine = PlainEngine(vae, config, CPU, config.curriculum.freeze)
    take_step = TrainingStep(config, engine, PlainEngine(discriminator, config, CPU), {}, None, CPU)
    for step in range(6):
        before = {name: weight.clone() for name, weight in engine.full_weights().items()}
        take_step(clips_of(step), [0, 1, 2, 3], step)
        kept = {name for name, weight in engine.full_weights().items() if torch.equal(weight, before[name])}
        frozen = {name for name in before if name.startswith(("encoder.", "logvar."))}
        assert kept & frozen == (frozen if step in (2, 3) else set())
        assert not any(name.startswith("decoder.") for name in kept)
    phases[1]["freeze"] = ["encode.*"]
    config = TrainVideoConfig.model_validate({**config.model_dump(), "phases": phases})
    with pytest.raises(ConfigError, match=r"phases\.1\.freeze: 'encode\.\*' matches no parameter"):
        build_networks(config, CPU)
