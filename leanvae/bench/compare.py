"""Two reports compared as ratios."""

from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table

from leanvae.bench.jobs import BenchRow
from leanvae.bench.report import Report


def compare_reports(before: Report, after: Report) -> list[dict[str, Any]]:
    """Return the ratios, after over before, of the measurements in both reports.

    Returns:
        An entry for each measurement: `job`, and for `encode` and `decode` the ratios of `median` and `peak_bytes`;
            None
        if the earlier figure is 0.
    """
    entries = []
    earlier = {_job(row): row for row in before["rows"] if row["status"] == "ok"}
    for row in after["rows"]:
        old = earlier.get(_job(row))
        if row["status"] != "ok" or old is None:
            continue
        entry: dict[str, Any] = {"job": str(_job(row))}
        for part in ("encode", "decode"):
            if part in row and part in old:
                entry[part] = {name: _ratio(row[part][name], old[part][name]) for name in ("median", "peak_bytes")}
        entries.append(entry)
    return entries


def print_comparison(entries: list[dict[str, Any]], names: tuple[str, str], console: Console | None = None) -> None:
    """Print the ratios of `compare_reports` as a table."""
    table = Table(title=f"{names[1]} over {names[0]}", title_justify="left")
    for column in ("measurement", "encode time", "decode time", "encode memory", "decode memory"):
        table.add_column(column, justify="left" if column == "measurement" else "right")
    for entry in entries:
        cells = [entry.get(part, {}).get(name) for name in ("median", "peak_bytes") for part in ("encode", "decode")]
        table.add_row(entry["job"], *("" if cell is None else f"{cell:.2f}" for cell in cells))
    (console or Console()).print(table)


def _job(row: dict[str, Any]) -> BenchRow:
    return BenchRow(**{field.name: row[field.name] for field in fields(BenchRow)})


def _ratio(after: float, before: float) -> float | None:
    return after / before if before else None
