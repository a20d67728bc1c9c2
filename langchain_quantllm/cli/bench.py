"""The command that measures: bench. It finds or makes checkpoints, runs the bench, and shows and writes its report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from langchain_quantllm.bench.options import MEMORY, OVERVIEW, SPEED, BenchOptions
from langchain_quantllm.bench.random_models import SHAPES, check_shape, random_checkpoint
from langchain_quantllm.cli.console import (
    Device,
    accelerators,
    app,
    check_file,
    demo_folder,
    err,
    errors,
    find_model,
    out,
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
        job = _Job(model=model, shape=shape, schemes=schemes, kernel=kernel, json_file=json_file)
        job.check()
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
        evaluated = _read_text(text, shape) if "quality" in options.measurements else None
        report = _run(job, options, device, own, evaluated)
        _show(report, plots, plot_format)
        job.write(report)
        out.print(json.dumps(report.to_dict()), markup=False, highlight=False, soft_wrap=True)
        _check_measured(report)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The model of a bench and its schemes."""

    model: str | None
    shape: str | None
    schemes: str | None
    kernel: str
    json_file: Path | None

    def check(self) -> None:
        """Check the arguments that need neither torch nor weights: files, names, and the place of the model.

        Raises:
            QuantLLMError: If one is not known or not there.
        """
        check_file("--json", self.json_file)
        for name in _words(self.schemes or ""):
            scheme_from(name)
        if self.shape is not None:
            check_shape(self.shape)
        elif self.model is not None:
            find_model(self.model)

    def checkpoints(self, default: str, folder: Path) -> dict[str, str]:
        """Find or make the checkpoint of each scheme."""
        names = _words(default if self.schemes is None else self.schemes)
        if self.shape is None:
            model = self.model or demo_folder() if names else ""
            return dict.fromkeys(names, model)
        plain = str(random_checkpoint(self.shape, folder / "plain")) if set(names) - {"gptq"} else ""
        packed = str(random_checkpoint(self.shape, folder / "gptq", gptq=True)) if "gptq" in names else ""
        return {name: packed if name == "gptq" else plain for name in names}

    def write(self, report: Any) -> None:
        """Write the document if `--json` names a file."""
        if self.json_file is not None:
            self.json_file.write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")


def _run(job: _Job, options: BenchOptions, device: str | None, own: Mapping[str, str], text: str | None) -> Any:
    """Measure one scheme after another; the document is written after each, should the next one end the process."""
    with err.status("importing PyTorch and transformers"):
        from langchain_quantllm.bench.machine import describe_machine, measure_copy
        from langchain_quantllm.bench.records import BenchReport
        from langchain_quantllm.bench.runner import run_bench
        from langchain_quantllm.bench.subjects import subjects_of
        from langchain_quantllm.memory.measure import device_name

        device = device_name(device or [*accelerators(), "cpu"][0])
    copy = None
    if options.measurements != MEMORY:
        copy = measure_copy(device)
        _report(f"{device} copies {copy['rate_byte_s'] / 1e9:.1f} GB/s, read and written")
    about: dict[str, Any] = {
        "model": job.model,
        "shape": job.shape,
        "device": device,
        "kernel": job.kernel,
        "machine": describe_machine(device),
        "options": options.to_dict(),
        "copy": copy,
    }
    report = BenchReport(**about, records=())
    default = "none,int8,nf4,nf4-double" if options.measurements in (MEMORY, SPEED) else "none,int8,nf4"
    with tempfile.TemporaryDirectory() as scratch:
        subjects = subjects_of(job.checkpoints(default, Path(scratch)), own, kernel=job.kernel)
        for found in run_bench(subjects, device=device, options=options, copy=copy, text=text, report=_report):
            report = BenchReport(**about, records=(*report.records, *found))
            job.write(report)
    return report


def _check_measured(report: Any) -> None:
    """Check that something was measured.

    Raises:
        InvalidOptionError: If there were no schemes, or every measurement failed.
    """
    if not report.records:
        msg = "no schemes were given."
        raise InvalidOptionError(msg)
    asked = report.options["measurements"] or ["loading"]
    if report.failures and not any(report.of(measurement) for measurement in asked):
        msg = f"no scheme could be measured; the first: {report.failures[0].failure}"
        raise InvalidOptionError(msg)


def _report(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(report: Any, plots: Path | None, plot_format: str) -> None:
    """Print the tables of a report and draw its figures."""
    from langchain_quantllm.bench.plots import save_plots
    from langchain_quantllm.cli.tables import tables

    wide = Console(width=max(out.width, _WIDTH))
    for table in tables(report):
        wide.print(table)
    if plots is not None:
        for file in save_plots(report, plots, formats=_words(plot_format)):
            _report(f"wrote {file}")


def _read_report(file: Path) -> Any:
    """Read the document of `--json`."""
    from langchain_quantllm.bench.records import BenchReport

    try:
        return BenchReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        msg = f"--from-json {file} cannot be read: {error}"
        raise InvalidOptionError(msg) from error


def _read_text(file: Path | None, shape: str | None) -> str | None:
    """Read the text for the quality; None for random weights, whose perplexity says nothing."""
    from langchain_quantllm.bench.quality import evaluation_text

    if file is None:
        return None if shape is not None else evaluation_text()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"--text {file} cannot be read: {error}; name a text file in UTF-8."
        raise InvalidOptionError(msg) from error


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
