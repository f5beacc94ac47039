"""Tars are listed by their headers and read by offset; damaged ones are named."""

import gzip
import io
import logging
import tarfile

import pytest

from leanvae.data.config import ImageDataConfig
from leanvae.data.shards import expand_braces, has_braces, list_members, read_member
from leanvae.data.sources import list_items, split_held_out
from leanvae.media.errors import MediaError, SourceError


def write_tar(path, contents, file_format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=file_format) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


CONTENTS = {f"{n:06}.{suffix}": bytes([n]) * (700 + n) for n in range(5) for suffix in ("jpg", "json", "txt")}


@pytest.mark.parametrize("file_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_the_images_in_the_tars_order_and_their_data_are_read(tmp_path, file_format):
    contents = {
        "b.jpg": b"first" * 300,
        "folder.jpg/": None,
        "link.jpg": "b.jpg",
        "b.json": b"{}",
        "./a.PNG": b"second",
        ".hidden.jpg": b"x",
        "._a.png": b"x",
        "deep/.trash/c.jpg": b"x",
        "deep/er/c.webp": b"third",
    }
    if file_format != tarfile.USTAR_FORMAT:
        contents[f"{'long/' * 40}é.jpg"] = b"fourth"
    shard = write_tar(tmp_path / "x.tar", contents, file_format)
    members = list_members(shard)
    assert [member.name for member in members][:3] == ["b.jpg", "a.PNG", "deep/er/c.webp"]
    data = [read_member(str(shard), member.offset, member.size, member.name) for member in members]
    assert data == [b"first" * 300, b"second", b"third", b"fourth"][: len(members)]
    assert len(members) == (3 if file_format == tarfile.USTAR_FORMAT else 4)


def test_a_tar_that_breaks_off_keeps_the_images_before_and_says_so(tmp_path, caplog):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    whole = list_members(shard)
    data = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: whole[3].offset + 10])
    assert list_members(tmp_path / "cut.tar") == whole[:3]
    assert "cut.tar: damaged, 3 images before that are used: it ends inside 000003.jpg" in caplog.text
    caplog.clear()
    (tmp_path / "cut.tar").write_bytes(data[: whole[3].offset - 100])
    assert list_members(tmp_path / "cut.tar") == whole[:3]
    assert "cut.tar: damaged, 3 images" in caplog.text


def test_a_damaged_header_is_no_end(tmp_path, caplog):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    whole = list_members(shard)
    data = bytearray(shard.read_bytes())
    header = whole[2].offset - tarfile.BLOCKSIZE
    data[header + 20] ^= 0xFF
    shard.write_bytes(data)
    assert list_members(shard) == whole[:2]
    assert f"2 images before that are used: the header at byte {header} is damaged" in caplog.text


def test_a_tar_without_its_end_blocks_is_complete(tmp_path, caplog):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    whole = list_members(shard)
    data = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    assert list_members(shard) == whole
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an intact tar: empty file"),
        (b"no tar " * 1000, "not an intact tar"),
        (gzip.compress(b"x"), "compressed with gzip: decompress it"),
        (b"BZh91AY", "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfdrest", "compressed with zstd"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, content, message):
    shard = tmp_path / "x.tar"
    if content is not None:
        shard.write_bytes(content)
    with pytest.raises(SourceError, match=rf"x\.tar: {message}"):
        list_members(shard)


def test_a_tar_cut_before_its_first_image_is_an_error(tmp_path):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(SourceError, match=r"x\.tar: not an intact tar: it ends inside 000000\.jpg"):
        list_members(shard)


def test_read_member_of_a_tar_that_has_shrunk_or_gone(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(100))
    with pytest.raises(MediaError, match=r"x\.tar/a\.jpg: truncated: the tar ends 20 bytes before"):
        read_member(str(tmp_path / "x.tar"), 90, 30, "x.tar/a.jpg")
    with pytest.raises(MediaError, match=r"y\.tar/a\.jpg: No such file"):
        read_member(str(tmp_path / "y.tar"), 90, 30, "y.tar/a.jpg")


def test_braces_stand_for_ranges():
    assert list(expand_braces("a.tar")) == ["a.tar"]
    assert list(expand_braces("a-{008..011}.tar")) == [f"a-{n:03}.tar" for n in range(8, 12)]
    assert list(expand_braces("a-{8..11}.tar")) == [f"a-{n}.tar" for n in range(8, 12)]
    assert list(expand_braces("{0..1}/{00..01}.tar")) == ["0/00.tar", "0/01.tar", "1/00.tar", "1/01.tar"]
    assert has_braces("a-{0..1}.tar")
    assert not has_braces("a-{0,1}.tar")
    with pytest.raises(SourceError, match=r"a-\{3\.\.1\}\.tar: the range \{3\.\.1\} runs backwards"):
        list(expand_braces("a-{3..1}.tar"))


def listed(*sources):
    return list_items(ImageDataConfig(sources=sources))


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"part-{number:03}.tar", CONTENTS)
    (tmp_path / "alone.png").touch()
    return tmp_path


def test_tars_are_sources_alone_by_globs_braces_folders_and_lists(shards, caplog):
    caplog.set_level(logging.INFO)
    one = listed(f"{shards}/part-001.tar")
    assert [picture.path for picture in one] == [f"{shards}/part-001.tar/{n:06}.jpg" for n in range(5)]
    assert {picture.file for picture in one} == {f"{shards}/part-001.tar"}
    assert not caplog.records
    every = listed(f"{shards}/*.tar")
    assert "listing the images in 3 tars" in caplog.text
    assert len(every) == 15
    assert listed(f"{shards}/part-{{000..002}}.tar") == every
    assert listed(str(shards)) == [*listed(f"{shards}/alone.png"), *every]
    (shards / "list.txt").write_text("part-000.tar\npart-001.tar\nalone.png\n")
    assert [picture.path for picture in listed(f"{shards}/list.txt")] == (
        [picture.path for picture in every[:10]] + [f"{shards}/alone.png"]
    )
    with pytest.raises(SourceError, match=r"part-003\.tar: no such file"):
        listed(f"{shards}/part-{{000..003}}.tar")


def test_compressed_tars_are_refused_where_they_are_named(shards):
    (shards / "x.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    for source in ("x.tar.gz", "*.tar.gz"):
        with pytest.raises(SourceError, match=r"x\.tar\.gz: compressed with gzip: decompress it"):
            listed(f"{shards}/{source}")
    assert len(listed(str(shards))) == 16


def test_images_of_the_same_name_in_different_tars_are_held_out_apart(shards, tmp_path):
    pictures = listed(f"{shards}/*.tar")
    training, held_out = split_held_out(pictures, 0.5)
    assert sorted(training + held_out, key=pictures.index) == pictures
    names = [{picture.path.rsplit("/")[-1] for picture in side} for side in (training, held_out)]
    assert names[0] & names[1]
    (tmp_path / "moved").mkdir()
    for shard in shards.glob("*.tar"):
        shard.rename(tmp_path / "moved" / shard.name)
    moved = split_held_out(listed(f"{tmp_path}/moved/*.tar"), 0.5)[1]
    assert [picture.split_name for picture in moved] == [picture.split_name for picture in held_out]
    assert held_out[0].split_name.startswith("part-00")
