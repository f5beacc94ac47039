"""Sources list their clips and images in a fixed order, and say what is wrong, passed over or cannot be read."""

import gzip
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leanvae.media.builtin import find_photographs
from leanvae.media.errors import MediaError, SourceError
from leanvae.media.image import read_image
from leanvae.media.item import Item, read_item
from leanvae.media.sources import expand_braces, has_braces, list_items
from leanvae.media.writer import write_png


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.MOV", "deep/er/c.webm", "deep/notes.txt", ".hidden.mp4", ".trash/d.mp4", "photo.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(clips, folder):
    return [clip.name.removeprefix(f"{folder}/") for clip in clips]


def listed(*sources, kind="clip"):
    return list_items([str(source) for source in sources], kind, where="data.sources")


def test_folders_are_read_recursively_sorted_and_without_hidden_files(folder):
    assert names(listed(str(folder)), folder) == ["a.MOV", "b.mp4", "deep/er/c.webm"]


def test_folders_with_links_in_a_circle_are_read_once(folder):
    (folder / "deep" / "again").symlink_to(folder, target_is_directory=True)
    assert names(listed(str(folder)), folder) == ["a.MOV", "b.mp4", "deep/er/c.webm"]


def test_globs_and_single_files(folder):
    assert names(listed(f"{folder}/*.mp4"), folder) == ["b.mp4"]
    assert names(listed(f"{folder}/**/*.[mw]*"), folder) == ["b.mp4", "deep/er/c.webm"]
    assert names(listed(str(folder / "b.mp4")), folder) == ["b.mp4"]


def test_folders_whose_name_looks_like_a_glob_are_folders(tmp_path):
    (tmp_path / "take [1]").mkdir()
    (tmp_path / "take [1]" / "x.mp4").touch()
    assert len(listed(str(tmp_path / "take [1]"))) == 1


def test_text_lists_are_relative_to_themselves(folder):
    (folder / "list.txt").write_text(f"\ufeffb.mp4\n\n  deep/er/c.webm  \n{folder}/a.MOV\n", encoding="utf-8")
    assert names(listed(str(folder / "list.txt")), folder) == ["b.mp4", "deep/er/c.webm", "a.MOV"]


def test_csv_files_give_parts_and_captions(folder):
    (folder / "parts.csv").write_text('caption,path,start,end\n"a, b",b.mp4,1.5,4\n,b.mp4,,2\n,a.MOV,,\n')
    clips = listed(str(folder), str(folder / "parts.csv"))[3:]
    path = str(folder / "b.mp4")
    assert clips == [
        Item(path, "clip", start=1.5, end=4.0, source=1),
        Item(path, "clip", end=2.0, source=1),
        Item(str(folder / "a.MOV"), "clip", source=1),
    ]
    assert [dict(clip.columns) for clip in clips] == [{"caption": "a, b"}, {}, {}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,start\na.mp4,1\n", r"parts\.csv: a column named 'path' is missing; found \['file', 'start'\]"),
        ("path,start\nb.mp4,soon\n", r"line 2: start: expected seconds, 0 or more, got 'soon'"),
        ("path,start\nb.mp4,-1\n", r"line 2: start: expected seconds, 0 or more, got '-1'"),
        ("path,start,end\nb.mp4,3,3\n", r"line 2: end 3 is not after start 3"),
        ("path,end\nb.mp4,1\n,2\n", r"line 3: the path is empty"),
        ("path\n", r"no clips found"),
        ("path,caption\nb.mp4,a, b\n", r"line 2: 3 values for 2 columns; put values that hold commas in quotes"),
    ],
)
def test_csv_mistakes_are_named_with_their_line(folder, content, message):
    (folder / "parts.csv").write_text(content)
    with pytest.raises(SourceError, match=message):
        listed(str(folder / "parts.csv"))


def test_missing_and_empty_sources_are_errors(folder):
    (folder / "empty").mkdir()
    with pytest.raises(SourceError, match="no such file or folder"):
        listed(str(folder / "nowhere"))
    with pytest.raises(SourceError, match="no clips found"):
        listed(str(folder / "empty"))
    with pytest.raises(SourceError, match="no clips found"):
        listed(str(folder / "*.avi"))
    with pytest.raises(SourceError, match=r"expected a \.csv"):
        listed(str(folder / "photo.jpg"))


