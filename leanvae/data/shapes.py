"""The shapes of training files, by which they are put into buckets: measured once, by several processes, and kept."""

import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass

from tqdm import tqdm

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig, DataConfig
from leanvae.data.samples import usable_frames
from leanvae.media.convert import check_colours
from leanvae.media.folder import open_clip
from leanvae.media.image import read_image
from leanvae.media.item import Item, printable
from leanvae.media.pool import DecoderPool
from leanvae.media.worker import FileFailure

logger = logging.getLogger("leanvae")

_CACHE = "shapes-v1.sqlite"
_BATCH = 256  # files that are measured between two writes of the cache
_MOST_COUNTED = 10_000  # frames; far more than any bucket asks for, so that a longer file's header will do


@dataclass(frozen=True)
class FileShape:
    """What is kept of a file, or of a part of one; zeros where it cannot be used.

    Attributes:
        frames: number of frames; 1 of an image.
        seconds: from the first frame to the last.
        height, width: of the upright picture in pixels.
    """

    frames: int = 0
    seconds: float = 0.0
    height: int = 0
    width: int = 0


def read_shape(item: Item) -> Iterator[FileShape]:
    """Measure a clip by its first frame and its packets, a long one by its header; an image by decoding it.

    Yields:
        The only shape.

    Raises:
        MediaError: the file cannot be used.
    """
    if item.kind == "image":
        height, width = read_image(item).shape[:2]
        yield FileShape(1, 0.0, height, width)
        return
    with open_clip(item) as reader:
        info, part = reader.info, (item.start, item.end)
        check_colours(item.name, info.transfer, info.primaries)
        timeline = reader.expect(part)
        if timeline is None or timeline.count < _MOST_COUNTED:
            timeline = reader.measure(part)
    yield FileShape(timeline.count, timeline.seconds, info.height, info.width)


def measure_shapes(items: Sequence[Item], config: DataConfig) -> list[Shape | None]:
    """Measure each item's shape, with as many frames as a sample of it can have; `None` if it cannot be used.

    What has been measured before is found in the cache folder, unless the file has changed since.
    """
    folder = config.cache_folder
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / _CACHE, timeout=60.0)) as cache:
        cache.execute("CREATE TABLE IF NOT EXISTS shapes (key TEXT PRIMARY KEY, frames, seconds, height, width)")
        keys = [_key(item) for item in items]
        known = {key: found for key in keys if (found := _look_up(cache, key))}
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        if new:
            logger.info("measuring %d files for the buckets (kept in %s)", len(new), folder)
        for batch in _measure_all(new, config):
            rows = [(key, *astuple(measured)) for key, measured in batch.items() if measured.frames]
            cache.executemany("INSERT OR REPLACE INTO shapes VALUES (?, ?, ?, ?, ?)", rows)
            cache.commit()
            known |= batch
    return [_shape(known[key], config) for key in keys]


def _key(item: Item) -> str:
    """Make the key of a measurement: the file, its part, its size and its time of change."""
    try:
        state = os.stat(item.address)
    except OSError:
        return f"{item.name}\tmissing"
    part = f"{item.offset}\t{item.size}" if item.kind == "image" else f"{item.start}\t{item.end}"
    return f"{printable(os.path.abspath(item.path))}\t{part}\t{state.st_size}\t{state.st_mtime_ns}"


def _look_up(cache: sqlite3.Connection, key: str) -> FileShape | None:
    row = cache.execute("SELECT frames, seconds, height, width FROM shapes WHERE key = ?", (key,)).fetchone()
    return FileShape(*row) if row else None


def _measure_all(items: dict[str, Item], config: DataConfig) -> Iterator[dict[str, FileShape]]:
    """Measure files in processes, under the time limit of training; a file that fails has an empty shape."""
    if not items:
        return
    keys = list(items)
    with (
        DecoderPool(config.num_workers, config.timeout) as pool,
        tqdm(total=len(keys), desc="measuring", unit="file", disable=None) as bar,
    ):
        for start in range(0, len(keys), _BATCH):
            tasks = {key: pool.submit(read_shape, items[key]) for key in keys[start : start + _BATCH]}
            results = {}
            for key, task in tasks.items():
                result = task.result()
                results[key] = FileShape() if isinstance(result, FileFailure) else result
                bar.update()
            yield results


def _shape(measured: FileShape, config: DataConfig) -> Shape | None:
    if not measured.frames:
        return None
    frames = measured.frames
    if isinstance(config, ClipDataConfig) and frames > 1:
        frames = usable_frames(frames, measured.seconds, config)
    return Shape(frames, measured.height, measured.width)
