"""The command that estimates memory: memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from langchain_quantllm.cli.console import (
    DraftModel,
    DraftQuantization,
    KVCacheDtype,
    LMHeadDtype,
    Revision,
    TrustRemoteCode,
    app,
    err,
    errors,
    find_model,
    out,
)
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.loading.sources import WHISPER
from langchain_quantllm.schemes import SCHEMES, Unquantized

_SMALL_BYTES = 300_000_000
"""Size in 16 bits up to which quantizing an encoder saves little; docs/rag.md has the measurement."""

_KINDS = {
    "embedding": "An embedding model",
    "cross_encoder": "A cross-encoder",
    "late_interaction": "A late-interaction model",
}


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub; only its config is read.")],
    tokens: Annotated[int, typer.Option(help="Length of a sequence in tokens, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once, for the KV cache.")] = 1,
    kv_cache_dtype: KVCacheDtype = "auto",
    lm_head_dtype: LMHeadDtype = "auto",
    draft_model: DraftModel = None,
    draft_quantization: DraftQuantization = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Estimate the memory of a model in every scheme, and which of them fit on this machine.

    Language models, embedding models, rerankers and Whisper.
    """
    with errors():
        if tokens < 0 or batch < 0:
            msg = f"--tokens {tokens} and --batch {batch} must not be negative."
            raise InvalidOptionError(msg)
        from langchain_quantllm.memory import check_cache_dtype, check_head_dtype

        check_cache_dtype(kv_cache_dtype)
        check_head_dtype(lm_head_dtype)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            checkpoint = find_model(model, **options)
        except UnsupportedError as error:
            if draft_model is None and _show_encoder(model, options):
                return
            checkpoint = _find_speech(model, options, error)
        with err.status("computing the estimates"):
            from langchain_quantllm.memory import estimate_memory, format_bytes

            config, stored = checkpoint.config, checkpoint.quantization
            if stored is not None:  # it may come from a file beside config.json
                config.quantization_config = dict(stored)
            parts = {"trust_remote_code": trust_remote_code, "lm_head_dtype": lm_head_dtype}
            beside = {"draft_model": draft_model, "draft_quantization": draft_quantization}
            estimate = estimate_memory(config, kv_cache_dtype=kv_cache_dtype, **beside, **parts)
            sizes, notes = _sizes_by_scheme(estimate, config, stored, parts)
            if config.model_type == WHISPER:
                sizes = {name: size for name, size in sizes.items() if name not in ("gptq", "awq")}
            free_bytes, device = _free_memory(model)
        out.print(_table(f"{model}: estimate", estimate, sizes, free_bytes, device, tokens, batch))
        context = f"; the model's context is {estimate.context_tokens} tokens" if estimate.context_tokens else ""
        lines = [f"{estimate.parameters:,} parameters{context}. 1 MB is 1,000,000 bytes."]
        if estimate.draft is not None:
            of_weights = estimate.draft.total_bytes
            of_cache = _draft_bytes(estimate, tokens, batch) - of_weights
            weights, cache = format_bytes(of_weights), format_bytes(of_cache)
            lines.append(f"Beside it, the draft model {draft_model}: {weights} of weights, {cache} of KV cache.")
        if estimate.weights.experts_bytes:
            size = format_bytes(estimate.weights.experts_bytes)
            lines.append(f"In {_name_of(estimate.scheme)}, {size} of the weights are experts.")
        if stored is None and sizes.get("gptq") is not None:
            lines.append("gptq is for 4 bits in groups of 128, and needs calibration: langchain-quantllm quantize")
        elif stored is not None:
            lines.append("The checkpoint is quantized already, and is loaded as it is.")
        out.print("\n".join([*lines, *notes]), markup=False, highlight=False, soft_wrap=True)


def _find_speech(model: str, options: Mapping[str, Any], error: UnsupportedError) -> Any:
    """Find a checkpoint that turns speech into text; raise the error if it is none."""
    try:
        return find_model(model, task="speech", **options)
    except UnsupportedError:
        raise error from None


def _show_encoder(model: str, options: Mapping[str, Any]) -> bool:
    """Print the estimates of an encoder; False if the model is none."""
    from langchain_quantllm.encoders.estimate import estimate_encoder, find_encoder
    from langchain_quantllm.encoders.spec import EncoderSpec

    spec = EncoderSpec(model_id=model, **options)
    files = find_encoder(spec)
    if files is None:
        return False
    with err.status("computing the estimates"):
        estimate = estimate_encoder(spec, files)
        sizes: dict[str, int | None] = {**estimate.bytes_by_scheme}
        if not sizes:
            sizes[_name_of(estimate.scheme)] = estimate.total_bytes
        elif estimate.dtype == "float32":
            sizes = {"none (float32)": sizes.pop("none"), "none (bfloat16)": estimate.bytes_16bit, **sizes}
        free_bytes, device = _free_memory(model)
    out.print(_table(f"{model}: estimate", estimate, sizes, free_bytes, device))
    limit = f"; it reads {estimate.context_tokens} tokens of a text" if estimate.context_tokens else ""
    lines = [f"{_KINDS[files.kind]}: {estimate.parameters:,} parameters{limit}. 1 MB is 1,000,000 bytes."]
    lines.append(_advice(estimate))
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return True


