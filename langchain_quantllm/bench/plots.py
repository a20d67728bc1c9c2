"""Figures of a bench, made from its report alone, so that a JSON file can be drawn long after it was measured.

Measures nothing, loads no model, and leaves matplotlib's settings as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm.bench.records import BenchReport
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, pip_install

FORMATS = ("png", "svg", "pdf")
"""File formats of the figures."""

RUNNERS = {"engine": "langchain-quantllm", "generate": "transformers generate"}
"""Names of the two runners in the figures."""

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Distinguishable with any kind of colour vision. Source: Okabe and Ito, https://jfly.uni-koeln.de/color/."""

_GREY = "#595959"
_GB, _MB = ("GB", 1e9), ("MB", 1e6)
_HEAD_INCHES = 0.8
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "quantllm", "font.size": 10.0}


def check_plots(formats: Sequence[str]) -> None:
    """Check that figures can be drawn, before anything is measured for them.

    Args:
        formats: Some of `FORMATS`.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        InvalidOptionError: If a format is not known.
    """
    if not is_installed("matplotlib"):
        msg = f"figures need matplotlib: {pip_install('langchain-quantllm[bench]')}; or leave them out."
        raise MissingPackageError(msg)
    for name in formats:
        if name not in FORMATS:
            msg = f"format {name!r} is not allowed; use {', '.join(FORMATS)}."
            raise InvalidOptionError(msg)


def save_plots(report: BenchReport, folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw all figures that a report has records for.

    Args:
        report: A report, measured now or read from its JSON.
        folder: Folder of the files; made if it is not there.
        formats: Some of `FORMATS`.

    Returns:
        The files: `memory`, `prefill`, `generation`, `training` and `quality`, as far as they were measured.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        InvalidOptionError: If a format is not known.
    """
    check_plots(formats)
    import matplotlib

    files = []
    with matplotlib.rc_context(_SETTINGS):  # which puts them back
        for stem, measurement, draw in (
            ("memory", "loading", _draw_memory),
            ("prefill", "prefill", _draw_prefill),
            ("generation", "batches", _draw_generation),
            ("training", "training", _draw_training),
            ("quality", "quality", _draw_quality),
        ):
            if not report.of(measurement):
                continue
            figure = draw(report)
            folder.mkdir(parents=True, exist_ok=True)
            for name in formats:
                file = folder / f"{stem}.{name}"
                figure.savefig(file, dpi=200, metadata=None if name == "png" else {_DATES[name]: None})
                files.append(file)
    return files


_DATES = {"svg": "Date", "pdf": "CreationDate"}


def subject_line(report: BenchReport) -> str:
    """Name the model that was measured, and the device."""
    name = Path(report.model).name if report.model else "demo model"
    if report.shape:
        name = f"{report.shape} shape, random weights"
    return f"{name} on {report.machine.get('device_name') or report.device}"


# The figures.


def _draw_memory(report: BenchReport) -> Any:
    rows = report.of("loading")
    kind = "resident memory" if report.device == "cpu" else "memory of tensors"
    about = f"{kind} above that before loading; smaller is better"
    figure = _figure(report, "Memory by scheme", about, 0.9 + 0.75 * len(rows))
    axes = figure.subplots()
    sizes_bytes = {
        "weights": [row["weights_bytes"] for row in rows],
        "after loading": [row["allocated_bytes"] for row in rows],
        "peak while generating": [report.peak_bytes(row.scheme) for row in rows],
    }
    unit, factor = _unit(size for sizes in sizes_bytes.values() for size in sizes)
    series = {label: [size / factor for size in sizes] for label, sizes in sizes_bytes.items()}
    _draw_rows(axes, [row.scheme for row in rows], series, ("#0072B2", "#56B4E9", "#999999"))
    axes.set_xlabel(f"{unit} ({factor:,.0f} bytes)")
    _add_legend(figure, axes, len(series))
    return figure


def _draw_prefill(report: BenchReport) -> Any:
    about = f"prompts of {report.options['prefill_tokens']} tokens, one new token each; larger is better"
    return _draw_by_batch(report, "prefill", "Prefill", about, "prompt tokens/s")


def _draw_generation(report: BenchReport) -> Any:
    about = f"prompts of {report.options['prompt_tokens']} tokens; larger is better"
    return _draw_by_batch(report, "batches", "Generation by batch", about, "new tokens/s")


def _draw_by_batch(report: BenchReport, measurement: str, title: str, about: str, unit: str) -> Any:
    """Draw bars grouped by batch, a panel for each runner, on one scale."""
    is_prefill = measurement == "prefill"
    calls = report.of(measurement)
    runners = [runner for runner in RUNNERS if any(call["runner"] == runner for call in calls)]
    batches = sorted({call["batch"] for call in calls})
    schemes = list(dict.fromkeys(call.scheme for call in calls))
    figure = _figure(report, title, about, 1.0 + 2.5 * len(runners))
    panels = figure.subplots(len(runners), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, runner in zip(panels, runners, strict=True):
        run = [call for call in calls if call["runner"] == runner]
        rate = "prompt_rate_tok_s" if is_prefill else "rate_tok_s"
        rates = {(call.scheme, call["batch"]): call[rate] for call in run}
        written = "" if is_prefill else f", {_span(sorted({call['new_tokens'] for call in run}))} new tokens"
        axes.set_title(f"{RUNNERS[runner]}{written}", loc="left", fontsize=10)
        series = {scheme: [rates.get((scheme, batch)) for batch in batches] for scheme in schemes}
        _draw_groups(axes, [str(batch) for batch in batches], series)
        axes.set_ylabel(unit)
    panels[-1].set_xlabel("prompts at once" if is_prefill else "texts at once")
    _add_legend(figure, panels[0], len(schemes))
    return figure


def _draw_training(report: BenchReport) -> Any:
    steps = report.of("training")
    first = steps[0]
    about = (
        f"LoRA of rank {first['rank']} on {first['targets']}, {first['batch']} x {first['tokens']} tokens; "
        "smaller is better"
    )
    figure = _figure(report, "One training step of an adapter", about, 1.1 + 0.5 * len(steps))
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(steps)))[::-1]
    forward_s = [step["forward_s"] for step in steps]
    backward_s = [step["backward_s"] for step in steps]
    both_s = [first_s + second_s for first_s, second_s in zip(forward_s, backward_s, strict=True)]
    left.barh(places, forward_s, 0.6, color=_COLOURS[0], label="forward")
    left.barh(places, backward_s, 0.6, left=forward_s, color=_COLOURS[1], label="backward")
    left.set_yticks(places, [step.scheme for step in steps])
    left.set_xlabel("seconds")
    unit, factor = _unit(step["peak_bytes"] for step in steps)
    sizes = [step["peak_bytes"] / factor for step in steps]
    right.barh(places, sizes, 0.6, color="#999999")
    right.set_xlabel(f"peak memory in {unit}")
    for axes, values, of in ((left, both_s, "s"), (right, sizes, unit)):
        for place, value in zip(places, values, strict=True):
            _annotate(axes, (value, place), f"{_digits(value)} {of}", across=True)
        axes.set_xlim(0, 1.25 * max(values))
        _tidy(axes)
    _add_legend(figure, left, 2)
    return figure


def _draw_quality(report: BenchReport) -> Any:
    rows = report.of("quality")
    loading = {row.scheme: row for row in report.of("loading")}
    losses = [row["loss_nats"] for row in rows]
    plain = next((row["loss_nats"] for row in rows if loading[row.scheme]["scheme_name"] == "none"), min(losses))
    about = f"loss above that of the unquantized model, {rows[0]['tokens']:,} tokens; smaller is better"
    figure = _figure(report, "Quality lost by scheme", about, 0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    weights_bytes = [loading[row.scheme]["weights_bytes"] for row in rows]
    unit, factor = _unit(weights_bytes)
    places = range(len(rows) - 1, -1, -1)
    added = [max(0.0, loss - plain) for loss in losses]
    axes.barh(places, added, 0.6, color=_COLOURS[0])
    for place, value, row in zip(places, added, rows, strict=True):
        increase = row["perplexity_increase_percent"]
        more = f" ({increase:+.1f}%)" if increase else ""
        _annotate(axes, (value, place), f"{row['perplexity']:.2f}{more}", across=True)
    labels = [f"{row.scheme}, {_digits(size / factor)} {unit}" for row, size in zip(rows, weights_bytes, strict=True)]
    axes.set_yticks(list(places), labels)
    axes.set_xlim(0, 1.45 * max(*added, 0.01))
    axes.set_xlabel("nats per token; beside the bars: perplexity")
    _tidy(axes)
    return figure


# How they look.


def _figure(report: BenchReport, title: str, about: str, height: float) -> Any:
    """Make an empty figure with its two lines of title; sizes in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    whole = height + _HEAD_INCHES
    figure = Figure(figsize=(7.5, whole), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, height / whole)))
    figure.text(0.012, 1 - 0.2 / whole, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.012, 1 - 0.44 / whole, subject_line(report), fontsize=9, color=_GREY, va="center")
    figure.text(0.012, 1 - 0.62 / whole, about, fontsize=9, color=_GREY, va="center")
    return figure


