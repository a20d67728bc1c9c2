"""The command that puts two models side by side: compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_quantllm.cli.console import Device, Model, app, check_file, demo_folder, err, errors, out, say
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes import SCHEMES

_MARK = "▸"
"""Stands where two texts part."""


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A scheme of the model, a folder, or FOLDER:scheme.")],
    b: Annotated[str, typer.Argument(help="The other one, named in the same way.")],
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to ask; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="What to ask, a line for each prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    device: Device = None,
    kernel: Annotated[str, typer.Option(help="Kernel for GPTQ, such as marlin or triton.")] = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without the chat format.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything into this file, too.")] = None,
) -> None:
    """Let two models, or one in two schemes, answer the same prompts greedily, and show where they part."""
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

        def keep(side: Any, given: list[Any]) -> None:
            answers.append((side, given))
            rows = [{"prompt": text, "a": asdict(answer)} for text, answer in zip(prompts, answers[0][1], strict=True)]
            _write(json_file, {"kind": "comparison", "a": asdict(answers[0][0]), "rows": rows})

        try:
            found = compare_models(
                a,
                b,
                prompts,
                model=model,
                max_new_tokens=max_new_tokens,
                device=device,
                kernel=kernel,
                chat=not raw,
                report=say,
                answered=keep,
            )
        finally:
            if not found and answers:  # the other side failed: what there is is shown
                _show_one(*answers[0], prompts)
        wide = Console(width=max(out.width, 80))
        for one in found:
            wide.print(_answers_table(one))
        wide.print(_sides_table(found))
        out.print(_summary(found), highlight=False)
        _write(json_file, as_document(found))


def _write(file: Path | None, document: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _show_one(side: Any, answers: list[Any], prompts: list[str]) -> None:
    """Show the answers of one side, where the other one has none."""
    table = Table()
    for head in ("prompt", side.label):
        table.add_column(Text(head))
    for text, answer in zip(prompts, answers, strict=True):
        table.add_row(Text(text), Text(answer.text))
    Console(width=max(out.width, 80)).print(table)


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"--file {file} cannot be read: {error}; give a text file in UTF-8, a line for each prompt."
        raise InvalidOptionError(msg) from error
    if not (prompts := [line for line in lines if line.strip()]):
        msg = f"--file {file} holds no prompts; write a line for each."
        raise InvalidOptionError(msg)
    return prompts


def _answers_table(one: Any) -> Table:
    """Put two answers beside each other, with a mark where they part."""
    table = Table(title=Text(one.prompt, style="bold"), title_justify="left", caption_justify="left", expand=True)
    common = len(one.common_text)
    cells = []
    for side, answer in ((one.side_a, one.a), (one.side_b, one.b)):
        table.add_column(Text(side.label), ratio=1, overflow="fold")
        text = Text(answer.text[:common])
        if not one.agree:
            text.append(_MARK, style="bold red")
        cells.append(text.append(answer.text[common:], style="yellow"))
    table.add_row(*cells)
    table.caption = Text(_parting_line(one))
    return table


def _parting_line(one: Any) -> str:
    if one.parting is None:
        return f"the same {len(one.a.tokens)} tokens"
    parting = one.parting
    place = f"after {parting.tokens} token{'' if parting.tokens == 1 else 's'}"
    chosen = [
        "the end" if token is None else repr(token) + ("" if gap is None else f" (by {gap:.2f} nats)")
        for token, gap in ((parting.chosen_a, parting.gap_a_nats), (parting.chosen_b, parting.gap_b_nats))
    ]
    return f"they part {place}: {chosen[0]} or {chosen[1]}"


def _sides_table(found: list[Any]) -> Table:
    import statistics

    from langchain_quantllm.memory import format_bytes

    table = Table()
    for head in ("", "scheme", "weights", "in use", "tokens/s"):
        table.add_column(head, justify="left" if head in ("", "scheme") else "right")
    for name in ("a", "b"):
        side = getattr(found[0], f"side_{name}")
        rates = [rate for one in found if (rate := getattr(one, name).rate_tok_s) is not None]
        rate = f"{statistics.median(rates):.1f}" if rates else "-"
        sizes = (format_bytes(side.weights_bytes), format_bytes(side.used_bytes))
        table.add_row(Text(side.label), side.scheme, *sizes, rate)
    return table


def _summary(found: list[Any]) -> str:
    import statistics

    partings = [one.parting.tokens for one in found if one.parting is not None]
    agreeing = f"{len(found) - len(partings)} of {len(found)} answers are the same"
    if not partings:
        return f"{agreeing}."
    return f"{agreeing}; the others part after {statistics.median(partings):g} tokens in the median."
