"""Tables and bars of memory use: in plain text, in HTML for notebooks, and drawn by matplotlib.

All sizes are decimal: 1 MB is 1,000,000 bytes, 1 GB is 1,000 MB.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import MissingPackageError, pip_install
from langchain_quantllm.memory.measure import CpuReading, MemorySnapshot, Reading

UNITS_NOTE = "Sizes are decimal: 1 MB = 1,000,000 bytes, 1 GB = 1,000 MB."

Stage = MemorySnapshot | Mapping[str, int]
"""A stage of memory use: a snapshot, or the peak bytes of a period by device."""

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

_BEFORE, _ANONYMOUS, _FILES, _ALLOCATED = "before loading", "anonymous", "mapped from files", "allocated"
_IN_USE = "in use, not told apart"
WEIGHTS, SIXTEEN_BITS = "weights", "in 16 bits, computed"

_COLOURS = {
    _BEFORE: "#8C8C8C",
    _ANONYMOUS: "#0072B2",
    _FILES: "#56B4E9",
    _ALLOCATED: "#0072B2",
    _IN_USE: "#CC79A7",
    WEIGHTS: "#009E73",
    SIXTEEN_BITS: "#E69F00",
}
"""Colours that are distinguishable with any kind of colour vision, on white and on black, in the order of the legend.
Source: Okabe and Ito, https://jfly.uni-koeln.de/color/."""


def format_bytes(size_bytes: int) -> str:
    """Write a size in the largest decimal unit that keeps it above 1, in three digits: `4.26 GB`, `163 MB`."""
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor * 0.9995:
            value = size / factor
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{size} bytes"


# --- tables ---


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of strings with lines of text under it.

    Args:
        title: Text above the table.
        header: Names of the columns.
        rows: Cells, one for each column.
        lines: Sentences under the table.
        headline: The most important result, in one line above all; empty for none.
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
        above = [Text(line) for line in (self.headline, self.title) if line]
        for part in (*above, table, *map(Text, self.lines)):
            console.print(part)
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


def stage_table(title: str, stages: Mapping[str, Stage | None], lines: Sequence[str] = (), headline: str = "") -> Table:
    """Lay out stages as columns, without those that are None, and the measured numbers of each device as rows."""
    shown = {name: stage for name, stage in stages.items() if stage is not None}
    snapshots = [stage for stage in shown.values() if isinstance(stage, MemorySnapshot)]
    devices: dict[str, Reading] = {reading.device: reading for snapshot in snapshots for reading in snapshot.readings}
    rows = []
    for device, reading in devices.items():
        label = device
        for row_name, field in _ROWS.items():
            if not hasattr(reading, field):
                continue
            sizes = [_size_of(stage, device, field) for stage in shown.values()]
            least_bytes = 1 if field == "shared_bytes" else 0  # few processes have shared memory
            if any(size is not None and size >= least_bytes for size in sizes):
                rows.append((label, row_name, *("" if s is None else format_bytes(s) for s in sizes)))
                label = ""
    header = ("device", "memory", *shown)
    return Table(title=title, header=header, rows=tuple(rows), lines=tuple(lines), headline=headline)


def _size_of(stage: Stage, device: str, field: str) -> int | None:
    if isinstance(stage, MemorySnapshot):
        return getattr(stage.reading(device), field, None)
    return stage.get(device) if field in _PEAK_ROWS else None


