"""Sizes of images and clips, as they are written on the command line."""

import re

from litevae.errors import InvalidInput

NAMED_RESOLUTIONS = {
    "480p": (480, 848),
    "720p": (720, 1280),
    "1080p": (1080, 1920),
    "4k": (2160, 3840),
}
_RULE = "a side in pixels such as 256, HEIGHTxWIDTH such as 480x640, or one of " + ", ".join(NAMED_RESOLUTIONS)


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
