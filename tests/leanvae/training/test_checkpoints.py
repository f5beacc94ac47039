"""The folder of checkpoints: `latest` always names a complete one."""

import os

import pytest

from leanvae.training import checkpoints as C


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


def test_checkpoints_without_a_manifest_pass_for_whole(tmp_path):
    folder = write(tmp_path, 1)
    (folder / C.MANIFEST_FILE).unlink()
    assert C.find_checkpoint(tmp_path, "auto") == folder