def test_tables_carry_columns_along_with_the_type_of_the_whole_column(folder):
    text = 'path,caption,score,share,good,mixed,day\nb.mp4,"a ""cat"",\nred",7,0.5,true,1,2024-01-02\na.MOV,12,,2,,x,\n'
    (folder / "t.csv").write_text(text)
    row = {"caption": 'a "cat",\nred', "score": 7, "share": 0.5, "good": True, "mixed": "1", "day": "2024-01-02"}
    assert [dict(item.columns) for item in listed(folder / "t.csv")] == [
        row,
        {"caption": "12", "share": 2.0, "mixed": "x"},
    ]
    rows = [{"path": "b.mp4", "start": 1.5, "end": 2.5, "score": 7}, {"path": "a.MOV", "start": None, "end": None}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    first, second = listed(folder / "t.parquet")
    assert (first.start, first.end, dict(first.columns)) == (1.5, 2.5, {"score": 7})
    assert (second.start, second.end, dict(second.columns)) == (0.0, None, {})
    pq.write_table(pa.Table.from_pylist([{"path": "b.mp4"}, {"path": ""}]), folder / "t.parquet")
    with pytest.raises(SourceError, match=r"t\.parquet: row 2: the path is empty"):
        listed(folder / "t.parquet")


def test_csv_needs_no_pyarrow(folder):
    (folder / "t.csv").write_text("path\nb.mp4\n")
    code = f"""
import sys
sys.modules["pyarrow"] = None
from leanvae.media.sources import list_items
print(len(list_items([{str(folder / "t.csv")!r}], "clip", where="x")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.fixture
def images(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/er/c.webp", "deep/notes.txt", ".hidden.jpg", ".trash/d.jpg", "clip.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_sources_of_images(images):
    assert names(listed(images, kind="image"), images) == ["a.PNG", "b.jpg", "deep/er/c.webp"]
    assert names(listed(f"{images}/**/*.[jw]*", kind="image"), images) == ["b.jpg", "deep/er/c.webp"]
    assert listed(images, images / "b.jpg", kind="image")[3:] == [Item(str(images / "b.jpg"), "image", source=1)]
    (images / "list.csv").write_text('caption,path\n"a, b",b.jpg\n,a.PNG\n')
    found = listed(images / "list.csv", kind="image")
    assert found == [Item(str(images / "b.jpg"), "image"), Item(str(images / "a.PNG"), "image")]
    assert found[0].columns == {"caption": "a, b"}
    for content, message in (("path,end\nb.jpg,3\n", "images have no column named 'end': it is for clips"),):
        (images / "list.csv").write_text(content)
        with pytest.raises(SourceError, match=message):
            listed(images / "list.csv", kind="image")
    with pytest.raises(SourceError, match=r"expected a \.csv, a \.txt, a \.parquet or a \.tar or an image file"):
        listed(images / "clip.mp4", kind="image")


def test_without_a_kind_both_are_listed(images):
    found = listed(images, kind=None)
    assert [(item.kind, item.name.rsplit("/")[-1]) for item in found] == [
        ("image", "a.PNG"),
        ("image", "b.jpg"),
        ("clip", "clip.mp4"),
        ("image", "c.webp"),
    ]


def test_each_address_has_its_kind(images):
    found = list_items([str(images), str(images)], ("clip", "image"), where="data.sources")
    assert [(item.kind, item.source) for item in found] == [("clip", 0), ("image", 1), ("image", 1), ("image", 1)]


def test_built_in_images_are_the_photographs_and_held_out_with_their_clips():
    found = listed("builtin", kind="image")
    assert [item.path for item in found] == [str(path) for _, path in sorted(find_photographs().items())]
    assert found[0].split_name == "photo_astronaut.mp4"


def test_what_is_passed_over_is_counted_once(folder, caplog):
    (folder / "more.txt").touch()
    (folder / "noextension").touch()
    listed(folder, folder / "deep")
    assert caplog.messages == ["data.sources: passed over 3 .txt, 1 .jpg, 1 without an ending"]
    caplog.clear()
    list_items([str(folder), str(folder)], ("clip", "image"), where="data.sources")  # one takes what the other does not
    assert caplog.messages == ["data.sources: passed over 4 .txt, 2 without an ending"]


def test_files_that_are_named_are_taken_whatever_their_ending(folder):
    for name in ("a.y4m", "noextension"):
        (folder / name).touch()
    assert names(listed(folder / "a.y4m", f"{folder}/*.y4m", folder / "noextension"), folder) == (
        ["a.y4m", "a.y4m", "noextension"]
    )
    assert names(listed(f"{folder}/*"), folder) == ["a.MOV", "a.y4m", "b.mp4", "noextension"]


def test_animated_webp_files_are_clips_and_still_ones_images(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 90)]
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:], duration=40)
    pictures[0].save(tmp_path / "still.webp")
    assert names(listed(tmp_path), tmp_path) == ["moving.webp"]
    assert names(listed(tmp_path / "moving.webp"), tmp_path) == ["moving.webp"]
    assert [item.kind for item in listed(tmp_path, kind=None)] == ["clip", "image"]
    assert names(listed(tmp_path, kind="image"), tmp_path) == ["moving.webp", "still.webp"]
    with pytest.raises(SourceError, match="expected"):
        listed(tmp_path / "still.webp")


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_images_whose_plugin_is_missing_are_counted_with_the_package(tmp_path, caplog):
    write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert names(listed(tmp_path, kind="image"), tmp_path) == ["a.png"]
    assert caplog.messages == ["data.sources: passed over 1 .heic (pip install pillow-heif)"]
    (named,) = listed(tmp_path / "b.heic", kind="image")
    with pytest.raises(MediaError, match=r"b\.heic: its format needs a package: pip install pillow-heif"):
        read_image(named)


@pytest.fixture
def frame_folder(tmp_path):
    for number in range(8, 12):
        (tmp_path / "take").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "take" / f"f{number}.png"), np.zeros((4, 4, 3), np.uint8))
    return tmp_path / "take"


def test_a_folder_of_numbered_images_is_a_clip_where_it_is_named(frame_folder, caplog):
    parent = frame_folder.parent
    frames = ("f8.png", "f9.png", "f10.png", "f11.png")
    clip = Item(str(frame_folder), "clip", frames=frames)
    assert listed(frame_folder) == [clip]
    assert not caplog.messages
    (parent / "t.csv").write_text("path,fps,end\ntake,12.5,3\n")
    (found,) = listed(parent / "t.csv")
    assert (found.frames, found.end, found.columns) == (frames, 3.0, {"fps": 12.5})
    assert len(listed(frame_folder, kind="image")) == len(listed(frame_folder, kind=None)) == 4
    with pytest.raises(SourceError, match=r"no clips found; it holds 4 \.png, 1 \.csv; images are a clip if they are"):
        listed(parent)
    (frame_folder / "f9.png").unlink()
    with pytest.raises(SourceError, match=r"no clips found; it holds 3 \.png; images are a clip if they are numbered"):
        listed(frame_folder)
    shutil.copy(frame_folder / "f8.png", frame_folder / "v.mp4")
    assert names(listed(frame_folder), frame_folder) == ["v.mp4"]


@pytest.mark.parametrize("alone", [False, True])
def test_folders_that_cannot_be_read_are_named(folder, tmp_path, caplog, alone, monkeypatch):
    """As `chmod 000` does for users who are not root."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if alone:
        with pytest.raises(SourceError, match=r"deep: Permission denied"):
            listed(folder / "deep")
        return
    unreadable = {}
    found = list_items([str(folder)], "clip", where="--input", unreadable=unreadable)
    assert names(found, folder) == ["a.MOV", "b.mp4"]
    assert unreadable == {str(folder / "deep"): "Permission denied"}
    assert f"--input: {folder}/deep: cannot be read, nothing in it is used: Permission denied" in caplog.messages


def test_names_that_are_not_utf8_are_listed_and_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"video")
    (item,) = listed(tmp_path)
    assert item.path.endswith("caf\udce9.mp4")
    assert item.name == f"{tmp_path}/caf\\udce9.mp4"
    assert item.name.encode()
    assert read_item(item) == b"video"
    assert len(item.id) == 20


