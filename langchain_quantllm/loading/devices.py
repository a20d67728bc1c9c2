"""Devices: the device map of a model, the devices of its weights, and memory that is released."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import release_heap

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` with which accelerate spreads a model over the devices."""


def default_device_map(spec: LoadSpec) -> Any:
    """Return a spec's device map, by default the first accelerator, else the CPU.

    Returns:
        A dict, with the key `""` for the whole model; or one of `SPREADS`.
    """
    device_map = spec.device_map
    if isinstance(device_map, str | int) and device_map not in SPREADS:
        return {"": device_map}
    if device_map is not None:
        return device_map
    if spec.max_memory is not None:
        return "auto"
    import torch

    if torch.cuda.is_available():
        return {"": torch.cuda.current_device()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"": str(accelerator.type) if accelerator is not None else "cpu"}


def devices_of(model: Any) -> tuple[str, ...]:
    """List the devices of a loaded model's weights."""
    return tuple(dict.fromkeys(str(p.device) for p in model.parameters() if p.device.type != "meta"))


def devices_named(device_map: Any, max_memory: Any) -> list[str]:
    """List the devices that a device map may put weights on."""
    import torch

    if isinstance(device_map, dict):
        names = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in device_map.values()]
    elif device_map in SPREADS:
        names = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
        if max_memory is not None:
            allowed = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in max_memory]
            names = [name for name in names if name in allowed]
    else:
        names = [str(device_map)]
    return list(dict.fromkeys(name for name in names if name not in ("disk", "meta")))


def release_memory(*, collect: bool = True) -> None:
    """Release freed memory to the device and the system.

    Args:
        collect: Run the garbage collector first, which takes some tenths of a second.
    """
    if collect:
        gc.collect()
    release_heap()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peaks(devices: Sequence[str]) -> None:
    """Reset the peak counters of the devices' allocators, which are those of the whole process."""
    import torch

    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
