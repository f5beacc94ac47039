"""Plots of a report: cost against resolution and frames, and time against FLOPs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from leanvae.bench.report import Report
from leanvae.bench.settings import DEFAULT_FRAMES, SWEEP_RESOLUTION
from leanvae.bench.sizes import resolution_name
from leanvae.peers.models import Size
from litevae.files import atomic_path

_MARKERS = "osD^vP*Xh<>p"
_TWENTY = mpl.colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
_COLORS = [*_TWENTY[::2], *_TWENTY[1::2]]  # the saturated ones first
_BAR_ALPHA = 0.45
_DPI = 110
_SAME_COST = 0.02  # our variants whose FLOPs differ by less are drawn once


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write the plots for which a report has figures, as PNG; return their paths."""
    rows = [row for row in report["rows"] if row["status"] == "ok" and not row["encode_only"]]
    drawings = {
        "flops_and_time": lambda figure: _draw_flops_and_time(figure, report, rows),
        "memory": lambda figure: _draw_memory(figure, rows),
        "frames": lambda figure: _draw_frames(figure, rows),
        "scatter": lambda figure: _draw_scatter(figure, rows),
    }
    written = []
    for name, draw in drawings.items():
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure):
            with atomic_path(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=_DPI)
            written.append(folder / f"{name}.png")
    return written


def _total_seconds(row: dict[str, Any]) -> float:
    return sum(row[part]["median"] for part in ("encode", "decode") if part in row)


def _peak_gib(row: dict[str, Any]) -> float:
    return max(row[part]["peak_bytes"] for part in ("encode", "decode") if part in row) / 2**30


def _draw_flops_and_time(figure: Figure, report: Report, rows: list[dict[str, Any]]) -> bool:
    """Draw bars of FLOPs with lines of measured time over them, a panel for clips and one for images."""
    panels = []
    for kind in ("video", "image"):
        entries = [entry for entry in report["flops"] if report["models"][entry["model"]]["kind"] == kind]
        if entries:
            panels.append((kind, _without_twins(entries, report)))
    figure.set_size_inches(13, 5.5 * len(panels))
    for axes, (kind, entries) in (
        zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True) if panels else ()
    ):
        _draw_panel(axes, entries, rows)
        frames = sorted({entry["frames"] for entry in entries})
        what = "images" if kind == "image" else f"clips of {', '.join(map(str, frames))} frames"
        axes.set_title(f"Encode + decode of {what}: FLOPs (bars, left), measured time (lines, right)")
    return bool(panels)


