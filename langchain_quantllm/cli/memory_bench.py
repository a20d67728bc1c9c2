"""The commands that measure: memory and bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from langchain_quantllm.bench.random_models import SHAPES
from langchain_quantllm.cli.bench_runs import (
    Job,
    bench_memory,
    bench_overview,
    bench_speed,
    numbers,
    pairs,
    read_document,
    show,
    words,
)
from langchain_quantllm.cli.console import (
    Device,
    Revision,
    TrustRemoteCode,
    accelerators,
    app,
    err,
    errors,
    find_model,
    out,
)
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError, nearest
from langchain_quantllm.schemes import SCHEMES


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub; only its config is read.")],
    tokens: Annotated[int, typer.Option(help="Length of a sequence in tokens, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once, for the KV cache.")] = 1,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Estimate what a model takes in every scheme, and which of them fit on this machine."""
    with errors():
        if tokens < 0 or batch < 0:
            msg = f"--tokens {tokens} and --batch {batch} must not be negative."
            raise InvalidOptionError(msg)
        checkpoint = find_model(model, revision=revision, trust_remote_code=trust_remote_code)
        with err.status("computing the estimates"):
            from langchain_quantllm.loading.devices import default_device_map
            from langchain_quantllm.loading.estimate import estimate_memory
            from langchain_quantllm.loading.spec import LoadSpec
            from langchain_quantllm.memory import available_memory, format_bytes

            config, stored = checkpoint.config, checkpoint.quantization
            if stored is not None:  # it may come from a file beside config.json
                config.quantization_config = dict(stored)
            estimate = estimate_memory(config, trust_remote_code=trust_remote_code)
            sizes: dict[str, int | None] = {**estimate.bytes_by_scheme}
            sizes = sizes or {_name_of(estimate.scheme): estimate.total_bytes}
            notes = []
            for name in SCHEMES if stored is None else ():
                if name not in sizes:
                    try:
                        sizes[name] = estimate_memory(config, name, trust_remote_code=trust_remote_code).total_bytes
                    except UnsupportedError as error:  # of this scheme alone
                        sizes[name] = None
                        notes.append(f"{name}: {error}")
            place = next(iter(default_device_map(LoadSpec(model_id=model)).values()))
            device = f"cuda:{place}" if isinstance(place, int) else str(place)
            free_bytes = available_memory(device)
        cache_bytes = estimate.kv_cache_bytes(tokens, batch)
        table = Table(title=f"{model}: estimate, {format_bytes(free_bytes)} free on {device}", title_justify="left")
        heads = ("scheme", "weights", "against 16 bits", f"KV cache, {batch} x {tokens} tokens", "in all", "fits")
        for head in heads:
            table.add_column(head, justify="left" if head == "scheme" else "right")
        for name, size_bytes in sizes.items():
            if size_bytes is None:
                table.add_row(name, *("-" for _ in heads[1:]))
                continue
            table.add_row(
                name,
                format_bytes(size_bytes),
                f"{round(100 * (size_bytes / estimate.bytes_16bit - 1)):+d}%",
                format_bytes(cache_bytes),
                format_bytes(size_bytes + cache_bytes),
                "yes" if size_bytes + cache_bytes <= free_bytes else "no",
            )
        out.print(table)
        context = f"; the model's context is {estimate.context_tokens} tokens" if estimate.context_tokens else ""
        lines = [f"{estimate.parameters:,} parameters{context}. 1 MB is 1,000,000 bytes."]
        if stored is None and sizes["gptq"] is not None:
            lines.append("gptq is for 4 bits in groups of 128, and needs calibration: langchain-quantllm quantize")
        elif stored is not None:
            lines.append("The checkpoint is quantized already, and is loaded as it is.")
        out.print("\n".join([*lines, *notes]), markup=False, highlight=False, soft_wrap=True)


def _name_of(scheme: Any) -> str:
    """Name the scheme of a checkpoint as `SCHEMES` does; with its bits where the name does not say them."""
    if scheme.calibrated:
        return f"{label_of(scheme)}, {scheme.weight_bits} bits"
    return f"{scheme.name}-double" if getattr(scheme, "double_quantization", False) else str(scheme.name)


