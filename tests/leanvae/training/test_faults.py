"""Steps that are not finite: the decisions about them, and that they leave nothing behind."""

import json
import shutil
import subprocess

import pytest
import torch
import yaml

from leanvae.training import step as step_module
from leanvae.training.checkpoints import damage
from leanvae.training.config import FaultConfig, TrainVideoConfig
from leanvae.training.faults import FaultRecord, check_roll_back, checkpoint_to_restore
from leanvae.training.loop import Run, train
from litevae.errors import TrainingDiverged

SETTINGS = {
    "model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1},
    "data": {"num_frames": 5, "resolution": [32, 32], "num_workers": 1, "held_out": 0.0},
    "losses": {"perceptual": "none"},
    "gan": {"weight": 0.4, "discriminator": {"base_channels": 8, "num_layers": 2}},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "training": {"engine": "plain", "max_steps": 12, "batch_size": 2, "checkpoint_every": 4, "validate_every": 100},
}


def test_a_record_counts_and_survives_json():
    record = FaultRecord()
    for step, bad in enumerate([False, True, True, False, True], start=1):
        record = record.after(step, bad)
    assert (record.updates, record.bad_in_a_row, record.skipped) == (2, 1, (2, 3, 5))
    record = record.rolled_back(FaultRecord(updates=1), restored_step=1, step=5, gan_factor=0.5)
    assert (record.updates, record.bad_in_a_row, record.lost, record.gan_factor) == (1, 0, ((2, 5),), 0.5)
    assert FaultRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_roll_backs_are_limited():
    record = FaultRecord(lost=((1, 2), (3, 4)))
    check_roll_back(FaultConfig(max_rollbacks=3), record, "bad")
    with pytest.raises(TrainingDiverged, match=r"^steps 5 to 9 .*2 times already.*max_rollbacks"):
        check_roll_back(FaultConfig(max_rollbacks=2), record, "steps 5 to 9 are not finite")


@pytest.mark.parametrize(
    ("updates", "chosen"),
    [
        (25, "c"),
        (20, "b"),  # the newest has the weights of now: going back to it would change nothing
        (10, "a"),
        (5, "a"),  # nothing is older
        (4, None),
    ],
)
def test_the_checkpoint_to_restore_is_the_newest_with_older_weights(updates, chosen):
    assert checkpoint_to_restore([("c", 20), ("b", 10), ("a", 5)], updates) == chosen


def test_weights_of_after_a_roll_back_are_older_than_their_checkpoint():
    """Checkpoints by age: 10 updates, 20 updates, and one of a roll-back to the first."""
    assert checkpoint_to_restore([("at once", 10), ("b", 20), ("a", 10)], 14) == "at once"
    assert checkpoint_to_restore([("at once", 10), ("b", 20), ("a", 10), ("start", 0)], 10) == "start"


