"""Sources of the latent store: what folders, lists, tables and tars name, locally and at fsspec addresses."""

import io
import json
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leanvae.latents.sources import Source, find_source, list_sources
from leanvae.media.errors import SourceError


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


def test_ids_depend_on_name_and_range_alone():
    ids = {Source("a.mp4").id, Source("b.mp4").id, Source("a.mp4", 1.0).id, Source("a.mp4", 1.0, 2.0).id}
    assert len(ids) == 4
    assert Source("a.mp4", columns={"caption": "x"}).id == Source("a.mp4").id
    ranks = [[rank for rank in range(3) if Source(f"{n}.mp4").belongs_to(rank, 3)] for n in range(50)]
    assert all(len(owners) == 1 for owners in ranks)
    assert {owners[0] for owners in ranks} == {0, 1, 2}


def test_lists_are_relative_to_themselves(folder):
    (folder / "list.txt").write_text("# comment\nb.mp4\n\ninner/c.mkv\n")
    assert names(list_sources([f"{folder}/list.txt"]), folder) == ["b.mp4", "inner/c.mkv"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_carry_columns_along(folder, suffix):
    if suffix == "csv":
        (folder / "t.csv").write_text('path,start,end,caption,score\nb.mp4,1.5,2.5,"a ""cat"",\nred",7\na.webm,,,,\n')
    else:
        rows = [
            {"path": "b.mp4", "start": 1.5, "end": 2.5, "caption": 'a "cat",\nred', "score": 7},
            {"path": "a.webm", "start": None, "end": None, "caption": None, "score": None},
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    first, second = list_sources([f"{folder}/t.{suffix}"])
    assert (first.start, first.end, first.columns) == (1.5, 2.5, {"caption": 'a "cat",\nred', "score": 7})
    assert (second.start, second.end, second.columns) == (0.0, None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\nb.mp4\n", "a column named 'path' is missing"),
        ("path,start,end\nb.mp4,2,1\n", "row 1: end 1 is not after start 2"),
        ("path,start\nb.mp4,soon\n", "row 1: start: expected seconds, 0 or more, got 'soon'"),
        ("path,start\n,1\n", "row 1: the path is empty"),
    ],
)
def test_wrong_tables_are_refused(folder, text, message):
    (folder / "t.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        list_sources([f"{folder}/t.csv"])


def test_missing_and_empty_addresses_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no such file or folder"):
        list_sources([f"{tmp_path}/nothing"])
    with pytest.raises(SourceError, match="no clips found"):
        list_sources([str(tmp_path)])
    (tmp_path / "x.doc").touch()
    with pytest.raises(SourceError, match="expected a video"):
        list_sources([f"{tmp_path}/x.doc"])


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
    assert sources[0].read() == b"video0"
    assert sources[1].read() == b"video1"
    assert sources[0].columns == {"key": "0", "fps": 25, "caption": "a dog"}
    assert sources[1].columns == {}
    assert find_source(sources[1].name).read() == b"video1"


def test_broken_tars_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with pytest.raises(SourceError, match=r"x\.tar: cannot be read as an uncompressed tar"):
        list_sources([f"{tmp_path}/x.tar"])


def test_files_of_other_file_systems_are_listed_and_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("inner/a.mp4", b"video")
        archive.writestr("list.txt", "inner/a.mp4\n")
    outer = f"::file://{tmp_path}/clips.zip"
    for address in (f"zip://inner{outer}", f"zip://list.txt{outer}"):
        (source,) = list_sources([address])
        assert source.local_path() is None
        assert source.read() == b"video"
