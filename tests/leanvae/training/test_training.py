"""Training runs in this process: their files, resuming, and refusals."""

import json
import os
import shutil

import pytest
import torch
import yaml

from leanvae import load_vae
from leanvae.config import ConfigError
from leanvae.data.loader import TooManyBadClips
from leanvae.distributed import lock_folder
from leanvae.latents.encode import write_statistics
from leanvae.training.config import TrainVideoConfig
from leanvae.training.engine import PlainEngine
from leanvae.training.listeners import duration, write_summary
from leanvae.training.loop import train
from litevae.errors import TrainingDiverged

SETTINGS = {
    "model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1},
    "data": {"num_frames": 5, "resolution": [32, 32], "num_workers": 1, "held_out": 0.3, "max_bad_share": 0.5},
    "losses": {"perceptual": "none"},
    "gan": {"discriminator": {"base_channels": 8, "num_layers": 2}},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "training": {"engine": "plain", "max_steps": 4, "batch_size": 2, "checkpoint_every": 2, "validate_every": 2},
}
SETTINGS["training"]["start_samples"] = 6
EXACT = ("loss", "l1", "kl", "discriminator", "lecam", "logits_real", "learning_rate")


@pytest.fixture
def run(tmp_path, write_clip):
    """A function that trains on six small clips and a file that is not one, in plain torch."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(6):
        write_clip(folder / f"clip{index}.mp4", seed=index)
    (folder / "broken.mp4").write_text("no video")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(SETTINGS))

    def run(output, *overrides, resume="auto"):
        settings = [f"data.sources=[{folder}]", *overrides]
        return train(TrainVideoConfig, tmp_path / "train.yaml", settings, tmp_path / output, resume)

    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(entries):
    return [{"step": entry["step"], **{name: entry[name] for name in EXACT}} for entry in entries]


@pytest.mark.integration
def test_run_leaves_weights_figures_and_a_list_of_bad_clips(run, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level("INFO", logger="leanvae"):
        assert run("out", "training.max_steps=6") == 0
    assert [entry["step"] for entry in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert {"l1", "low_bands", "high_bands", "kl", "adversarial", "discriminator", "lecam"} <= metrics(out)[0].keys()
    vae = load_vae(out / "checkpoints" / "latest")
    assert vae.config.low_channels == 8
    state = json.loads((out / "checkpoints" / "latest" / "trainer.json").read_text())
    assert state["step"] == 6
    assert state["perceptual"] == []
    validation = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in validation] == [0, 2, 4, 6]
    held_out = (out / "held_out.txt").read_text().split()
    assert held_out
    used = (out / "quarantine.rank0.jsonl").read_text()
    assert "broken.mp4" in used
    assert "broken.mp4" in caplog.text
    assert list((out / "tensorboard").iterdir())
    assert yaml.safe_load((out / "train.yaml").read_text())["training"]["max_steps"] == 6


@pytest.mark.integration
def test_new_runs_start_as_the_linear_codec_of_their_data(run, tmp_path, caplog):
    def state(name):
        return json.loads((tmp_path / name / "checkpoints" / "latest" / "trainer.json").read_text())

    def psnr(name):
        return [json.loads(line)["psnr"] for line in (tmp_path / name / "validation.jsonl").read_text().splitlines()]

    with caplog.at_level("INFO", logger="leanvae"):
        run("klt", "training.max_steps=2")
    assert "start: the linear codec of 6 samples" in caplog.text
    start = state("klt")["start"]
    assert start["samples"] == 6
    caplog.clear()
    with caplog.at_level("INFO", logger="leanvae"):
        run("klt")
    assert "start: " not in caplog.text  # a resumed run has its own weights
    assert state("klt")["step"] == 4
    assert state("klt")["start"] == start
    run("random", "training.start=random", "training.max_steps=1")
    assert state("random")["start"] is None
    assert psnr("klt")[0] > psnr("random")[0] + 2
    run("tuned", f"training.initial_weights={tmp_path}/klt/checkpoints/latest", "training.max_steps=1")
    assert state("tuned")["start"] is None
    assert psnr("tuned")[0] == pytest.approx(psnr("klt")[-1], abs=1e-4)


@pytest.mark.integration
def test_models_without_a_linear_skeleton_say_that_they_start_at_random(run, caplog):
    run("out", "training.max_steps=1", "model.patch_norm=true")
    assert "model.patch_norm leaves no linear skeleton: random weights" in caplog.text


@pytest.mark.integration
def test_resumed_run_equals_an_undisturbed_one(run, tmp_path):
    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again", symlinks=True)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    (tmp_path / "again" / "checkpoints" / "latest").unlink()
    assert run("again") == 0
    assert exact(metrics(tmp_path / "again")) == exact(metrics(tmp_path / "whole"))
    weights = [load_vae(tmp_path / name / "checkpoints" / "latest").state_dict() for name in ("again", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.integration
def test_finished_run_is_left_as_it_is(run, tmp_path):
    run("out")
    before = metrics(tmp_path / "out")
    assert run("out") == 0
    assert metrics(tmp_path / "out") == before


@pytest.mark.integration
def test_perceptual_loss_uses_a_local_backbone(run, tmp_path):
    from litevae.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from torchvision.models import vgg16

    torch.manual_seed(0)
    torch.save(vgg16(weights=None).features.state_dict(prefix="features."), tmp_path / "vgg16.pth")
    settings = ["losses.perceptual=required", f"losses.lpips_backbone={tmp_path / 'vgg16.pth'}"]
    assert run("out", *settings, "training.max_steps=1") == 0
    assert metrics(tmp_path / "out")[0]["lpips"] > 0
    assert json.loads((tmp_path / "out/checkpoints/latest/trainer.json").read_text())["perceptual"] == ["lpips"]


def test_missing_backbone_is_an_error_when_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vgg16"):
        run("out", "losses.perceptual=required")


@pytest.mark.integration
def test_missing_backbone_is_a_warning_otherwise(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert run("out", "losses.perceptual=auto", "training.max_steps=1") == 0
    assert caplog.text.count("training without the perceptual loss") == 1


@pytest.mark.integration
def test_too_many_bad_clips_stop_the_run(run, tmp_path):
    for index in range(12):
        (tmp_path / "clips" / f"bad{index}.mp4").write_text("no video")
    with pytest.raises(TooManyBadClips, match=r"data\.max_bad_share"):
        run("out", "data.max_bad_share=0.1", "training.max_steps=30")


def test_resume_refuses_another_model(run, tmp_path):
    run("out", "training.max_steps=1")
    with pytest.raises(ValueError, match="another model"):
        run("out", "model.latent_channels=8")


def test_resume_none_refuses_to_overwrite(run):
    run("out", "training.max_steps=1")
    with pytest.raises(ValueError, match="holds checkpoints already"):
        run("out", resume="none")


def test_a_batch_that_does_not_divide_is_refused(run):
    with pytest.raises(ValueError, match=r"training\.micro_batch_size is 3"):
        run("out", "training.batch_size=4", "training.micro_batch_size=3")


@pytest.mark.integration
def test_training_with_another_wavelet_validates_and_learns(run, tmp_path):
    assert run("out", "model.wavelet=db2", "training.max_steps=2") == 0
    assert len(metrics(tmp_path / "out")) == 2


@pytest.mark.integration
def test_a_second_run_on_the_same_folder_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(lock_folder, "__defaults__", (0.0,))
    descriptor = lock_folder(tmp_path / "out")
    with pytest.raises(ValueError, match=f"another run \\(process {os.getpid()}\\) writes here"):
        run("out")
    os.close(descriptor)
    assert run("out", "training.max_steps=1") == 0


@pytest.mark.integration
def test_changed_data_are_told_at_resume(run, tmp_path, caplog, write_clip):
    run("out", "training.max_steps=1")
    write_clip(tmp_path / "clips" / "more.mp4", seed=9)
    run("out", "training.max_steps=2", "losses.l1=3")
    assert "the list of training files" in caplog.text
    assert "losses.l1: 2.0 -> 3.0" in caplog.text


@pytest.mark.integration
def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    """As if an update itself failed: the gradient is finite, and the average takes the weights in."""
    update = PlainEngine.update

    def spoil(self):
        update(self)
        next(self.module.parameters()).data.fill_(float("nan"))

    run("out", "training.max_steps=2")
    monkeypatch.setattr(PlainEngine, "update", spoil)
    settings = ["training.max_steps=4", "training.checkpoint_every=1", "training.faults.max_rollbacks=1"]
    with pytest.raises(TrainingDiverged, match=r"step 4: .* weights are not finite.*max_rollbacks"):
        run("out", *settings)
    folder = tmp_path / "out" / "checkpoints"
    for checkpoint in folder.glob("step_*"):
        assert all(value.isfinite().all() for value in load_vae(checkpoint).state_dict().values())
    state = json.loads((folder / "latest" / "trainer.json").read_text())
    assert (state["step"], state["faults"]["lost"]) == (3, [[3, 3]])
    monkeypatch.undo()
    assert run("out", *settings) == 0


@pytest.mark.integration
def test_profiled_steps_leave_a_trace(run, tmp_path):
    assert run("out", "training.profile=[2,3]", "gan=null") == 0
    events = json.loads((tmp_path / "out" / "trace.rank0.json").read_text())["traceEvents"]
    assert {"aten::layer_norm", "Optimizer.step#AdamW.step"} <= {event.get("name") for event in events}


@pytest.mark.integration
@pytest.mark.parametrize("part", ["trainer.json", "model.safetensors", "vae/state.pt"])
def test_a_damaged_checkpoint_is_named_and_passed_over(run, tmp_path, part, caplog):
    run("out", "training.max_steps=2", "training.checkpoint_every=1")
    path = tmp_path / "out" / "checkpoints" / "latest" / part
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ConfigError, match=rf"{path.name if part[0] != 'v' else 'vae'} is damaged .*--resume"):
        run("out", "training.max_steps=3", resume=str(path.parents[part.count("/")].resolve()))
    assert run("out", "training.max_steps=3") == 0
    assert f"step_00000002 is damaged ({part} has 10 bytes" in caplog.text
    assert [entry["step"] for entry in metrics(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.integration
def test_a_run_goes_on_from_a_checkpoint_that_got_statistics_of_latents(run, tmp_path, caplog):
    run("out", "training.max_steps=2")
    latest = tmp_path / "out" / "checkpoints" / "latest"
    statistics = [0.5] * load_vae(latest).config.latent_channels
    write_statistics(latest, statistics, statistics)
    assert run("out", "training.max_steps=3") == 0
    assert "is damaged" not in caplog.text
    assert [entry["step"] for entry in metrics(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.integration
def test_repaired_files_count_no_more(run, tmp_path, write_clip):
    names = [f"bad{index}.mp4" for index in range(12)]
    for name in names:
        (tmp_path / "clips" / name).write_text("no video")
    with pytest.raises(TooManyBadClips):
        run("out", "data.max_bad_share=0.1", "training.max_steps=30")
    for name in (*names, "broken.mp4"):
        write_clip(tmp_path / "clips" / name)
    assert run("out", "data.max_bad_share=0.1", "training.max_steps=3") == 0
    assert metrics(tmp_path / "out")[-1]["bad_clips"] == 0


def test_summary_survives_other_held_out_clips(tmp_path):
    entries = [{"step": 0, "psnr": 8.0, "psnr_by_clip": {"a": 7.0, "b": 9.0}}]
    entries.append({"step": 5, "psnr": 20.0, "psnr_by_clip": {"a": 20.0, "c": 20.0}})
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert "a: 7.00 dB before, 20.00 dB after" in write_summary(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.2, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")]
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text
