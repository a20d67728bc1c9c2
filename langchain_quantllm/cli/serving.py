"""The commands that put a model behind OpenAI's protocol: serve, and deploy for other engines' servers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from langchain_quantllm.cli.console import (
    Device,
    DraftModel,
    DraftQuantization,
    KVCacheDtype,
    LMHeadDtype,
    Quantization,
    Revision,
    TrustRemoteCode,
    app,
    err,
    errors,
    find_model,
    out,
    say,
)
from langchain_quantllm.errors import InvalidOptionError, nearest

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="LoRA adapter as NAME=FOLDER, a model of that name; may be repeated."),
]
Name = Annotated[str | None, typer.Option(help="The model's name in requests. Default: the repository or folder.")]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub.")],
    quantization: Quantization = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 lets the system choose.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients must send; the variable hides it from other users of this machine.",
            envvar="QUANTLLM_API_KEY",
        ),
    ] = None,
    name: Name = None,
    adapter: Adapters = None,
    device: Device = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Memory of the KV cache: 0.5 of what is free, 4GiB. Default: 0.3.")
    ] = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    lm_head_dtype: LMHeadDtype = "auto",
    draft_model: DraftModel = None,
    draft_quantization: DraftQuantization = None,
    batch_size: Annotated[int | None, typer.Option(help="Most sequences that run at once.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Refuse requests while so many sequences wait.")] = 1024,
    timeout: Annotated[float | None, typer.Option(help="Seconds that an answer may take. Default: any time.")] = None,
    media_domain: Annotated[
        list[str] | None, typer.Option(help="Host that images may be fetched from; may be repeated. Default: none.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model to OpenAI's clients: chat, completions, metrics. Ctrl-C finishes or cancels what runs, and ends."""
    with errors():
        from langchain_quantllm.server import run_server
        from langchain_quantllm.server.access import check_listening

        check_listening(host, api_key)
        llm = _found(
            model,
            quantization,
            adapters=_adapters(adapter),
            device=device,
            kv_cache_memory=_memory(kv_cache_memory),
            kv_cache_dtype=kv_cache_dtype,
            lm_head_dtype=lm_head_dtype,
            draft_model=draft_model,
            draft_quantization=draft_quantization,
            batch_size=batch_size,
            timeout=timeout,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        shown = f"[{host}]" if ":" in host else host
        try:
            run_server(
                llm,
                host=host,
                port=port,
                api_key=api_key,
                name=name,
                max_waiting=max_waiting,
                media_domains=media_domain or (),
                on_ready=lambda bound: say(f"serving on http://{shown}:{bound}/v1; Ctrl-C ends"),
            )
        except KeyboardInterrupt:
            if not llm.is_loaded:
                say("the model is still being loaded; this ends as soon as it is")
            raise
        finally:
            llm.unload()


def _found(model: str, quantization: str | None, **fields: Any) -> Any:
    """Find a checkpoint and make its LLM, not loaded yet."""
    from langchain_quantllm.compat.packages import is_installed
    from langchain_quantllm.llms import QuantizedHuggingFaceLLM

    fields = {"progress": err.is_terminal, **{k: v for k, v in fields.items() if v not in (None, {})}}
    llm = QuantizedHuggingFaceLLM(model_id=model, quantization=quantization, **fields)
    checkpoint = find_model(model, revision=llm.revision, trust_remote_code=llm.trust_remote_code)
    if quantization is None and checkpoint.quantization is None and is_installed("bitsandbytes"):
        llm.quantization = "nf4"
        say("quantization nf4 (default; -q none for 16 bits)")
    return llm


def _memory(text: str | None) -> Any:
    """Read a fraction as a number; other texts stay."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _adapters(given: list[str] | None) -> dict[str, str]:
    """Read NAME=FOLDER.

    Raises:
        InvalidOptionError: If one is not so.
    """
    found = {}
    for text in given or ():
        name, _, folder = text.partition("=")
        if not name or not folder or name in found:
            msg = f"--adapter {text!r} is not possible; give NAME=FOLDER, each name once."
            raise InvalidOptionError(msg)
        found[name] = folder
    return found


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="Folder that `quantize` wrote, or repository on the Hub.")],
    engine: Annotated[str, typer.Option(help="The engine: vllm.")] = "vllm",
    format_: Annotated[str, typer.Option("--format", help="command, ray or kubernetes.")] = "command",
    replicas: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share each layer.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Groups of these, each with a part of the layers.")] = 1,
    context: Annotated[int | None, typer.Option(help="Most tokens of an answer with its prompt. Default: all.")] = None,
    name: Name = None,
    adapter: Adapters = None,
    image: Annotated[str | None, typer.Option(help="Container image of a Kubernetes manifest.")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print how another engine serves a checkpoint on one machine or many: a command or a manifest. Starts nothing."""
    with errors():
        from langchain_quantllm.server.deployment import ENGINES, IMAGE, Deployment
        from langchain_quantllm.server.names import name_of

        if engine not in ENGINES:
            msg = f"--engine {engine!r} is not known{nearest(engine, ENGINES)}"
            raise InvalidOptionError(msg)
        checkpoint = find_model(model, revision=revision, trust_remote_code=trust_remote_code)
        deployment = Deployment(
            source=model,
            config=checkpoint.config.to_dict(),
            quantization=checkpoint.quantization,
            name=name or name_of(model),
            replicas=replicas,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            context_tokens=context,
            adapters=_adapters(adapter),
            image=image or IMAGE,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        out.print(deployment.text(format_).rstrip(), markup=False, highlight=False, soft_wrap=True)