def test_files_of_other_file_systems_are_listed_and_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("inner/a.mp4", b"video")
        archive.writestr("inner/.hidden/b.mp4", b"video")
        archive.writestr("inner/notes.md", b"")
        archive.writestr("list.txt", "inner/a.mp4\n")
        archive.writestr("t.csv", "path,end\ninner/a.mp4,3\n")
    outer = f"::file://{tmp_path}/clips.zip"
    for address in (
        f"zip://inner{outer}",
        f"zip://list.txt{outer}",
        f"zip://t.csv{outer}",
        f"zip://inner/*.mp4{outer}",
    ):
        (item,) = listed(address)
        assert read_item(item) == b"video"
        assert item.name.endswith(f"inner/a.mp4{outer}")


def test_a_hundred_thousand_files_take_seconds(tmp_path):
    for number in range(100):
        (tmp_path / str(number)).mkdir()
        for name in range(200):
            os.close(os.open(f"{tmp_path}/{number}/{name}.mp4", os.O_CREAT))
    started = time.monotonic()
    assert len(listed(tmp_path)) == 20_000
    assert time.monotonic() - started < 2.0


def test_braces_stand_for_ranges():
    assert list(expand_braces("a.tar", "data.sources")) == ["a.tar"]
    assert list(expand_braces("a-{008..011}.tar", "data.sources")) == [f"a-{n:03}.tar" for n in range(8, 12)]
    assert list(expand_braces("a-{8..11}.tar", "data.sources")) == [f"a-{n}.tar" for n in range(8, 12)]
    assert list(expand_braces("{0..1}/{00..01}.tar", "-")) == [
        "0/00.tar",
        "0/01.tar",
        "1/00.tar",
        "1/01.tar",
    ]
    assert has_braces("a-{0..1}.tar")
    assert not has_braces("a-{0,1}.tar")
    with pytest.raises(SourceError, match=r"a-\{3\.\.1\}\.tar: the range \{3\.\.1\} runs backwards"):
        list(expand_braces("a-{3..1}.tar", "data.sources"))


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        with tarfile.open(tmp_path / f"part-{number:03}.tar", "w") as tar:
            for name in (f"{n:06}.{suffix}" for n in range(5) for suffix in ("jpg", "json", "txt")):
                tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "alone.png").touch()
    return tmp_path


