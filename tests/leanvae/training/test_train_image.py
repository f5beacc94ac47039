"""Training of image autoencoders: the step against plain torch, runs through phases, resumes inside them."""

import json
import shutil
import tarfile
import weakref

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from leanvae import load_vae
from leanvae.config import ConfigError
from leanvae.training.build import build_networks, check_passes
from leanvae.training.config import TrainImageConfig
from leanvae.training.curriculum import posterior_noise
from leanvae.training.loop import train
from litevae import LiteVAE
from litevae.discriminators import build_discriminator
from litevae.losses import charbonnier
from litevae.wavelet import dwt2d

CPU = torch.device("cpu")
SETTINGS = {
    "model": {
        "extraction_channels": 4,
        "extraction_multipliers": [1],
        "aggregation_channels": 4,
        "aggregation_multipliers": [1],
        "decoder_channels": 8,
        "decoder_multipliers": [1, 1, 1, 1],
        "num_res_blocks": 1,
    },
    "data": {"num_workers": 1, "held_out": 0.2, "max_bad_share": 0.5},
    "losses": {"perceptual": "none", "wavelet": 0.5, "gaussian": 0.5, "kl": 1e-4},
    "gan": {"start_step": 0, "lecam": 0.1, "discriminator": {"base_channels": 8, "num_layers": 2}},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"engine": "plain", "checkpoint_every": 1, "validate_every": 2, "keep_checkpoints": 100},
    "phases": [{"resolution": 16, "steps": 3, "batch": 4}, {"resolution": 24, "steps": 3, "batch": 2}],
}
TIMINGS = {
    "seconds_per_step",
    "step_seconds",
    "memory_mib",
    "data_wait_share",
    "samples_per_second",
    "frames_per_second",
    "bad_clips",
}


def write_images(folder, count=9):
    generator = np.random.default_rng(0)
    for index in range(count):
        blocks = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"image{index}.png"), cv2.resize(blocks, (40, 32), interpolation=cv2.INTER_CUBIC))


@pytest.fixture
def run(tmp_path):
    """A function that trains on nine small images and a file that is not one, in plain torch."""
    folder = tmp_path / "images"
    folder.mkdir()
    write_images(folder)
    (folder / "text.jpg").write_text("no image")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(SETTINGS))

    def start(output, *overrides, resume="auto"):
        settings = [f"data.sources=[{folder}]", *overrides]
        return train(TrainImageConfig, tmp_path / "train.yaml", settings, tmp_path / output, resume)

    return start


def metrics(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in entries]


