"""A report as tables on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from leanvae.bench.report import NO_TIME, Report
from leanvae.bench.settings import HEADLINE, TABLE3_BATCH, TABLE3_SIDE
from leanvae.bench.sizes import resolution_name
from leanvae.peers.models import Size

_SHOWN_LEFT_OUT = 6
_TABLE3_PAPER = {
    "litevae-s": "5.6x, 0.15",
    "litevae-b": "1.9x, 0.36",
    "litevae-m": "0.62x, 1.37",
    "litevae-l": "0.61x, 1.37",
}
_WIDTH_OF_FILES = 150  # columns if the output is not a terminal


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the measurements, the counts, Table 3, the memory limits and what was left out."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_OF_FILES)
    machine = report["machine"]
    hardware, rates = machine["hardware"], machine["matrix_rate"]
    console.print(
        f"{hardware.get('gpu') or hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['memory_bytes'] / 2**30:.0f} GiB; torch {machine['software']['torch']}; {machine['date']}. "
        f"Floors: matrix products {', '.join(f'{rate / 1e9:.3g} GFLOP/s {name}' for name, rate in rates.items())}; "
        f"memory {machine['memory_bandwidth'] / 1e9:.3g} GB/s."
    )
    tables = [
        _measurements(report["rows"]),
        _flops(report, "video"),
        _flops(report, "image"),
        _table3(report),
        _memory(report),
        _quality(report),
    ]
    for table in tables:
        if table.row_count:
            console.print(f"\n{table.title}", highlight=False)
            table.title = None  # rich would wrap it to the table's width
            console.print(table)
    failed = [row for row in report["rows"] if row["status"] != "ok"]
    for row in failed:
        console.print(f"{row['model']} {Size.of(row)} {row['mode']} {row['dtype']}: {row['status']}: {row['reason']}")
    _print_left_out(report["left_out"], console)


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    """Make a table whose columns after the first are right-aligned."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _measurements(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "Measured: encode / decode",
        *("model", "size", "mode", "dtype", "TFLOP", "seconds", "IQR %", "frames/s", "peak GiB", "x floor"),
        caption="x floor: time over that of the same FLOPs at the rate of matrix products. * one call, no warm-up.",
    )
    for row in sorted(rows, key=lambda row: (row["batch"], Size.of(row), row["mode"], row["model"])):
        parts = [row[part] for part in ("encode", "decode") if part in row]
        if row["status"] != "ok":
            table.add_row(row["model"], str(Size.of(row)), row["mode"], row["dtype"], row["status"])
            continue
        batch = f"{row['batch']} x " if row["batch"] > 1 else ""
        table.add_row(
            row["model"],
            f"{batch}{Size.of(row)}",
            row["mode"],
            row["dtype"],
            _pair(parts, lambda part: f"{part['flops'] / 1e12:.3g}" if part["flops"] else "?"),
            _pair(parts, lambda part: f"{part['median']:.3g}{'' if part['warm_up'] else '*'}"),
            _pair(parts, lambda part: f"{100 * (part['quartiles'][1] - part['quartiles'][0]) / part['median']:.0f}"),
            _pair(parts, lambda part: f"{part['frames_per_second']:.3g}"),
            _pair(parts, lambda part: f"{part['peak_bytes'] / 2**30:.2f}"),
            _pair(parts, lambda part: f"{part['times_floor']:.1f}"),
        )
    return table


def _pair(parts: list[dict[str, Any]], show: Any) -> str:
    return " / ".join(show(part) for part in parts)


