"""The tables of a bench: one for each measurement that its report has records of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from langchain_quantllm.bench.options import MEMORY, SPEED

_RUNNERS = {"engine": "langchain-quantllm", "generate": "generate"}


def tables(report: Any) -> Iterator[Table]:
    """Lay out a report, a table for each measurement, and one of the failures.

    Args:
        report: A `BenchReport`.
    """
    from langchain_quantllm.bench.plots import subject_line

    options, where = report.options, subject_line(report)
    if not set(options["measurements"]) & {*MEMORY, *SPEED}:
        yield _weights_table(report, f"{where}: weights and memory, above that before loading")
    sizes = f"{options['prompt_tokens']} tokens in, {options['new_tokens']} out"
    layouts: dict[str, tuple[Callable[[Any, str], Table], str]] = {
        "memory": (_memory_table, f"{where}, generating {options['memory_batch']} x {options['new_tokens']} tokens"),
        "prefill": (
            _prefill_table,
            f"Prefill, prompts of {options['prefill_tokens']} tokens: prompt tokens/s by prompts at once",
        ),
        "batches": (
            _batches_table,
            f"Generation, prompts of {options['prompt_tokens']} tokens: new tokens/s by texts at once",
        ),
        "lengths": (_lengths_table, "Generation of one text: tokens/s by its length in tokens"),
        "cache": (_cache_table, "generate with and without KV cache: tokens/s"),
        "training": (_training_table, "Training an adapter of rank {rank}: one step of {batch} x {tokens} tokens"),
        "quality": (_quality_table, "Quality: perplexity of a text"),
        "generation": (_generation_table, f"{where}, {sizes}: tokens/s, and a step in ms"),
    }
    for measurement, (lay_out, title) in layouts.items():
        if report.of(measurement):
            yield lay_out(report, title)
    if "generation" in options["measurements"] and (report.of("long_prompt") or report.of("shared_prefix")):
        yield _first_text_table(report, f"{where}: seconds")
    if report.failures:
        table = _table("Not measured", ("scheme", "part", "why"), ("scheme", "part", "why"))
        for record in report.failures:
            table.add_row(record.scheme, record.title, Text(record.failure))
        yield table


def _table(title: str, heads: Sequence[str], texts: Sequence[str] = ("scheme",)) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in texts else "right")
    return table


def _weights_table(report: Any, title: str) -> Table:
    heads = ("scheme", "loaded in, s", "weights", "loaded", "nvidia-smi", "peak loading", "peak", "limit, tokens/s")
    table = _table(title, heads)
    for scheme in report.schemes:
        if (loading := report.first("loading", scheme)) is None:
            table.add_row(scheme, *["-"] * (len(heads) - 1))
            continue
        sizes = [loading[f"{name}_bytes"] for name in ("weights", "allocated", "driver", "peak")]
        cells = map(_size, [*sizes, report.peak_bytes(scheme)])
        table.add_row(scheme, _cell(loading["load_s"], 1), *cells, _cell(loading["limit_tok_s"], 1))
    return table


def _memory_table(report: Any, title: str) -> Table:
    heads = ("scheme", "estimate", "weights", "allocated", "reserved", "nvidia-smi")
    table = _table(
        title, (*heads, "generating: allocated", "reserved", "nvidia-smi", "unloaded: allocated", "tokens/s")
    )
    kinds = ("allocated_bytes", "reserved_bytes", "driver_bytes")
    for generating in report.of("memory"):
        scheme = generating.scheme
        estimate, loading, unloading = (report.first(name, scheme) for name in ("estimate", "loading", "unloading"))
        cells = (
            estimate and estimate["estimate_bytes"],
            generating["weights_bytes"],
            *(loading[kind] for kind in kinds),
            *(generating[kind] for kind in kinds),
            unloading and unloading["allocated_bytes"],
        )
        table.add_row(scheme, *map(_size, cells), _cell(generating["rate_tok_s"] or None, 1))
    return table


def _prefill_table(report: Any, title: str) -> Table:
    return _rates_table(report, title, "prefill", "batch", "prompt_rate_tok_s")


def _batches_table(report: Any, title: str) -> Table:
    return _rates_table(report, title, "batches", "batch", "rate_tok_s")


def _lengths_table(report: Any, title: str) -> Table:
    return _rates_table(report, title, "lengths", "asked_tokens", "rate_tok_s")


def _rates_table(report: Any, title: str, measurement: str, size: str, rate: str) -> Table:
    """Lay out rates: a row for each scheme and runner, a column for each size."""
    sizes = sorted({record[size] for record in report.of(measurement)})
    table = _table(title, ("scheme", "with", *map(str, sizes)), ("scheme", "with"))
    for scheme in report.schemes:
        for runner, name in _RUNNERS.items():
            calls = {call[size]: call for call in report.of(measurement, scheme) if call["runner"] == runner}
            if calls:
                table.add_row(scheme, name, *(_rate_cell(calls.get(s), rate) for s in sizes))
    return table


def _rate_cell(call: Any, rate: str) -> str:
    if call is None:
        return "-"
    short = f" ({call['new_tokens']} tokens)" if call["new_tokens"] < call["asked_tokens"] else ""
    return f"{_rate(call[rate])}{short}"


def _cache_table(report: Any, title: str) -> Table:
    table = _table(title, ("scheme", "new tokens", "with", "without", "times"))
    for scheme in report.schemes:
        calls = report.of("cache", scheme)
        rates = {call["use_cache"]: call["rate_tok_s"] for call in calls}
        if rates:
            ratio = rates[True] / rates[False] if len(rates) == 2 else None
            cells = (_rate(rates[kept]) if kept in rates else "-" for kept in (True, False))
            table.add_row(scheme, str(calls[0]["new_tokens"]), *cells, _cell(ratio, 1))
    return table


def _training_table(report: Any, title: str) -> Table:
    steps = report.of("training")
    heads = ("scheme", "layers", "on", "forward, s", "backward, s", "tokens/s", "peak")
    table = _table(title.format(**steps[0].values), heads, ("scheme", "layers", "on"))
    for step in steps:
        times = (_cell(step["forward_s"], 3), _cell(step["backward_s"], 3), _rate(step["rate_tok_s"]))
        table.add_row(step.scheme, step["kernels"] or "Linear", step["targets"], *times, _size(step["peak_bytes"]))
    return table


def _quality_table(report: Any, title: str) -> Table:
    heads = ("scheme", "perplexity", "loss, nats", "against 16 bits, nats", "perplexity", "tokens")
    table = _table(title, heads)
    for quality in report.of("quality"):
        nats, percent = quality["loss_increase_nats"], quality["perplexity_increase_percent"]
        table.add_row(
            quality.scheme,
            _cell(quality["perplexity"], 3),
            _cell(quality["loss_nats"], 4),
            "-" if nats is None else f"{nats:+.4f}",
            "-" if percent is None else f"{percent:+.2f}%",
            str(quality["tokens"]),
        )
    return table


def _generation_table(report: Any, title: str) -> Table:
    """Lay out our engine in depth: the limit, the bare step, the calls, and the peer."""
    heads = ("scheme", "requests", "limit", "bare step", "step", "step/bare", "first token, s", "decoding", "in all")
    table = _table(title, (*heads, "spread", "peer", "ours/peer", "peer, all at once", "ours/peer"))
    for ours in report.of("generation"):
        peers = [peer for peer in report.of("peer", ours.scheme) if peer["batch"] == ours["batch"]]
        first, last = (peers[0], peers[-1] if len(peers) > 1 else None) if peers else (None, None)
        limit_tok_s = report.first("loading", ours.scheme)["limit_tok_s"]
        table.add_row(
            ours.scheme,
            str(ours["batch"]),
            _cell(limit_tok_s, 1) if ours["batch"] == 1 else "",
            _cell(ours["bare_step_s"] and 1e3 * ours["bare_step_s"], 2),
            _cell(1e3 * ours["engine_step_s"], 2),
            _cell(ours["step_ratio"], 2),
            _cell(ours["first_token_s"], 3),
            _cell(ours["decode_rate_tok_s"], 1),
            _cell(ours["rate_tok_s"], 1),
            f"{ours.spread:.0%}",
            *(_cell(peer and peer[name], 1) for peer in (first, last) for name in ("rate_tok_s", "our_ratio")),
        )
    return table


def _first_text_table(report: Any, title: str) -> Table:
    """Lay out the waits for first texts: of a long prompt, and of prompts that share a prefix."""
    heads = ("scheme", "long prompt, tokens", "first text", "bare prefill", "first text/bare")
    table = _table(title, (*heads, "requests x shared tokens", "apart", "shared", "apart/shared"))
    for scheme in report.schemes:
        long, shared = report.first("long_prompt", scheme), report.first("shared_prefix", scheme)
        if long or shared:
            table.add_row(
                scheme,
                str(long["prompt_tokens"]) if long else "-",
                *(_cell(long and long[name], digits) for name, digits in (("first_text_s", 4), ("bare_s", 4))),
                _cell(long and long["ratio"], 2),
                f"{shared['requests']} x {shared['prefix_tokens']}" if shared else "-",
                *(_cell(shared and shared[name], 3) for name in ("apart_s", "shared_s")),
                _cell(shared and shared["ratio"], 2),
            )
    return table


def _size(size_bytes: int | None) -> str:
    from langchain_quantllm.memory import format_bytes

    return "-" if size_bytes is None else format_bytes(size_bytes)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