def _draw_groups(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Draw upright bars, side by side within each group, with their values."""
    width = 0.84 / len(series)
    for i, ((label, values), colour) in enumerate(zip(series.items(), _cycle(len(series)), strict=True)):
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [value or 0.0 for value in values]
        axes.bar(places, heights, 0.92 * width, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                _annotate(axes, (place, value), _digits(value), small=len(groups) * len(series) > 12)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.16)
    axes.yaxis.set_major_formatter("{x:,.0f}" if axes.get_ylim()[1] > 10 else "{x:g}")
    _tidy(axes)


def _draw_rows(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """Draw lying bars, one below the other within each group, with their values."""
    height = 0.8 / len(series)
    for i, ((label, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        places = [len(groups) - 1 - group + ((len(series) - 1) / 2 - i) * height for group in range(len(groups))]
        axes.barh(places, values, 0.92 * height, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            _annotate(axes, (max(0.0, value), place), _digits(value), across=True)
    axes.set_yticks(range(len(groups))[::-1], groups)
    axes.set_xlim(0, 1.12 * max(max(values) for values in series.values()))
    _tidy(axes)


def _annotate(axes: Any, place: tuple[float, float], text: str, *, across: bool = False, small: bool = False) -> None:
    axes.annotate(
        text,
        place,
        xytext=(3, 0) if across else (0, 2),
        textcoords="offset points",
        ha="left" if across else "center",
        va="center" if across else "bottom",
        fontsize=6 if small else 8.5,
    )


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, colors="#333333")


def _add_legend(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, 6), frameon=False)


def _unit(sizes_bytes: Iterable[int]) -> tuple[str, float]:
    return _GB if max(sizes_bytes) >= 0.9995 * _GB[1] else _MB


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _digits(value: float) -> str:
    """Write a value in three digits or so."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.3f}"


def _span(lengths: Sequence[int]) -> str:
    return str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
