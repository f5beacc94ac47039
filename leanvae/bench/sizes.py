"""Sizes of images and clips: how they are written on the command line, and which of them a model takes."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from litevae.errors import InvalidInput

NAMED_RESOLUTIONS = {
    "480p": (480, 848),
    "720p": (720, 1280),
    "1080p": (1080, 1920),
    "4k": (2160, 3840),
}
_RULE = "a side in pixels such as 256, HEIGHTxWIDTH such as 480x640, or one of " + ", ".join(NAMED_RESOLUTIONS)


@dataclass(frozen=True, order=True)
class Size:
    """Frames, height and width in pixels; an image has one frame."""

    frames: int
    height: int
    width: int

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames together."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        area = f"{self.height}x{self.width}"
        return area if self.frames == 1 else f"{self.frames}x{area}"


@dataclass(frozen=True)
class Grid:
    """The lengths `first`, `first + step`, `first + 2 step`, ... that a model takes along an axis.

    Of each it gives `lead` less back, which a user has to put in front.
    """

    first: int
    step: int
    lead: int = 0

    def fit(self, length: int) -> int:
        """The smallest length of the grid that gives `length` back: what a user has to pad to."""
        return self.first + max(0, -(-(length + self.lead - self.first) // self.step)) * self.step


def parse_resolution(text: str) -> tuple[int, int]:
    """Height and width of `256`, `480x640` or `1080p`.

    Raises:
        ValueError: it is none of these.
    """
    name = text.strip().lower()
    if name in NAMED_RESOLUTIONS:
        return NAMED_RESOLUTIONS[name]
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", name)
    if not match or "0" in (match[1].strip("0") or "0", (match[2] or "1").strip("0") or "0"):
        raise InvalidInput(f"resolution {text!r} is not known: write {_RULE}")
    return int(match[1]), int(match[2] or match[1])


def resolution_name(height: int, width: int) -> str:
    """The shortest way to write a resolution: `256`, `480x640` or `1080p`."""
    for name, area in NAMED_RESOLUTIONS.items():
        if area == (height, width):
            return name
    return str(height) if height == width else f"{height}x{width}"


def parse_frames(text: str) -> int:
    """Number of frames.

    Raises:
        ValueError: it is no positive whole number.
    """
    if not text.strip().isdecimal() or int(text) == 0:
        raise InvalidInput(f"number of frames {text!r} is not known: write a whole number from 1, such as 17")
    return int(text)


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is one of `known`.

    Raises:
        ValueError: it is not; the message lists what there is, and the nearest one.
    """
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise InvalidInput(f"{kind} {name!r} is not known{hint}: there are {', '.join(known)}")
