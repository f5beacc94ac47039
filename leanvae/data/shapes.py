"""The shapes of training files, by which they are put into buckets: measured once, by several processes, and kept."""

import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass

from tqdm import tqdm

from leanvae.data.buckets import Shape
from leanvae.data.clips import usable_frames
from leanvae.data.config import ClipDataConfig, DataConfig
from leanvae.data.decoding import read_frame_table
from leanvae.data.pictures import load_picture
from leanvae.data.sources import Item, Picture
from leanvae.data.workers import Decoders

logger = logging.getLogger("leanvae")

_CACHE = "shapes-v1.sqlite"
_BATCH = 256  # files that are measured between two writes of the cache


@dataclass(frozen=True)
class Measure:
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


def measure(item: Item) -> Measure:
    """Measures a clip by its packets and first frame, an image by decoding it.

    Raises:
        MediaError: the file cannot be used.
    """
    if isinstance(item, Picture):
        height, width = load_picture(item).shape[:2]
        return Measure(1, 0.0, height, width)
    table = read_frame_table(item)
    seconds = float(table.times[-1] - table.times[0]) if len(table.times) else 0.0
    return Measure(len(table.times), seconds, table.info.height, table.info.width)


def measure_shapes(items: Sequence[Item], config: DataConfig) -> list[Shape | None]:
    """The shape of each item, with as many frames as a sample of it can have; `None` of those that cannot be used.

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
    """What a measurement is known by: the file, its part, its size and its time of change."""
    try:
        state = os.stat(item.file)
    except OSError:
        return f"{item.path}\tmissing"
    part = f"{item.offset}\t{item.size}" if isinstance(item, Picture) else f"{item.start}\t{item.end}"
    return f"{os.path.abspath(item.path)}\t{part}\t{state.st_size}\t{state.st_mtime_ns}"


def _look_up(cache: sqlite3.Connection, key: str) -> Measure | None:
    row = cache.execute("SELECT frames, seconds, height, width FROM shapes WHERE key = ?", (key,)).fetchone()
    return Measure(*row) if row else None


def _measure_all(items: dict[str, Item], config: DataConfig) -> Iterator[dict[str, Measure]]:
    """Measures files in processes, under the time limit of training; a file that fails gives an empty measure."""
    if not items:
        return
    keys = list(items)
    with (
        Decoders(config.num_workers, config.timeout) as decoders,
        tqdm(total=len(keys), desc="measuring", unit="file", disable=None) as bar,
    ):
        for start in range(0, len(keys), _BATCH):
            works = {key: decoders.begin(measure, items[key]) for key in keys[start : start + _BATCH]}
            results = {}
            for key, work in works.items():
                result = decoders.result(work)
                results[key] = Measure() if isinstance(result, str) else result
                bar.update()
            yield results


def _shape(measured: Measure, config: DataConfig) -> Shape | None:
    if not measured.frames:
        return None
    frames = measured.frames
    if isinstance(config, ClipDataConfig) and frames > 1:
        frames = usable_frames(frames, measured.seconds, config)
    return Shape(frames, measured.height, measured.width)
