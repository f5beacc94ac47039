"""Clips of the latent store: each part of a file once, on one rank, and found again by its name."""

import io
import json
import os
import tarfile
from dataclasses import replace

import pytest

from leanvae.latents.clips import belongs_to, find_source, list_sources
from leanvae.media.item import Item, read_item


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.webm", "inner/c.mkv", ".hidden.mp4", ".cache/d.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def names(sources, folder):
    return [source.name.removeprefix(f"{folder}/") for source in sources]


def test_folders_give_their_shown_videos(folder):
    assert names(list_sources([str(folder)]), folder) == ["a.webm", "b.mp4", "inner/c.mkv"]
    assert names(list_sources([f"file://{folder}"]), folder) == ["a.webm", "b.mp4", "inner/c.mkv"]
    assert names(list_sources([f"{folder}/*.mp4"]), folder) == ["b.mp4"]


def test_each_part_of_a_file_is_listed_once(folder):
    assert len(list_sources([str(folder), str(folder), f"{folder}/a.webm"])) == 3


def test_each_clip_has_one_rank():
    ranks = [[rank for rank in range(3) if belongs_to(Item(f"{n}.mp4", "clip"), rank, 3)] for n in range(50)]
    assert all(len(owners) == 1 for owners in ranks)
    assert {owners[0] for owners in ranks} == {0, 1, 2}


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tars_give_videos_with_what_shares_their_key(tmp_path):
    facts = json.dumps({"key": "0", "fps": 25}).encode()
    for number in range(2):
        members = {"a/0.json": facts, "a/0.mp4": b"video0", "a/0.txt": b"a dog\n", "a/1.mp4": b"video1"}
        write_tar(tmp_path / f"shard-{number}.tar", members)
    sources = list_sources([f"{tmp_path}/shard-{{0..1}}.tar"])
    assert names(sources, tmp_path) == [f"shard-{n}.tar/a/{m}.mp4" for n in range(2) for m in range(2)]
    assert read_item(sources[0]) == b"video0"
    assert read_item(sources[1]) == b"video1"
    assert sources[0].columns == {"key": "0", "fps": 25, "caption": "a dog"}
    assert sources[1].columns == {}
    assert read_item(find_source(sources[1].name)) == b"video1"


def test_names_are_found_again(folder):
    path = folder / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(b"video")
    for item in list_sources([str(folder)]):
        assert find_source(item.name, 1.0, 2.0) == replace(item, start=1.0, end=2.0)