# --- bars ---


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a chart: its parts side by side.

    Args:
        label: Name of the bar.
        parts: Bytes of each part, by its kind.
    """

    label: str
    parts: Mapping[str, int]

    @property
    def text(self) -> str:
        """Size to write behind the bar: its length, or for weights only what they add to the memory before."""
        added = [size for kind, size in self.parts.items() if kind in (WEIGHTS, SIXTEEN_BITS)]
        sign = "+ " if added and len(self.parts) > 1 else ""
        return f"{sign}{format_bytes(sum(added) or self.total_bytes)}"

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts: the length of the bar."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar chart with one scale.

    Args:
        title: Text above the chart.
        bars: The bars, from top to bottom.
    """

    title: str
    bars: tuple[Bar, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parts that occur, in the order of the legend."""
        found = {kind for bar in self.bars for kind, size in bar.parts.items() if size}
        return tuple(kind for kind in _COLOURS if kind in found)

    @property
    def _longest_bytes(self) -> int:
        return max((bar.total_bytes for bar in self.bars), default=0)

    def to_html(self) -> str:
        """Render as HTML that needs no script and no style sheet, every text escaped; empty without bars.

        Text has the page's own colour. The bars are rows of a table, which stays readable where styles are removed.
        """
        if not (longest_bytes := self._longest_bytes):
            return ""
        cell = "border:0;background:none;padding:2px 8px 2px 0;vertical-align:middle"
        rows = []
        for bar in self.bars:
            parts = "".join(
                f'<div style="width:{100 * size / longest_bytes:.2f}%;background:{_COLOURS[kind]}"'
                f' title="{html.escape(f"{kind}: {format_bytes(size)}")}"></div>'
                for kind, size in bar.parts.items()
                if size
            )
            rows.append(
                f'<tr style="background:none"><td style="{cell};text-align:left;white-space:nowrap">'
                f"{html.escape(bar.label)}</td>"
                f'<td style="{cell};width:100%">'
                f'<div style="display:flex;height:14px;min-width:160px">{parts}</div></td>'
                f'<td style="{cell};text-align:right;white-space:nowrap">{bar.text}</td></tr>'
            )
        legend = " ".join(
            f'<span style="white-space:nowrap;margin-right:12px"><span style="display:inline-block;width:10px;'
            f'height:10px;margin-right:4px;background:{_COLOURS[kind]}"></span>{html.escape(kind)}</span>'
            for kind in self.kinds
        )
        return (
            '<div style="max-width:720px;margin:4px 0 8px">'
            f'<div style="font-weight:600">{html.escape(self.title)}</div>'
            '<table style="width:100%;border:0;border-collapse:collapse;margin:0">'
            f"<tbody>{''.join(rows)}</tbody></table>"
            f'<div style="margin-top:4px">{legend}</div></div>'
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw with matplotlib.

        Args:
            ax: The `matplotlib.axes.Axes` to draw on; None makes a new figure.

        Returns:
            The axes; `.figure` is their figure.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        if not is_installed("matplotlib"):
            msg = f"plot() needs matplotlib: {pip_install('langchain-quantllm[bench]')}."
            raise MissingPackageError(msg)
        from matplotlib.patches import Patch

        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots(figsize=(9.0, 1.4 + 0.4 * len(self.bars)), layout="constrained")
        unit, factor = ("GB", 10**9) if self._longest_bytes >= 10**9 else ("MB", 10**6)
        for at, bar in enumerate(self.bars):
            left_bytes = 0
            for kind, size in bar.parts.items():
                ax.barh(at, size / factor, left=left_bytes / factor, height=0.6, color=_COLOURS[kind])
                left_bytes += size
            ax.annotate(bar.text, (left_bytes / factor, at), (4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(self.bars)), [bar.label for bar in self.bars], parse_math=False)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * self._longest_bytes / factor or 1)
        ax.set_xlabel(f"{unit} ({factor:,} bytes)")
        ax.set_title(self.title, loc="left", parse_math=False)
        ax.spines[["top", "right"]].set_visible(False)
        handles = [Patch(color=_COLOURS[kind], label=kind) for kind in self.kinds]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        return ax


def stage_bars(
    stages: Mapping[str, Stage | None], devices: Sequence[str], weights: Mapping[str, tuple[str, int]]
) -> Bars:
    """Build a model's chart: a bar for each stage, then one for each size of its weights.

    Every bar begins with the memory in use before loading.

    Args:
        stages: Stages by name; `"before"` is the one before loading. None leaves one out, and so does a stage that was
            not measured on all devices.
        devices: Devices of the weights; their memory is added up.
        weights: Kind and bytes of each further bar, by its label.
    """
    before = stages.get("before")
    base = {} if before is None else _parts_of(before, devices) or {}
    base_bytes = sum(base.values())
    bars = []
    for label, stage in stages.items():
        if stage is None or (sizes := _parts_of(stage, devices)) is None:
            continue
        grown_bytes = sum(sizes.values()) - base_bytes
        if stage is before or grown_bytes <= 0:
            parts = {_BEFORE: sum(sizes.values())}
        elif _ANONYMOUS in sizes and (not base or _ANONYMOUS in base):
            anonymous_bytes = min(max(0, sizes[_ANONYMOUS] - base.get(_ANONYMOUS, 0)), grown_bytes)
            parts = {_BEFORE: base_bytes, _ANONYMOUS: anonymous_bytes, _FILES: grown_bytes - anonymous_bytes}
        else:
            parts = {_BEFORE: base_bytes, _IN_USE if "cpu" in devices else _ALLOCATED: grown_bytes}
        bars.append(Bar(label=label, parts=parts))
    start = {_BEFORE: base_bytes} if base_bytes else {}
    bars += [Bar(label=label, parts={**start, kind: size}) for label, (kind, size) in weights.items()]
    title = "Resident, this process" if list(devices) == ["cpu"] else f"In use on {' and '.join(devices)}"
    return Bars(title=title, bars=tuple(bars))


def _parts_of(stage: Stage, devices: Sequence[str]) -> dict[str, int] | None:
    """Add up a stage's memory on all devices, by kind; None where one of them was not measured."""
    if isinstance(stage, MemorySnapshot):
        readings = [stage.reading(device) for device in devices]
        if len(readings) == 1 and isinstance(cpu := readings[0], CpuReading) and cpu.anonymous_bytes is not None:
            anonymous_bytes = cpu.anonymous_bytes + (cpu.shared_bytes or 0)  # neither can be read from a file again
            return {_ANONYMOUS: anonymous_bytes, _FILES: cpu.resident_bytes - anonymous_bytes}
        used = [None if reading is None else reading.used_bytes for reading in readings]
    else:
        used = [stage.get(device) for device in devices]
    return None if None in used or not used else {_IN_USE: sum(filter(None, used))}
