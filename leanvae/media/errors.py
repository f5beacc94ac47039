"""What is wrong with a file, or with an address that names files."""

from pathlib import Path

from litevae.errors import InvalidInput


class MediaError(InvalidInput):
    """A file cannot be used as the video or image that it should be.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SourceError(InvalidInput):
    """A data source is missing, empty, broken or wrongly written; the message names it and the place in it."""
