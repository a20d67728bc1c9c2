"""The command that measures: bench. It finds or makes checkpoints, runs the bench, and shows and writes its report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from langchain_quantllm.bench.options import MEMORY, OVERVIEW, SPEED, BenchOptions
from langchain_quantllm.bench.random_models import SHAPES, check_shape, random_checkpoint
from langchain_quantllm.cli.console import (
    Device,
    SafeConsole,
    accelerators,
    app,
    check_file,
    demo_folder,
    err,
    errors,
    find_model,
    out,
    read_text,
)
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.schemes import SCHEMES, scheme_from

_WIDTH = 150
"""Least width of the tables in characters, for terminals that do not tell theirs."""

Schemes = Annotated[
    str | None,
    typer.Option(
        help=f"With commas: {', '.join(SCHEMES)}. Default: none,int8,nf4; with --memory or --speed nf4-double, too."
    ),
]
Without = Annotated[str, typer.Option(help=f"Parts to leave out, with commas: {', '.join(OVERVIEW)}.")]


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
        str, typer.Option(help="Kernel for GPTQ, such as marlin; several with commas make a row each.")
    ] = "auto",
    without: Without = "",
    text: Annotated[Path | None, typer.Option(help="Text for the quality. Default: the package's own.")] = None,
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
        Path | None, typer.Option(help="Measure nothing: show and draw the document in this file, of --json.")
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure estimate, report and nvidia-smi instead.")] = False,
    batch: Annotated[int, typer.Option(help="With --memory: texts at once.")] = 1,
    speed: Annotated[bool, typer.Option("--speed", help="Measure our engine's speed in depth instead.")] = False,
    shared: Annotated[int, typer.Option(help="With --speed: requests that share a prefix; 0 for none.")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="With --speed: length of that prefix.")] = 1000,
    long_prompt_tokens: Annotated[int, typer.Option(help="With --speed: length of the long prompt; 0: none.")] = 512,
) -> None:
    """Measure a model in several schemes: memory, speed, training and quality; the last line is JSON.

    --memory compares estimates with measurements; --speed measures our engine against the device's limits, with
    shared prefixes, and beside langchain-huggingface.
    """
    with errors():
        if from_json is not None:
            _show(_read_report(from_json), plots, plot_format)
            return
        if memory and speed:
            msg = "--memory and --speed are two benches; name one of them."
            raise InvalidOptionError(msg)
        check_file("--json", json_file)
        names = None if schemes is None else _words(schemes)
        for name in names or ():
            scheme_from(name)
        if shape is not None:
            check_shape(shape)
        elif model is not None:
            find_model(model)
        if peer is None:
            peer = not speed or is_installed("langchain_huggingface")
        options = BenchOptions(
            measurements=MEMORY if memory else SPEED if speed else _parts(without),
            peer=peer,
            batches=_numbers("--batches", batches or ("1,8,32,64" if speed else "1,2,4,8,16")),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            peer_new_tokens=peer_new_tokens,
            lengths=_numbers("--lengths", lengths),
            prefill_batches=_numbers("--prefill-batches", prefill_batches),
            prefill_tokens=prefill_tokens,
            cache_new_tokens=cache_new_tokens,
            train_batch=train_batch,
            train_tokens=train_tokens,
            quality_tokens=quality_tokens or None,
            repeats=repeats,
            peer_repeats=peer_repeats,
            limit_s=limit_s,
            shared=shared,
            shared_tokens=shared_tokens,
            long_prompt_tokens=long_prompt_tokens,
            memory_batch=batch,
        )
        own = _pairs("--checkpoint", checkpoint or [])
        if plots is not None:
            from langchain_quantllm.bench.plots import check_plots

            check_plots(_words(plot_format))
        about = {"model": model, "shape": shape, "kernel": kernel, "options": options.to_dict()}
        report = None
        for report in _measure(about, options, names, own, device, _read_text(text, options, shape)):
            _write(json_file, report)  # after each scheme, should the next one end the process
        _finish(report, plots, plot_format)


def _finish(report: Any, plots: Path | None, plot_format: str) -> None:
    """Show a report and print its document; it is an error if nothing was measured."""
    if report is None:
        msg = "no schemes were given."
        raise InvalidOptionError(msg)
    _show(report, plots, plot_format)
    out.print(json.dumps(report.to_dict()), markup=False, highlight=False, soft_wrap=True)
    asked = report.options["measurements"] or ["loading"]
    if report.failures and not any(report.of(measurement) for measurement in asked):
        msg = f"no scheme could be measured; the first: {report.failures[0].failure}"
        raise InvalidOptionError(msg)


def _measure(
    about: dict[str, Any],
    options: BenchOptions,
    names: list[str] | None,
    own: Mapping[str, str],
    device: str | None,
    text: str | None,
) -> Iterator[Any]:
    """Measure one scheme after another; yields the report so far after each."""
    with err.status("importing PyTorch and transformers"):
        from langchain_quantllm.bench.machine import describe_machine, measure_copy
        from langchain_quantllm.bench.records import BenchReport, Record
        from langchain_quantllm.bench.runner import run_bench
        from langchain_quantllm.bench.subjects import subjects_of
        from langchain_quantllm.memory.measure import device_name

        device = device_name(device or [*accelerators(), "cpu"][0])
    copy = None
    if options.measurements != MEMORY:
        copy = measure_copy(device)
        _report(f"{device} copies {copy['rate_byte_s'] / 1e9:.1f} GB/s, read and written")
    about = {**about, "device": device, "machine": describe_machine(device), "copy": copy}
    if names is None:
        names = ["none", "int8", "nf4", *(["nf4-double"] if options.measurements in (MEMORY, SPEED) else [])]
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = _checkpoints(names, about["model"], about["shape"], Path(scratch))
        subjects = subjects_of(folders, own, kernel=about["kernel"])
        for found in run_bench(subjects, device=device, options=options, copy=copy, text=text, report=_report):
            records += found
            yield BenchReport(**about, records=tuple(records))


def _checkpoints(names: list[str], model: str | None, shape: str | None, folder: Path) -> dict[str, str]:
    """Find or make the checkpoint of each scheme."""
    if shape is None:
        return dict.fromkeys(names, model or demo_folder() if names else "")
    plain = str(random_checkpoint(shape, folder / "plain")) if set(names) - {"gptq"} else ""
    packed = str(random_checkpoint(shape, folder / "gptq", gptq=True)) if "gptq" in names else ""
    return {name: packed if name == "gptq" else plain for name in names}


def _write(file: Path | None, report: Any) -> None:
    if file is not None:
        file.write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")


def _report(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(report: Any, plots: Path | None, plot_format: str) -> None:
    """Print the tables of a report and draw its figures."""
    from langchain_quantllm.bench.plots import save_plots
    from langchain_quantllm.cli.tables import tables

    wide = SafeConsole(width=max(out.width, _WIDTH))
    for table in tables(report):
        wide.print(table)
    if plots is not None:
        for file in save_plots(report, plots, formats=_words(plot_format)):
            _report(f"wrote {file}")


def _read_report(file: Path) -> Any:
    """Read the document of `--json`."""
    from langchain_quantllm.bench.records import BenchReport

    text = read_text("--from-json", file, "file that --json wrote")
    try:
        return BenchReport.from_dict(json.loads(text))
    except ValueError as error:
        msg = f"--from-json {file} cannot be shown: {error}"
        raise InvalidOptionError(msg) from error


def _read_text(file: Path | None, options: BenchOptions, shape: str | None) -> str | None:
    """Read the text for the quality; None without that, and for random weights, whose perplexity is no measure."""
    from langchain_quantllm.bench.quality import evaluation_text

    if "quality" not in options.measurements or (file is None and shape is not None):
        return None
    return evaluation_text() if file is None else read_text("--text", file)


def _parts(without: str) -> tuple[str, ...]:
    """Parts of the overview but those left out."""
    left_out = _words(without)
    for part in left_out:
        if part not in OVERVIEW:
            msg = f"--without {part!r} is not a part{nearest(part, OVERVIEW)}"
            raise InvalidOptionError(msg)
    return tuple(part for part in OVERVIEW if part not in left_out)


def _words(text: str) -> list[str]:
    """Read words with commas in between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read numbers with commas in between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        msg = f"{option} {text!r} is not allowed; use whole numbers with commas, such as 1,8,32."
        raise InvalidOptionError(msg) from None


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    """Read label=value."""
    read: dict[str, str] = {}
    for text in given:
        label, _, value = text.partition("=")
        if not label or not value or label in read:
            msg = f"{option} {text!r} is not allowed; write label=FOLDER, each label once, such as gptq-4=models/gptq."
            raise InvalidOptionError(msg)
        read[label] = value
    return read
