"""What a measurement was made on: the device's name and the versions of what ran.

Owns how they are found. Measures nothing.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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


def describe_machine(device: str) -> dict[str, Any]:
    """Name a device and the versions of everything that a measurement depends on, ready for JSON.

    Args:
        device: Such as `"cpu"` or `"cuda:0"`.

    Returns:
        `device_name`, None where it is not known; `cpu_threads`, those that PyTorch uses; and `versions` by package,
        None for what is not installed.
    """
    import torch

    versions: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"device_name": _device_name(device), "cpu_threads": torch.get_num_threads(), "versions": versions}


def _device_name(device: str) -> str | None:
    device = device_name(device)
    reading = take_snapshot([device]).reading(device)
    if device != "cpu" or reading is None:
        return None if reading is None else reading.name
    return f"{_processor_name() or reading.name}, {os.cpu_count()} cores"


def _processor_name() -> str | None:
    """Read the processor's name where Linux tells it; the standard library knows its architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