def _without_twins(entries: Sequence[dict[str, Any]], report: Report) -> list[dict[str, Any]]:
    """Drop our models' entries that cost the same as an earlier one of ours."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        ours = report["models"][entry["model"]]["is_ours"]
        total = entry["encode"] + entry["decode"]
        twins = [
            other
            for other in kept
            if ours
            and report["models"][other["model"]]["is_ours"]
            and Size.of(other) == Size.of(entry)
            and abs(other["encode"] + other["decode"] - total) < _SAME_COST * total
        ]
        if not twins:
            kept.append(entry)
    return kept


def _draw_panel(axes: Axes, entries: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    sizes = sorted({Size.of(entry) for entry in entries}, key=lambda size: size.num_pixels)
    names = list(dict.fromkeys(entry["model"] for entry in entries))
    flops = {(entry["model"], Size.of(entry)): (entry["encode"] + entry["decode"]) / 1e12 for entry in entries}
    times = {
        (row["model"], Size.of(row)): _total_seconds(row)
        for row in rows
        if row["mode"] == "whole" and row["dtype"] == "float32" and row["batch"] == 1
    }
    width = 0.85 / len(names)
    right = axes.twinx()
    for index, name in enumerate(names):
        style = {"color": _COLORS[index % len(_COLORS)], "label": name}
        offset = (index - (len(names) - 1) / 2) * width
        known = [(place, size) for place, size in enumerate(sizes) if (name, size) in flops]
        axes.bar(
            [place + offset for place, _ in known],
            [flops[name, size] for _, size in known],
            width,
            alpha=_BAR_ALPHA,
            **style,
        )
        timed = [(place + offset, times[name, size]) for place, size in known if (name, size) in times]
        if timed:
            marker = _MARKERS[index % len(_MARKERS)]
            right.plot(*zip(*timed, strict=True), marker=marker, markeredgecolor="black", **style)
    axes.set_xticks(range(len(sizes)), [_label(size, sizes) for size in sizes])
    axes.set(yscale="log", ylabel="TFLOP", xlabel="resolution")
    right.set(yscale="log", ylabel="seconds")
    _label_plainly(axes.yaxis, (1.0,))
    _label_plainly(right.yaxis)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.06, 1.0))


def _label_plainly(axis: Axis, steps: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Label a logarithmic axis with plain numbers, at some steps of each decade."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(size: Size, sizes: Sequence[Size]) -> str:
    resolution = resolution_name(size.height, size.width)
    return resolution if len({other.frames for other in sizes}) == 1 else f"{size.frames} x {resolution}"


def _draw_memory(figure: Figure, rows: list[dict[str, Any]]) -> bool:
    """Draw peak memory against the side of square frames: clips on the left, images on the right."""
    if not rows:
        return False
    figure.set_size_inches(13, 5.5)
    counts = sorted({row["frames"] for row in rows}, key=lambda count: (count == DEFAULT_FRAMES, count))
    panels = [
        (f"clips of {counts[-1]} frames", [row for row in rows if row["frames"] == counts[-1] > 1]),
        ("one image", [row for row in rows if row["frames"] == 1]),
    ]
    panels = [(title, of_panel) for title, of_panel in panels if of_panel]
    for axes, (title, of_panel) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw_lines(axes, of_panel, lambda row: (row["height"] * row["width"]) ** 0.5, _peak_gib)
        axes.set(xscale="log", yscale="log", xlabel="side in pixels (square root of the area)", ylabel="peak GiB")
        axes.set_title(f"Peak memory beyond the weights, {title}")
        sides = sorted({round((row["height"] * row["width"]) ** 0.5) for row in of_panel})
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.minorticks_off()
        _label_plainly(axes.yaxis)
    return True


def _draw_frames(figure: Figure, rows: list[dict[str, Any]]) -> bool:
    """Draw time against the number of frames, at the resolution with the most frame counts."""
    areas: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        areas.setdefault((row["height"], row["width"]), set()).add(row["frames"])
    area = max(areas, key=lambda area: (len(areas[area]), area == SWEEP_RESOLUTION), default=None)
    if area is None or len(areas[area]) < 2:
        return False
    figure.set_size_inches(9, 5.5)
    axes = figure.subplots()
    # Image models have one point, which makes no line.
    at_area = [row for row in rows if (row["height"], row["width"]) == area]
    lines = {row["model"] for row in at_area if row["frames"] > 1}
    at_area = [row for row in at_area if row["model"] in lines]
    _draw_lines(axes, at_area, lambda row: row["frames"], _total_seconds)
    axes.set(yscale="log", xlabel="frames", ylabel="seconds, encode + decode")
    axes.set_xticks(sorted({row["frames"] for row in at_area}))
    _label_plainly(axes.yaxis)
    axes.set_title(f"Time against frames at {resolution_name(*area)}")
    return True


def _draw_lines(axes: Axes, rows: list[dict[str, Any]], x: Callable[..., float], y: Callable[..., float]) -> None:
    """Draw a line for each model, mode and dtype."""
    names = list(dict.fromkeys(_line_name(row) for row in rows))
    for index, name in enumerate(names):
        points = sorted((x(row), y(row)) for row in rows if _line_name(row) == name)
        style = {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)


def _line_name(row: dict[str, Any]) -> str:
    extra = [row[name] for name, usual in (("mode", "whole"), ("dtype", "float32")) if row[name] != usual]
    batch = [f"batch {row['batch']}"] if row["batch"] > 1 else []
    return ", ".join([row["model"], *extra, *batch])


def _draw_scatter(figure: Figure, rows: list[dict[str, Any]]) -> bool:
    """Draw time against FLOPs for every measurement, with the machine's limit."""
    rows = [row for row in rows if row["encode"]["flops"]]
    if not rows:
        return False
    figure.set_size_inches(9, 6.5)
    axes = figure.subplots()
    points = [(sum(row[part]["flops"] for part in ("encode", "decode")) / 1e12, _total_seconds(row)) for row in rows]
    names = list(dict.fromkeys(row["model"] for row in rows))
    for index, name in enumerate(names):
        of_model = [point for point, row in zip(points, rows, strict=True) if row["model"] == name]
        style = {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.scatter(*zip(*of_model, strict=True), label=name, **style)
    floors = [
        (flops, _floor_seconds(row)) for (flops, _), row in zip(points, rows, strict=True) if row["dtype"] == "float32"
    ]
    if floors:
        axes.plot(*zip(*sorted(floors), strict=True), color="black", linewidth=0.8, label="matrix products, float32")
    axes.set(xscale="log", yscale="log", xlabel="TFLOP, encode + decode", ylabel="seconds, encode + decode")
    axes.set_title("Time against FLOPs, all sizes and modes")
    _label_plainly(axes.xaxis, (1.0,))
    _label_plainly(axes.yaxis, (1.0,))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    return True


def _floor_seconds(row: dict[str, Any]) -> float:
    return sum(row[part]["floor_seconds"] for part in ("encode", "decode"))