def test_tars_are_sources_alone_by_globs_braces_folders_and_lists(shards, caplog):
    caplog.set_level(logging.INFO)
    one = listed(f"{shards}/part-001.tar", kind="image")
    assert [picture.path for picture in one] == [f"{shards}/part-001.tar/{n:06}.jpg" for n in range(5)]
    assert {picture.address for picture in one} == {f"{shards}/part-001.tar"}
    assert not caplog.records
    every = listed(f"{shards}/*.tar", kind="image")
    assert "listing the images in 3 tars" in caplog.text
    assert len(every) == 15
    assert listed(f"{shards}/part-{{000..002}}.tar", kind="image") == every
    assert listed(str(shards), kind="image") == [*listed(f"{shards}/alone.png", kind="image"), *every]
    (shards / "list.txt").write_text("part-000.tar\npart-001.tar\nalone.png\n")
    assert [picture.path for picture in listed(f"{shards}/list.txt", kind="image")] == (
        [picture.path for picture in every[:10]] + [f"{shards}/alone.png"]
    )
    with pytest.raises(SourceError, match=r"part-003\.tar: no such file"):
        listed(f"{shards}/part-{{000..003}}.tar", kind="image")


def test_compressed_tars_are_refused_where_they_are_named(shards):
    (shards / "x.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    for source in ("x.tar.gz", "*.tar.gz"):
        with pytest.raises(SourceError, match=r"x\.tar\.gz: compressed with gzip: decompress it"):
            listed(f"{shards}/{source}", kind="image")
    assert len(listed(str(shards), kind="image")) == 16
