"""Figures of an overview, made from its document alone, so that a JSON file can be drawn long after it was measured.

Owns what is drawn and how it looks. Measures nothing, loads no model, and leaves matplotlib's settings as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, pip_install

FORMATS = ("png", "svg", "pdf")
"""File formats of the figures."""

RUNNERS = {"engine": "langchain-quantllm", "generate": "transformers generate"}
"""How the two runners are called for readers."""

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


def save_plots(document: Mapping[str, Any], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw all figures that a document has numbers for.

    Args:
        document: What `overview_results.as_document` gives, or what was read from its JSON.
        folder: Where the files go; made if it is not there.
        formats: Some of `FORMATS`.

    Returns:
        The files: `memory`, `prefill`, `generation`, `training` and `quality`, as far as they were measured.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        InvalidOptionError: If the document is no overview, or a format is not known.
    """
    check_plots(formats)
    if document.get("kind") != "overview" or not isinstance(document.get("rows"), list):
        msg = "the document is no overview; give the JSON that `langchain-quantllm bench MODEL --json FILE` wrote."
        raise InvalidOptionError(msg)
    import matplotlib

    files = []
    with matplotlib.rc_context(_SETTINGS):  # which puts them back
        for stem, figure in _figures(document):
            folder.mkdir(parents=True, exist_ok=True)
            for name in formats:
                file = folder / f"{stem}.{name}"
                figure.savefig(file, dpi=200, metadata=None if name == "png" else {_DATES[name]: None})
                files.append(file)
    return files


_DATES = {"svg": "Date", "pdf": "CreationDate"}


def subject_line(document: Mapping[str, Any]) -> str:
    """Say which model was measured, and on what."""
    shape, model = document.get("shape"), document.get("model")
    name = f"{shape} shape, random weights" if shape else Path(str(model)).name if model else "demo model"
    return f"{name} on {document.get('device_name') or document.get('device')}"


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    drawers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "memory": _draw_memory,
        "prefill": _draw_prefill,
        "generation": _draw_generation,
        "training": _draw_training,
        "quality": _draw_quality,
    }
    for stem, draw in drawers.items():
        figure = draw(document)
        if figure is not None:
            yield stem, figure


# The figures.


def _draw_memory(document: Mapping[str, Any]) -> Any:
    rows = [row for row in document["rows"] if row["memory"]]
    if not rows:
        return None
    kinds = {"weights_bytes": "weights", "loaded_bytes": "after loading", "peak_bytes": "peak while generating"}
    figure = _figure(document, "Memory by scheme", _memory_note(document), 0.9 + 0.75 * len(rows))
    axes = figure.subplots()
    unit, factor = _unit(row["memory"][kind] for row in rows for kind in kinds)
    series = {label: [row["memory"][kind] / factor for row in rows] for kind, label in kinds.items()}
    shades = ("#0072B2", "#56B4E9", "#999999")
    _draw_rows(axes, [row["label"] for row in rows], series, shades)
    axes.set_xlabel(f"{unit} ({factor:,.0f} bytes)")
    _add_legend(figure, axes, len(series))
    return figure


def _draw_prefill(document: Mapping[str, Any]) -> Any:
    tokens = document["options"]["prefill_tokens"]
    about = f"prompts of {tokens} tokens, one new token each; larger is better"
    return _draw_by_batch(document, "prefill", "prompt_rate_tok_s", "Prefill", about, "prompt tokens/s")


def _draw_generation(document: Mapping[str, Any]) -> Any:
    about = f"prompts of {document['options']['prompt_tokens']} tokens; larger is better"
    return _draw_by_batch(document, "by_batch", "rate_tok_s", "Generation by batch", about, "new tokens/s")


