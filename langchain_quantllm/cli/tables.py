"""The tables of the benches.

Owns which numbers stand where. Reads results and documents; measures nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_RUNNERS = {"engine": "langchain-quantllm", "generate": "generate"}


def overview_tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """Lay out an overview, a table for each part that was measured, and one of what could not be.

    Args:
        document: What `overview_results.as_document` gives.
    """
    from langchain_quantllm.bench.plots import subject_line

    rows, options = document["rows"], document["options"]
    where = subject_line(document)
    yield _weights_table(rows, f"{where}: weights and memory, above that before loading")
    prompts = f"prompts of {options['prefill_tokens']} tokens"
    if any(row["prefill"] for row in rows):
        yield _rates_table(
            rows, "prefill", "prompt_rate_tok_s", f"Prefill, {prompts}: prompt tokens/s by prompts at once"
        )
    if any(row["by_batch"] for row in rows):
        title = f"Generation, prompts of {options['prompt_tokens']} tokens: new tokens/s by texts at once"
        yield _rates_table(rows, "by_batch", "rate_tok_s", title)
    if any(row["by_length"] for row in rows):
        yield _rates_table(rows, "by_length", "rate_tok_s", "Generation of one text: tokens/s by its length in tokens")
    if any(row["by_cache"] for row in rows):
        yield _cache_table(rows, "generate with and without KV cache: tokens/s")
    if any(row["training"] for row in rows):
        yield _training_table(rows)
    if any(row["quality"] for row in rows):
        yield _quality_table(rows)
    if any(row["failures"] for row in rows):
        yield _failure_table(rows)


def _table(title: str, heads: Sequence[str], texts: Sequence[str] = ("scheme",)) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in texts else "right")
    return table


def _weights_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    from langchain_quantllm.memory import format_bytes

    heads = ("scheme", "loaded in, s", "weights", "loaded", "nvidia-smi", "peak loading", "peak", "limit, tokens/s")
    table = _table(title, heads)
    for row in rows:
        if (memory := row["memory"]) is None:
            table.add_row(row["label"], *["-"] * (len(heads) - 1))
            continue
        names = ("weights", "loaded", "loaded_driver", "peak_loading", "peak")
        sizes = [memory[f"{name}_bytes"] for name in names]
        cells = ["-" if size is None else format_bytes(size) for size in sizes]
        table.add_row(row["label"], _cell(row["load_s"], 1), *cells, _cell(row["limit_tok_s"], 1))
    return table


def _rates_table(rows: Sequence[Mapping[str, Any]], part: str, rate: str, title: str) -> Table:
    """Lay out the rates of one part: a row for each scheme and runner, a column for each size."""
    size = "asked_tokens" if part == "by_length" else "batch"
    sizes = sorted({call[size] for row in rows for call in row[part]})
    table = _table(title, ("scheme", "with", *map(str, sizes)), ("scheme", "with"))
    for row in rows:
        for runner, name in _RUNNERS.items():
            calls = {call[size]: call for call in row[part] if call["runner"] == runner}
            if calls:
                table.add_row(row["label"], name, *(_rate_cell(calls.get(s), rate) for s in sizes))
    return table


def _rate_cell(call: Mapping[str, Any] | None, rate: str) -> str:
    if call is None:
        return "-"
    short = f" ({call['new_tokens']} tokens)" if call["new_tokens"] < call["asked_tokens"] else ""
    return f"{_rate(call[rate])}{short}"


def _cache_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = _table(title, ("scheme", "new tokens", "with", "without", "times"))
    for row in rows:
        rates = {call["use_cache"]: call["rate_tok_s"] for call in row["by_cache"]}
        if rates:
            ratio = rates[True] / rates[False] if len(rates) == 2 else None
            tokens = str(row["by_cache"][0]["new_tokens"])
            cells = (_rate(rates[kept]) if kept in rates else "-" for kept in (True, False))
            table.add_row(row["label"], tokens, *cells, _cell(ratio, 1))
    return table


def _training_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from langchain_quantllm.memory import format_bytes

    steps = [row["training"] for row in rows if row["training"]]
    title = (
        f"Training an adapter of rank {steps[0]['rank']}: one step of {steps[0]['batch']} x {steps[0]['tokens']} tokens"
    )
    heads = ("scheme", "layers", "on", "forward, s", "backward, s", "tokens/s", "peak")
    table = _table(title, heads, ("scheme", "layers", "on"))
    for row in rows:
        if step := row["training"]:
            times = (_cell(step["forward_s"], 3), _cell(step["backward_s"], 3), _rate(step["rate_tok_s"]))
            kernels = step["kernels"] or "Linear"
            table.add_row(row["label"], kernels, step["targets"], *times, format_bytes(step["peak_bytes"]))
    return table


def _quality_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = ("scheme", "perplexity", "loss, nats", "against 16 bits, nats", "perplexity", "tokens")
    table = _table("Quality: perplexity of a text", heads)
    for row in rows:
        if quality := row["quality"]:
            nats, percent = quality["loss_increase_nats"], quality["perplexity_increase_percent"]
            table.add_row(
                row["label"],
                _cell(quality["perplexity"], 3),
                _cell(quality["loss_nats"], 4),
                "-" if nats is None else f"{nats:+.4f}",
                "-" if percent is None else f"{percent:+.2f}%",
                str(quality["tokens"]),
            )
    return table


def _failure_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Not measured", ("scheme", "part", "why"), ("scheme", "part", "why"))
    for row in rows:
        for failure in row["failures"]:
            table.add_row(row["label"], failure["part"], Text(failure["reason"]))
    return table


def failure_table(failures: Sequence[Mapping[str, str]]) -> Table:
    """Lay out which schemes could not be measured.

    Args:
        failures: `scheme` and `reason` of each.
    """
    table = _table("Not measured", ("scheme", "why"), ("scheme", "why"))
    for failure in failures:
        table.add_row(failure["scheme"], Text(failure["reason"]))
    return table


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def memory_table(rows: Sequence[Any], title: str) -> Table:
    """Lay out what `measure_memory` gave."""
    from langchain_quantllm.memory import format_bytes

    table = Table(title=title, title_justify="left")
    heads = ("scheme", "estimate", "weights", "allocated", "reserved", "nvidia-smi")
    for head in (*heads, "generating: allocated", "reserved", "nvidia-smi", "unloaded: allocated", "tokens/s"):
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for row in rows:
        sizes = (
            row.estimate_bytes,
            row.weights_bytes,
            *(getattr(row.loaded, f"{kind}_bytes") for kind in ("allocated", "reserved", "driver")),
            *(getattr(row.generating, f"{kind}_bytes") for kind in ("allocated", "reserved", "driver")),
            row.unloaded.allocated_bytes,
        )
        cells = ["-" if size is None else format_bytes(size) for size in sizes]
        table.add_row(row.scheme, *cells, f"{row.rate_tok_s:.1f}" if row.rate_tok_s else "-")
    return table


def generation_table(rows: Sequence[Any], title: str) -> Table:
    """Lay out how fast texts were written, as `measure_speed` gave it."""
    table = Table(title=title, title_justify="left")
    heads = ("scheme", "requests", "limit", "bare step", "step", "step/bare", "first token, s", "decoding", "in all")
    for head in (*heads, "spread", "peer", "ours/peer", "peer, all at once", "ours/peer"):
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for row in rows:
        for ours in row.generation:
            peers = [p for p in row.peer if p.batch == ours.batch]
            first, last = (peers[0], peers[-1] if len(peers) > 1 else None) if peers else (None, None)
            table.add_row(
                row.scheme,
                str(ours.batch),
                f"{row.limit_tok_s:.1f}" if ours.batch == 1 else "",
                _cell(ours.bare_step_s and 1e3 * ours.bare_step_s, 2),
                _cell(1e3 * ours.engine_step_s, 2),
                _cell(ours.step_ratio, 2),
                _cell(ours.first_token_s, 3),
                _cell(ours.decode_rate_tok_s, 1),
                _cell(ours.rate_tok_s, 1),
                f"{max(ours.runs_s) / min(ours.runs_s) - 1:.0%}",
                *(cell for p in (first, last) for cell in (_cell(p and p.rate_tok_s, 1), _cell(p and p.our_ratio, 1))),
            )
    return table


def prefill_table(rows: Sequence[Any], title: str) -> Table:
    """Lay out the waits for first texts, as `measure_speed` gave them."""
    table = Table(title=title, title_justify="left")
    heads = ("scheme", "long prompt, tokens", "first text", "bare prefill", "first text/bare")
    for head in (*heads, "requests x shared tokens", "apart", "shared", "apart/shared"):
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for row in rows:
        long, shared = row.prefill, row.shared_prefix
        table.add_row(
            row.scheme,
            str(long.prompt_tokens) if long else "-",
            *(_cell(long and value, 4) for value in (long and (long.first_text_s, long.bare_s)) or (None, None)),
            _cell(long and long.ratio, 2),
            f"{shared.requests} x {shared.prefix_tokens}" if shared else "-",
            *(_cell(value, 3) for value in (shared and (shared.apart_s, shared.shared_s)) or (None, None)),
            _cell(shared and shared.ratio, 2),
        )
    return table


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