def _advice(estimate: Any) -> str:
    """Say whether quantizing an encoder pays."""
    if not estimate.bytes_by_scheme and not isinstance(estimate.scheme, Unquantized):
        return "The checkpoint is quantized already, and is loaded as it is."
    from langchain_quantllm.memory import format_bytes

    int8, nf4 = (format_bytes(estimate.bytes_16bit - estimate.bytes_by_scheme[name]) for name in ("int8", "nf4"))
    if estimate.bytes_16bit <= _SMALL_BYTES:
        return (
            f'A small model: 16 bits (dtype="bfloat16") keep its quality and speed. int8 would save {int8} more, nf4 '
            f"{nf4}."
        )
    return f"A large model: int8 saves {int8} against 16 bits and keeps nearly all of its quality, nf4 saves {nf4}."


def _free_memory(model: str) -> tuple[int, str]:
    """Return the free bytes of the device that a model goes to, and its name."""
    from langchain_quantllm.loading.devices import default_device_map
    from langchain_quantllm.loading.spec import LoadSpec
    from langchain_quantllm.memory import available_memory

    place = next(iter(default_device_map(LoadSpec(model_id=model)).values()))
    device = f"cuda:{place}" if isinstance(place, int) else str(place)
    return available_memory(device), device


def _sizes_by_scheme(
    estimate: Any, config: Any, stored: Any, parts: Mapping[str, Any]
) -> tuple[dict[str, int | None], list[str]]:
    """Bytes of the weights by scheme, None where a scheme does not suit the model, and the reasons for these."""
    from langchain_quantllm.memory import estimate_memory

    sizes: dict[str, int | None] = {**estimate.bytes_by_scheme}
    sizes = sizes or {_name_of(estimate.scheme): estimate.total_bytes}
    notes = []
    for name, scheme in SCHEMES.items() if stored is None else ():
        if name not in sizes and config.model_type in (scheme.model_types or (config.model_type,)):
            try:
                sizes[name] = estimate_memory(config, name, **parts).total_bytes
            except UnsupportedError as error:  # of this scheme alone
                sizes[name] = None
                notes.append(f"{name}: {error}")
    return sizes, notes


def _table(
    title: str,
    estimate: Any,
    sizes: Mapping[str, int | None],
    free_bytes: int,
    device: str,
    tokens: int = 0,
    batch: int = 0,
) -> Table:
    """Make the table of the schemes; without columns of a KV cache where there is none, or its size is not known."""
    from langchain_quantllm.memory import format_bytes

    cache_bytes = estimate.kv_cache_bytes(tokens, batch) if estimate.kv_cache_bytes_per_token else None
    draft_bytes = _draft_bytes(estimate, tokens, batch)
    table = Table(title=f"{title}, {format_bytes(free_bytes)} free on {device}", title_justify="left")
    cache_dtype = "" if estimate.kv_cache_dtype == "auto" else f" in {estimate.kv_cache_dtype}"
    in_all = "in all, with the draft model" if draft_bytes else "in all"
    cache_heads = (f"KV cache{cache_dtype}, {batch} x {tokens} tokens", in_all) if cache_bytes is not None else ()
    heads = ("scheme", "weights", "against 16 bits", *cache_heads, "fits")
    for head in heads:
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for name, size_bytes in sizes.items():
        if size_bytes is None:
            table.add_row(name, *("-" for _ in heads[1:]))
            continue
        all_bytes = size_bytes + (cache_bytes or 0) + draft_bytes
        cells = (format_bytes(cache_bytes), format_bytes(all_bytes)) if cache_bytes is not None else ()
        table.add_row(
            name,
            format_bytes(size_bytes),
            f"{round(100 * (size_bytes / estimate.bytes_16bit - 1)):+d}%",
            *cells,
            "yes" if all_bytes <= free_bytes else "no",
        )
    return table


def _draft_bytes(estimate: Any, tokens: int, batch: int) -> int:
    """Return the bytes of a draft model and of its own KV cache; 0 without one."""
    if estimate.draft is None:
        return 0
    cache_bytes: int = estimate.draft.kv_cache_bytes(tokens, batch) if estimate.draft.kv_cache_bytes_per_token else 0
    return int(estimate.draft.total_bytes) + cache_bytes


def _name_of(scheme: Any) -> str:
    """Name the scheme of a checkpoint as `SCHEMES` does; with its bits where the name does not say them."""
    if scheme.calibrated:
        bits = getattr(scheme, "layer_bits", ()) or (scheme.weight_bits,)
        return f"{label_of(scheme)}, {' and '.join(map(str, bits))} bits"
    return f"{scheme.name}-double" if getattr(scheme, "double_quantization", False) else str(scheme.name)
