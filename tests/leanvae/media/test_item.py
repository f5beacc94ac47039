"""Names, ids, digests and sides of the split are those of the code before the renovation, for data that it took."""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import pytest

from leanvae.data.config import ClipDataConfig, ImageDataConfig
from leanvae.data.schedule import list_training_items, split_held_out
from leanvae.latents.clips import list_sources
from leanvae.media.item import Item
from leanvae.media.naming import find_inputs
from leanvae.training.state import items_digest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder `d` in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.mp4", "d/a.MOV", "d/deep/c.webm", "d/p.png", "d/deep/q.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    with tarfile.open("d/x.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 7
            tar.addfile(info, io.BytesIO(b"x" * 7))
    Path("d/parts.csv").write_text("path,start,end\nb.mp4,1.5,4\na.MOV,,\n")
    Path("d/list.txt").write_text("deep/../b.mp4\ndeep/c.webm\n")
    return tmp_path


def test_ids_are_what_they_were():
    items = {
        Item("/data/a.mp4", "clip"): "df1856c62e89955ba159",
        Item("/data/a.mp4", "clip", start=1.0, end=2.5): "46e76672ff5c5af4052a",
        Item("s3://b/x.tar", "clip", member="k/0.mp4", offset=5, size=6): "047c0f473c12221b8cb2",
        Item("/data/caf\udce9.mp4", "clip"): "77cee15c18209c697ce6",
        Item("/data/ü.mp4", "clip"): "456ec765653e27a2426b",
    }
    assert {item: item.id for item in items} == items
    assert Item("a.mp4", "clip", columns={"caption": "x"}).id == Item("a.mp4", "clip").id


def test_digests_of_training_files_are_what_they_were(folder):
    clips = list_training_items(
        ClipDataConfig.model_validate({"sources": ["d", "d/parts.csv", "d/list.txt", "d/*.mp4"]})
    )
    assert [(item.path, item.start, item.end, item.source) for item in clips] == [
        ("d/a.MOV", 0.0, None, 0),
        ("d/b.mp4", 0.0, None, 0),
        ("d/deep/c.webm", 0.0, None, 0),
        ("d/b.mp4", 1.5, 4.0, 1),
        ("d/a.MOV", 0.0, None, 1),
        ("d/deep/../b.mp4", 0.0, None, 2),
        ("d/deep/c.webm", 0.0, None, 2),
        ("d/b.mp4", 0.0, None, 3),
    ]
    assert items_digest(clips) == "5f3ac7bd015c8bd7"
    images = list_training_items(ImageDataConfig.model_validate({"sources": ["d", "d/x.tar"]}))
    tar = [("d/x.tar/0.jpg", 512, 7), ("d/x.tar/1.jpg", 1536, 7)]
    assert [(item.path, item.offset, item.size) for item in images] == [
        ("d/deep/q.jpg", 0, 0),
        ("d/p.png", 0, 0),
        *tar,
        *tar,
    ]
    assert items_digest(images) == "fb22c5a4e5aa6002"
    joint = ClipDataConfig.model_validate({"sources": ["d", {"path": "d", "kind": "images"}]})
    assert items_digest(list_training_items(joint)) == "323c43e352406e5c"


def test_held_out_files_are_what_they_were():
    items = [Item(f"/data/{n}.mp4", "clip") for n in range(200)]
    items += [Item("/data/x.tar", "image", member=f"{n}.jpg") for n in range(200)]
    training, held_out = split_held_out(items, 0.05)
    assert [item.path.removeprefix("/data/") for item in held_out] == [
        *(f"{n}.mp4" for n in (7, 8, 70, 71, 82, 189, 197)),
        *(f"x.tar/{n}.jpg" for n in (47, 54, 55, 61, 62, 90, 100, 106, 115, 123, 133, 176)),
    ]
    assert len(training) + len(held_out) == 400


def test_clips_of_the_store_are_named_as_they_were(folder):
    found = list_sources(["d", "./d/parts.csv", "d/list.txt"])
    assert [(item.name.removeprefix(f"{folder}/"), item.start, item.end) for item in found] == [
        ("d/a.MOV", 0.0, None),
        ("d/b.mp4", 0.0, None),
        ("d/deep/c.webm", 0.0, None),
        ("d/b.mp4", 1.5, 4.0),
    ]
    assert all(item.name.startswith(f"{folder}/") for item in found)


def test_outputs_are_named_as_they_were(folder):
    for name in ("d/same.jpg", "d/same.mp4", "d/Same.png"):
        Path(name).touch()
    assert {(found.name, found.target, found.is_video) for found in find_inputs(Path("d"), Path("d/out"))} == {
        ("Same.png", "Same.png", False),
        ("a.MOV", "a", True),
        ("b.mp4", "b", True),
        ("deep/c.webm", "deep/c", True),
        ("deep/q.jpg", "deep/q", False),
        ("p.png", "p", False),
        ("same.jpg", "same.jpg", False),
        ("same.mp4", "same.mp4", True),
    }
    (alone,) = find_inputs(Path("d/deep/c.webm"), Path("out"))
    assert (alone.name, alone.target) == ("c.webm", "c")
    assert [found.name for found in find_inputs(Path("d/list.txt"), Path("out"))] == ["b.mp4", "deep/c.webm"]


def test_items_are_small_and_survive_the_way_to_a_decoder():
    items = [Item("x.tar", "image", "a.jpg", 512, 7), Item("b", "clip", frames=("1.png",), columns={"fps": 5})]
    assert pickle.loads(pickle.dumps(items)) == items
    assert sys.getsizeof(items[0]) < 150
    assert Item("a", "clip").columns is Item("b", "clip").columns
    assert not hasattr(items[0], "__dict__")


def test_split_is_by_name_alone_and_stable_when_files_are_added():
    clips = [Item(f"/data/{n % 7}/clip_{n}.mp4", "clip") for n in range(1000)]
    training, held_out = split_held_out(clips, 0.1)
    assert 70 < len(held_out) < 130
    assert sorted(training + held_out, key=clips.index) == clips
    moved = [Item(clip.path.replace("/data/", "/elsewhere/"), "clip") for clip in clips[::2]]
    added = [Item(f"new_{n}.mp4", "clip") for n in range(500)]
    again = {clip.path.rsplit("/")[-1] for clip in split_held_out(added + moved, 0.1)[1]}
    before = {clip.path.rsplit("/")[-1] for clip in held_out}
    assert before & {clip.path.rsplit("/")[-1] for clip in moved} == again - {clip.path for clip in added}
    assert split_held_out(clips, 0.0) == (clips, [])
    grown = split_held_out(clips, 0.2)[1]
    assert set(held_out) <= set(grown)


def test_parts_of_a_file_stand_on_one_side():
    clips = [Item(f"{n}.mp4", "clip", start=part) for n in range(50) for part in (0.0, 1.0)]
    training, held_out = split_held_out(clips, 0.5)
    assert not {clip.path for clip in training} & {clip.path for clip in held_out}