def _draw_by_batch(document: Mapping[str, Any], part: str, rate: str, title: str, about: str, unit: str) -> Any:
    """Draw bars grouped by batch, a panel for each runner, on one scale."""
    rows = [row for row in document["rows"] if row[part]]
    calls = [call for row in rows for call in row[part]]
    runners = [runner for runner in RUNNERS if any(call["runner"] == runner for call in calls)]
    batches = sorted({call["batch"] for call in calls})
    if not rows:
        return None
    figure = _figure(document, title, about, 1.0 + 2.5 * len(runners))
    panels = figure.subplots(len(runners), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, runner in zip(panels, runners, strict=True):
        series = {}
        for row in rows:
            found = {call["batch"]: call[rate] for call in row[part] if call["runner"] == runner}
            series[row["label"]] = [found.get(batch) for batch in batches]
        lengths = sorted({call["new_tokens"] for call in calls if call["runner"] == runner})
        written = "" if part == "prefill" else f", {_span(lengths)} new tokens"
        axes.set_title(f"{RUNNERS[runner]}{written}", loc="left", fontsize=10)
        _draw_groups(axes, [str(batch) for batch in batches], series)
        axes.set_ylabel(unit)
    panels[-1].set_xlabel("prompts at once" if part == "prefill" else "texts at once")
    _add_legend(figure, panels[0], len(rows))
    return figure


def _draw_training(document: Mapping[str, Any]) -> Any:
    rows = [row for row in document["rows"] if row["training"]]
    if not rows:
        return None
    first = rows[0]["training"]
    about = (
        f"LoRA of rank {first['rank']} on {first['targets']}, {first['batch']} x {first['tokens']} tokens; "
        "smaller is better"
    )
    figure = _figure(document, "One training step of an adapter", about, 1.1 + 0.5 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [row["label"] for row in rows]
    places = list(range(len(rows)))[::-1]
    forward_s = [row["training"]["forward_s"] for row in rows]
    backward_s = [row["training"]["backward_s"] for row in rows]
    left.barh(places, forward_s, 0.6, color=_COLOURS[0], label="forward")
    left.barh(places, backward_s, 0.6, left=forward_s, color=_COLOURS[1], label="backward")
    for place, first_s, second_s in zip(places, forward_s, backward_s, strict=True):
        _annotate(left, (first_s + second_s, place), f"{_digits(first_s + second_s)} s", across=True)
    left.set_yticks(places, labels)
    left.set_xlabel("seconds")
    unit, factor = _unit(row["training"]["peak_bytes"] for row in rows)
    sizes = [row["training"]["peak_bytes"] / factor for row in rows]
    right.barh(places, sizes, 0.6, color="#999999")
    for place, size in zip(places, sizes, strict=True):
        _annotate(right, (size, place), f"{_digits(size)} {unit}", across=True)
    right.set_xlabel(f"peak memory in {unit}")
    for axes, values in ((left, [f + b for f, b in zip(forward_s, backward_s, strict=True)]), (right, sizes)):
        axes.set_xlim(0, 1.25 * max(values))
        _tidy(axes)
    _add_legend(figure, left, 2)
    return figure


def _draw_quality(document: Mapping[str, Any]) -> Any:
    rows = [row for row in document["rows"] if row["quality"] and row["memory"]]
    if not rows:
        return None
    tokens = rows[0]["quality"]["tokens"]
    losses = [row["quality"]["loss_nats"] for row in rows]
    plain = next((row["quality"]["loss_nats"] for row in rows if row["scheme"] == "none"), min(losses))
    about = f"loss above that of the unquantized model, {tokens:,} tokens; smaller is better"
    figure = _figure(document, "What a scheme costs in quality", about, 0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    unit, factor = _unit(row["memory"]["weights_bytes"] for row in rows)
    places = range(len(rows) - 1, -1, -1)
    added = [max(0.0, loss - plain) for loss in losses]
    axes.barh(places, added, 0.6, color=_COLOURS[0])
    for place, value, row in zip(places, added, rows, strict=True):
        _annotate(axes, (value, place), _quality_text(row), across=True)
    axes.set_yticks(
        list(places), [f"{row['label']}, {_digits(row['memory']['weights_bytes'] / factor)} {unit}" for row in rows]
    )
    axes.set_xlim(0, 1.45 * max(*added, 0.01))
    axes.set_xlabel("nats per token; beside the bars: perplexity")
    _tidy(axes)
    return figure


def _quality_text(row: Mapping[str, Any]) -> str:
    increase = row["quality"]["perplexity_increase_percent"]
    added = f" ({increase:+.1f}%)" if increase else ""
    return f"{row['quality']['perplexity']:.2f}{added}"


def _memory_note(document: Mapping[str, Any]) -> str:
    kind = "resident memory" if str(document.get("device")) == "cpu" else "memory of tensors"
    return f"{kind} above that before loading; smaller is better"


# How they look.


def _figure(document: Mapping[str, Any], title: str, about: str, height: float) -> Any:
    """Make an empty figure with its two lines of title; sizes in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    whole = height + _HEAD_INCHES
    figure = Figure(figsize=(7.5, whole), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, height / whole)))
    figure.text(0.012, 1 - 0.2 / whole, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.012, 1 - 0.44 / whole, subject_line(document), fontsize=9, color=_GREY, va="center")
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
