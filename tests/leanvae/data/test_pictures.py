"""Images are listed as clips are, cut to cover the resolution, and come the same out of files and tars."""

import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from leanvae.config import ConfigError, parse_config
from leanvae.data.config import ClipDataConfig, ImageDataConfig
from leanvae.data.pictures import read_picture
from leanvae.data.sources import Picture, list_items, split_held_out
from leanvae.media.builtin import find_photographs
from leanvae.media.errors import MediaError, SourceError
from leanvae.media.image import read_image

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared images are not beside the checkout")


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/er/c.webp", "deep/notes.txt", ".hidden.jpg", ".trash/d.jpg", "clip.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(pictures, folder):
    return [picture.path.removeprefix(f"{folder}/") for picture in pictures]


def listed(*sources):
    return list_items(ImageDataConfig(sources=sources))


def test_sources_of_images(folder):
    assert names(listed(str(folder)), folder) == ["a.PNG", "b.jpg", "deep/er/c.webp"]
    assert names(listed(f"{folder}/**/*.[jw]*"), folder) == ["b.jpg", "deep/er/c.webp"]
    assert listed(str(folder), str(folder / "b.jpg"))[3:] == [Picture(str(folder / "b.jpg"), source=1)]
    (folder / "list.txt").write_text("b.jpg\n# a.PNG\n\ndeep/er/c.webp\n")
    assert names(listed(str(folder / "list.txt")), folder) == ["b.jpg", "deep/er/c.webp"]
    (folder / "list.csv").write_text('caption,path\n"a, b",b.jpg\n,a.PNG\n')
    assert listed(str(folder / "list.csv")) == [
        Picture(str(folder / "b.jpg"), "a, b"),
        Picture(str(folder / "a.PNG")),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "path,end\nb.jpg,3\n", r"list\.csv: images have no column named 'end': it is for clips"),
        ("list.csv", "file\nb.jpg\n", r"list\.csv: a column named 'path' is missing"),
        ("list.txt", "", r"list\.txt: no images found"),
        ("clip.mp4", "", r"expected a \.csv, a \.txt or a \.tar or an image file, got '\.mp4'"),
    ],
)
def test_mistakes_in_sources_of_images_are_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        listed(str(folder / name))


def test_built_in_images_are_the_photographs_and_held_out_with_their_clips():
    pictures = listed("builtin")
    assert [picture.path for picture in pictures] == [str(path) for _, path in sorted(find_photographs().items())]
    held_out = split_held_out(pictures, ImageDataConfig().held_out)[1]
    assert [Path(picture.path).stem for picture in held_out] == ["flower", "hubble_deep_field"]


def test_pictures_survive_the_way_to_a_decoder():
    picture = Picture("x.tar/a.jpg", archive="x.tar", offset=512, size=7)
    assert pickle.loads(pickle.dumps(picture)) == picture
    assert picture.file == "x.tar"
    assert replace(picture, archive=None).file == "x.tar/a.jpg"


def test_configurations_differ_by_kind_and_take_one_number_for_both_sides():
    assert ImageDataConfig.model_validate({"resolution": 128}).resolution == (128, 128)
    assert ClipDataConfig.model_validate({"resolution": [64, 96]}).resolution == (64, 96)
    config = ImageDataConfig(resolution=(128, 64))
    assert ImageDataConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="num_frames: unknown key"):
        parse_config(ImageDataConfig, {"num_frames": 5}, "run.yaml")
    for bad in (0, [64], True, "large", 1.5):
        with pytest.raises(ConfigError, match="resolution"):
            parse_config(ImageDataConfig, {"resolution": bad}, "run.yaml")


def write(path, image):
    cv2.imwrite(str(path), image[..., ::-1])
    return Picture(str(path))


def ramp(height, width):
    """Red rises to the right and green downwards."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 255 / width, rows * 255 / height, np.full((height, width), 90)], -1).astype(np.uint8)


@pytest.mark.parametrize("resolution", [(64, 96), (32, 32), (24, 96), (130, 130), (7, 5)])
def test_read_picture_covers_any_resolution_without_borders(tmp_path, resolution):
    picture = write(tmp_path / "a.png", np.full((50, 70, 3), 180, np.uint8))
    for generator in (None, np.random.default_rng(0)):
        sample = read_picture(picture, resolution, True, generator)
        assert sample.item == picture
        assert sample.frames.shape == (*resolution, 3)
        assert sample.frames.dtype == np.uint8
        assert (sample.frames == 180).all()


def test_read_picture_takes_the_centre_without_a_generator(tmp_path):
    image = ramp(40, 100)
    frames = read_picture(write(tmp_path / "a.png", image), (40, 40), True, None).frames
    assert np.array_equal(frames, image[:, 30:70])


def test_read_picture_draws_crop_and_flip_from_the_generator(tmp_path):
    picture = write(tmp_path / "a.png", ramp(40, 50))
    lefts, flips = set(), set()
    for seed in range(60):
        frames, again, unflipped = (
            read_picture(picture, (40, 40), flip, np.random.default_rng(seed)).frames for flip in (True, True, False)
        )
        assert np.array_equal(frames, again)
        flipped = bool(frames[0, 0, 0] > frames[0, -1, 0])
        assert np.array_equal(frames[:, ::-1] if flipped else frames, unflipped)
        flips.add(flipped)
        lefts.add(round(int(unflipped[0, 0, 0]) * 50 / 255))
    assert flips == {False, True}
    assert lefts == set(range(11))


def test_members_of_tars_are_read_as_the_same_files_are(tmp_path):
    for name, height in (("a.png", 60), ("b.png", 80)):
        write(tmp_path / name, ramp(height, 70))
    (tmp_path / "c.jpg").write_bytes(b"not an image")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "b.png", "c.jpg"):
            tar.add(tmp_path / name, name)
    files = [picture for picture in listed(str(tmp_path)) if not picture.archive]
    members = listed(str(tmp_path / "x.tar"))
    for file, member in zip(files[:2], members[:2], strict=True):
        ours, theirs = (read_picture(p, (32, 48), True, np.random.default_rng(3)).frames for p in (file, member))
        assert np.array_equal(ours, theirs)
    with pytest.raises(MediaError, match=r"x\.tar/c\.jpg: not an image that can be decoded"):
        read_picture(members[2], (32, 48), True, None)


@needs_shared
def test_shared_images_of_awkward_kinds_look_as_pillow_shows_them():
    image_module = pytest.importorskip("PIL.Image")
    folder = SHARED / "dev" / "images"
    rotated = ["exif_Landscape_6.jpg", "immich_portrait-orientation-6.jpg", "rails_racecar_rotated.jpg"]
    for path in [*folder.glob("jxl_*"), folder / "immich_denali.webp", *(folder / name for name in rotated)]:
        with image_module.open(path) as image:
            if path.name in rotated:
                image = image.transpose(image_module.Transpose.ROTATE_270)
            if image.mode in ("LA", "RGBA"):
                white = image_module.new("RGBA", image.size, "white")
                image = image_module.alpha_composite(white, image.convert("RGBA"))
            reference = np.asarray(image.convert("RGB"))
        error = np.abs(read_image(path).astype(int) - reference)
        assert error.max() <= 2, path
        assert read_picture(Picture(str(path)), (64, 64), True, None).frames.std() > 1


@needs_shared
@pytest.mark.parametrize("name", ["half.png", "bad_crc.png", "half.jpg", "zero_byte.jpg", "text_renamed.png"])
def test_shared_broken_images_are_refused(name):
    with pytest.raises(MediaError, match=name):
        read_picture(Picture(str(SHARED / "bad" / name)), (64, 64), True, None)
