"""The commands that answer prompts: demo, run and chat."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from langchain_quantllm.cli.console import (
    Device,
    MaxNewTokens,
    Model,
    Quantization,
    Seed,
    Temperature,
    TrustRemoteCode,
    app,
    demo_folder,
    err,
    errors,
    find_model,
    out,
    print_stream,
    say,
)

DEMO_QUESTION = "Why is the sky blue? Answer in two sentences."


def _load(model: str | None, quantization: str | None, **fields: Any) -> Any:
    """Load the model of a command, with its engine; the steps that take time are shown meanwhile."""
    from langchain_quantllm.compat.bitsandbytes import import_quietly
    from langchain_quantllm.compat.packages import is_installed
    from langchain_quantllm.llms import QuantizedHuggingFaceLLM

    if model is None:
        say("model SmolLM2-135M-Instruct (default; -m names another)")
        model = demo_folder()
    fields = {"progress": err.is_terminal, **{name: value for name, value in fields.items() if value is not None}}
    llm = QuantizedHuggingFaceLLM(model_id=model, quantization=quantization, **fields)  # raises for a wrong option
    checkpoint = find_model(model, trust_remote_code=llm.trust_remote_code)
    if quantization is None and checkpoint.quantization is None and is_installed("bitsandbytes"):
        llm.quantization = "nf4"
        say("quantization nf4 (default; -q none for 16 bits)")
    with err.status("importing PyTorch and transformers"):
        import_quietly()
    llm.load()
    with err.status("checking the engine against the model"):
        llm.engine_info  # noqa: B018  (makes the engine)
    return llm


def _as_chat(llm: Any) -> Any:
    """The chat model over the same weights; the model itself where it has no chat format."""
    from langchain_quantllm.chat_models import ChatQuantizedHuggingFace

    fields: dict[str, Any] = {"llm": llm}
    places = (llm.pipeline.tokenizer, getattr(llm.pipeline, "processor", None))
    has_format = any(getattr(place, "chat_template", None) for place in places)
    return ChatQuantizedHuggingFace(**fields) if has_format else llm


@app.command()
def demo() -> None:
    """Load a small model in nf4 and stream an answer through a LangChain chain, with its memory and time."""
    with errors():
        llm = _load(demo_folder(), "nf4", max_new_tokens=120, progress=False)
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import ChatPromptTemplate

        from langchain_quantllm.cli.chat import LastAnswer

        chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | _as_chat(llm) | StrOutputParser()
        answer = LastAnswer()
        out.print(f"[bold]{DEMO_QUESTION}[/]")
        print_stream(chain.stream({"question": DEMO_QUESTION}, {"callbacks": [answer]}))
        out.print(f"[dim]{answer.line()}[/]\n", highlight=False)
        out.print(str(llm.memory_report()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: Model = None,
    quantization: Quantization = None,
    device: Device = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat format.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    memory: Annotated[bool, typer.Option("--memory", help="Show the memory report afterwards.")] = False,
) -> None:
    """Answer one prompt, streamed to standard output; figures go to standard error."""
    with errors():
        text = sys.stdin.read() if prompt == "-" else prompt
        llm = _load(
            model,
            quantization,
            device=device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop or None,
            trust_remote_code=trust_remote_code,
        )
        from langchain_quantllm.cli.chat import LastAnswer

        answer = LastAnswer()
        print_stream((llm if raw else _as_chat(llm)).stream(text, {"callbacks": [answer]}), thoughts=err)
        say(answer.line())
        if memory:
            err.print(str(llm.memory_report()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def chat(
    model: Model = None,
    quantization: Quantization = None,
    device: Device = None,
    system: Annotated[str | None, typer.Option(help="The role of the model, as its system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Temperature = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D or /exit leaves, /help lists the other commands."""
    with errors():
        llm = _load(
            model,
            quantization,
            device=device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        from langchain_quantllm.cli.chat import Conversation

        say(f"{model or 'SmolLM2-135M-Instruct'} on {llm.memory_report().summary()}")
        Conversation(_as_chat(llm), system).run()
