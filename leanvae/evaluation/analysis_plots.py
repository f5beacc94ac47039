"""Plots of an analysis, as atomically written PNG files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litevae.errors import extra
from litevae.files import atomic_path

with extra("plots"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

_DPI = 150
_CELL = 2.4  # inches, side of an image
_MEASURES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
_LONGEST_NAME = 28  # characters above an image
_COLOURS = "viridis"
_MOST_TICKS = 12

Pictures = Mapping[str, Sequence[Mapping[str, Any]]]


def plot_resolutions(path: Path, models: Sequence[Mapping[str, Any]]) -> None:
    """Plot each measure against resolution on a log2 scale, a line for each model (LiteVAE, Figures 5 and 8).

    Args:
        path: the PNG file.
        models: each with `name` and `resolution`, rows of `resolution` and the measures, None where undefined.
    """
    measures = [key for key in _MEASURES if key in models[0]["resolution"][0]]
    figure = Figure(figsize=(4 * len(measures), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for model in models:
            rows = model["resolution"]
            values = [math.nan if row[key] is None else row[key] for row in rows]
            axes.plot([row["resolution"] for row in rows], values, marker="o", label=model["name"])
        ticks = [row["resolution"] for row in models[0]["resolution"]]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("resolution (side in pixels)")
        axes.set_ylabel(_MEASURES[key])
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    _save(figure, path)


def plot_features(path: Path, sources: Sequence[NDArray[np.uint8]], drawn: Pictures) -> None:
    """Plot the magnitude of feature maps over its median, all on one colour scale (LiteVAE, Figure 3).

    Args:
        path: the PNG file.
        sources: images `(H, W, 3)`, one per row.
        drawn: for each model and image, `magnitude` (`(H, W)`, or None), `peak_ratio` and `top_share`.
    """
    drawn = {name: pictures for name, pictures in drawn.items() if pictures[0]["magnitude"] is not None}
    maps = {name: [_over_median(picture["magnitude"]) for picture in pictures] for name, pictures in drawn.items()}
    everything = [values for some in maps.values() for values in some]
    peak = max([4.0, *(float(values.max()) for values in everything)])
    norm = LogNorm(0.25, peak, clip=True)
    figure, grid = _grid(len(sources), ["source", *map(_short, drawn)], margin=1.0)
    shown = None
    for row, (axes, source) in enumerate(zip(grid, sources, strict=True)):
        axes[0].imshow(source)
        for place, name in zip(axes[1:], drawn, strict=True):
            shown = place.imshow(maps[name][row], norm=norm, cmap=_COLOURS, interpolation="nearest")
            picture = drawn[name][row]
            place.set_xlabel(
                f"peak / median {picture['peak_ratio']:.3g}\ntop 1% has {picture['top_share']:.1%} of energy",
                fontsize="small",
            )
    if shown is None:
        figure.suptitle("none of the models has decoder feature maps", fontsize="medium")
    else:
        bar = figure.colorbar(shown, ax=grid.ravel().tolist(), label="magnitude / its median", aspect=40)
        ticks = 2.0 ** np.arange(-2, math.floor(math.log2(peak)) + 1)
        ticks = ticks[:: math.ceil(len(ticks) / _MOST_TICKS)].tolist()
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    _save(figure, path)


def _over_median(magnitude: NDArray[np.float32]) -> NDArray[np.float32]:
    median = float(np.median(magnitude))
    return magnitude / (median if median > 0 else float(magnitude.max()) or 1.0)


def plot_latents(path: Path, sources: Sequence[NDArray[np.uint8]], drawn: Pictures) -> None:
    """Plot sources, reconstructions, and three latent channels as red, green and blue (LiteVAE, Figures 2 and 4).

    Args:
        path: the PNG file.
        sources: images `(H, W, 3)`, one per row.
        drawn: for each model and image, `reconstruction` and `latent` (`(h, w, 3)` in [0, 1]) and `psnr`.
    """
    columns = ["source", *(f"{_short(name)}\n{part}" for name in drawn for part in ("reconstruction", "latent"))]
    figure, grid = _grid(len(sources), columns)
    for row, (axes, source) in enumerate(zip(grid, sources, strict=True)):
        axes[0].imshow(source)
        for index, name in enumerate(drawn):
            picture = drawn[name][row]
            axes[1 + 2 * index].imshow(picture["reconstruction"])
            axes[1 + 2 * index].set_xlabel(f"{picture['psnr']:.2f} dB")
            axes[2 + 2 * index].imshow(picture["latent"], interpolation="nearest")
    _save(figure, path)


def _grid(num_rows: int, columns: Sequence[str], margin: float = 0.0) -> tuple[Figure, NDArray[Any]]:
    """Make a figure of square cells with a title above each column, and a margin on the right (inches)."""
    size = (_CELL * len(columns) + margin, (_CELL + 0.3) * num_rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(num_rows, len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize="medium", parse_math=False)
    return figure, grid


def _short(name: str) -> str:
    """Shorten a name to fit above an image, by cutting off its beginning."""
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=_DPI, format="png")
