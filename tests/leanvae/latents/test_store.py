"""A store's files at addresses other than local ones."""

import importlib
import os
import pickle
import subprocess
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from leanvae.cli.main import main
from leanvae.latents.encode import encode_clips
from leanvae.latents.store import Store
from leanvae.latents.verify import verify_store


@pytest.fixture
def objects(monkeypatch):
    """The module of a file system that behaves as an object store does."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("object_store")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_open_the_file_system_themselves(store, objects, start):
    clips = objects.RemoteClips(f"objects://{store}")
    expected = [clips[0, index]["key"] for index in range(len(clips))]
    loader = DataLoader(clips, batch_size=None, num_workers=2, multiprocessing_context=start)
    assert [item["key"] for item in loader] == expected
    assert [clips[0, index]["key"] for index in range(len(clips))] == expected


def test_stores_are_pickled_by_address(store):
    copy = pickle.loads(pickle.dumps(Store(store)))
    assert (copy.address, copy.root, copy.is_local) == (str(store), str(store), True)
    assert copy.shards() == ["00000-000000"]


def test_object_stores_hold_the_same_store(objects, stored_clips, checkpoint, make_job, tmp_path):
    address = f"objects://{tmp_path}/remote"
    for _ in range(2):
        summary = encode_clips([str(stored_clips)], address, make_job())
    assert (summary["clips"], summary["run"]["clips"]) == (5, 0)
    assert verify_store(address, checkpoint)["problems"] == []


def test_files_of_other_writers_are_seen(store, objects):
    remote = Store(f"objects://{store}")
    assert (remote.shards(), remote.exists("new.json")) == (["00000-000000"], False)
    for suffix in ("tar", "parquet"):
        path = store / "shards" / f"00000-000000.{suffix}"
        path.with_name(f"00001-000000.{suffix}").write_bytes(path.read_bytes())
    Store(store).write_json("new.json", {})
    assert (remote.exists("new.json"), len(remote.shards())) == (True, 2)


def test_a_network_that_is_down_is_not_an_empty_store(store, stored_clips, objects, make_job):
    """It would be written over."""
    before = (store / "store.json").read_bytes()
    objects.ObjectStore.set_down(True)
    try:
        for ask in (Store.shards, lambda remote: remote.exists("store.json"), lambda remote: remote.next_number("0")):
            with pytest.raises(OSError, match=f"the network is down: '{store}"):
                ask(Store(f"objects://{store}"))
        with pytest.raises(OSError, match=f"the network is down: '{store}/store.json'"):
            encode_clips([str(stored_clips)], f"objects://{store}", make_job())
    finally:
        objects.ObjectStore.set_down(False)
    assert (store / "store.json").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte; it needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [4096, 20_000, 40_000, 60_000])
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    small_disk, stored_clips, checkpoint, room, capsys, tmp_path
):
    """The disk has room for at most the store's description, part of the shard, or all except its index."""
    fill = small_disk / "fill"
    fill.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - room))
    flags = ["--checkpoint", str(checkpoint), "--input", str(stored_clips), "--output", str(small_disk / "store")]
    flags += ["--frames", "5", "--every", "4", "--resolution", "32x32", "--workers", "1", "--flips", "--thumbnails"]
    assert main(flags, command="encode_clips") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: [Errno 28] No space left on device: '{small_disk}/store/")
    fill.unlink()
    assert main(flags, command="encode_clips") == 0
    assert verify_store(small_disk / "store", checkpoint)["problems"] == []
    assert not [path for path in (small_disk / "store").rglob("*") if ".tmp" in path.name]


def test_clips_that_do_not_fit_are_named_and_come_with_the_same_command(small_disk, store, checkpoint, capsys):
    fill = small_disk / "fill"
    fill.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 6000))
    flags = ["--checkpoint", str(checkpoint), "--input", str(store), "--output", str(small_disk)]
    assert main(flags, command="decode_latents") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: [Errno 28] No space left on device:")
    assert str(small_disk) in error
    fill.unlink()
    assert main(flags, command="decode_latents") == 0
    assert len(list(small_disk.glob("*.mp4"))) == 5
    assert not list(small_disk.glob(".*"))
