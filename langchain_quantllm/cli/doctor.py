"""The command that inspects the machine: doctor."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from langchain_quantllm._version import __version__
from langchain_quantllm.cli.console import accelerators, app, errors, out
from langchain_quantllm.compat.versions import TRIED, compared, installed_version
from langchain_quantllm.errors import QuantLLMError


@app.command()
def doctor() -> None:
    """Show devices and versions, which schemes run here, and what the others need."""
    with errors():
        import torch

        from langchain_quantllm.kernels.linear.tuned import state_of
        from langchain_quantllm.memory import format_bytes, take_snapshot
        from langchain_quantllm.schemes import SCHEMES

        out.print(_versions())
        table = Table("device", "name", "free", "total", "tuned", title="Devices", title_justify="left")
        for device, name, free_bytes, total_bytes in _devices(take_snapshot(accelerators())):
            table.add_row(
                device, name, format_bytes(free_bytes), format_bytes(total_bytes), state_of(torch.device(device))
            )
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
    "peft",
    "gptqmodel",
    "optimum",
    "flash-attn",
    "triton",
    "xgrammar",
)


def _versions() -> Table:
    table = Table("package", "installed", "tested", "", title="Versions", title_justify="left")
    table.add_row("langchain-quantllm", __version__)
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        here, tried = installed_version(package), TRIED.get(package)
        table.add_row(
            package,
            here or "-",
            f"{tried.oldest} to {tried.newest}" if tried else "",
            (here and compared(package, here)) or "",
        )
    return table


def _obstacle(scheme: Any) -> str | None:
    from langchain_quantllm.compat.packages import check_packages

    try:
        check_packages(scheme)
    except QuantLLMError as error:
        return str(error)
    return None


def _devices(snapshot: Any) -> Iterator[tuple[str, str, int, int]]:
    for reading in snapshot.readings:
        if reading.device == "cpu":
            yield "cpu", reading.name, reading.available_bytes, reading.total_bytes
        else:
            total_bytes = reading.driver_total_bytes or 0
            yield reading.device, reading.name, total_bytes - (reading.driver_used_bytes or 0), total_bytes
