"""The command that estimates memory: memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from langchain_quantllm.cli.console import Revision, TrustRemoteCode, app, err, errors, find_model, out
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.schemes import SCHEMES


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub; only its config is read.")],
    tokens: Annotated[int, typer.Option(help="Length of a sequence in tokens, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once, for the KV cache.")] = 1,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Estimate the memory of a model in every scheme, and which of them fit on this machine."""
    with errors():
        if tokens < 0 or batch < 0:
            msg = f"--tokens {tokens} and --batch {batch} must not be negative."
            raise InvalidOptionError(msg)
        checkpoint = find_model(model, revision=revision, trust_remote_code=trust_remote_code)
        with err.status("computing the estimates"):
            from langchain_quantllm.loading.devices import default_device_map
            from langchain_quantllm.loading.spec import LoadSpec
            from langchain_quantllm.memory import available_memory, estimate_memory

            config, stored = checkpoint.config, checkpoint.quantization
            if stored is not None:  # it may come from a file beside config.json
                config.quantization_config = dict(stored)
            estimate = estimate_memory(config, trust_remote_code=trust_remote_code)
            sizes, notes = _sizes_by_scheme(estimate, config, stored, trust_remote_code=trust_remote_code)
            place = next(iter(default_device_map(LoadSpec(model_id=model)).values()))
            device = f"cuda:{place}" if isinstance(place, int) else str(place)
            free_bytes = available_memory(device)
        out.print(_table(f"{model}: estimate", estimate, sizes, free_bytes, device, tokens, batch))
        context = f"; the model's context is {estimate.context_tokens} tokens" if estimate.context_tokens else ""
        lines = [f"{estimate.parameters:,} parameters{context}. 1 MB is 1,000,000 bytes."]
        if stored is None and sizes["gptq"] is not None:
            lines.append("gptq is for 4 bits in groups of 128, and needs calibration: langchain-quantllm quantize")
        elif stored is not None:
            lines.append("The checkpoint is quantized already, and is loaded as it is.")
        out.print("\n".join([*lines, *notes]), markup=False, highlight=False, soft_wrap=True)


def _sizes_by_scheme(
    estimate: Any, config: Any, stored: Any, *, trust_remote_code: bool
) -> tuple[dict[str, int | None], list[str]]:
    """Bytes of the weights by scheme, None where a scheme does not suit the model, and the reasons for these."""
    from langchain_quantllm.memory import estimate_memory

    sizes: dict[str, int | None] = {**estimate.bytes_by_scheme}
    sizes = sizes or {_name_of(estimate.scheme): estimate.total_bytes}
    notes = []
    for name in SCHEMES if stored is None else ():
        if name not in sizes:
            try:
                sizes[name] = estimate_memory(config, name, trust_remote_code=trust_remote_code).total_bytes
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
    tokens: int,
    batch: int,
) -> Table:
    from langchain_quantllm.memory import format_bytes

    cache_bytes = estimate.kv_cache_bytes(tokens, batch)
    table = Table(title=f"{title}, {format_bytes(free_bytes)} free on {device}", title_justify="left")
    heads = ("scheme", "weights", "against 16 bits", f"KV cache, {batch} x {tokens} tokens", "in all", "fits")
    for head in heads:
        table.add_column(head, justify="left" if head == "scheme" else "right")
    for name, size_bytes in sizes.items():
        if size_bytes is None:
            table.add_row(name, *("-" for _ in heads[1:]))
            continue
        table.add_row(
            name,
            format_bytes(size_bytes),
            f"{round(100 * (size_bytes / estimate.bytes_16bit - 1)):+d}%",
            format_bytes(cache_bytes),
            format_bytes(size_bytes + cache_bytes),
            "yes" if size_bytes + cache_bytes <= free_bytes else "no",
        )
    return table


def _name_of(scheme: Any) -> str:
    """Name the scheme of a checkpoint as `SCHEMES` does; with its bits where the name does not say them."""
    if scheme.calibrated:
        return f"{label_of(scheme)}, {scheme.weight_bits} bits"
    return f"{scheme.name}-double" if getattr(scheme, "double_quantization", False) else str(scheme.name)
