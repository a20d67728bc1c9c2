"""The command that compares two models: compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from langchain_quantllm.cli.console import (
    Device,
    Model,
    SafeConsole,
    app,
    check_file,
    demo_folder,
    err,
    errors,
    out,
    read_text,
    say,
)
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes import SCHEMES

_MARK = "▸"
"""Mark of the place where two texts diverge."""


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A scheme of the model, a folder, or FOLDER:scheme.")],
    b: Annotated[str, typer.Argument(help="The other model, named in the same way.")],
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="File of prompts, a line for each.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    device: Device = None,
    kernel: Annotated[str, typer.Option(help="Kernel for GPTQ, such as marlin or triton.")] = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without the chat format.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the document into this file, too.")] = None,
) -> None:
    """Let two models, or one in two schemes, answer the same prompts greedily, and show where they diverge."""
    with errors():
        check_file("--json", json_file)
        prompts = [*(prompt or []), *(_lines(file) if file is not None else [])]
        if model is None and {a, b} & set(SCHEMES):
            model = demo_folder()
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.bench.compare import PROMPTS, as_document
            from langchain_quantllm.bench.compare import compare as compare_models

        prompts = prompts or list(PROMPTS)
        answers: list[tuple[Any, list[Any]]] = []
        found: list[Any] = []

        def keep(answering: Any, given: list[Any]) -> None:
            answers.append((answering, given))
            rows = [{"prompt": text, "a": asdict(answer)} for text, answer in zip(prompts, answers[0][1], strict=True)]
            _write(json_file, {"kind": "comparison", "a": asdict(answers[0][0]), "rows": rows})

        options: dict[str, Any] = {"model": model, "device": device, "kernel": kernel, "chat": not raw}
        options |= {"max_new_tokens": max_new_tokens, "report": say, "answered": keep}
        try:
            found = compare_models(a, b, prompts, **options)
        finally:
            if not found and answers:  # the other model failed: the answers of the first are shown
                _show_one(*answers[0], prompts)
        wide = SafeConsole(width=max(out.width, 80))
        for one in found:
            wide.print(_answers_table(one))
        wide.print(_models_table(found))
        out.print(_summary(found), highlight=False)
        _write(json_file, as_document(found))


def _write(file: Path | None, document: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _show_one(compared: Any, answers: list[Any], prompts: list[str]) -> None:
    """Show the answers of one model, where the other one has none."""
    table = Table()
    for head in ("prompt", compared.label):
        table.add_column(Text(head))
    for text, answer in zip(prompts, answers, strict=True):
        table.add_row(Text(text), Text(answer.text))
    SafeConsole(width=max(out.width, 80)).print(table)


def _lines(file: Path) -> list[str]:
    lines = read_text("--file", file, "text file in UTF-8, a line for each prompt").splitlines()
    if not (prompts := [line for line in lines if line.strip()]):
        msg = f"--file {file} holds no prompts; write a line for each."
        raise InvalidOptionError(msg)
    return prompts


def _answers_table(one: Any) -> Table:
    """Put two answers beside each other, with a mark where they diverge."""
    table = Table(title=Text(one.prompt, style="bold"), title_justify="left", caption_justify="left", expand=True)
    common = len(one.common_text)
    cells = []
    for compared, answer in ((one.model_a, one.a), (one.model_b, one.b)):
        table.add_column(Text(compared.label), ratio=1, overflow="fold")
        text = Text(answer.text[:common])
        if not one.agree:
            text.append(_MARK, style="bold red")
        cells.append(text.append(answer.text[common:], style="yellow"))
    table.add_row(*cells)
    table.caption = Text(_divergence_line(one))
    return table


def _divergence_line(one: Any) -> str:
    if one.divergence is None:
        return f"the same {len(one.a.tokens)} tokens"
    divergence = one.divergence
    place = f"after {divergence.tokens} token{'' if divergence.tokens == 1 else 's'}"
    chosen = [
        "the end" if token is None else repr(token) + ("" if gap is None else f" (by {gap:.2f} nats)")
        for token, gap in ((divergence.chosen_a, divergence.gap_a_nats), (divergence.chosen_b, divergence.gap_b_nats))
    ]
    return f"they diverge {place}: {chosen[0]} or {chosen[1]}"


def _models_table(found: list[Any]) -> Table:
    import statistics

    from langchain_quantllm.memory import format_bytes

    table = Table()
    for head in ("", "scheme", "weights", "in use", "tokens/s"):
        table.add_column(head, justify="left" if head in ("", "scheme") else "right")
    for name in ("a", "b"):
        compared = getattr(found[0], f"model_{name}")
        rates = [rate for one in found if (rate := getattr(one, name).rate_tok_s) is not None]
        rate = f"{statistics.median(rates):.1f}" if rates else "-"
        sizes = (format_bytes(compared.weights_bytes), format_bytes(compared.used_bytes))
        table.add_row(Text(compared.label), compared.scheme, *sizes, rate)
    return table


def _summary(found: list[Any]) -> str:
    import statistics

    places = [one.divergence.tokens for one in found if one.divergence is not None]
    agreeing = f"{len(found) - len(places)} of {len(found)} answers are the same"
    if not places:
        return f"{agreeing}."
    return f"{agreeing}; the others diverge after {statistics.median(places):g} tokens in the median."
