"""What a run writes: JSON lines, TensorBoard, Weights & Biases, and the best checkpoint."""

import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanvae.config import ConfigError
from leanvae.data.buckets import Shape
from leanvae.training import listeners
from leanvae.training.comparison import Comparison, write_comparisons
from leanvae.training.config import TrainVideoConfig
from leanvae.training.listeners import Listener, StepReport, default_listeners, write_summary
from leanvae.training.loop import train
from leanvae.training.profiling import StepTimes
from leanvae.training.validation import Validation, ValidationResults

SETTINGS = {
    "model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1},
    "data": {"num_frames": 5, "resolution": [32, 32], "num_workers": 1, "held_out": 0.3},
    "losses": {"perceptual": "none"},
    "gan": None,
    "training": {"engine": "plain", "max_steps": 5, "batch_size": 2, "checkpoint_every": 100, "validate_every": 1}
    | {"keep_checkpoints": 1},
}
WANDB = {"training": {"wandb": {"project": "clips", "name": "first"}}}


def results(psnr=20.0):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 64, 3), np.uint8)
    figures = {"psnr": {"a": psnr, "b": None}, "ssim": {"a": 0.5, "b": 0.7}}
    return ValidationResults(
        figures, [Comparison("a", frames, 10.0, frames[0]), Comparison("b", frames[:1], None, frames[0])]
    )


class FakeWandb(SimpleNamespace):
    """The part of the package in use; it records its calls."""

    def __init__(self):
        super().__init__(calls=[], logged=[], finished=0)

    def init(self, **arguments):
        self.calls.append(arguments)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1

    def Image(self, picture):
        return ("image", picture.shape)

    def Video(self, path, format):
        assert os.path.getsize(path)
        return ("video", format)


def write_all(root, config, events, step=None):
    """Tells the listeners of every run of some events: the name of a method, and its arguments."""
    listeners = default_listeners(config)
    for listener in listeners:
        listener.started(root, config, step)
    for name, *arguments in events:
        for listener in listeners:
            getattr(listener, name)(*arguments)
    for listener in reversed(listeners):
        listener.closed()


def report(step, loss, is_logged):
    return StepReport(step, {"loss": loss}, {"loss": loss}, Shape(5, 32, 32), StepTimes(0.1, 0.8, 1.0), is_logged)


def evaluation(root, step, found):
    return ("validated", step, found, write_comparisons(root / "held_out", step, found.comparisons))


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_validation_is_recorded_everywhere(tmp_path, wandb):
    events = [("stepped", report(1, 2.0, True)), ("stepped", report(2, 1.0, False)), evaluation(tmp_path, 2, results())]
    write_all(tmp_path, TrainVideoConfig.model_validate(WANDB), events)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    (entry,) = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert entry == {
        "step": 2,
        "psnr": 20.0,
        "ssim": pytest.approx(0.6),
        "psnr_by_clip": {"a": 20.0, "b": None},
        "ssim_by_clip": {"a": 0.5, "b": 0.7},
    }
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 2.0)]
    assert board.Scalars("held_out/psnr")[0].value == 20.0
    (gif,) = board.Images("held_out/clip")
    assert gif.encoded_image_string.startswith(b"GIF8")
    assert (gif.step, gif.height, gif.width) == (2, 16, 64)
    assert board.Images("held_out/source_and_reconstruction")
    assert sorted(path.suffix for path in (tmp_path / "held_out/step_00000002").iterdir()) == [".mp4", ".png"]
    assert wandb.logged[:2] == [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "held_out/psnr": 20.0, "held_out/ssim": 0.6},
    ]
    assert wandb.logged[2] == {
        "step": 2,
        "held_out/source_and_reconstruction": ("image", (32, 64, 3)),
        "held_out/clips": [("video", "mp4")],
    }
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, wandb):
    for step in (None, 3):
        write_all(tmp_path, TrainVideoConfig.model_validate(WANDB), [], step)
    first, second = wandb.calls
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first["resume"] == "allow"
    assert (first["project"], first["name"], first["entity"], first["dir"]) == ("clips", "first", None, str(tmp_path))
    assert first["config"]["training"]["wandb"]["project"] == "clips"


def test_missing_wandb_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr(listeners.importlib.util, "find_spec", lambda name: None)
    listeners.check_wandb(None)
    with pytest.raises(ConfigError, match=r"training\.wandb needs the package wandb: pip install 'leanvae\[wandb\]'"):
        listeners.check_wandb(TrainVideoConfig.model_validate(WANDB).training.wandb)


@pytest.mark.integration
def test_wandb_itself_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    events = [("stepped", report(1, 2.0, True)), evaluation(tmp_path, 1, results())]
    write_all(tmp_path, TrainVideoConfig.model_validate(WANDB), events)
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith(name)
    assert (run / f"run-{name}.wandb").stat().st_size > 1000


