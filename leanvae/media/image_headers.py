"""What image files say of themselves that OpenCV does not pass on; pure functions of their bytes."""

import struct

# What brings an image with each EXIF orientation upright: transpose, then flip x, then flip y.
EXIF_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_ORIENTATION_TAG = 0x0112


def is_png(data: bytes) -> bool:
    """Whether a file's content is a PNG."""
    return data[:8] == b"\x89PNG\r\n\x1a\n"


def is_webp(data: bytes) -> bool:
    """Whether a file's content is a WebP."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def has_alpha(data: bytes) -> bool:
    """Whether the header of a PNG or WebP allows for transparent pixels; True for all AVIF, False for the rest."""
    chunks = read_chunks(data)
    if b"IHDR" in chunks:
        colour_type = chunks[b"IHDR"][9:10]
        return colour_type in (b"\4", b"\6") or b"tRNS" in chunks
    # Bit 4 means alpha in both of WebP's headers; its plain VP8 has none.
    flags = [*chunks.get(b"VP8X", b"")[:1], *chunks.get(b"VP8L", b"")[4:5]]
    return any(byte & 0x10 for byte in flags) or data[4:12] in (b"ftypavif", b"ftypavis")


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a PNG or WebP, 1 (upright) to 8; 1 where there is none, and for other formats."""
    chunks = read_chunks(data)
    tiff = bytes(chunks.get(b"eXIf", chunks.get(b"EXIF", b""))).removeprefix(b"Exif\0\0")
    order = ">" if tiff[:2] == b"MM" else "<"
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return value if value in EXIF_TURNS else 1
    except struct.error:  # no EXIF at all, or a broken one
        pass
    return 1


def read_chunks(data: bytes) -> dict[bytes, memoryview]:
    """The contents of a PNG's or WebP's chunks by type (the first of each); nothing for other formats."""
    png = is_png(data)
    if not png and not is_webp(data):
        return {}
    found: dict[bytes, memoryview] = {}
    position = 8 if png else 12
    while position + 8 <= len(data):
        first, second = data[position : position + 4], data[position + 4 : position + 8]
        kind, size = (second, int.from_bytes(first, "big")) if png else (first, int.from_bytes(second, "little"))
        found.setdefault(kind, memoryview(data)[position + 8 : position + 8 + size])
        # A PNG's checksum, or the byte that makes RIFF's sizes even, lies between.
        position += 8 + size + (4 if png else size % 2)
    return found


def jpeg_is_complete(data: bytes) -> bool:
    """Walks the JPEG's markers (ITU-T T.81, annex B) to the end of image; libjpeg would fill with grey."""
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 3 >= len(data):
            return data[position : position + 2] == b"\xff\xd9" if position >= 0 else False
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
