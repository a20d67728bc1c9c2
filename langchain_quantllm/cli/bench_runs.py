"""The benches as the command line runs them: checkpoints found or made, measured, shown and written down.

Owns what happens between the words of a command and its tables. Measures nothing by itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from langchain_quantllm.cli.console import check_file, demo_folder, err, find_model, out
from langchain_quantllm.cli.tables import (
    failure_table,
    generation_table,
    memory_table,
    overview_tables,
    prefill_table,
)
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes import scheme_from


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every bench is told."""

    model: str | None
    shape: str | None
    schemes: str | None
    device: str
    kernel: str
    json_file: Path | None

    def check(self) -> None:
        """Check what needs neither torch nor weights: where the document goes, names, and where the model is.

        Raises:
            QuantLLMError: If one is not known or not there.
        """
        from langchain_quantllm.bench.random_models import check_shape

        check_file("--json", self.json_file)
        for name in words(self.schemes or ""):
            scheme_from(name)
        if self.shape is not None:
            check_shape(self.shape)
        elif self.model is not None:
            find_model(self.model)

    @property
    def about(self) -> dict[str, Any]:
        """What its document says of it."""
        return {"model": self.model, "shape": self.shape, "device": self.device, "kernel": self.kernel}

    @property
    def where(self) -> str:
        """What its tables say of it."""
        return f"{self.model or self.shape or 'demo model'} on {self.device}"

    def checkpoints(self, default: str, folder: Path) -> dict[str, str]:
        """Find or make the checkpoint of each scheme."""
        from langchain_quantllm.bench.random_models import random_checkpoint

        names = words(default if self.schemes is None else self.schemes)
        if self.shape is None:
            model = self.model or demo_folder() if names else ""
            return dict.fromkeys(names, model)
        plain = str(random_checkpoint(self.shape, folder / "plain")) if set(names) - {"gptq"} else ""
        packed = str(random_checkpoint(self.shape, folder / "gptq", gptq=True)) if "gptq" in names else ""
        return {name: packed if name == "gptq" else plain for name in names}

    def finish(self, document: str) -> None:
        """Print the document as the last line, and write it where it was asked for."""
        self.write(document)
        out.print(document, markup=False, highlight=False, soft_wrap=True)

    def write(self, document: str) -> None:
        """Write the document where it was asked for: after each scheme, should the next one be the last."""
        if self.json_file is not None:
            self.json_file.write_text(document + "\n", encoding="utf-8")


