"""Files that cannot be used: recorded, so that a resume decides as the run did, and counted."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from litevae.errors import LeanVAEError

logger = logging.getLogger(__name__)


class TooManyBadClips(LeanVAEError, RuntimeError):
    """More clips or images cannot be used than ``data.max_bad_share`` allows."""


@dataclass(frozen=True)
class Rejection:
    """A clip or an image that could not be used at a position of the order.

    Attributes:
        position: number of the sample in the run.
        attempt: 0 for what the order names, 1 for its first substitute, ...
        path: the file, or the tar and the name in it.
        reason: what is wrong with it.
        substitute: what was tried in its place.
        modified: time at which the file was last changed, in nanoseconds; -1 where it could not be read.
        file: the file on disk where that is not ``path``: the tar.
    """

    position: int
    attempt: int
    path: str
    reason: str
    substitute: str
    modified: int
    file: str = ""


def check_bad_share(rejected: Mapping[str, str], total: int, max_share: float) -> None:
    """Stop the run if too many files are unusable.

    Args:
        rejected: reasons by path, of all ranks.
        total: number of training files, those in tars counted one by one.
        max_share: allowed share of them (``data.max_bad_share``).

    Raises:
        TooManyBadClips: with the count and the first few files and reasons.
    """
    if len(rejected) <= max_share * total:
        return
    listed = "\n".join(f"  {path}: {rejected[path]}" for path in sorted(rejected)[:10])
    more = f"\n  and {len(rejected) - 10} more" if len(rejected) > 10 else ""
    raise TooManyBadClips(
        f"{len(rejected)} of {total} training files cannot be used; data.max_bad_share allows {max_share:.0%}:\n"
        f"{listed}{more}"
    )


class QuarantineRecord:
    """The rejections of a run: one JSON object a line, in one file a rank, kept over resumes.

    Decisions already recorded, by any rank of any earlier start, are replayed, because whether a file runs out
    of time is not the same every time. What is recorded of a file that has changed since counts no more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[int, int], Rejection] = {}
        for file in sorted({*path.parent.glob("quarantine.rank*.jsonl"), path}):
            for rejection in _read_rejections(file):
                if rejection.modified == modification_time(rejection.file or rejection.path):
                    self._known[rejection.position, rejection.attempt] = rejection
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            # A line torn by a crash must not swallow the next one.
            self._append(b"\n")

    def find(self, position: int, attempt: int, path: str) -> Rejection | None:
        """Find the recorded rejection of a path, if there is one; other data leave records behind."""
        known = self._known.get((position, attempt))
        return known if known is not None and known.path == path else None

    def add(self, rejection: Rejection) -> None:
        """Write a rejection to disk, unless it is recorded already."""
        if self.find(rejection.position, rejection.attempt, rejection.path) is None:
            self._known[rejection.position, rejection.attempt] = rejection
            self._append(json.dumps(asdict(rejection)).encode() + b"\n")

    def reasons(self) -> dict[str, str]:
        """List the reasons of all rejections, by path."""
        return {rejection.path: rejection.reason for rejection in self._known.values()}

    def _append(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def modification_time(path: str) -> int:
    """Read the time of a file's last change in nanoseconds; -1 if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _read_rejections(path: Path) -> Iterator[Rejection]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            yield Rejection(**json.loads(line))
        except (ValueError, TypeError):
            logger.warning("%s: passed over a line that is not complete", path)
