"""The commands that answer: demo, run and chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from langchain_core.callbacks import BaseCallbackHandler
from rich.console import Console

from langchain_quantllm.cli.console import (
    Device,
    MaxNewTokens,
    Model,
    Quantization,
    Seed,
    ShowMemory,
    Temperature,
    TrustRemoteCode,
    app,
    err,
    errors,
    out,
    print_error,
)
from langchain_quantllm.errors import QuantLLMError

DEMO_QUESTION = "Why is the sky blue? Answer in two sentences."


class LastAnswer(BaseCallbackHandler):
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
    with errors():
        llm = _make_llm(None, "nf4", max_new_tokens=120, progress=False)
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import ChatPromptTemplate

        with err.status("loading it in nf4 ..."):
            llm.load()
        chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | _as_chat(llm) | StrOutputParser()
        answer = LastAnswer()
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
    with errors():
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
        answer = LastAnswer()
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
    with errors():
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
    answer = LastAnswer()
    try:
        reply = _print_stream(llm.stream(turn, {"callbacks": [answer]}))
    except KeyboardInterrupt:
        out.print("\n[dim]stopped; the turn is forgotten[/]")
    except QuantLLMError as error:
        print_error(str(error))
    else:
        out.print(f"[dim]{answer.line()}[/]", highlight=False)
        messages[:] = [*turn, {"role": "assistant", "content": reply}]
