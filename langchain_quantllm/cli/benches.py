"""The benches as the command line runs them: checkpoints found or made, measured, shown and written down.

Owns what happens between the words of a command and its tables. Measures nothing by itself.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from langchain_quantllm.cli.console import err, out
from langchain_quantllm.cli.tables import generation_table, memory_table, overview_tables, prefill_table
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
        from langchain_quantllm.benchmarks.random_models import random_checkpoint
        from langchain_quantllm.demo_model import demo_model

        names = words(default if self.schemes is None else self.schemes)
        if self.shape is None:
            model = self.model or str(demo_model(progress=False)) if names else ""
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
    from langchain_quantllm.benchmarks.memory import as_document, measure_memory

    sizes: dict[str, Any] = {"new_tokens": new_tokens, "batch": batch}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = job.checkpoints("none,int8,nf4,nf4-double", Path(scratch))
        about = {**job.about, "model": job.model or job.shape}
        del about["shape"]
        rows = []
        for row in measure_memory(checkpoints, device=job.device, kernel=job.kernel, **sizes):
            _report(f"{row.scheme}: loaded in {row.load_s:.1f} s")
            rows.append(row)
            job.write(as_document(rows, **about, **sizes))
    title = f"{job.where}, generating {batch} x {new_tokens} tokens"
    Console(width=max(out.width, 130)).print(memory_table(rows, title))
    job.finish(as_document(rows, **about, **sizes))


def bench_speed(job: Job, options: Any) -> None:
    """Measure our engine in depth."""
    from langchain_quantllm.benchmarks.speed import measure_speed
    from langchain_quantllm.benchmarks.speed_results import as_document

    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = job.checkpoints("none,int8,nf4,nf4-double", Path(scratch))
        what: dict[str, Any] = {"options": options, "copy_speed": _measure_copy(job.device)}
        rows = []
        for row in measure_speed(checkpoints, device=job.device, kernel=job.kernel, report=_report, **what):
            rows.append(row)
            job.write(as_document(rows, **job.about, **what))
    wide = Console(width=max(out.width, 150))
    sizes = f"{options.prompt_tokens} tokens in, {options.new_tokens} out"
    wide.print(generation_table(rows, f"{job.where}, {sizes}: tokens/s, and a step in ms"))
    wide.print(prefill_table(rows, f"{job.where}: seconds"))
    job.finish(as_document(rows, **job.about, **what))


def bench_overview(
    job: Job, options: Any, own: dict[str, str], text: Path | None, plots: Path | None, plot_format: str
) -> None:
    """Measure everything of each scheme; see `OverviewOptions`."""
    from langchain_quantllm.benchmarks.overview import measure_overview, subjects_of
    from langchain_quantllm.benchmarks.overview_results import as_document
    from langchain_quantllm.benchmarks.plots import check_plots

    if plots is not None:
        check_plots(words(plot_format))
    evaluated = _read_text(text, job.shape) if "quality" in options.parts else None
    for name in words(job.schemes or ""):
        scheme_from(name)  # raises, before anything is made, where it is not known
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
    from langchain_quantllm.benchmarks.plots import save_plots

    wide = Console(width=max(out.width, 110))
    for table in overview_tables(document) if document else ():
        wide.print(table)
    if plots is not None and document:
        for file in save_plots(document, plots, formats=words(plot_format)):
            _report(f"wrote {file}")
    if job is not None:
        job.finish(json.dumps(document))


def _measure_copy(device: str) -> Any:
    from langchain_quantllm.benchmarks.speed import measure_copy

    copy_speed = measure_copy(device)
    _report(f"{device} copies {copy_speed.rate_byte_s / 1e9:.1f} GB/s, read and written")
    return copy_speed


def _read_text(file: Path | None, shape: str | None) -> str | None:
    """Give the text for the quality; None for random weights, whose perplexity says nothing."""
    from langchain_quantllm.benchmarks.quality import evaluation_text

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