Schemes = Annotated[
    str | None,
    typer.Option(
        help=f"With commas: {', '.join(SCHEMES)}. Default: none,int8,nf4; with --memory or --speed nf4-double, too."
    ),
]
Parts = Annotated[
    str, typer.Option(help="Parts to leave out, with commas: prefill, batches, lengths, cache, training, quality.")
]


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Folder, or repository on the Hub. Default: a small demo model.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help=f"Random weights of this shape instead: {', '.join(SHAPES)}.")
    ] = None,
    schemes: Schemes = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="A quantized checkpoint as label=FOLDER, one more row; may be repeated.")
    ] = None,
    device: Device = None,
    kernel: Annotated[
        str, typer.Option(help="Kernel for GPTQ, such as marlin; in the overview also several, with commas.")
    ] = "auto",
    without: Parts = "",
    text: Annotated[Path | None, typer.Option(help="Text for the quality. Default: the one of this package.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of the texts that are generated.")] = 128,
    batches: Annotated[
        str | None, typer.Option(help="Texts at once, with commas. Default: 1,2,4,8,16; with --speed 1,8,32,64.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Lengths of single texts, with commas.")] = "30,512",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 30,
    prefill_batches: Annotated[str, typer.Option(help="Long prompts at once, with commas.")] = "1,16",
    prefill_tokens: Annotated[int, typer.Option(help="Length of the long prompts.")] = 512,
    cache_new_tokens: Annotated[int, typer.Option(help="Length of texts with and without KV cache.")] = 16,
    train_batch: Annotated[int, typer.Option(help="Texts at once in training.")] = 2,
    train_tokens: Annotated[int, typer.Option(help="Length of texts in training.")] = 256,
    quality_tokens: Annotated[int, typer.Option(help="Most tokens of the text for the quality; 0 for all.")] = 4096,
    repeats: Annotated[int, typer.Option(help="Runs of each measurement; the median counts.")] = 3,
    limit_s: Annotated[float, typer.Option(help="Seconds a measurement may take; longer texts get shorter.")] = 8.0,
    peer: Annotated[
        bool | None,
        typer.Option(
            help="Measure transformers' generate beside it; with --speed langchain-huggingface, if installed."
        ),
    ] = None,
    peer_new_tokens: Annotated[int, typer.Option(help="Length of the peer's texts in batches.")] = 32,
    peer_repeats: Annotated[int, typer.Option(help="Runs of the peer's measurements.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the document into this file, too.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw figures into this folder.")] = None,
    plot_format: Annotated[str, typer.Option(help="png, svg, pdf, or several with commas.")] = "png",
    from_json: Annotated[
        Path | None, typer.Option(help="Measure nothing: show and draw what --json wrote into this file.")
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure estimate, report and nvidia-smi instead.")] = False,
    batch: Annotated[int, typer.Option(help="With --memory: texts at once.")] = 1,
    speed: Annotated[bool, typer.Option("--speed", help="Measure our engine's speed in depth instead.")] = False,
    shared: Annotated[int, typer.Option(help="With --speed: requests that share a prefix; 0 for none.")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="With --speed: length of that prefix.")] = 1000,
    long_prompt_tokens: Annotated[int, typer.Option(help="With --speed: length of the long prompt; 0: none.")] = 512,
) -> None:
    """Measure a model in several schemes: memory, speed, training and quality; the last line is JSON.

    --memory compares estimates with what is measured; --speed measures our engine against the device's limits, with
    shared prefixes, and beside langchain-huggingface.
    """
    with errors():
        if from_json is not None:
            show(read_document(from_json), None, plots, plot_format)
            return
        if memory and speed:
            msg = "--memory and --speed are two benches; give one of them."
            raise InvalidOptionError(msg)
        job = Job(model=model, shape=shape, schemes=schemes, device=device or "", kernel=kernel, json_file=json_file)
        job.check()
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.memory.measure import device_name

            job = replace(job, device=device_name(device or [*accelerators(), "cpu"][0]))
        if memory:
            bench_memory(job, new_tokens=new_tokens, batch=batch)
        elif speed:
            from langchain_quantllm.bench.speed_results import SpeedOptions
            from langchain_quantllm.compat.packages import is_installed

            speed_options = SpeedOptions(
                batches=numbers("--batches", batches or "1,8,32,64"),
                new_tokens=new_tokens,
                prompt_tokens=prompt_tokens,
                repeats=repeats,
                peer=is_installed("langchain_huggingface") if peer is None else peer,
                peer_new_tokens=peer_new_tokens,
                shared=shared,
                shared_tokens=shared_tokens,
                long_prompt_tokens=long_prompt_tokens,
            )
            bench_speed(job, speed_options)
        else:
            from langchain_quantllm.bench.overview_results import PARTS, OverviewOptions

            left_out = words(without)
            for part in left_out:
                if part not in PARTS:
                    msg = f"--without {part!r} is not a part{nearest(part, PARTS)}"
                    raise InvalidOptionError(msg)
            options = OverviewOptions(
                parts=tuple(part for part in PARTS if part not in left_out),
                peer=peer is not False,
                batches=numbers("--batches", batches or "1,2,4,8,16"),
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                peer_new_tokens=peer_new_tokens,
                lengths=numbers("--lengths", lengths),
                prefill_batches=numbers("--prefill-batches", prefill_batches),
                prefill_tokens=prefill_tokens,
                cache_new_tokens=cache_new_tokens,
                train_batch=train_batch,
                train_tokens=train_tokens,
                quality_tokens=quality_tokens or None,
                repeats=repeats,
                peer_repeats=peer_repeats,
                limit_s=limit_s,
            )
            bench_overview(job, options, pairs("--checkpoint", checkpoint or []), text, plots, plot_format)
