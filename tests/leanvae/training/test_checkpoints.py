"""The checkpoint folder: `latest` always names a complete one."""

import json
import os
import re

import pytest
import torch
import yaml
from safetensors import SafetensorError

from leanvae import LeanVAEConfig
from leanvae.training import checkpoints as C
from leanvae.training.config import TrainVideoConfig
from leanvae.training.state import resolved_config
from litevae.pretrained import config_text, save_pretrained, update_config


def write(root, step, content="x", keep=3, keep_every=None):
    folder = C.new_checkpoint(root, step)
    written = C.temporary_folder(folder)
    written.mkdir(parents=True)
    (written / C.STATE_FILE).write_text(content)
    C.commit(folder, keep, keep_every)
    return folder


def test_latest_names_the_newest(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
        assert os.readlink(tmp_path / "latest") == f"step_{step:08d}"
    assert (tmp_path / "latest" / C.STATE_FILE).read_text() == "x"


def test_old_checkpoints_go(tmp_path):
    for step in range(6):
        write(tmp_path, step, keep=2)
    assert [path.name for path in C.complete_checkpoints(tmp_path)] == ["step_00000004", "step_00000005"]


def test_a_checkpoint_written_again_replaces_the_first(tmp_path):
    write(tmp_path, 1, "old")
    write(tmp_path, 1, "new")
    assert (tmp_path / "latest" / C.STATE_FILE).read_text() == "new"
    write(tmp_path, 1, "newest", keep=1)
    assert (tmp_path / "latest" / C.STATE_FILE).read_text() == "newest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001_2"]


@pytest.mark.parametrize("call", ["rename", "symlink_to", "replace"])
def test_latest_stays_complete_when_writing_fails(tmp_path, monkeypatch, call):
    write(tmp_path, 1)

    def fail(*_, **__):
        raise OSError("disk gone")

    target = os if call == "replace" else C.Path
    monkeypatch.setattr(target, call, fail)
    with pytest.raises(OSError, match="disk gone"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert (tmp_path / "latest" / C.STATE_FILE).read_text() == "x"
    assert (C.find_checkpoint(tmp_path, "auto") / C.STATE_FILE).is_file()


def test_what_a_killed_run_left_is_cleaned(tmp_path):
    folder = write(tmp_path, 1)
    C.temporary_folder(C.new_checkpoint(tmp_path, 2)).mkdir()
    C.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", folder.name]


def test_auto_begins_where_there_is_nothing(tmp_path):
    assert C.find_checkpoint(tmp_path / "none", "auto") is None
    (tmp_path / ".step_00000001.tmp").mkdir()
    assert C.find_checkpoint(tmp_path, "auto") is None


def test_none_refuses_to_overwrite(tmp_path):
    assert C.find_checkpoint(tmp_path, "none") is None
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="holds checkpoints already"):
        C.find_checkpoint(tmp_path, "none")


def test_a_named_checkpoint_must_be_one(tmp_path):
    folder = write(tmp_path, 4)
    assert C.find_checkpoint(tmp_path, str(folder)) == folder
    with pytest.raises(FileNotFoundError, match=r"trainer\.json is missing.*checkpoints/latest"):
        C.find_checkpoint(tmp_path, str(tmp_path))


def test_every_so_many_steps_a_checkpoint_stays(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, keep=2, keep_every=3)
    assert [int(path.name[5:]) for path in C.complete_checkpoints(tmp_path)] == [3, 6, 7]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text("xy"), "has 2 bytes, not 1"),
        (lambda path: path.write_text("y"), "has changed"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
    ids=["longer", "other content", "missing"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, spoil, reason):
    for step in (1, 2, 3):
        write(tmp_path, step)
    spoil(tmp_path / "step_00000003" / C.STATE_FILE)
    assert C.find_checkpoint(tmp_path, "auto").name == "step_00000002"
    assert "step_00000003 is damaged" in caplog.text
    assert reason in caplog.text
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}" / C.MANIFEST_FILE).write_text("[]")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        C.find_checkpoint(tmp_path, "auto")


FIRST, SECOND = ({"latent_mean": [x, 0.1], "latent_std": [1 / 3, 2.5]} for x in (0.25, -1e-7))


@pytest.fixture
def trained(tmp_path):
    """A function that writes a checkpoint with a model's configuration, given statistics that it was trained with."""

    def write(**statistics):
        config = LeanVAEConfig(latent_channels=2, low_channels=4, high_channels=4, **statistics)
        folder = C.new_checkpoint(tmp_path, 1)
        save_pretrained("LeanVAE", config, {}, C.temporary_folder(folder))
        train_config = TrainVideoConfig(model=config)
        (C.temporary_folder(folder) / C.RESOLVED_CONFIG).write_text(resolved_config(train_config))
        C.commit(folder, 3)
        return folder

    return write


@pytest.mark.parametrize("before", [{}, FIRST])
def test_statistics_of_latents_are_no_damage(trained, before):
    """However often they are written, even by the previous version."""
    folder = trained(**before)
    for statistics in (SECOND, FIRST):
        update_config(folder, statistics)
        assert json.loads((folder / "config.json").read_text()).items() >= statistics.items()
        assert C.damage(folder) is None
    tree = json.loads((folder / "config.json").read_text()) | SECOND
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    assert C.damage(folder) is None


def test_a_configuration_without_the_fields_of_statistics_gains_them_undamaged(trained):
    """As in a run older than these fields."""
    folder = trained()
    for name, read, write in (("config.json", json.loads, config_text), ("train.yaml", yaml.safe_load, yaml.safe_dump)):
        tree = read((folder / name).read_text())
        for field in FIRST:
            del (tree["model"] if name == "train.yaml" else tree)[field]
        (folder / name).write_text(write(tree))
    (folder / C.MANIFEST_FILE).unlink()
    folder.rename(C.temporary_folder(folder))
    C.commit(folder, 3)
    update_config(folder, FIRST)
    assert C.damage(folder) is None


def test_other_changes_of_the_configuration_are_damage(trained):
    folder = trained()
    update_config(folder, {**FIRST, "low_channels": 8})
    assert re.fullmatch(r"config\.json has \d+ bytes, not \d+", C.damage(folder))
    (folder / "config.json").write_text("{")
    assert "config.json has 1 bytes" in C.damage(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in C.damage(folder)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("write(): fd 3 failed with No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_told_with_the_folder_and_leaves_nothing(tmp_path, error):
    """As observed with torch 2.13 and safetensors 0.8 on a full disk."""
    folder = C.new_checkpoint(tmp_path, 3)
    C.temporary_folder(folder).mkdir()
    with pytest.raises(OSError, match="step_00000003") as caught, C.writing(folder):
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.filename == str(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:13719"),
        ConnectionResetError(104, "Connection reset by peer"),
        KeyError("module"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_not_of_writing_keep_their_type(tmp_path, error):
    with pytest.raises(type(error)) as caught, C.writing(C.new_checkpoint(tmp_path, 3)):
        raise error
    assert caught.value is error


def test_checkpoints_without_a_manifest_pass_for_whole(tmp_path):
    folder = write(tmp_path, 1)
    (folder / C.MANIFEST_FILE).unlink()
    assert C.find_checkpoint(tmp_path, "auto") == folder
