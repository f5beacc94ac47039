"""Tars are listed by their headers and read by offset; damaged ones are named."""

import gzip
import io
import json
import tarfile

import pytest

from leanvae.media.errors import MediaError, SourceError
from leanvae.media.item import Item, open_item, read_item
from leanvae.media.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_items
from leanvae.media.tars import list_members


def list_images(path):
    return list_members(str(path), IMAGE_SUFFIXES.__contains__, where="data.sources").members


def read_member(tar, offset, size, name):
    return read_item(Item(str(tar), "image", name, offset, size))


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
    members = list_images(shard)
    assert [member.name for member in members][:3] == ["b.jpg", "a.PNG", "deep/er/c.webp"]
    data = [read_member(shard, member.offset, member.size, member.name) for member in members]
    assert data == [b"first" * 300, b"second", b"third", b"fourth"][: len(members)]
    assert len(members) == (3 if file_format == tarfile.USTAR_FORMAT else 4)


def test_a_tar_that_breaks_off_keeps_the_images_before_and_says_so(tmp_path, caplog):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    whole = list_images(shard)
    data = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: whole[3].offset + 10])
    assert list_images(tmp_path / "cut.tar") == whole[:3]
    assert "cut.tar: damaged, 3 members before that are used: it ends inside 000003.jpg" in caplog.text
    caplog.clear()
    (tmp_path / "cut.tar").write_bytes(data[: whole[3].offset - 100])
    assert list_images(tmp_path / "cut.tar") == whole[:3]
    assert "cut.tar: damaged, 3 members" in caplog.text


def test_a_damaged_header_is_no_end(tmp_path, caplog):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    whole = list_images(shard)
    data = bytearray(shard.read_bytes())
    header = whole[2].offset - tarfile.BLOCKSIZE
    data[header + 20] ^= 0xFF
    shard.write_bytes(data)
    assert list_images(shard) == whole[:2]
    assert f"2 members before that are used: the header at byte {header} is damaged" in caplog.text


def test_a_tar_without_its_end_blocks_is_complete(tmp_path, caplog):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    whole = list_images(shard)
    data = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    assert list_images(shard) == whole
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
        list_images(shard)


def test_a_tar_cut_before_its_first_image_is_an_error(tmp_path):
    shard = write_tar(tmp_path / "x.tar", CONTENTS)
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(SourceError, match=r"x\.tar: not an intact tar: it ends inside 000000\.jpg"):
        list_images(shard)


def test_read_member_of_a_tar_that_has_shrunk_or_gone(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(100))
    with pytest.raises(MediaError, match=r"x\.tar/a\.jpg: truncated: the tar ends 20 bytes before"):
        read_member(tmp_path / "x.tar", 90, 30, "a.jpg")
    with pytest.raises(MediaError, match=r"y\.tar/a\.jpg: No such file"):
        read_member(tmp_path / "y.tar", 90, 30, "a.jpg")


def test_members_are_files_that_can_be_seeked(tmp_path):
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": b"0123456789", "b.jpg": b"rest"})
    member = list_images(shard)[0]
    with open_item(Item(str(shard), "image", *member[:3])) as file:
        assert file.read(3) == b"012"
        assert file.seek(-2, 2) == 8
        assert (file.tell(), file.read(), file.read()) == (8, b"89", b"")
        assert file.seek(1) == 1
        assert file.read() == b"123456789"


def list_videos(path):
    items = list_items([str(path)], "clip", where="--input")
    return {item.member: dict(item.columns) for item in items}


def test_videos_come_with_what_shares_their_name(tmp_path):
    shard = write_tar(
        tmp_path / "x.tar",
        {
            "a/0.json": json.dumps({"key": "0", "fps": 25}).encode(),
            "a/0.mp4": b"video0",
            "a/0.txt": b"a dog\n",
            "a/1.mp4": b"video1",
            "b.mp4": b"",
            "b.jpg": b"thumbnail",
        },
    )
    assert list_videos(shard) == {
        "a/0.mp4": {"key": "0", "fps": 25, "caption": "a dog"},
        "a/1.mp4": {},
        "b.mp4": {},
    }


def test_names_with_dots_find_their_texts_as_webdataset_splits_them(tmp_path, caplog):
    """WebDataset's key ends at the first dot: `clip.json` is of both cameras, `clip.left.txt` of one."""
    contents = {
        "clip.left.mp4": b"",
        "clip.right.mp4": b"",
        "clip.json": b'{"caption": "both", "fps": 9}',
        "clip.left.txt": b"left",
        "take.001.mp4": b"",
        "take.001.json": b'{"caption": "a white square"}',
        "take.002.json": b"{}",
        "other.txt": b"of nothing",
        "more.txt": b"of nothing",
    }
    found = list_videos(write_tar(tmp_path / "x.tar", contents))
    assert found == {
        "clip.left.mp4": {"caption": "left", "fps": 9},
        "clip.right.mp4": {"caption": "both", "fps": 9},
        "take.001.mp4": {"caption": "a white square"},
    }
    assert caplog.messages == ["--input: in tars, 2 .txt, 1 .json match no video"]


def test_text_that_is_not_what_it_should_be_is_named(tmp_path):
    for data, message in ((b"[1]", "expected a JSON object, got list"), (b"{", "cannot be read as json")):
        shard = write_tar(tmp_path / "x.tar", {"a.mp4": b"", "a.json": data})
        with pytest.raises(SourceError, match=rf"x\.tar/a\.json: {message}"):
            list_videos(shard)


def test_videos_and_images_are_listed_by_kind(tmp_path):
    shard = write_tar(tmp_path / "x.tar", {"a.mp4": b"", "b.png": b"", "c.json": b"{}"})
    kinds = {kind: [item.member for item in list_items([str(shard)], kind, where="-")] for kind in ("clip", "image")}
    assert kinds == {"clip": ["a.mp4"], "image": ["b.png"]}
    both = list_items([str(shard)], where="-")
    assert [(item.member, item.kind) for item in both] == [("a.mp4", "clip"), ("b.png", "image")]
    assert not VIDEO_SUFFIXES & IMAGE_SUFFIXES