@pytest.mark.integration
def test_run_goes_through_its_phases_and_leaves_a_model(run, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level("INFO", logger="leanvae"):
        assert run("out", "gan.log_gradient_ratio=true", "training.log_every=2") == 0
    entries = metrics(out)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert {"l1", "wavelet", "gaussian", "kl", "adversarial", "discriminator", "logits_real_1"} <= entries[0].keys()
    assert ["gradient_ratio" in entry for entry in entries] == [True, True, False, True, False, True]
    vae = load_vae(out / "checkpoints" / "latest")
    assert isinstance(vae, LiteVAE)
    assert vae.config.decoder_channels == 8
    x = torch.rand(1, 3, 21, 30) * 2 - 1
    assert vae.decode(vae.encode(x).mode(), (21, 30)).shape == x.shape
    assert "text.jpg" in (out / "quarantine.rank0.jsonl").read_text()
    assert "text.jpg" in caplog.text
    assert (out / "held_out.txt").read_text().split()
    assert len((out / "validation.jsonl").read_text().splitlines()) == 4


@pytest.mark.integration
@pytest.mark.parametrize("step", [2, 3, 5], ids=["in the first phase", "between", "in the second phase"])
def test_a_run_resumed_in_any_phase_equals_an_undisturbed_one(run, tmp_path, step):
    settings = ["losses.ldl=0.5", "training.micro_batch_size=2", "training.ema_decay=0.5"]
    run("whole", *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "again", symlinks=True)
    (tmp_path / "again" / "checkpoints" / "latest").unlink()
    for later in range(step + 1, 7):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step_{later:08d}")
    assert run("again", *settings) == 0
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")
    weights = [load_vae(tmp_path / name / "checkpoints" / "latest").state_dict() for name in ("again", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.integration
def test_max_steps_stops_before_the_phases_end(run, tmp_path):
    assert run("out", "training.max_steps=4") == 0
    assert len(metrics(tmp_path / "out")) == 4


@pytest.mark.integration
def test_tar_shards_train_as_their_files_do(run, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted((tmp_path / "images").glob("image*.png")):
            shard.add(path, path.name)
    settings = ["data.held_out=0", "training.max_steps=2"]
    run("files", *settings, f"data.sources=[{tmp_path}/images/image*.png]")
    run("shards", *settings, f"data.sources=[{tmp_path}/shard.tar]")
    assert metrics(tmp_path / "files") == metrics(tmp_path / "shards")


def config_of(**blocks):
    tree = {**SETTINGS, "phases": [], "training": {"engine": "plain", "batch_size": 4, "max_steps": 10}}
    for name, block in blocks.items():
        tree[name] = {**tree[name], **block} if isinstance(tree[name], dict) else block
    return TrainImageConfig.model_validate({**tree, "data": {"resolution": 24}})


def pixels_of(step):
    return torch.randint(0, 256, (4, 3, 24, 24), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


def reference_steps(config, num_steps):
    """Plain torch: losses and both updates written out; returns the losses of each step."""
    torch.manual_seed(0)
    vae, discriminator = LiteVAE(config.model), build_discriminator(config.gan.discriminator)
    adam = {"lr": 1e-3, "betas": (0.5, 0.9)}
    optimizer = torch.optim.Adam(vae.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **{**adam, "lr": 1e-4})
    averages = [(0.0, 0.0), (0.0, 0.0)]
    entries = []
    for step in range(num_steps):
        x = pixels_of(step).float() / 127.5 - 1
        posterior = vae.encode(x)
        noise = posterior_noise(posterior.mean.shape[1:], 0, step, [0, 1, 2, 3])
        y = vae.decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise)
        blur = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
        kernel = torch.outer(blur, blur) / torch.outer(blur, blur).sum()
        smooth = F.conv2d(F.pad(y - x, (2,) * 4, mode="replicate"), kernel.expand(3, 1, 5, 5), groups=3)
        terms = {
            "l1": (y - x).abs().mean(),
            "wavelet": charbonnier(dwt2d(y)[:, 3:] / 2, dwt2d(x)[:, 3:] / 2),
            "gaussian": (y - x - smooth).abs().mean(),
            "kl": 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / 4,
        }
        loss = terms["l1"] + 0.5 * terms["wavelet"] + 0.5 * terms["gaussian"] + 1e-4 * terms["kl"]
        adversarial = sum(-logits.mean() for logits in discriminator(y))
        weight = config.gan.weight
        if config.gan.weighting == "adaptive":
            last = vae.decoder.conv_out.conv.weight
            norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, adversarial)]
            weight = terms["adaptive_weight"] = 0.1 * norms[0] / (norms[1] + 1e-6)
        loss = loss + weight * adversarial
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer_d.zero_grad()
        d_loss = lecam = 0.0
        outputs = zip(discriminator(x), discriminator(y.detach()), averages, strict=True)
        means = []
        for real, fake, (average_real, average_fake) in outputs:
            d_loss = d_loss + 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
            lecam = lecam + (real - average_fake).relu().square().mean() + (average_real - fake).relu().square().mean()
            means.append((0.999 * average_real + 0.001 * real.mean(), 0.999 * average_fake + 0.001 * fake.mean()))
        (d_loss + 0.1 * lecam).backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        optimizer_d.step()
        averages = [(real.item(), fake.item()) for real, fake in means]
        terms |= {"loss": loss, "adversarial": adversarial, "discriminator": d_loss, "lecam": lecam}
        entries.append({name: float(torch.as_tensor(value).detach()) for name, value in terms.items()})
    return entries


@pytest.mark.parity
@pytest.mark.parametrize(
    ("weighting", "output_type"), [("constant", "image"), ("adaptive", "image"), ("adaptive", "wavelet")]
)
def test_step_equals_plain_torch(weighting, output_type):
    config = config_of(gan={"weighting": weighting}, model={"output_type": output_type})
    take_step, _ = build_networks(config, CPU)
    for step, expected in enumerate(reference_steps(config, 2)):
        logs = take_step(pixels_of(step), [0, 1, 2, 3], step)
        for name, value in expected.items():
            # Adam brings gradients that are nothing but rounding, as of biases before a norm, to full size.
            assert logs[name] == pytest.approx(value, rel=1e-4 if step == 0 else 5e-3, abs=1e-5), (step, name)


def test_gradient_ratio_is_that_of_the_weighted_losses():
    """With the adaptive weight, the adversarial gradient has the requested share of the reconstruction's."""
    config = config_of(gan={"weighting": "adaptive", "weight": 0.5})
    take_step, _ = build_networks(config, CPU)
    for step in range(2):
        assert take_step(pixels_of(step), [0, 1, 2, 3], step)["gradient_ratio"] == pytest.approx(0.5, rel=1e-3)


def test_nothing_is_kept_of_what_the_last_layer_read():
    take_step, _ = build_networks(config_of(gan={"weighting": "adaptive"}), CPU)
    read = []
    last = take_step.vae.module.decoder.conv_out.conv
    last.register_forward_pre_hook(lambda _, inputs: read.append(weakref.ref(inputs[0].untyped_storage())))
    take_step(pixels_of(0), [0, 1, 2, 3], 0)
    assert [storage() for storage in read] == [None]


def test_ldl_compares_with_the_averaged_weights():
    config = config_of(losses={"ldl": 1.0}, gan={"start_step": 100})
    take_step, average = build_networks(config, CPU)
    assert all(
        parameter.data_ptr() == average[name].data_ptr() for name, parameter in take_step.average.named_parameters()
    )
    # Before the first update both are the same network: no residual is smaller than its reference's.
    first = take_step(pixels_of(0), [0, 1, 2, 3], 0)
    assert first["ldl"] > 0
    for value in average.values():
        value.zero_()
    take_step_again, _ = build_networks(config, CPU)
    assert take_step_again(pixels_of(0), [0, 1, 2, 3], 0)["ldl"] == first["ldl"]
    noise = torch.zeros(4, 4, 3, 3)
    output = take_step._average_prediction(torch.zeros(4, 3, 24, 24), noise)
    torch.testing.assert_close(output, torch.zeros_like(output))


def test_terms_wait_for_their_start_step():
    config = config_of(losses={"gaussian": {"weight": 0.5, "start_step": 1}})
    take_step, _ = build_networks(config, CPU)
    logs = [take_step(pixels_of(step), [0, 1, 2, 3], step) for step in range(2)]
    assert ["gaussian" in entry for entry in logs] == [False, True]


def test_adaptive_weight_refuses_several_passes():
    config = config_of(gan={"weighting": "adaptive"}, training={"micro_batch_size": 2})
    check_passes(config, 2)
    with pytest.raises(ConfigError, match=r"gan\.weighting is adaptive: .* needs a single pass"):
        check_passes(config, 1)