def _flops(report: Report, kind: str) -> Table:
    """Make a table with the models of a kind as rows and sizes as columns."""
    entries = [entry for entry in report["flops"] if report["models"][entry["model"]]["kind"] == kind]
    sizes = sorted({Size.of(entry) for entry in entries})
    counts = sorted({size.frames for size in sizes})
    columns = [
        resolution_name(size.height, size.width) if len(counts) == 1 else f"{size.frames} x {size.height}x{size.width}"
        for size in sizes
    ]
    what = "an image" if kind == "image" else f"clips of {', '.join(map(str, counts))} frames"
    brackets = f"; in brackets, relative to {HEADLINE}" if any(entry["times_ours"] for entry in entries) else ""
    title = f"Counted: TFLOP to encode and decode {what}{brackets}"
    table = _table(title, "model", *columns, caption="A multiply-add counts as two.")
    for name in dict.fromkeys(entry["model"] for entry in entries):
        of_model = {Size.of(entry): entry for entry in entries if entry["model"] == name}
        table.add_row(name, *(_flops_cell(of_model.get(size)) for size in sizes))
    return table


def _flops_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    ratio = f" ({_number(entry['times_ours'])})" if entry["times_ours"] else ""
    return f"{_number((entry['encode'] + entry['decode']) / 1e12)}{ratio}"


def _number(value: float) -> str:
    """Format with three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table3(report: Report) -> Table:
    table = _table(
        f"Table 3 of the LiteVAE paper: encoders, {TABLE3_BATCH} images of {TABLE3_SIDE}x{TABLE3_SIDE}, float32",
        *("encoder", "images/s", "x SD-VAE", "peak GiB", "of SD-VAE", "GFLOP/image", "of SD-VAE", "paper, on a GPU"),
        caption="Relative to sd-vae-nchw, the SD-VAE in its default layout. LiteVAE-M and L need more FLOPs: "
        "448 and 466 against 271 GFLOP per image.",
    )
    for entry in report["table3"]:
        ratios = [entry["speed_ratio"], entry["memory_ratio"], entry["flops_ratio"]]
        speed, memory, flops = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        table.add_row(
            entry["model"],
            f"{entry['images_per_second']:.3g}",
            speed,
            f"{entry['peak_bytes'] / 2**30:.2f}",
            memory,
            f"{entry['flops_per_image'] / 1e9:.3g}",
            flops,
            _TABLE3_PAPER.get(entry["model"], ""),
        )
    return table


def _memory(report: Report) -> Table:
    table = _table(
        "Memory limits: square frames that fill this machine's memory, run whole in float32",
        *("model", "frames", "side", "extrapolated from"),
    )
    for limit in report["memory_limits"]:
        if "ran_out_at" in limit:
            table.add_row(limit["model"], str(limit["frames"]), f"ran out at {limit['ran_out_at']}", "")
        elif limit["side"]:
            table.add_row(limit["model"], str(limit["frames"]), f"about {limit['side']:.0f}", limit["from"])
    return table


def _quality(report: Report) -> Table:
    table = _table("Reconstruction", "model", "files", "frames", "PSNR dB", "SSIM")
    for entry in report.get("reconstruction", []):
        psnr, ssim = ("" if entry[name] is None else f"{entry[name]:.4g}" for name in ("psnr", "ssim"))
        table.add_row(entry["model"], str(entry["files"]), str(entry["frames"]), psnr, ssim)
    return table


def _print_left_out(left_out: Sequence[dict[str, str]], console: Console) -> None:
    """Print what was left out, by reason; of jobs without time, only the shortest."""
    by_reason: dict[str, list[str]] = {}
    no_time = [f"{entry['what']} ({entry['reason']})" for entry in left_out if entry["reason"].startswith(NO_TIME)]
    for entry in left_out:
        if not entry["reason"].startswith(NO_TIME):
            by_reason.setdefault(entry["reason"], []).append(entry["what"])
    for reason, names in by_reason.items():
        console.print(f"\nLeft out, {reason}: {'; '.join(names)}", highlight=False)
    if no_time:
        more = f"; and {len(no_time) - _SHOWN_LEFT_OUT} more" if len(no_time) > _SHOWN_LEFT_OUT else ""
        shown = "; ".join(no_time[:_SHOWN_LEFT_OUT])
        console.print(f"\nLeft out, {len(no_time)} that --full measures: {shown}{more}", highlight=False)
