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
    reference: Annotated[
        str | None,
        typer.Option(help="A third model that reads both, such as none. Default: the one of the two in 16 bits."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    device: Device = None,
    kernel: Annotated[str, typer.Option(help="Kernel for GPTQ, such as marlin or triton.")] = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without the chat format.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the document into this file, too.")] = None,
) -> None:
    """Let two models, or one in two schemes, answer the same prompts greedily.

    Shows where the answers diverge, and which of them is nearer to 16 bits.
    """
    with errors():
        check_file("--json", json_file)
        prompts = [*(prompt or []), *(_lines(file) if file is not None else [])]
        if model is None and {a, b, reference} & set(SCHEMES):
            model = demo_folder()
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.bench.compare import PROMPTS, as_document
            from langchain_quantllm.bench.compare import compare as compare_models

        prompts = prompts or list(PROMPTS)
        answers: dict[str, tuple[Any, list[Any]]] = {}  # by the side, in the order in which they came
        found: list[Any] = []

        def keep(answering: Any, given: list[Any]) -> None:
            side = "a" if answering.label == a and "a" not in answers else "b"
            answers[side] = answering, given
            sides = {name: asdict(one) for name, (one, _) in answers.items()}
            rows = [
                {"prompt": text, **{name: asdict(own[n]) for name, (_, own) in answers.items()}}
                for n, text in enumerate(prompts)
            ]
            _write(json_file, {"kind": "comparison", **sides, "rows": rows})

        options: dict[str, Any] = {"model": model, "device": device, "kernel": kernel, "chat": not raw}
        options |= {"reference": reference}
        options |= {"max_new_tokens": max_new_tokens, "report": say, "answered": keep}
        try:
            found = compare_models(a, b, prompts, **options)
        finally:
            for answered in () if found else answers.values():  # another model failed: what there is, is shown
                _show_one(*answered, prompts)
        wide = SafeConsole(width=max(out.width, 80))
        for one in found:
            wide.print(_answers_table(one))
        wide.print(_models_table(found))
        out.print(_summary(found), highlight=False)
        _write(json_file, as_document(found))


def _write(file: Path | None, document: dict[str, Any]) -> None:
    if file is not None:
        text = json.dumps(document, ensure_ascii=False, indent=1)
        # Halves of characters, as prompts in another encoding have them, are written as JSON escapes them.
        file.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def _show_one(compared: Any, answers: list[Any], prompts: list[str]) -> None:
    """Show the answers of one model, where they cannot be compared."""
    table = Table()
    for head in ("prompt", compared.label):
        table.add_column(Text(head))
    for text, answer in zip(prompts, answers, strict=True):
        table.add_row(Text(text), Text(answer.text))
    SafeConsole(width=max(out.width, 80)).print(table)


def _lines(file: Path) -> list[str]:
    lines = read_text("--file", file, "text file in UTF-8, a line for each prompt").split("\n")
    if not (prompts := [line.removesuffix("\r") for line in lines if line.strip()]):
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
    line = f"they diverge {place}: {chosen[0]} or {chosen[1]}"
    if divergence.reference_choice is None:
        return line
    gap = divergence.reference_gap_nats
    by = "" if gap is None else f", and {'the first' if gap > 0 else 'the second'} likelier by {abs(gap):.2f} nats"
    return f"{line}; {one.reference} finds {divergence.reference_choice!r} likeliest{by}"


def _models_table(found: list[Any]) -> Table:
    import statistics

    from langchain_quantllm.bench.nearness import mean_kl
    from langchain_quantllm.memory import format_bytes

    table = Table()
    reference = found[0].reference
    read = () if reference is None else (f"divergence from {reference}", f"log-likelihood by {reference}")
    for head in ("", "scheme", "weights", "in use", "tokens/s", *read):
        table.add_column(Text(head), justify="left" if head in ("", "scheme") else "right")
    for name in ("a", "b"):
        compared = getattr(found[0], f"model_{name}")
        rates = [rate for one in found if (rate := getattr(one, name).rate_tok_s) is not None]
        rate = f"{statistics.median(rates):.1f}" if rates else "-"
        sizes = (format_bytes(compared.weights_bytes), format_bytes(compared.used_bytes))
        near = [view for one in found if (view := getattr(one, f"near_{name}")) is not None]
        cells = ["-"] * len(read)
        if read and near:
            kl, tokens = mean_kl(near), sum(len(view.nats) for view in near)
            likelihood = sum(sum(view.nats) for view in near) / tokens
            cells = [f"{kl.mean:.4f} ({kl.low:.4f} to {kl.high:.4f})", f"{likelihood:.3f}"]
        table.add_row(Text(compared.label), compared.scheme, *sizes, rate, *cells)
    return table


def _summary(found: list[Any]) -> str:
    import statistics

    places = [one.divergence.tokens for one in found if one.divergence is not None]
    text = f"{len(found) - len(places)} of {len(found)} answers are the same"
    if places:
        text += f"; the others diverge after {statistics.median(places):g} tokens in the median"
    pairs = [(one.near_a.mean_kl_nats, one.near_b.mean_kl_nats) for one in found if one.near_a and one.near_b]
    if pairs and found[0].reference not in (found[0].model_a.label, found[0].model_b.label):
        counts = {"model_a": sum(x < y for x, y in pairs), "model_b": sum(y < x for x, y in pairs)}
        nearer = max(counts, key=lambda name: counts[name])
        label = "neither" if len({*counts.values()}) == 1 else getattr(found[0], nearer).label
        text += f"; {label} is nearer to {found[0].reference} in {counts[nearer]} of {len(pairs)}"
    return f"{text}."
