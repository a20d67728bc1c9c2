"""Benches of tiny models: their runs, reports and commands."""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from langchain_quantllm.bench.machine import describe_machine
from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.records import BenchReport, Record
from langchain_quantllm.bench.runner import run_bench
from langchain_quantllm.bench.subjects import Subject
from langchain_quantllm.cli import app

COPY = {"buffer_bytes": 1_000, "rate_byte_s": 1e9}


def measure(
    subjects: list[Subject], options: BenchOptions, *, text: str | None = None
) -> tuple[BenchReport, list[str]]:
    """Run a bench on the CPU; returns its report and the lines of its progress."""
    lines: list[str] = []
    records: list[Record] = []
    for found in run_bench(subjects, device="cpu", options=options, copy=COPY, text=text, report=lines.append):
        records += found
    return report_of(records, options), lines


def report_of(records: list[Record], options: BenchOptions, *, model: str | None = None) -> BenchReport:
    """The report of some records on this machine; without a model, of the tiny shape."""
    return BenchReport(
        model=model,
        shape=None if model else "tiny",
        device="cpu",
        kernel="auto",
        machine=describe_machine("cpu"),
        options=options.to_dict(),
        copy=COPY,
        records=tuple(records),
    )


def bench(*words: object) -> Result:
    """Call `langchain-quantllm bench` on the CPU."""
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *(str(word) for word in words)])


def with_begin_token(tokenizer: Any) -> Any:
    """A copy of a tokenizer that puts its begin token before every text, as Llama's does."""
    copied = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    begin = copied.convert_ids_to_tokens(0)
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin}:0 $A:0", pair=None, special_tokens=[(begin, 0)]
    )
    assert copied("a")["input_ids"][0] == 0
    return copied
