"""The commands that measure: memory and bench."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from langchain_quantllm.cli.console import Device, TrustRemoteCode, accelerators, app, err, errors, out
from langchain_quantllm.errors import InvalidOptionError


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub; only its config is read.")],
    tokens: Annotated[int, typer.Option(help="Length of a sequence in tokens, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once, for the KV cache.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Estimate what a model takes in every scheme, and which of them fit on this machine."""
    with errors():
        from langchain_quantllm.checkpoint import LoadSpec, find_checkpoint
        from langchain_quantllm.memory import available_memory, estimate_memory, format_bytes
        from langchain_quantllm.placement import default_device_map
        from langchain_quantllm.schemes import SCHEMES

        spec = LoadSpec(model_id=model, revision=revision, trust_remote_code=trust_remote_code)
        config = find_checkpoint(spec).config
        estimate = estimate_memory(config, trust_remote_code=trust_remote_code)
        device = str(next(iter(default_device_map(spec).values())))
        device = f"cuda:{device}" if device.isdigit() else device
        free_bytes = available_memory(device)
        table = Table(title=f"{model}: estimate, {format_bytes(free_bytes)} free on {device}", title_justify="left")
        for column in (
            "scheme",
            "weights",
            "against 16 bits",
            f"KV cache, {batch} x {tokens} tokens",
            "in all",
            "fits",
        ):
            table.add_column(column, justify="left" if column == "scheme" else "right")
        known: dict[str, Any] = {name: SCHEMES[name] for name in estimate.bytes_by_scheme} or {
            estimate.scheme.name: None
        }
        for name, scheme in known.items():
            one = estimate_memory(config, scheme, trust_remote_code=trust_remote_code)
            cache_bytes = one.kv_cache_bytes(tokens, batch)
            whole_bytes = one.total_bytes + cache_bytes
            table.add_row(
                name,
                format_bytes(one.total_bytes),
                f"{round(-100 * one.saving):+d}%",
                format_bytes(cache_bytes),
                format_bytes(whole_bytes),
                "yes" if whole_bytes <= free_bytes else "no",
            )
        out.print(table)
        context = f"; the model's context is {estimate.context_tokens} tokens" if estimate.context_tokens else ""
        out.print(f"{estimate.parameters:,} parameters{context}. 1 MB is 1,000,000 bytes.", highlight=False)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Folder, or repository on the Hub.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead: llama-2-7b or tiny.")] = None,
    schemes: Annotated[str, typer.Option(help="Names of schemes, with commas.")] = "none,int8,nf4,nf4-double",
    device: Device = None,
    new_tokens: Annotated[int, typer.Option(help="Length of the texts that are generated.")] = 128,
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    kernel: Annotated[str, typer.Option(help="Kernel for GPTQ, such as marlin or triton.")] = "auto",
    speed: Annotated[bool, typer.Option("--speed", help="Measure the speed instead of the memory.")] = False,
    batches: Annotated[str, typer.Option(help="Speed: requests at once, with commas.")] = "1,8,32,64",
    prompt_tokens: Annotated[int, typer.Option(help="Speed: length of the prompts.")] = 30,
    repeats: Annotated[int, typer.Option(help="Speed: runs of each measurement; the median counts.")] = 3,
    shared: Annotated[int, typer.Option(help="Speed: requests that share a prefix; 0 for none.")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="Speed: length of that prefix.")] = 1000,
    long_prompt_tokens: Annotated[int, typer.Option(help="Speed: length of the long prompt; 0 for none.")] = 512,
    peer: Annotated[
        bool | None, typer.Option(help="Speed: langchain-huggingface beside it. Default: where it is installed.")
    ] = None,
    peer_new_tokens: Annotated[int, typer.Option(help="Speed: length of its texts in batches of 4.")] = 32,
) -> None:
    """Measure the memory of every scheme, or with --speed the speed; the last line is JSON.

    Memory: estimate, report and nvidia-smi. Speed: the limit by the memory's bandwidth, the step by itself, calls
    through LangChain, the first token of a long prompt, a shared prefix, and langchain-huggingface.
    """
    with errors():
        from langchain_quantllm.benchmarks import memory as benches

        device = benches.check_device(device or ([*accelerators(), "cpu"])[0])
        if speed:
            from langchain_quantllm.benchmarks.speed_results import SpeedOptions
            from langchain_quantllm.packages import is_installed

            options = SpeedOptions(
                batches=_numbers("--batches", batches),
                new_tokens=new_tokens,
                prompt_tokens=prompt_tokens,
                repeats=repeats,
                peer=is_installed("langchain_huggingface") if peer is None else peer,
                peer_new_tokens=peer_new_tokens,
                shared=shared,
                shared_tokens=shared_tokens,
                long_prompt_tokens=long_prompt_tokens,
            )
            _bench_speed(model, shape, schemes.split(","), device, kernel, options)
            return
        with tempfile.TemporaryDirectory() as scratch:
            checkpoints = _bench_checkpoints(model, shape, schemes.split(","), Path(scratch))
            rows = []
            sizes: dict[str, Any] = {"new_tokens": new_tokens, "batch": batch}
            for row in benches.measure_memory(checkpoints, device=device, kernel=kernel, **sizes):
                err.print(f"{row.scheme}: loaded in {row.load_s:.1f} s", highlight=False)
                rows.append(row)
        title = f"{model or shape or 'demo model'} on {device}, generating {batch} x {new_tokens} tokens"
        Console(width=max(out.width, 130)).print(_memory_table(rows, title))
        document = benches.as_document(rows, model=model or shape, device=device, kernel=kernel, **sizes)
        out.print(document, markup=False, highlight=False, soft_wrap=True)


