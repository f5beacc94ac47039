"""The page: an HTML file with styles, program and numbers, and pictures embedded or beside it."""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from leanvae.evaluation.records import SOURCE, Row
from leanvae.evaluation.summary import Evaluated
from litevae.files import write_text

PAGE_FILE, MEDIA = "report.html", "media"
INLINE_BYTES = 8 * 2**20  # most bytes of all pictures for which they are embedded in the page
_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_DIGITS = 4  # after the point, of a frame's PSNR


def write_page(report: dict[str, Any], evaluated: Evaluated, folder: Path) -> None:
    """Write `report.html`, which works from disk, without a server or the network.

    Args:
        report: the totals.
        evaluated: measures and the paths of pictures.
        folder: folder for the page, with pictures in `media/`.
    """
    media = folder / MEDIA
    paths = [path for rows in _all_rows(evaluated) for path in rows.get("pictures", {}).values()]
    inline = sum((media / path).stat().st_size for path in paths) <= INLINE_BYTES

    def link(path: str) -> str:
        if not inline:
            return quote(f"{MEDIA}/{path}")
        data = base64.b64encode((media / path).read_bytes()).decode("ascii")
        return f"data:{_TYPES[Path(path).suffix]};base64,{data}"

    def linked(row: Row) -> Row:
        return {**row, "pictures": {kind: link(path) for kind, path in row.get("pictures", {}).items()}}

    clips = [
        {
            "name": name,
            **_without_key(linked(info)),
            "models": {model: _shortened(linked(rows[name])) for model, rows in evaluated.rows.items()},
        }
        for name, info in evaluated.clips.items()
    ]
    # Characters that could end the script or begin a comment occur only in strings, where they can be escaped.
    data = json.dumps({"report": report, "source": SOURCE, "clips": clips}, allow_nan=False).replace("<", "\\u003c")
    template = files("leanvae.evaluation") / "template"
    page = (template / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        page = page.replace(f"/* {name} */", (template / name).read_text(encoding="utf-8"))
    write_text(folder / PAGE_FILE, page.replace("/* data */", data))


def _all_rows(evaluated: Evaluated) -> list[Row]:
    return [*evaluated.clips.values(), *(row for rows in evaluated.rows.values() for row in rows.values())]


def _without_key(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "key"}


def _shortened(row: Row) -> Row:
    """Return a row with what the page needs: PSNR of the frames only if they have pictures."""
    values = row["frame_psnr"] if row["pictures"] else []
    rounded = [None if value is None else round(value, _DIGITS) for value in values]
    return {**_without_key(row), "frame_psnr": rounded}