@pytest.fixture
def run(tmp_path, write_clip, one_pool):
    """A function that trains on six small clips, in plain torch; all tests share a decoder process."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(6):
        write_clip(folder / f"clip{index}.mp4", seed=index)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(SETTINGS))

    def run(output, *overrides):
        return train(
            TrainVideoConfig, tmp_path / "train.yaml", [f"data.sources=[{folder}]", *overrides], tmp_path / output
        )

    return run


@pytest.fixture
def spoil(monkeypatch):
    """A function that makes a term of the given steps, counted from 0, not finite: its value, or just its gradient."""
    original = step_module.reconstruction_terms

    def spoil(steps, kind="value"):
        def spoilt(losses, step, prediction, *args):
            terms = original(losses, step, prediction, *args)
            if step in steps:
                weight, value = terms["l1"]
                extra = (0.0 * prediction).sum().sqrt() if kind == "gradient" else value * torch.nan
                terms["l1"] = weight, value + extra
            return terms

        monkeypatch.setattr(step_module, "reconstruction_terms", spoilt)

    return spoil


@pytest.fixture
def samples(monkeypatch):
    """The files of each step that runs took, in order: step, counted from 1, and paths."""
    taken = []
    original = Run._meet_faults

    def keep(self, logs, paths):
        taken.append((self.step, paths))
        original(self, logs, paths)

    monkeypatch.setattr(Run, "_meet_faults", keep)
    return taken


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return json.loads((folder / "checkpoints" / "latest" / "trainer.json").read_text())


def snapshot(trainer):
    take_step = trainer.take_step
    tensors = {f"average.{name}": value for name, value in trainer.average.items()}
    for kind, engine in (("vae", take_step.vae), ("discriminator", take_step.discriminator)):
        tensors |= {f"{kind}.{name}": value for name, value in engine.full_weights().items()}
        for number, entry in engine._optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}.adam.{number}.{name}": value for name, value in entry.items()}
    return {name: value.clone() for name, value in tensors.items()}, (take_step.lecam.real, take_step.lecam.fake)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_a_bad_step_changes_nothing_and_is_counted(run, spoil, tmp_path, monkeypatch, caplog, kind):
    spoil({2, 5}, kind)
    seen = []
    meet_faults = Run._meet_faults
    monkeypatch.setattr(
        Run, "_meet_faults", lambda self, *args: (seen.append(snapshot(self)), meet_faults(self, *args))
    )
    assert run("out", "training.max_steps=8", "training.micro_batch_size=1") == 0
    for step, (tensors, lecam) in list(enumerate(seen))[1:]:
        before, lecam_before = seen[step - 1]
        same = [torch.equal(value, before[name]) for name, value in tensors.items()]
        assert all(same) == (step in (2, 5))
        assert (lecam == lecam_before) == (step in (2, 5))
    assert [entry["step"] for entry in metrics(tmp_path / "out")] == list(range(1, 9))
    assert [entry["skipped_steps"] for entry in metrics(tmp_path / "out")] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert state(tmp_path / "out")["faults"]["skipped"] == [3, 6]
    assert state(tmp_path / "out")["faults"]["updates"] == 6
    warnings = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(warnings) == 2
    assert ("loss is nan" if kind == "value" else "a gradient is not finite") in warnings[0]
    assert "/clip" in warnings[0]


FAULTS = "training.faults={max_bad_steps: 3, max_rollbacks: 1, gan_weight_factor: 0.25}"


@pytest.mark.integration
def test_bad_steps_in_a_row_go_back_and_go_on(run, spoil, samples, tmp_path, caplog):
    run("whole")
    order = list(samples)
    samples.clear()
    spoil({5, 6, 7})
    assert run("out", FAULTS, "training.keep_checkpoints=9") == 0
    assert samples == order  # nothing is repeated or left out; what is lost are updates
    faults = state(tmp_path / "out")["faults"]
    assert faults["lost"] == [[5, 8]]  # from the checkpoint after step 4, which was the newest with older weights
    assert faults["skipped"] == [6, 7, 8]
    assert faults["gan_factor"] == 0.25
    assert faults["updates"] == 8
    assert "Back to the weights of" in caplog.text
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("step*"))
    assert names == [f"step_{step:08d}" for step in (0, 4, 8, 12)]


@pytest.mark.integration
def test_a_run_killed_after_a_roll_back_goes_on_behind_the_lost_stretch(run, spoil, samples, tmp_path):
    spoil({5, 6, 7})
    run("whole", FAULTS)
    order = list(samples)
    shutil.copytree(tmp_path / "whole", tmp_path / "again", symlinks=True)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000012")
    samples.clear()
    assert run("again", FAULTS) == 0
    assert samples == order[8:]
    assert state(tmp_path / "again") == state(tmp_path / "whole")
    losses = [[entry.get("loss") for entry in metrics(tmp_path / name)] for name in ("again", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.integration
def test_a_run_gives_up_after_so_many_roll_backs(run, spoil, tmp_path):
    spoil(range(4, 100))
    with pytest.raises(
        TrainingDiverged, match=r"steps 8 to 10 are not finite; their files: .*clip\d\.mp4.*max_rollbacks"
    ):
        run("out", FAULTS, "training.max_steps=30")
    # Its newest checkpoint is good, and remembers.
    assert state(tmp_path / "out")["faults"]["lost"] == [[1, 7]]
    with pytest.raises(TrainingDiverged):
        run("out", FAULTS, "training.max_steps=30")
    spoil(())
    assert run("out", FAULTS, "training.max_steps=30") == 0


@pytest.mark.integration
def test_the_gan_keeps_its_weight_if_it_was_off(run, spoil, tmp_path):
    spoil({5, 6, 7})
    run("out", FAULTS, "gan.start_step=10")
    assert state(tmp_path / "out")["faults"]["gan_factor"] == 1.0


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.integration
@pytest.mark.parametrize("left", [200_000, 0])
def test_a_full_disk_stops_the_run_and_leaves_its_checkpoints(run, small_disk, left):
    out = small_disk / "out"
    run(out, "training.max_steps=2")
    checkpoint = (out / "checkpoints" / "latest").resolve()
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - left))
    with pytest.raises(OSError, match=r"No space left on device.*disk/out") as caught:
        run(out, "training.max_steps=4")
    assert str(out) in caught.value.filename
    assert (out / "checkpoints" / "latest").resolve() == checkpoint
    assert damage(checkpoint) is None
    assert not list((out / "checkpoints").glob(".*.tmp"))
    (small_disk / "filler").unlink()
    assert run(out, "training.max_steps=4") == 0
    assert [entry["step"] for entry in metrics(out)] == [1, 2, 3, 4]
