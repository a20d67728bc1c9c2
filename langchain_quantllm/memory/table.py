"""Stages of memory use as a table: in plain text, and in HTML for notebooks.

Owns the units and the layout. All sizes are decimal: 1 MB is 1,000,000 bytes, 1 GB is 1,000 MB.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from langchain_quantllm.memory.measure import AcceleratorReading, CpuReading, MemorySnapshot

UNITS_NOTE = "Sizes are decimal: 1 MB = 1,000,000 bytes, 1 GB = 1,000 MB."

Stage = MemorySnapshot | Mapping[str, int]
"""Readings of one moment, or the peak bytes of a time by device."""

_ROWS = {
    "allocated by PyTorch": "allocated_bytes",
    "reserved by PyTorch": "reserved_bytes",
    "this process (NVML)": "process_bytes",
    "whole device": "driver_used_bytes",
    "resident, this process": "resident_bytes",
    "- anonymous": "anonymous_bytes",
    "- mapped from files": "file_bytes",
    "- shared": "shared_bytes",
    "available": "available_bytes",
}
_PEAK_ROWS = ("allocated_bytes", "resident_bytes")


def format_bytes(size_bytes: int) -> str:
    """Write a size in the largest decimal unit that keeps it above 1, in three digits: `4.26 GB`, `163 MB`."""
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor * 0.9995:
            value = size / factor
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{size} bytes"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of strings with lines of text under it.

    Args:
        title: What stands above it.
        header: Names of the columns.
        rows: Cells, as many in each row as there are columns.
        lines: Sentences under the table.
        headline: What matters most, in one line above all; empty for none.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...] = ()
    headline: str = ""

    def to_text(self, width: int = 100) -> str:
        """Render as plain ASCII text, at most `width` characters wide."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.ASCII2, show_edge=False, pad_edge=False)
        for i, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if i < 2 else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        out = io.StringIO()
        console = Console(
            file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False
        )
        for line in filter(None, (self.headline, self.title)):
            console.print(Text(line))
        console.print(table)
        for line in self.lines:
            console.print(Text(line))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def to_html(self, picture: str = "") -> str:
        """Render as an HTML table, every text escaped.

        Args:
            picture: HTML to show between the headline and the table, as `Bars.to_html` renders it.
        """

        def cells(tag: str, texts: Sequence[str]) -> str:
            return "".join(
                f'<{tag} style="text-align:{"left" if i < 2 else "right"}">{html.escape(text)}</{tag}>'
                for i, text in enumerate(texts)
            )

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self.lines)
        headline = f'<div style="font-size:1.3em;font-weight:600">{html.escape(self.headline)}</div>'
        return (
            f"<div>{headline if self.headline else ''}{picture}<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{cells('th', self.header)}</tr></thead><tbody>{body}</tbody></table>{lines}</div>"
        )


class Tabular:
    """Something that shows itself as a table: as text when printed, as HTML in Jupyter."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Lay it out as a plain text table; `to_dict` is there for programs."""
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def stage_table(title: str, stages: Mapping[str, Stage | None], lines: Sequence[str] = (), headline: str = "") -> Table:
    """Lay out stages as columns, and the devices with what was read of each as rows.

    Args:
        title: What stands above the table.
        stages: Name of each stage with its readings, or with its peaks by device; None leaves it out.
        lines: Sentences under the table.
        headline: A line above the title; empty for none.
    """
    shown = {name: stage for name, stage in stages.items() if stage is not None}
    devices: dict[str, AcceleratorReading | CpuReading] = {}
    for stage in shown.values():
        if isinstance(stage, MemorySnapshot):
            devices.update({r.device: r for r in stage.readings})
    rows = []
    for device, reading in devices.items():
        label = device
        for row_name, field in _ROWS.items():
            if not hasattr(reading, field):
                continue
            sizes = [_size_of(stage, device, field) for stage in shown.values()]
            least_bytes = 1 if field == "shared_bytes" else 0  # hardly any process has it
            if any(size is not None and size >= least_bytes for size in sizes):
                rows.append((label, row_name, *("" if s is None else format_bytes(s) for s in sizes)))
                label = ""
    return Table(
        title=title, header=("device", "memory", *shown), rows=tuple(rows), lines=tuple(lines), headline=headline
    )


def _size_of(stage: Stage, device: str, field: str) -> int | None:
    if isinstance(stage, MemorySnapshot):
        return getattr(stage.reading(device), field, None)
    return stage.get(device) if field in _PEAK_ROWS else None
