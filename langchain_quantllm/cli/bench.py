"""The command that measures: bench. It finds or makes checkpoints, runs the bench, and shows and writes its report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from langchain_quantllm.bench.options import MEMORY, OVERVIEW, QUALITY, SPEED, BenchOptions
from langchain_quantllm.bench.random_models import SHAPES, check_shape, random_checkpoint
from langchain_quantllm.cli.console import (
    Device,
    SafeConsole,
    accelerators,
    check_file,
    command,
    demo_folder,
    err,
    find_model,
    out,
    print_error,
    read_text,
)
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.schemes import SCHEMES, scheme_from

_WIDTH = 150
"""Least width of the tables in characters, for terminals that do not tell theirs."""

_LIMIT_S = 8.0
"""Seconds of a measurement, by default."""

Schemes = Annotated[
    str | None,
    typer.Option(
        help=f"With commas: {', '.join(SCHEMES)}. Default: none,int8,nf4; with --memory or --speed nf4-double, too."
    ),
]
Shape = Annotated[str | None, typer.Option(help=f"Random weights of this shape instead: {', '.join(SHAPES)}.")]
Without = Annotated[
    str,
    typer.Option(help=f"Parts to leave out, with commas: {', '.join(OVERVIEW)}; with --quality {', '.join(QUALITY)}."),
]


@command
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure a model in several schemes: memory, speed, training and quality; the last line is JSON.

    --memory compares estimates with measurements; --speed measures our engine against the device's limits, with
    shared prefixes, and beside langchain-huggingface; --quality measures divergence from 16 bits, valid calls and JSON,
    retrieval, and tasks of yours; --tune measures kernels on this GPU, and keeps the fastest configs for later runs.
    """

    model: Annotated[
        str | None, typer.Argument(help="Folder, or repository on the Hub. Default: a small demo model.")
    ] = None
    shape: Shape = None
    schemes: Schemes = None
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="A quantized checkpoint as label=FOLDER, one more row; may be repeated.")
    ] = None
    device: Device = None
    kernel: Annotated[
        str, typer.Option(help="Kernel for GPTQ, such as marlin; several with commas make a row each.")
    ] = "auto"
    without: Without = ""
    text: Annotated[Path | None, typer.Option(help="Text for the quality. Default: the package's own.")] = None
    new_tokens: Annotated[int, typer.Option(help="Length of the texts that are generated.")] = 128
    batches: Annotated[
        str | None, typer.Option(help="Texts at once, with commas. Default: 1,2,4,8,16; with --speed 1,8,32,64.")
    ] = None
    lengths: Annotated[str, typer.Option(help="Lengths of single texts, with commas.")] = "30,512"
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 30
    prefill_batches: Annotated[str, typer.Option(help="Long prompts at once, with commas.")] = "1,16"
    prefill_tokens: Annotated[int, typer.Option(help="Length of the long prompts.")] = 512
    cache_new_tokens: Annotated[int, typer.Option(help="Length of texts with and without KV cache.")] = 16
    train_batch: Annotated[int, typer.Option(help="Texts at once in training.")] = 2
    train_tokens: Annotated[int, typer.Option(help="Length of texts in training.")] = 256
    quality_tokens: Annotated[int, typer.Option(help="Most tokens of the text for the quality; 0 for all.")] = 4096
    repeats: Annotated[int, typer.Option(help="Runs of each measurement; the median counts.")] = 3
    limit_s: Annotated[
        float | None,
        typer.Option(help="Seconds a measurement may take; longer texts get shorter. Default: 8; --tune: 600 in all."),
    ] = None
    peer: Annotated[
        bool | None,
        typer.Option(
            help="Measure transformers' generate beside it; with --speed langchain-huggingface, if installed."
        ),
    ] = None
    peer_new_tokens: Annotated[int, typer.Option(help="Length of the peer's texts in batches.")] = 32
    peer_repeats: Annotated[int, typer.Option(help="Runs of the peer's measurements.")] = 1
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the document into this file, too.")] = None
    plots: Annotated[Path | None, typer.Option(help="Draw figures into this folder.")] = None
    plot_format: Annotated[str, typer.Option(help="png, svg, pdf, or several with commas.")] = "png"
    from_json: Annotated[
        Path | None, typer.Option(help="Measure nothing: show and draw the document in this file, of --json.")
    ] = None
    memory: Annotated[bool, typer.Option("--memory", help="Measure estimate, report and nvidia-smi instead.")] = False
    batch: Annotated[int, typer.Option(help="With --memory: texts at once.")] = 1
    speed: Annotated[bool, typer.Option("--speed", help="Measure our engine's speed in depth instead.")] = False
    shared: Annotated[int, typer.Option(help="With --speed: requests that share a prefix; 0 for none.")] = 64
    shared_tokens: Annotated[int, typer.Option(help="With --speed: length of that prefix.")] = 1000
    long_prompt_tokens: Annotated[int, typer.Option(help="With --speed: length of the long prompt; 0: none.")] = 512
    quality: Annotated[bool, typer.Option("--quality", help="Measure the quality of answers instead.")] = False
    tasks: Annotated[
        str | None,
        typer.Option(help="With --quality: FOLDER or FOLDER:name,name with tasks of lm-evaluation-harness."),
    ] = None
    task_questions: Annotated[int, typer.Option(help="With --tasks: most questions of each; 0 for all.")] = 0
    chat: Annotated[bool, typer.Option("--chat", help="With --tasks: ask by the model's chat template.")] = False
    questions: Annotated[int, typer.Option(help="With --quality: questions of each kind of check.")] = 40
    retrieval_tokens: Annotated[
        str, typer.Option(help="With --quality: lengths of the texts that facts are looked for in, with commas.")
    ] = "512,1024,2048"
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune the kernels of quantized linear layers to this GPU instead.")
    ] = False

    def run(self) -> None:
        """Measure, show and write; or show the document of an earlier bench."""
        if self.from_json is not None:
            self._show(_read_report(self.from_json))
            return
        kind = _kind(memory=self.memory, speed=self.speed, quality=self.quality, tune=self.tune)
        names = self._check(kind)
        if self.tune:
            self._tune(names)
            return
        options = self._options(kind)
        checkpoints = _pairs("--checkpoint", self.checkpoint or [])
        if self.plots is not None:
            from langchain_quantllm.bench.plots import check_plots

            check_plots(_words(self.plot_format))
        inputs = {"text": self._text(options), "tasks": self._tasks(options)}
        report = None
        for report in self._measure(options, names, checkpoints, inputs):
            if self.json_file is not None:  # after each scheme, should the next one end the process
                self.json_file.write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")
        self._finish(report)

    def _check(self, kind: tuple[str, ...]) -> list[str] | None:
        """Check what needs no PyTorch, before it is imported; returns the names of the schemes, None for the usual."""
        if self.tasks is not None and kind != QUALITY:
            msg = f"--tasks {self.tasks!r} belongs to --quality; name that as well."
            raise InvalidOptionError(msg)
        check_file("--json", self.json_file)
        names = None if self.schemes is None else _words(self.schemes)
        for name in names or ():
            scheme_from(name)
        if self.shape is not None:
            check_shape(self.shape)
        elif self.model is not None:
            find_model(self.model)
        return names

    def _options(self, kind: tuple[str, ...]) -> BenchOptions:
        peer = self.peer
        if peer is None:
            peer = not self.speed or is_installed("langchain_huggingface")
        return BenchOptions(
            measurements=kind if kind in (MEMORY, SPEED) else _parts(self.without, kind),
            peer=peer,
            batches=_numbers("--batches", self.batches or ("1,8,32,64" if self.speed else "1,2,4,8,16")),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            peer_new_tokens=self.peer_new_tokens,
            lengths=_numbers("--lengths", self.lengths),
            prefill_batches=_numbers("--prefill-batches", self.prefill_batches),
            prefill_tokens=self.prefill_tokens,
            cache_new_tokens=self.cache_new_tokens,
            train_batch=self.train_batch,
            train_tokens=self.train_tokens,
            quality_tokens=self.quality_tokens or None,
            repeats=self.repeats,
            peer_repeats=self.peer_repeats,
            limit_s=_LIMIT_S if self.limit_s is None else self.limit_s,
            shared=self.shared,
            shared_tokens=self.shared_tokens,
            long_prompt_tokens=self.long_prompt_tokens,
            memory_batch=self.batch,
            questions=self.questions,
            retrieval_tokens=_numbers("--retrieval-tokens", self.retrieval_tokens),
            task_questions=self.task_questions or None,
            task_chat=self.chat,
        )

    def _tune(self, names: list[str] | None) -> None:
        """Tune the kernels, and write their table."""
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.bench.subjects import subjects_of
            from langchain_quantllm.bench.tune import LIMIT_S, tune, unsupported_device
            from langchain_quantllm.loading.sources import stored_quantization
            from langchain_quantllm.memory.measure import device_name
        if (reason := unsupported_device(self.device)) is not None:
            print_error(reason)
            raise typer.Exit(2)
        checkpoints = _pairs("--checkpoint", self.checkpoint or [])
        if names is None and self.model is not None and stored_quantization(self.model):
            names, checkpoints = [], {"checkpoint": self.model, **checkpoints}
        with tempfile.TemporaryDirectory() as scratch:
            folders = _checkpoints(["int8", "nf4"] if names is None else names, self.model, self.shape, Path(scratch))
            found = tune(
                subjects_of(folders, checkpoints, kernel=self.kernel),
                device=device_name(self.device or "cuda"),
                limit_s=LIMIT_S if self.limit_s is None else self.limit_s,
                report=_report,
            )
        _report(f"{found.faster} of {len(found.entries)} are faster than by the rule, {found.left_out} were left out")
        for label, why in found.failures.items():
            print_error(f"{label}: {why}")
        text = json.dumps(found.to_dict())
        if self.json_file is not None:
            self.json_file.write_text(text + "\n", encoding="utf-8")
        out.print(text, markup=False, highlight=False, soft_wrap=True)
        if not found.entries and found.failures:
            raise typer.Exit(1)

    def _text(self, options: BenchOptions) -> str | None:
        """Read the text for the quality; None without that, and for random weights, whose perplexity is no measure."""
        from langchain_quantllm.bench.quality import evaluation_text

        if not {"quality", "predictions"} & set(options.measurements):
            return None
        if self.text is not None:
            return read_text("--text", self.text)
        return evaluation_text() if self.shape is None else None

    def _tasks(self, options: BenchOptions) -> Any:
        """Find and build the tasks of lm-evaluation-harness; None without any."""
        if self.tasks is None or "tasks" not in options.measurements:
            return None
        with err.status("building the tasks"):
            from langchain_quantllm.bench.harness_tasks import TaskFiles

            return TaskFiles(self.tasks)

    def _measure(
        self,
        options: BenchOptions,
        names: list[str] | None,
        checkpoints: Mapping[str, str],
        inputs: Mapping[str, Any],
    ) -> Iterator[Any]:
        """Measure one scheme after another; yields the report so far after each."""
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.bench.machine import describe_machine, measure_copy
            from langchain_quantllm.bench.records import BenchReport, Record
            from langchain_quantllm.bench.runner import run_bench
            from langchain_quantllm.bench.subjects import subjects_of
            from langchain_quantllm.memory.measure import device_name

            device = device_name(self.device or [*accelerators(), "cpu"][0])
        copy = None
        if options.measurements != MEMORY and not set(options.measurements) & set(QUALITY):
            copy = measure_copy(device)
            _report(f"{device} copies {copy['rate_byte_s'] / 1e9:.1f} GB/s, read and written")
        about: dict[str, Any] = {"model": self.model, "shape": self.shape, "kernel": self.kernel}
        about |= {"options": options.to_dict(), "device": device, "machine": describe_machine(device), "copy": copy}
        if names is None:
            names = ["none", "int8", "nf4", *(["nf4-double"] if options.measurements in (MEMORY, SPEED) else [])]
        records: list[Record] = []
        with tempfile.TemporaryDirectory() as scratch:
            folders = _checkpoints(names, self.model, self.shape, Path(scratch))
            subjects = subjects_of(folders, checkpoints, kernel=self.kernel)
            for found in run_bench(subjects, device=device, options=options, copy=copy, report=_report, **inputs):
                records += found
                yield BenchReport(**about, records=tuple(records))

    def _finish(self, report: Any) -> None:
        """Show a report and print its document; it is an error if nothing was measured."""
        if report is None:
            msg = "no schemes were given."
            raise InvalidOptionError(msg)
        self._show(report)
        out.print(json.dumps(report.to_dict()), markup=False, highlight=False, soft_wrap=True)
        asked = report.options["measurements"] or ["loading"]
        if report.failures and not any(report.of(measurement) for measurement in asked):
            msg = f"no scheme could be measured; the first: {report.failures[0].failure}"
            raise InvalidOptionError(msg)

    def _show(self, report: Any) -> None:
        """Print the tables of a report and draw its figures."""
        from langchain_quantllm.bench.plots import save_plots
        from langchain_quantllm.cli.tables import tables

        wide = SafeConsole(width=max(out.width, _WIDTH))
        for table in tables(report):
            wide.print(table)
        if self.plots is not None:
            for file in save_plots(report, self.plots, formats=_words(self.plot_format)):
                _report(f"wrote {file}")


