"""The tables of a bench: one for each measurement that its report has records of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from langchain_quantllm.bench.options import MEMORY, QUALITY, SPEED

_RUNNERS = {"engine": "langchain-quantllm", "generate": "generate"}
_TEXTS = {"scheme", "with", "layers", "on", "part", "why", "by", "check", "task", "metric"}
"""Heads of columns of text, which is aligned to the left."""

_CHECKS = {
    "tool_calls": "tool calls, {mode}: {share}",
    "json": "JSON, {mode}: {share}",
    "retrieval": "facts in {tokens} tokens",
}
"""Names of checks."""

_KINDS = ("allocated", "reserved", "nvidia-smi")


def tables(report: Any) -> Iterator[Table]:
    """Lay out a report, a table for each measurement, and one of the failures.

    Args:
        report: A `BenchReport`.
    """
    from langchain_quantllm.bench.plots import subject_line

    options, where = report.options, subject_line(report)
    prompts = f"prompts of {options['prompt_tokens']} tokens"
    long_prompts = f"prompts of {options['prefill_tokens']} tokens"
    lengths = f"{options['prompt_tokens']} tokens in, {options['new_tokens']} out"
    generated = f"{options['memory_batch']} x {options['new_tokens']} tokens"
    if not set(options["measurements"]) & {*MEMORY, *SPEED, *QUALITY}:
        yield _weights_table(report, f"{where}: weights and memory, above that before loading")
    laid_out = (
        _memory_table(report, f"{where}, generating {generated}"),
        _rates_table(report, "prefill", f"Prefill, {long_prompts}: prompt tokens/s by prompts at once"),
        _rates_table(report, "batches", f"Generation, {prompts}: new tokens/s by texts at once"),
        _rates_table(report, "lengths", "Generation of one text: tokens/s by its length in tokens"),
        _cache_table(report, "generate with and without KV cache: tokens/s"),
        _training_table(report),
        _quality_table(report, "Quality: perplexity of a text"),
        _predictions_table(report, f"{where}: predictions of a text, with intervals of 95%"),
        _checks_table(report, f"{where}: share of questions, with intervals of 95%"),
        _tasks_table(report, f"{where}: tasks of lm-evaluation-harness, with intervals of 95%"),
        _generation_table(report, f"{where}, {lengths}: tokens/s, and a step in ms"),
        _first_text_table(report, f"{where}: seconds"),
        _table("Not measured", ("scheme", "part", "why"), ((r.scheme, r.title, r.failure) for r in report.failures)),
    )
    yield from (table for table in laid_out if table.row_count)


def _table(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in _TEXTS else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _weights_table(report: Any, title: str) -> Table:
    heads = ("scheme", "loaded in, s", "weights", "loaded", "nvidia-smi", "peak loading", "peak", "limit, tokens/s")

    def cells(scheme: str) -> Iterable[str]:
        if (loading := report.first("loading", scheme)) is None:
            return ["-"] * (len(heads) - 1)
        sizes = [loading[f"{name}_bytes"] for name in ("weights", "allocated", "driver", "peak")]
        peak = report.peak_bytes(scheme)
        return _number(loading["load_s"], 1), *map(_size, [*sizes, peak]), _number(loading["limit_tok_s"], 1)

    return _table(title, heads, ((scheme, *cells(scheme)) for scheme in report.schemes))


def _memory_table(report: Any, title: str) -> Table:
    def sizes(scheme: str, generating: Any) -> Iterator[int | None]:
        estimate, loading, unloading = (report.first(name, scheme) for name in ("estimate", "loading", "unloading"))
        yield estimate and estimate["estimate_bytes"]
        yield generating["weights_bytes"]
        for record in (loading, generating):
            yield from (record[f"{kind}_bytes"] for kind in ("allocated", "reserved", "driver"))
        yield unloading and unloading["allocated_bytes"]

    heads = ("scheme", "estimate", "weights", *_KINDS, "generating: allocated", *_KINDS[1:], "unloaded: allocated")
    rows = (
        (r.scheme, *map(_size, sizes(r.scheme, r)), _number(r["rate_tok_s"] or None, 1)) for r in report.of("memory")
    )
    return _table(title, (*heads, "tokens/s"), rows)


def _rates_table(report: Any, measurement: str, title: str) -> Table:
    """Lay out rates: a row for each scheme and runner, a column for each size."""
    size = "asked_tokens" if measurement == "lengths" else "batch"
    rate = "prompt_rate_tok_s" if measurement == "prefill" else "rate_tok_s"
    calls = {(call.scheme, call["runner"], call[size]): call for call in report.of(measurement)}
    sizes = sorted({key[-1] for key in calls})

    def cell(call: Any) -> str:
        if call is None:
            return "-"
        short = f" ({call['new_tokens']} tokens)" if call["new_tokens"] < call["asked_tokens"] else ""
        return f"{_rate(call[rate])}{short}"

    rows = (
        (scheme, name, *(cell(calls.get((scheme, runner, s))) for s in sizes))
        for scheme in report.schemes
        for runner, name in _RUNNERS.items()
        if any(key[:2] == (scheme, runner) for key in calls)
    )
    return _table(title, ("scheme", "with", *map(str, sizes)), rows)


def _cache_table(report: Any, title: str) -> Table:
    def cells(calls: Any) -> Iterable[str]:
        rates = {call["use_cache"]: call["rate_tok_s"] for call in calls}
        ratio = rates[True] / rates[False] if len(rates) == 2 else None
        both = (_rate(rates[kept]) if kept in rates else "-" for kept in (True, False))
        return str(calls[0]["new_tokens"]), *both, _number(ratio, 1)

    rows = ((scheme, *cells(calls)) for scheme in report.schemes if (calls := report.of("cache", scheme)))
    return _table(title, ("scheme", "new tokens", "with", "without", "times"), rows)


def _training_table(report: Any) -> Table:
    heads = ("scheme", "layers", "on", "forward, s", "backward, s", "tokens/s", "peak")
    steps = report.of("training")
    rows = (
        (
            step.scheme,
            step["kernels"] or "Linear",
            step["targets"],
            _number(step["forward_s"], 3),
            _number(step["backward_s"], 3),
            _rate(step["rate_tok_s"]),
            _size(step["peak_bytes"]),
        )
        for step in steps
    )
    title = "Training an adapter of rank {rank}: one step of {batch} x {tokens} tokens"
    return _table(title.format(**steps[0].values) if steps else title, heads, rows)


def _quality_table(report: Any, title: str) -> Table:
    heads = (
        "scheme",
        "perplexity",
        "loss, nats",
        "against 16 bits, nats",
        "perplexity",
        "divergence, nats",
        "95% of samples",
        "same token",
        "tokens",
    )
    rows = (
        (
            quality.scheme,
            _number(quality["perplexity"], 3),
            _number(quality["loss_nats"], 4),
            _number(quality["loss_increase_nats"], "+.4f"),
            _number(quality["perplexity_increase_percent"], "+.2f", "%"),
            # Reports of earlier releases have no divergence.
            _number(quality.values.get("kl_nats"), 4),
            _interval(quality.values.get("kl_interval_nats")),
            _number(quality.values.get("agreement"), ".1%"),
            str(quality["tokens"]),
        )
        for quality in report.of("quality")
    )
    return _table(title, heads, rows)


def _predictions_table(report: Any, title: str) -> Table:
    """Lay out perplexity and divergence by a model's own layers and by the engine's kernels."""
    heads = ("scheme", "by", "weights", "perplexity", "divergence, nats", "loss against 16 bits, nats", "same token")

    def cells(found: Any) -> Iterator[str]:
        loading = report.first("loading", found.scheme)
        yield from (found.scheme, f"the {found['by']}", _size(loading and loading["weights_bytes"]))
        yield f"{found['perplexity']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        yield _with_interval(found, "kl_nats", "kl_interval_nats", ".5f")
        yield _with_interval(found, "loss_increase_nats", "loss_increase_interval_nats", "+.4f")
        yield _with_interval(found, "agreement", "agreement_interval", ".1%")

    return _table(title, heads, map(cells, report.of("predictions")))


def _checks_table(report: Any, title: str) -> Table:
    """Lay out calls, JSON and retrieval: a row for each check and scheme, so that schemes stand below each other."""
    heads = ("check", "scheme", "share", "against 16 bits", "questions")
    rows: dict[str, list[Any]] = {}
    for measurement in ("tool_calls", "json", "retrieval"):
        for record in report.of(measurement):
            rows.setdefault(_CHECKS[measurement].format(**record.case), []).append(record)

    def cells(check: str, record: Any) -> Iterator[str]:
        yield from (check, record.scheme, _with_interval(record, "value", "interval", ".1%"))
        yield _with_interval(record, "difference", "difference_interval", "+.1%")
        yield str(record["questions"])

    return _table(title, heads, (cells(check, record) for check, records in rows.items() for record in records))


def _tasks_table(report: Any, title: str) -> Table:
    heads = ("task", "metric", "scheme", "value", "against 16 bits", "questions")
    found = sorted(report.of("tasks"), key=lambda record: (record["task"], record["metric"], record["filter"]))
    rows = (
        (
            record["task"],
            record["metric"] + ("" if record["filter"] == "none" else f", {record['filter']}"),
            record.scheme,
            _with_interval(record, "value", "interval", ".4f"),
            _with_interval(record, "difference", "difference_interval", "+.4f"),
            str(record["questions"]),
        )
        for record in found
    )
    return _table(title, heads, rows)


def _generation_table(report: Any, title: str) -> Table:
    """Lay out our engine in depth: the limit, the bare step, the calls, and the peer."""
    heads = ("scheme", "requests", "limit", "bare step", "step", "step/bare", "first token, s", "decoding", "in all")

    def cells(ours: Any) -> Iterator[str]:
        peers = [peer for peer in report.of("peer", ours.scheme) if peer["batch"] == ours["batch"]]
        yield ours.scheme
        yield str(ours["batch"])
        yield _number(report.first("loading", ours.scheme)["limit_tok_s"], 1) if ours["batch"] == 1 else ""
        yield _number(ours["bare_step_s"] and 1e3 * ours["bare_step_s"], 2)
        yield _number(1e3 * ours["engine_step_s"], 2)
        yield _number(ours["step_ratio"], 2)
        yield _number(ours["first_token_s"], 3)
        yield _number(ours["decode_rate_tok_s"], 1)
        yield _number(ours["rate_tok_s"], 1)
        yield f"{ours.spread:.0%}"
        for peer in (peers[0] if peers else None, peers[-1] if len(peers) > 1 else None):
            yield from (_number(peer and peer[name], 1) for name in ("rate_tok_s", "our_ratio"))

    compared = ("spread", "peer", "ours/peer", "peer, all at once", "ours/peer")
    return _table(title, (*heads, *compared), map(cells, report.of("generation")))


def _first_text_table(report: Any, title: str) -> Table:
    """Lay out the waits for first texts: of a long prompt, and of prompts that share a prefix."""
    heads = ("scheme", "long prompt, tokens", "first text", "bare prefill", "first text/bare")

    def cells(scheme: str) -> Iterator[str]:
        long, shared = report.first("long_prompt", scheme), report.first("shared_prefix", scheme)
        yield str(long["prompt_tokens"]) if long else "-"
        yield from (_number(long and long[name], 4) for name in ("first_text_s", "bare_s"))
        yield _number(long and long["ratio"], 2)
        yield f"{shared['requests']} x {shared['prefix_tokens']}" if shared else "-"
        yield from (_number(shared and shared[name], 3) for name in ("apart_s", "shared_s"))
        yield _number(shared and shared["ratio"], 2)

    schemes = [s for s in report.schemes if report.of("long_prompt", s) or report.of("shared_prefix", s)]
    compared = ("requests x shared tokens", "apart", "shared", "apart/shared")
    return _table(title, (*heads, *compared), ((scheme, *cells(scheme)) for scheme in schemes))


def _size(size_bytes: int | None) -> str:
    from langchain_quantllm.memory import format_bytes

    return "-" if size_bytes is None else format_bytes(size_bytes)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def _with_interval(record: Any, value: str, interval: str, digits: str) -> str:
    """Write a value of a record with its interval; a dash where there is none."""
    found, ends = record.values.get(value), record.values.get(interval)
    if found is None:
        return "-"
    between = "" if ends is None else f" ({ends[0]:{digits}} to {ends[1]:{digits}})"
    return f"{found:{digits}}{between}"


def _number(value: float | None, digits: int | str, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{digits if isinstance(digits, str) else f'.{digits}f'}}{unit}"
