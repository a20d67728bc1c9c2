"""The command line: `langchain-quantllm demo | run | chat | memory | doctor`.

Owns all printing of the package. Everything it shows comes from the public classes and
functions; it loads and computes nothing by itself.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from langchain_core.callbacks import BaseCallbackHandler
from rich.console import Console
from rich.table import Table

from langchain_quantllm._version import __version__
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Quantized local language models in LangChain, and what they take.",
)
out = Console()
err = Console(stderr=True)

DEMO_QUESTION = "Why is the sky blue? Answer in two sentences."

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, or repository on the Hub. Default: a small demo model.")
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", "-q", help="none, int8, nf4, nf4-double, fp4, gptq. Default: as the checkpoint is."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, ... Default: the first GPU, else the CPU.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the checkpoint.")]
ShowMemory = Annotated[bool, typer.Option("--memory", help="Show the memory report afterwards.")]


class _LastAnswer(BaseCallbackHandler):
    """Keeps the usage and timing of the last answer."""

    info: dict[str, Any]

    def __init__(self) -> None:
        self.info = {}

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """Note what came with the answer."""
        generation = response.generations[0][0]
        message = getattr(generation, "message", None)  # of a chat model
        self.info = generation.generation_info or {}
        if message is not None:
            self.info = {**message.response_metadata, "usage_metadata": message.usage_metadata}

    def line(self) -> str:
        """Say it in one line."""
        if not self.info:
            return ""
        usage, timing = self.info["usage_metadata"], self.info["timing"]
        rate = f", {timing['rate_tok_s']:.1f} tokens/s" if timing["rate_tok_s"] else ""
        return (
            f"{usage['input_tokens']} tokens in, {usage['output_tokens']} out, first after "
            f"{timing['first_token_s']:.2f} s{rate}, ended by {self.info['finish_reason']}"
        )


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print an error of the package as the sentence that it is; exit with 1, or 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped")
        raise typer.Exit(130) from None
    except (QuantLLMError, ValueError) as error:
        _print_error(str(error))
        raise typer.Exit(1) from None


def _print_error(text: str) -> None:
    err.print("error: ", style="bold red", end="")
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _make_llm(model: str | None, quantization: str | None, **fields: Any) -> Any:
    from langchain_quantllm.demo_model import demo_model
    from langchain_quantllm.llms import QuantizedHuggingFaceLLM

    if model is None:
        with err.status("getting the demo model, SmolLM2-135M-Instruct ..."):
            model = str(demo_model(progress=False))
        quantization = quantization or "nf4"
    given = {name: value for name, value in fields.items() if value is not None}
    return QuantizedHuggingFaceLLM(model_id=model, quantization=quantization, **given)


def _as_chat(llm: Any) -> Any:
    """Give the chat model over the same weights; the model itself where it has no chat format."""
    from langchain_quantllm.chat_models import ChatQuantizedHuggingFace

    fields: dict[str, Any] = {"llm": llm}
    places = (llm.pipeline.tokenizer, getattr(llm.pipeline, "processor", None))
    has_format = any(getattr(place, "chat_template", None) for place in places)
    return ChatQuantizedHuggingFace(**fields) if has_format else llm


def _print_stream(chunks: Iterator[Any], thoughts: Console = out) -> str:
    """Print an answer as it comes, what the model thinks before it dimmed, and give it."""
    text = ""
    thinks = False
    for chunk in chunks:
        if thought := "" if isinstance(chunk, str) else chunk.additional_kwargs.get("reasoning_content", ""):
            thoughts.print(thought, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
            thinks = True
        given = chunk if isinstance(chunk, str) else str(chunk.text)
        if given and thinks:
            thoughts.print("\n")
            thinks = False
        out.print(given, end="", markup=False, highlight=False, soft_wrap=True)
        text += given
    out.print()
    return text


@app.command()
def demo() -> None:
    """Load a small model in nf4 and stream an answer through a LangChain chain, with what it took."""
    with _errors():
        llm = _make_llm(None, "nf4", max_new_tokens=120, progress=False)
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import ChatPromptTemplate

        with err.status("loading it in nf4 ..."):
            llm.load()
        chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | _as_chat(llm) | StrOutputParser()
        answer = _LastAnswer()
        out.print(f"[bold]{DEMO_QUESTION}[/]")
        _print_stream(chain.stream({"question": DEMO_QUESTION}, {"callbacks": [answer]}))
        out.print(f"[dim]{answer.line()}[/]\n", highlight=False)
        out.print(str(llm.memory_report()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    model: Model = None,
    quantization: Quantization = None,
    device: Device = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the prompt as it is, without the model's chat format.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    memory: ShowMemory = False,
) -> None:
    """Answer one prompt, streamed to standard output; figures go to standard error."""
    with _errors():
        text = sys.stdin.read() if prompt == "-" else prompt
        llm = _make_llm(
            model,
            quantization,
            device=device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop or None,
            trust_remote_code=trust_remote_code,
        )
        llm.load()
        answer = _LastAnswer()
        _print_stream((llm if raw else _as_chat(llm)).stream(text, {"callbacks": [answer]}), thoughts=err)
        err.print(f"[dim]{answer.line()}[/]", highlight=False)
        if memory:
            err.print(str(llm.memory_report()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def chat(
    model: Model = None,
    quantization: Quantization = None,
    device: Device = None,
    system: Annotated[str | None, typer.Option(help="What the model is told about its role.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D or /bye ends, /memory shows what it takes."""
    with _errors():
        llm = _make_llm(
            model,
            quantization,
            device=device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        llm = _as_chat(llm.load())
        messages = [{"role": "system", "content": system}] if system else []
        while True:
            try:
                text = out.input("[bold]>>>[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                out.print()
                return
            if text in ("/bye", "/exit", "/quit"):
                return
            if text == "/memory":
                out.print(str(llm.memory_report()), markup=False, highlight=False, soft_wrap=True)
            elif text:
                _answer(llm, messages, text)


def _answer(llm: Any, messages: list[dict[str, str]], text: str) -> None:
    """Stream one turn and add it to the conversation, unless it failed or was stopped."""
    turn = [*messages, {"role": "user", "content": text}]
    answer = _LastAnswer()
    try:
        reply = _print_stream(llm.stream(turn, {"callbacks": [answer]}))
    except KeyboardInterrupt:
        out.print("\n[dim]stopped; the turn is forgotten[/]")
    except QuantLLMError as error:
        _print_error(str(error))
    else:
        out.print(f"[dim]{answer.line()}[/]", highlight=False)
        messages[:] = [*turn, {"role": "assistant", "content": reply}]


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub; only its config is read.")],
    tokens: Annotated[int, typer.Option(help="Length of a sequence in tokens, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once, for the KV cache.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Estimate what a model takes in every scheme, and which of them fit on this machine."""
    with _errors():
        from langchain_quantllm.checkpoint import LoadSpec, find_checkpoint
        from langchain_quantllm.memory import available_memory, estimate_memory, format_bytes
        from langchain_quantllm.placement import default_device_map
        from langchain_quantllm.schemes import SCHEMES

        spec = LoadSpec(model_id=model, revision=revision, trust_remote_code=trust_remote_code)
        config = find_checkpoint(spec).config
        estimate = estimate_memory(config, trust_remote_code=trust_remote_code)
        device = str(next(iter(default_device_map(spec).values())))
        device = f"cuda:{device}" if device.isdigit() else device
        free_bytes = available_memory(device)
        table = Table(title=f"{model}: estimate, {format_bytes(free_bytes)} free on {device}", title_justify="left")
        for column in (
            "scheme",
            "weights",
            "against 16 bits",
            f"KV cache, {batch} x {tokens} tokens",
            "in all",
            "fits",
        ):
            table.add_column(column, justify="left" if column == "scheme" else "right")
        known: dict[str, Any] = {name: SCHEMES[name] for name in estimate.bytes_by_scheme} or {
            estimate.scheme.name: None
        }
        for name, scheme in known.items():
            one = estimate_memory(config, scheme, trust_remote_code=trust_remote_code)
            cache_bytes = one.kv_cache_bytes(tokens, batch)
            whole_bytes = one.total_bytes + cache_bytes
            table.add_row(
                name,
                format_bytes(one.total_bytes),
                f"{round(-100 * one.saving):+d}%",
                format_bytes(cache_bytes),
                format_bytes(whole_bytes),
                "yes" if whole_bytes <= free_bytes else "no",
            )
        out.print(table)
        context = f"; the model's context is {estimate.context_tokens} tokens" if estimate.context_tokens else ""
        out.print(f"{estimate.parameters:,} parameters{context}. 1 MB is 1,000,000 bytes.", highlight=False)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Folder, or repository on the Hub.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead: llama-2-7b or tiny.")] = None,
    schemes: Annotated[str, typer.Option(help="Names of schemes, with commas.")] = "none,int8,nf4,nf4-double",
    device: Device = None,
    new_tokens: Annotated[int, typer.Option(help="Length of the texts that are generated.")] = 128,
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    kernel: Annotated[str, typer.Option(help="Kernel for GPTQ, such as marlin or triton.")] = "auto",
    speed: Annotated[bool, typer.Option("--speed", help="Measure the speed instead of the memory.")] = False,
    batches: Annotated[str, typer.Option(help="Speed: requests at once, with commas.")] = "1,8,32,64",
    prompt_tokens: Annotated[int, typer.Option(help="Speed: length of the prompts.")] = 30,
    repeats: Annotated[int, typer.Option(help="Speed: runs of each measurement; the median counts.")] = 3,
    shared: Annotated[int, typer.Option(help="Speed: requests that share a prefix; 0 for none.")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="Speed: length of that prefix.")] = 1000,
    long_prompt_tokens: Annotated[int, typer.Option(help="Speed: length of the long prompt; 0 for none.")] = 512,
    peer: Annotated[
        bool | None, typer.Option(help="Speed: langchain-huggingface beside it. Default: where it is installed.")
    ] = None,
    peer_new_tokens: Annotated[int, typer.Option(help="Speed: length of its texts in batches of 4.")] = 32,
) -> None:
    """Measure the memory of every scheme, or with --speed the speed; the last line is JSON.

    Memory: estimate, report and nvidia-smi. Speed: the limit by the memory's bandwidth, the step by itself, calls
    through LangChain, the first token of a long prompt, a shared prefix, and langchain-huggingface.
    """
    with _errors():
        from langchain_quantllm import bench as benches

        device = benches.check_device(device or ([*_accelerators(), "cpu"])[0])
        if speed:
            from langchain_quantllm.packages import is_installed
            from langchain_quantllm.speed_results import SpeedOptions

            options = SpeedOptions(
                batches=_numbers("--batches", batches),
                new_tokens=new_tokens,
                prompt_tokens=prompt_tokens,
                repeats=repeats,
                peer=is_installed("langchain_huggingface") if peer is None else peer,
                peer_new_tokens=peer_new_tokens,
                shared=shared,
                shared_tokens=shared_tokens,
                long_prompt_tokens=long_prompt_tokens,
            )
            _bench_speed(model, shape, schemes.split(","), device, kernel, options)
            return
        with tempfile.TemporaryDirectory() as scratch:
            checkpoints = _bench_checkpoints(model, shape, schemes.split(","), Path(scratch))
            rows = []
            sizes: dict[str, Any] = {"new_tokens": new_tokens, "batch": batch}
            for row in benches.measure_memory(checkpoints, device=device, kernel=kernel, **sizes):
                err.print(f"{row.scheme}: loaded in {row.load_s:.1f} s", highlight=False)
                rows.append(row)
        title = f"{model or shape or 'demo model'} on {device}, generating {batch} x {new_tokens} tokens"
        Console(width=max(out.width, 130)).print(_memory_table(rows, title))
        document = benches.as_document(rows, model=model or shape, device=device, kernel=kernel, **sizes)
        out.print(document, markup=False, highlight=False, soft_wrap=True)


def _bench_checkpoints(model: str | None, shape: str | None, schemes: list[str], folder: Path) -> dict[str, str]:
    """Find or make the checkpoint of each scheme."""
    from langchain_quantllm.bench import random_checkpoint
    from langchain_quantllm.demo_model import demo_model

    if shape is None:
        return dict.fromkeys(schemes, model or str(demo_model(progress=False)))
    plain = str(random_checkpoint(shape, folder / "plain")) if set(schemes) - {"gptq"} else ""
    return {
        name: str(random_checkpoint(shape, folder / "gptq", gptq=True)) if name == "gptq" else plain for name in schemes
    }


def _memory_table(rows: list[Any], title: str) -> Table:
    from langchain_quantllm.memory import format_bytes

    table = Table(title=title, title_justify="left")
    heads = ("scheme", "estimate", "weights", "allocated", "reserved", "nvidia-smi")
    for head in (*heads, "generating: allocated", "reserved", "nvidia-smi", "unloaded: allocated", "tokens/s"):
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for row in rows:
        sizes = (
            row.estimate_bytes,
            row.weights_bytes,
            *(getattr(row.loaded, f"{kind}_bytes") for kind in ("allocated", "reserved", "driver")),
            *(getattr(row.generating, f"{kind}_bytes") for kind in ("allocated", "reserved", "driver")),
            row.unloaded.allocated_bytes,
        )
        cells = ["-" if size is None else format_bytes(size) for size in sizes]
        table.add_row(row.scheme, *cells, f"{row.rate_tok_s:.1f}" if row.rate_tok_s else "-")
    return table


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read numbers with commas in between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        msg = f"{option} {text!r} is not allowed; give whole numbers with commas, such as 1,8,32."
        raise InvalidOptionError(msg) from None


def _bench_speed(
    model: str | None, shape: str | None, schemes: list[str], device: str, kernel: str, options: Any
) -> None:
    from langchain_quantllm import speed as speeds
    from langchain_quantllm.speed_results import as_document

    def report(line: str) -> None:
        err.print(line, markup=False, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = _bench_checkpoints(model, shape, schemes, Path(scratch))
        copy_speed = speeds.measure_copy(device)
        report(f"{device} copies {copy_speed.rate_byte_s / 1e9:.1f} GB/s, read and written")
        what: dict[str, Any] = {"options": options, "copy_speed": copy_speed}
        rows = list(speeds.measure_speed(checkpoints, device=device, kernel=kernel, report=report, **what))
    where = f"{model or shape or 'demo model'} on {device}"
    wide = Console(width=max(out.width, 150))
    sizes = f"{options.prompt_tokens} tokens in, {options.new_tokens} out"
    wide.print(_generation_table(rows, f"{where}, {sizes}: tokens/s, and a step in ms"))
    wide.print(_prefill_table(rows, f"{where}: seconds"))
    document = as_document(rows, model=model, shape=shape, device=device, kernel=kernel, **what)
    out.print(document, markup=False, highlight=False, soft_wrap=True)


def _generation_table(rows: list[Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    heads = ("scheme", "requests", "limit", "bare step", "step", "step/bare", "first token, s", "decoding", "in all")
    for head in (*heads, "spread", "peer", "ours/peer", "peer, all at once", "ours/peer"):
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for row in rows:
        for ours in row.generation:
            peers = [p for p in row.peer if p.batch == ours.batch]
            first, last = (peers[0], peers[-1] if len(peers) > 1 else None) if peers else (None, None)
            table.add_row(
                row.scheme,
                str(ours.batch),
                f"{row.limit_tok_s:.1f}" if ours.batch == 1 else "",
                _cell(ours.bare_step_s and 1e3 * ours.bare_step_s, 2),
                _cell(1e3 * ours.engine_step_s, 2),
                _cell(ours.step_ratio, 2),
                _cell(ours.first_token_s, 3),
                _cell(ours.decode_rate_tok_s, 1),
                _cell(ours.rate_tok_s, 1),
                f"{max(ours.runs_s) / min(ours.runs_s) - 1:.0%}",
                *(cell for p in (first, last) for cell in (_cell(p and p.rate_tok_s, 1), _cell(p and p.our_ratio, 1))),
            )
    return table


def _prefill_table(rows: list[Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    heads = ("scheme", "long prompt, tokens", "first text", "bare prefill", "first text/bare")
    for head in (*heads, "requests x shared tokens", "apart", "shared", "apart/shared"):
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for row in rows:
        long, shared = row.prefill, row.shared_prefix
        table.add_row(
            row.scheme,
            str(long.prompt_tokens) if long else "-",
            *(_cell(long and value, 4) for value in (long and (long.first_text_s, long.bare_s)) or (None, None)),
            _cell(long and long.ratio, 2),
            f"{shared.requests} x {shared.prefix_tokens}" if shared else "-",
            *(_cell(value, 3) for value in (shared and (shared.apart_s, shared.shared_s)) or (None, None)),
            _cell(shared and shared.ratio, 2),
        )
    return table


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@app.command()
def doctor() -> None:
    """Show devices and versions, which schemes can run here, and what would make the others run."""
    with _errors():
        from langchain_quantllm.memory import format_bytes, take_snapshot
        from langchain_quantllm.schemes import SCHEMES

        table = Table(title="Versions", title_justify="left", show_header=False)
        table.add_row("langchain-quantllm", __version__)
        table.add_row("python", platform.python_version())
        for package in _PACKAGES:
            table.add_row(package, _version_of(package))
        out.print(table)
        table = Table("device", "name", "free", "in all", title="Devices", title_justify="left")
        for device, name, free_bytes, total_bytes in _devices(take_snapshot(_accelerators())):
            table.add_row(device, name, format_bytes(free_bytes), format_bytes(total_bytes))
        out.print(table)
        table = Table("scheme", "runs here", title="Schemes", title_justify="left")
        for name, scheme in SCHEMES.items():
            table.add_row(name, _obstacle(scheme) or "yes")
        out.print(table)


_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "langchain-core",
    "langchain-huggingface",
    "gptqmodel",
    "optimum",
    "flash-attn",
    "triton",
    "xgrammar",
)


def _obstacle(scheme: Any) -> str | None:
    from langchain_quantllm.packages import check_packages

    try:
        check_packages(scheme)
    except QuantLLMError as error:
        return str(error)
    return None


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _accelerators() -> list[str]:
    import torch

    if not torch.accelerator.is_available():
        return []
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cpu"
    return [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]


def _devices(snapshot: Any) -> Iterator[tuple[str, str, int, int]]:
    for reading in snapshot.readings:
        if reading.device == "cpu":
            yield "cpu", reading.name, reading.available_bytes, reading.total_bytes
        else:
            total_bytes = reading.driver_total_bytes or 0
            yield reading.device, reading.name, total_bytes - (reading.driver_used_bytes or 0), total_bytes


if __name__ == "__main__":
    app()
