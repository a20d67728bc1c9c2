"""Stages of a model's memory as bars: in HTML for notebooks, and drawn by matplotlib.

Owns which bars there are, what each is made of, and how they look. Takes no measurements.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import MissingPackageError, pip_install
from langchain_quantllm.memory.measure import CpuReading, MemorySnapshot
from langchain_quantllm.memory.table import Stage, format_bytes

BEFORE, ANONYMOUS, FILES, ALLOCATED = "before loading", "anonymous", "mapped from files", "allocated"
IN_USE = "in use, not told apart"
WEIGHTS, SIXTEEN_BITS = "weights", "in 16 bits, computed"

_COLOURS = {
    BEFORE: "#8C8C8C",
    ANONYMOUS: "#0072B2",
    FILES: "#56B4E9",
    ALLOCATED: "#0072B2",
    IN_USE: "#CC79A7",
    WEIGHTS: "#009E73",
    SIXTEEN_BITS: "#E69F00",
}
"""Distinguishable with any kind of colour vision, on white and on black. Source: Okabe and Ito,
https://jfly.uni-koeln.de/color/."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: parts behind each other.

    Args:
        label: What the bar shows.
        parts: Bytes of each part, by its kind.
    """

    label: str
    parts: Mapping[str, int]

    @property
    def text(self) -> str:
        """What stands behind the bar: its length, or for weights what they add."""
        added = [size for kind, size in self.parts.items() if kind in (WEIGHTS, SIXTEEN_BITS)]
        sign = "+ " if added and len(self.parts) > 1 else ""
        return f"{sign}{format_bytes(sum(added) or self.total_bytes)}"

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts: the length of the bar."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars under each other, of one scale.

    Args:
        title: What they show.
        bars: The bars, from top to bottom.
    """

    title: str
    bars: tuple[Bar, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parts that occur, in the order of the legend."""
        found = {kind for bar in self.bars for kind, size in bar.parts.items() if size}
        return tuple(kind for kind in _COLOURS if kind in found)

    def to_html(self) -> str:
        """Render as HTML that needs no script and no style sheet, every text escaped; empty without bars.

        Text has the page's own colour. The bars are rows of a table, which stays readable where styles are removed.
        """
        most_bytes = max((bar.total_bytes for bar in self.bars), default=0)
        if not most_bytes:
            return ""
        cell = "border:0;background:none;padding:2px 8px 2px 0;vertical-align:middle"
        rows = []
        for bar in self.bars:
            parts = "".join(
                f'<div style="width:{100 * size / most_bytes:.2f}%;background:{_COLOURS[kind]}"'
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

    def draw(self, ax: Any = None) -> Any:
        """Draw with matplotlib.

        Args:
            ax: The `matplotlib.axes.Axes` to draw on; None makes a figure of its own.

        Returns:
            The axes; `.figure` is their figure.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        if not is_installed("matplotlib"):
            msg = f"plot() needs matplotlib: {pip_install('langchain-quantllm[bench]')}."
            raise MissingPackageError(msg)
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots(figsize=(9.0, 1.4 + 0.4 * len(self.bars)), layout="constrained")
        most_bytes = max((bar.total_bytes for bar in self.bars), default=0)
        unit, factor = ("GB", 10**9) if most_bytes >= 10**9 else ("MB", 10**6)
        for at, bar in enumerate(self.bars):
            left_bytes = 0
            for kind, size in bar.parts.items():
                ax.barh(at, size / factor, left=left_bytes / factor, height=0.6, color=_COLOURS[kind])
                left_bytes += size
            ax.annotate(bar.text, (left_bytes / factor, at), (4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(self.bars)), [bar.label for bar in self.bars], parse_math=False)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * most_bytes / factor or 1)
        ax.set_xlabel(f"{unit} ({factor:,} bytes)")
        ax.set_title(self.title, loc="left", parse_math=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(handles=[_patch(kind) for kind in self.kinds], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        return ax


def _patch(kind: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=_COLOURS[kind], label=kind)


def stage_bars(
    stages: Mapping[str, Stage | None], devices: Sequence[str], weights: Mapping[str, tuple[str, int]]
) -> Bars:
    """Build the bars of a model: its stages, then its weights beside those of 16 bits, on what was there before.

    Args:
        stages: Readings, or peak bytes by device, by the stage's name; `"before"` is what all others build on. None
            leaves a stage out, and so does a stage that was not read on all devices.
        devices: Devices that the weights lie on; what is in use on them is added up.
        weights: Kind and bytes of each further bar, by its label.
    """
    before = stages.get("before")
    base = _sizes(before, devices) if before is not None else None
    base_bytes = sum(base.values()) if base is not None else 0
    bars = []
    for label, stage in stages.items():
        sizes = None if stage is None else _sizes(stage, devices)
        if sizes is None:
            continue
        grown_bytes = sum(sizes.values()) - base_bytes
        if stage is before or grown_bytes <= 0:
            parts = {BEFORE: sum(sizes.values())}
        elif ANONYMOUS in sizes and (base is None or ANONYMOUS in base):
            anonymous_bytes = sizes[ANONYMOUS] - (base or {}).get(ANONYMOUS, 0)
            anonymous_bytes = min(max(0, anonymous_bytes), grown_bytes)
            parts = {BEFORE: base_bytes, ANONYMOUS: anonymous_bytes, FILES: grown_bytes - anonymous_bytes}
        else:
            is_cpu = "cpu" in devices
            parts = {BEFORE: base_bytes, IN_USE if is_cpu else ALLOCATED: grown_bytes}
        bars.append(Bar(label=label, parts=parts))
    bars += [
        Bar(label=label, parts={**({BEFORE: base_bytes} if base_bytes else {}), kind: size})
        for label, (kind, size) in weights.items()
    ]
    where = "Resident, this process" if list(devices) == ["cpu"] else f"In use on {' and '.join(devices)}"
    return Bars(title=where, bars=tuple(bars))


def _sizes(stage: Stage, devices: Sequence[str]) -> dict[str, int] | None:
    """Read what a stage says of all devices together, by kind; None where one of them was not read."""
    if not isinstance(stage, MemorySnapshot):
        used = [stage.get(device) for device in devices]
        return None if None in used or not used else {IN_USE: sum(size for size in used if size is not None)}
    readings = [stage.reading(device) for device in devices]
    if not readings or None in readings:
        return None
    if len(readings) == 1 and isinstance(cpu := readings[0], CpuReading) and cpu.anonymous_bytes is not None:
        anonymous_bytes = cpu.anonymous_bytes + (cpu.shared_bytes or 0)  # neither can be read from a file again
        return {ANONYMOUS: anonymous_bytes, FILES: cpu.resident_bytes - anonymous_bytes}
    return {IN_USE: sum(reading.used_bytes for reading in readings if reading is not None)}
