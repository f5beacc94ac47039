"""Progress of a run: a bar on a terminal, an occasional log line elsewhere."""

import logging
import time
from collections import Counter
from typing import Self

from litevae.errors import extra

with extra("video"):
    from tqdm import tqdm

logger = logging.getLogger("leanvae")

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A counter of a run's finished work, shown to the user.

    Args:
        label: name of the work, such as `encoding`.
        unit: unit of the work, such as `file`.
        total: number of units; None if unknown.
        is_shown: whether this process shows anything; of several ranks, only one should.
        stays: whether the bar stays on the terminal after the work.

    Attributes:
        counts: the totals of `count`.
    """

    def __init__(
        self, label: str, unit: str, total: int | None = None, *, is_shown: bool = True, stays: bool = True
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._label = label
        self._unit = unit
        self._total = total
        self._done = 0
        self._started = self._last = time.monotonic()
        self._bar = tqdm(desc=label, unit=unit, total=total, disable=None if is_shown else True, leave=stays)
        self._writes_lines = is_shown and self._bar.disable  # tqdm found no terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, number: int = 1) -> None:
        """Count finished units."""
        self._done += number
        self._bar.update(number)
        self._write_line_if_due()

    def count(self, **numbers: int) -> None:
        """Count other things, such as `clips=1, frames=17`, and show their rates."""
        self.counts.update(numbers)
        self._bar.set_postfix_str(self._rates(), refresh=False)
        self._write_line_if_due()

    def note(self, text: str) -> None:
        """Show a text beside the bar, such as the current file; rates replace it."""
        self._bar.set_postfix_str(text)

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._started)
        return ", ".join(f"{number / seconds:.2f} {name}/s" for name, number in self.counts.items())

    def _write_line_if_due(self) -> None:
        now = time.monotonic()
        if not self._writes_lines or now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        of_total = "" if self._total is None else f" of {self._total}"
        parts = [f"{self._label}: {self._done}{of_total} {self._unit}s", self._rates()]
        if self._total is not None and self._done:
            left = (now - self._started) * (self._total - self._done) / self._done
            parts.append(f"{tqdm.format_interval(left)} left")
        logger.info("%s", ", ".join(filter(None, parts)))