def _bench_checkpoints(model: str | None, shape: str | None, schemes: list[str], folder: Path) -> dict[str, str]:
    """Find or make the checkpoint of each scheme."""
    from langchain_quantllm.benchmarks.random_models import random_checkpoint
    from langchain_quantllm.demo_model import demo_model

    if shape is None:
        return dict.fromkeys(schemes, model or str(demo_model(progress=False)))
    plain = str(random_checkpoint(shape, folder / "plain")) if set(schemes) - {"gptq"} else ""
    return {
        name: str(random_checkpoint(shape, folder / "gptq", gptq=True)) if name == "gptq" else plain for name in schemes
    }


def _memory_table(rows: list[Any], title: str) -> Table:
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


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read numbers with commas in between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        msg = f"{option} {text!r} is not allowed; give whole numbers with commas, such as 1,8,32."
        raise InvalidOptionError(msg) from None


def _bench_speed(
    model: str | None, shape: str | None, schemes: list[str], device: str, kernel: str, options: Any
) -> None:
    from langchain_quantllm.benchmarks import speed as speeds
    from langchain_quantllm.benchmarks.speed_results import as_document

    def report(line: str) -> None:
        err.print(line, markup=False, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = _bench_checkpoints(model, shape, schemes, Path(scratch))
        copy_speed = speeds.measure_copy(device)
        report(f"{device} copies {copy_speed.rate_byte_s / 1e9:.1f} GB/s, read and written")
        what: dict[str, Any] = {"options": options, "copy_speed": copy_speed}
        rows = list(speeds.measure_speed(checkpoints, device=device, kernel=kernel, report=report, **what))
    where = f"{model or shape or 'demo model'} on {device}"
    wide = Console(width=max(out.width, 150))
    sizes = f"{options.prompt_tokens} tokens in, {options.new_tokens} out"
    wide.print(_generation_table(rows, f"{where}, {sizes}: tokens/s, and a step in ms"))
    wide.print(_prefill_table(rows, f"{where}: seconds"))
    document = as_document(rows, model=model, shape=shape, device=device, kernel=kernel, **what)
    out.print(document, markup=False, highlight=False, soft_wrap=True)


def _generation_table(rows: list[Any], title: str) -> Table:
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


def _prefill_table(rows: list[Any], title: str) -> Table:
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