def _report(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def bench_memory(job: Job, *, new_tokens: int, batch: int) -> None:
    """Measure what each scheme takes, beside its estimate."""
    from langchain_quantllm.bench.memory import as_document, measure_memory

    sizes: dict[str, Any] = {"new_tokens": new_tokens, "batch": batch}
    about = {**job.about, "model": job.model or job.shape, **sizes}
    del about["shape"]

    def measure(checkpoint: dict[str, str]) -> Any:
        row = next(measure_memory(checkpoint, device=job.device, kernel=job.kernel, **sizes))
        _report(f"{row.scheme}: loaded in {row.load_s:.1f} s")
        return row

    rows, failures = _measure_each(job, measure, partial(as_document, **about))
    title = f"{job.where}, generating {batch} x {new_tokens} tokens"
    _finish(job, [memory_table(rows, title)], 130, as_document(rows, failures=failures, **about), failures)


def bench_speed(job: Job, options: Any) -> None:
    """Measure our engine in depth."""
    from langchain_quantllm.bench.speed import measure_speed
    from langchain_quantllm.bench.speed_results import as_document

    what: dict[str, Any] = {"options": options, "copy_speed": _measure_copy(job.device)}

    def measure(checkpoint: dict[str, str]) -> Any:
        return next(measure_speed(checkpoint, device=job.device, kernel=job.kernel, report=_report, **what))

    rows, failures = _measure_each(job, measure, partial(as_document, **job.about, **what))
    sizes = f"{options.prompt_tokens} tokens in, {options.new_tokens} out"
    tables = [
        generation_table(rows, f"{job.where}, {sizes}: tokens/s, and a step in ms"),
        prefill_table(rows, f"{job.where}: seconds"),
    ]
    _finish(job, tables, 150, as_document(rows, failures=failures, **job.about, **what), failures)


def _measure_each(
    job: Job, measure: Callable[[dict[str, str]], Any], document: Callable[..., str]
) -> tuple[list[Any], list[dict[str, str]]]:
    """Measure one scheme after another, and write down after each what there is; one that fails leaves the others."""
    from langchain_quantllm.bench.overview_results import reason_of
    from langchain_quantllm.loading.devices import release_memory

    rows: list[Any] = []
    failures: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in job.checkpoints("none,int8,nf4,nf4-double", Path(scratch)).items():
            try:
                rows.append(measure({name: folder}))
            except Exception as error:  # whatever a kernel or a library says belongs into the row
                failures.append({"scheme": name, "reason": reason_of(error)})
                _report(f"{name} failed: {failures[-1]['reason']}")
            release_memory()  # outside of the handler, whose error holds on to the tensors of what failed
            job.write(document(rows, failures=failures))
    return rows, failures


def _finish(job: Job, tables: list[Any], width: int, document: str, failures: list[dict[str, str]]) -> None:
    """Show what was measured and what failed; it is an error where nothing was measured."""
    wide = Console(width=max(out.width, width))
    measured = [table for table in tables if table.row_count]
    for table in [*measured, *([failure_table(failures)] if failures else [])]:
        wide.print(table)
    job.finish(document)
    if not measured:
        reason = f"no scheme could be measured; the first: {failures[0]['reason']}" if failures else ""
        raise InvalidOptionError(reason or "no schemes were given.")


def bench_overview(
    job: Job, options: Any, own: dict[str, str], text: Path | None, plots: Path | None, plot_format: str
) -> None:
    """Measure everything of each scheme; see `OverviewOptions`."""
    from langchain_quantllm.bench.overview import measure_overview, subjects_of
    from langchain_quantllm.bench.overview_results import as_document
    from langchain_quantllm.bench.plots import check_plots

    if plots is not None:
        check_plots(words(plot_format))
    evaluated = _read_text(text, job.shape) if "quality" in options.parts else None
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        schemes = job.checkpoints("none,int8,nf4", Path(scratch))
        subjects = subjects_of(schemes, own, kernel=job.kernel)
        what: dict[str, Any] = {"options": options, "copy_speed": _measure_copy(job.device)}
        rows = []
        for row in measure_overview(subjects, device=job.device, text=evaluated, report=_report, **what):
            rows.append(row)
            document = as_document(rows, **job.about, **what)
            job.write(json.dumps(document))
    show(document, job, plots, plot_format)
    if not any(row.memory for row in rows):
        msg = (
            f"no scheme could be loaded; the first: {rows[0].failures[0].reason}" if rows else "no schemes were given."
        )
        raise InvalidOptionError(msg)


def show(document: dict[str, Any], job: Job | None, plots: Path | None, plot_format: str) -> None:
    """Print a document's tables, draw its figures, and print it."""
    from langchain_quantllm.bench.plots import save_plots

    wide = Console(width=max(out.width, 110))
    for table in overview_tables(document) if document else ():
        wide.print(table)
    if plots is not None and document:
        for file in save_plots(document, plots, formats=words(plot_format)):
            _report(f"wrote {file}")
    if job is not None:
        job.finish(json.dumps(document))


def _measure_copy(device: str) -> Any:
    from langchain_quantllm.bench.speed import measure_copy

    copy_speed = measure_copy(device)
    _report(f"{device} copies {copy_speed.rate_byte_s / 1e9:.1f} GB/s, read and written")
    return copy_speed


def _read_text(file: Path | None, shape: str | None) -> str | None:
    """Give the text for the quality; None for random weights, whose perplexity says nothing."""
    from langchain_quantllm.bench.quality import evaluation_text

    if file is None:
        return None if shape is not None else evaluation_text()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"--text {file} cannot be read: {error}; give a text file in UTF-8."
        raise InvalidOptionError(msg) from error


def read_document(file: Path) -> dict[str, Any]:
    """Read what `--json` wrote."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"--from-json {file} cannot be read: {error}; give a file that --json wrote."
        raise InvalidOptionError(msg) from error
    if not isinstance(document, dict) or document.get("kind") != "overview":
        msg = f"--from-json {file} holds no overview; give a file that --json wrote, without --memory or --speed."
        raise InvalidOptionError(msg)
    return document


def words(text: str) -> list[str]:
    """Read words with commas in between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Read numbers with commas in between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        msg = f"{option} {text!r} is not allowed; give whole numbers with commas, such as 1,8,32."
        raise InvalidOptionError(msg) from None


def pairs(option: str, given: list[str]) -> dict[str, str]:
    """Read label=value."""
    read: dict[str, str] = {}
    for text in given:
        label, _, value = text.partition("=")
        if not label or not value or label in read:
            msg = f"{option} {text!r} is not allowed; write label=FOLDER, each label once, such as gptq-4=models/gptq."
            raise InvalidOptionError(msg)
        read[label] = value
    return read
