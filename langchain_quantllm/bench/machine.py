"""The machine of a measurement: device name, versions, and the copying speed of its memory."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from langchain_quantllm.bench.calls import synchronize
from langchain_quantllm.compat.versions import installed_version
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.memory import take_snapshot
from langchain_quantllm.memory.measure import device_name

_PACKAGES = (
    "langchain-quantllm",
    "langchain-core",
    "langchain-huggingface",
    "transformers",
    "torch",
    "triton",
    "bitsandbytes",
    "gptqmodel",
    "peft",
)
_COPIES = 10


def describe_machine(device: str) -> dict[str, Any]:
    """Name a device and the versions of everything that a measurement depends on, ready for JSON.

    Args:
        device: Such as `"cpu"` or `"cuda:0"`.

    Returns:
        `device_name`, None where it is not known; `cpu_threads`, those that PyTorch uses; and `versions` by package,
        None for a package that is not installed.
    """
    import torch

    versions: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    versions |= {package: installed_version(package) for package in _PACKAGES}
    return {"device_name": _device_name(device), "cpu_threads": torch.get_num_threads(), "versions": versions}


def measure_copy(device: str) -> dict[str, float]:
    """Measure how fast a device moves memory: a large copy within it, reading and writing.

    Args:
        device: Such as `"cpu"` or `"cuda:0"`.

    Returns:
        `buffer_bytes`, the size of the copy, and `rate_byte_s`, bytes read and written per second.
    """
    import torch

    is_cpu = device.startswith("cpu")
    buffer_bytes, copies = (2**28, 1) if is_cpu else (2**31, _COPIES)
    if device.startswith("cuda"):
        buffer_bytes = min(buffer_bytes, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(buffer_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_s = []
    for _ in range(4):  # the first is the warm-up
        synchronize(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        synchronize(device)
        times_s.append((time.perf_counter() - began) / copies)
    del source, target
    release_memory()
    return {"buffer_bytes": buffer_bytes, "rate_byte_s": 2 * buffer_bytes / statistics.median(times_s[1:])}


def _device_name(device: str) -> str | None:
    device = device_name(device)
    reading = take_snapshot([device]).reading(device)
    if device != "cpu" or reading is None:
        return None if reading is None else reading.name
    return f"{_processor_name() or reading.name}, {os.cpu_count()} cores"


def _processor_name() -> str | None:
    """Read the processor's name from Linux; the standard library knows its architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
