"""Sizes of images and clips, as written on the command line."""

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
    """Parse `256`, `480x640` or `1080p` into height and width.

    Raises:
        ValueError: it has another form.
    """
    name = text.strip().lower()
    if name in NAMED_RESOLUTIONS:
        return NAMED_RESOLUTIONS[name]
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", name)
    if not match or "0" in (match[1].strip("0") or "0", (match[2] or "1").strip("0") or "0"):
        raise InvalidInput(f"resolution is {text!r}: expected {_RULE}")
    return int(match[1]), int(match[2] or match[1])


def resolution_name(height: int, width: int) -> str:
    """Return the shortest notation of a resolution: `256`, `480x640` or `1080p`."""
    for name, area in NAMED_RESOLUTIONS.items():
        if area == (height, width):
            return name
    return str(height) if height == width else f"{height}x{width}"


def parse_frames(text: str) -> int:
    """Parse a number of frames.

    Raises:
        ValueError: it is not a positive whole number.
    """
    if not text.strip().isdecimal() or int(text) == 0:
        raise InvalidInput(f"number of frames is {text!r}: expected a whole number from 1, such as 17")
    return int(text)
