"""How far a run is: a bar on a terminal, and a line now and then elsewhere."""

import logging
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger("leanvae")

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts sources, clips and frames, and shows them.

    Args:
        total: number of sources.
        is_shown: whether this process shows anything.

    Attributes:
        clips, frames: encoded so far.
    """

    def __init__(self, total: int, is_shown: bool) -> None:
        self.clips = self.frames = 0
        self._sources = 0
        self._total = total
        self._is_shown = is_shown
        self._started = self._last = time.monotonic()
        self._bar = tqdm(total=total, unit="file", desc="encoding", disable=None if is_shown else True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def add_clip(self, num_frames: int) -> None:
        """Counts a clip."""
        self.clips += 1
        self.frames += num_frames
        seconds = max(1e-9, time.monotonic() - self._started)
        rates = f"{self.clips / seconds:.2f} clips/s, {self.frames / seconds:.1f} frames/s"
        self._bar.set_postfix_str(rates, refresh=False)
        if self._is_shown and self._bar.disable and time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            left = seconds * (self._total - self._sources) / self._sources if self._sources else None
            time_left = "" if left is None else f", {tqdm.format_interval(left)} left"
            logger.info("%d of %d files, %s%s", self._sources, self._total, rates, time_left)

    def add_source(self) -> None:
        """Counts a source that is done with."""
        self._sources += 1
        self._bar.update()