def _checkpoints(names: list[str], model: str | None, shape: str | None, folder: Path) -> dict[str, str]:
    """Find or make the checkpoint of each scheme."""
    if shape is None:
        return dict.fromkeys(names, model or demo_folder() if names else "")
    plain = str(random_checkpoint(shape, folder / "plain")) if set(names) - {"gptq"} else ""
    packed = str(random_checkpoint(shape, folder / "gptq", gptq=True)) if "gptq" in names else ""
    return {name: packed if name == "gptq" else plain for name in names}


def _report(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def _read_report(file: Path) -> Any:
    """Read the document of `--json`."""
    from langchain_quantllm.bench.records import BenchReport

    text = read_text("--from-json", file, "file that --json wrote")
    try:
        return BenchReport.from_dict(json.loads(text))
    except ValueError as error:
        msg = f"--from-json {file} cannot be shown: {error}"
        raise InvalidOptionError(msg) from error


def _kind(**asked: bool) -> tuple[str, ...]:
    """Return the measurements of the bench that was asked for."""
    named = [name for name, is_asked in asked.items() if is_asked]
    if len(named) > 1:
        msg = f"{' and '.join(f'--{name}' for name in named)} are {len(named)} benches; name one of them."
        raise InvalidOptionError(msg)
    return {"memory": MEMORY, "speed": SPEED, "quality": QUALITY, "tune": ()}[named[0]] if named else OVERVIEW


def _parts(without: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of a bench but those left out."""
    left_out = _words(without)
    for part in left_out:
        if part not in parts:
            msg = f"--without {part!r} is not a part{nearest(part, parts)}"
            raise InvalidOptionError(msg)
    return tuple(part for part in parts if part not in left_out)


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
