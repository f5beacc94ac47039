"""The built-in source: photographs from installed packages, moved into clips, for training with no data at hand.

scikit-image and scikit-learn carry a few photographs inside their wheels. Each becomes one video file whose camera
pans, zooms and turns smoothly over it; so a held-out file shows a photograph that no training clip shows. With
the default share, the hash of the names holds out ``photo_flower`` and ``photo_hubble_deep_field``.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvae.media.writer import Interpolation, to_yuv
from litevae.errors import MissingFile, extra

with extra("video"):
    import av
    import cv2

logger = logging.getLogger(__name__)

# In the wheels themselves: scikit-image would download the rest of its collection.
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
SIZE = 320
NUM_FRAMES = 97
FPS = 30
_FOLDER = "builtin-v1"  # to be raised whenever the clips' content changes
_SUPERSAMPLING = 2
_MAX_SIDE = 640  # of the photograph's shorter side, so that supersampling is enough against aliasing


def find_photographs() -> dict[str, Path]:
    """Find the installed photographs, by name.

    Raises:
        FileNotFoundError: neither package is installed with its photographs.
    """
    found = {}
    for name, location in PHOTOGRAPHS.items():
        package, _, inside = location.partition("/")
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / inside).is_file():
                found[name] = path
    if not found:
        raise MissingFile(
            "data.sources: builtin needs the photographs of scikit-image or scikit-learn: pip install 'leanvae[train]'"
        )
    return found


def make_builtin_clips(cache_folder: Path) -> list[Path]:
    """Return the built-in clips, making those that are missing; several processes may do so at once.

    Args:
        cache_folder: where to keep them, in a folder of their own.

    Returns:
        The files' paths, sorted; 320x320 pixels, 97 frames at 30 frames a second, H.264.

    Raises:
        FileNotFoundError: no photographs are installed.
        OSError: the cache folder cannot be written; the message names ``data.cache_dir``.
    """
    from tqdm import tqdm

    folder = cache_folder / _FOLDER
    clips = {folder / f"photo_{name}.mp4": path for name, path in sorted(find_photographs().items())}
    missing = [clip for clip in clips if not clip.is_file()]
    if missing:
        logger.info("making %d built-in clips in %s", len(missing), folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a terminal there is the line above instead.
        for clip in tqdm(missing, desc="making the built-in clips", unit="clip", disable=None if missing else True):
            if not clip.is_file():
                _write_clip(clip, moving_views(_read_photograph(clips[clip]), clip.stem))
    except OSError as error:
        raise OSError(error.errno, f"data.cache_dir: cannot be written: {error.strerror}", str(folder)) from error
    return list(clips)


def _read_photograph(path: Path) -> NDArray[np.uint8]:
    """Read a photograph as OpenCV does, without its ICC profile: the clips keep the content that they always had."""
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), np.uint8)


def moving_views(photograph: NDArray[np.uint8], name: str) -> Iterator[NDArray[np.uint8]]:
    """Move a camera smoothly over a photograph: pans, zooms and turns, seeded by ``name``.

    Args:
        photograph: (H, W, 3) uint8.

    Yields:
        ``NUM_FRAMES`` views, (SIZE, SIZE, 3) uint8, always inside the photograph.
    """
    generator = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    shrink = min(1.0, _MAX_SIDE / min(photograph.shape[:2]))
    if shrink < 1:
        photograph = cv2.resize(photograph, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    height, width = photograph.shape[:2]
    across, down, zoom, turn = (_wander(generator) for _ in range(4))
    rendered = SIZE * _SUPERSAMPLING
    for u, v, z, t in zip(across, down, zoom, turn, strict=True):
        angle = np.deg2rad(15) * (2 * t - 1)
        cos, sin = np.cos(angle), np.sin(angle)
        # The turned square view must fit with two pixels to spare, which the cubic kernel reads.
        widest = (min(height, width) - 4) / (cos + abs(sin))
        side = widest * (0.5 + 0.5 * z)
        reach = side * (cos + abs(sin)) / 2 + 2
        centre = np.array([reach + u * (width - 2 * reach), reach + v * (height - 2 * reach)]) - 0.5
        linear = side / rendered * np.array([[cos, -sin], [sin, cos]])
        offset = centre - linear @ np.full(2, (rendered - 1) / 2)
        view = cv2.warpAffine(
            photograph,
            np.column_stack([linear, offset]),
            (rendered, rendered),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        yield np.asarray(cv2.resize(view, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8)


def _wander(generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw a smooth random course over `NUM_FRAMES` frames that spans [0, 1]."""
    time = np.arange(NUM_FRAMES) / NUM_FRAMES
    cycles = generator.uniform(0.1, 0.6, size=3)
    phases = generator.uniform(0, 2 * np.pi, size=3)
    course = np.sin(2 * np.pi * cycles[:, None] * time + phases[:, None]).sum(axis=0)
    return (course - course.min()) / (course.max() - course.min())


def _write_clip(path: Path, frames: Iterator[NDArray[np.uint8]]) -> None:
    """Write an H.264 file under a temporary name and move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            options = {"crf": "10", "preset": "veryfast", "tune": "fastdecode", "g": "12"}
            stream = container.add_stream("libx264", rate=FPS, options=options)
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited
            for index, image in enumerate(frames):
                frame = to_yuv(image, interpolation=Interpolation.BICUBIC)  # other flags would change the clips
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