def test_summary_tells_what_has_no_figure(tmp_path):
    events = [evaluation(tmp_path, 0, results(20.0)), evaluation(tmp_path, 4, results(25.0))]
    write_all(tmp_path, TrainVideoConfig(), events)
    text = write_summary(tmp_path)
    assert "a: 20.00 dB before, 25.00 dB after" in text
    assert "b: not finite before, not finite after" in text
    assert (tmp_path / "summary.txt").read_text() == text + "\n"


def test_summary_survives_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    entry = {"step": 0, "psnr": 8.0, "psnr_by_clip": {name: 8.0}}
    (tmp_path / "validation.jsonl").write_text(json.dumps(entry) + "\n")
    assert r"caf\udce9.mp4: 8.00 dB before" in write_summary(tmp_path)
    assert r"caf\udce9.mp4" in (tmp_path / "summary.txt").read_text()


def test_lines_are_for_few_steps_and_the_estimate_for_the_fourth(tmp_path, caplog):
    config = TrainVideoConfig.model_validate({"training": {"log_every": 5, "max_steps": 100}})
    costs = {"samples_per_second": 4.0, "frames_per_second": 20.0, "memory_mib": 100.0}
    reports = [report(step, 2.0, False) for step in range(11, 17)]
    reports = [dataclasses.replace(each, figures={**each.figures, **costs}) for each in reports]
    with caplog.at_level("INFO", logger="leanvae"):
        write_all(tmp_path, config, [("stepped", each) for each in reports], step=10)
    assert [record.getMessage() for record in caplog.records] == [
        "1.00 s per step, about 1 min 40 s in total",
        "step 15/100 5x32x32: loss 2; 1.00 s, 10% of it waiting for data, 4 samples/s, 20 frames/s, 100 MiB; "
        "about 1 min 25 s left",
    ]


class Watcher(Listener):
    """A listener that records its calls, and may fail in a step."""

    def __init__(self, fails_in=None):
        self.told, self.fails_in = [], fails_in

    def started(self, root, config, step):
        self.told.append(("started", root.name, step))

    def stepped(self, report):
        self.told.append(("stepped", report.step))
        if report.step == self.fails_in:
            raise ZeroDivisionError

    def validated(self, step, results, files):
        self.told.append(("validated", step, len(files)))

    def closed(self):
        self.told.append(("closed",))


class Quiet(Listener):
    """A listener without methods."""


@pytest.fixture
def run(tmp_path, write_clip):
    """A function that trains on a few small clips, with listeners."""
    (tmp_path / "clips").mkdir()
    for index in range(4):
        write_clip(tmp_path / "clips" / f"clip{index}.mp4", seed=index)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(SETTINGS))

    def run(*overrides, listeners=()):
        settings = [f"data.sources=[{tmp_path / 'clips'}]", *overrides]
        return train(TrainVideoConfig, tmp_path / "train.yaml", settings, tmp_path / "out", listeners=listeners)

    return run


@pytest.mark.integration
def test_listeners_of_the_user_are_told_in_order_and_closed_after_errors(run, tmp_path):
    first, second, failing = Watcher(), Watcher(), Watcher(fails_in=4)
    settings = ["training.validate_every=2", "training.checkpoint_every=1"]
    assert run("training.max_steps=3", *settings, listeners=[first, Quiet()]) == 0
    steps = [("stepped", 1), ("stepped", 2), ("validated", 2, 1), ("stepped", 3), ("validated", 3, 1)]
    assert first.told == [("started", "out", None), ("validated", 0, 1), *steps, ("closed",)]
    with pytest.raises(ZeroDivisionError):
        run(*settings, listeners=[second, failing])
    assert second.told == failing.told == [("started", "out", 3), ("stepped", 4), ("closed",)]
    assert run(*settings) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]  # the failing step is taken again


@pytest.mark.integration
def test_best_names_the_checkpoint_with_the_highest_psnr(run, tmp_path, monkeypatch):
    psnrs = iter([10.0, 12.0, 15.0, 14.0, None, 15.0])
    monkeypatch.setattr(Validation, "run", lambda self, weights: results(next(psnrs)))
    assert run() == 0
    checkpoints = tmp_path / "out" / "checkpoints"
    # keep_checkpoints is 1: the last one, and the best besides; a worse one is not written, nor an equal one named.
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000002", "step_00000005"]
    assert os.readlink(checkpoints / "best") == "step_00000002"
    assert os.readlink(checkpoints / "latest") == "step_00000005"
    assert json.loads((checkpoints / "best" / "held_out.json").read_text()) == {"psnr": 15.0, "ssim": 0.6}
