"""Check that a model fits into the free memory, before it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.accelerate import size_in_bytes
from langchain_quantllm.errors import InvalidOptionError, NotEnoughMemoryError
from langchain_quantllm.memory.display import format_bytes
from langchain_quantllm.memory.estimate import MemoryEstimate
from langchain_quantllm.memory.measure import available_memory, device_name

if TYPE_CHECKING:
    import torch


def check_fits(
    estimate: MemoryEstimate,
    devices: Sequence[str | torch.device],
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    tokens: int = 0,
    batch: int = 1,
) -> int:
    """Check that a model fits into the free memory of the devices that it may be spread over.

    Only weights and KV cache are compared: activations, the CUDA context of a device not yet used, and losses from
    splitting layers over devices come on top.

    Args:
        estimate: Estimate of the model.
        devices: Devices for the weights, such as `["cuda:0"]` or `["cuda:0", "cpu"]`.
        max_memory: Most that may be used, by device, as accelerate takes it: `{0: "10GiB", "cpu": 8 * 10**9}`;
            a number stands for that CUDA device. Where given, only the devices named in it count.
        tokens: Tokens per sequence that the KV cache must hold; 0 leaves it out.
        batch: Sequences held at once.

    Returns:
        Bytes that stay free.

    Raises:
        NotEnoughMemoryError: If it does not fit; the message names the schemes that would.
        InvalidOptionError: If a device or a size is not understood.
        UnsupportedError: If a device is not there, does not report its free memory, or the cache has no known size.
    """
    cache_bytes = estimate.kv_cache_bytes(tokens, batch) if tokens else 0
    free_by_device = _free_bytes(devices, max_memory)
    free_bytes = sum(free_by_device.values())
    left_bytes = free_bytes - estimate.total_bytes - cache_bytes
    if left_bytes >= 0:
        return left_bytes
    cache = f" and {format_bytes(cache_bytes)} for a KV cache of {batch} x {tokens} tokens" if cache_bytes else ""
    free = " and ".join(f"{format_bytes(size)} on {device}" for device, size in free_by_device.items()) or "no device"
    by_size = sorted(estimate.bytes_by_scheme.items(), key=lambda item: -item[1])
    fitting = [f"{name!r} ({format_bytes(size)})" for name, size in by_size if size + cache_bytes <= free_bytes]
    if fitting:
        advice = f"use quantization={' or '.join(fitting)}"
    elif cache_bytes and min(estimate.bytes_by_scheme.values(), default=estimate.total_bytes) <= free_bytes:
        advice = "hold fewer tokens or sequences at once"
    else:
        advice = "no other scheme fits either: free memory, add a device, or take a smaller model"
    msg = (
        f"{estimate.model_id!r} with quantization={estimate.scheme.name!r} needs {format_bytes(estimate.total_bytes)}"
        f" for its weights{cache}, but free are {free}; {advice}."
    )
    raise NotEnoughMemoryError(msg)


def _free_bytes(
    devices: Sequence[str | torch.device], max_memory: Mapping[int | str, int | str] | None
) -> dict[str, int]:
    free_bytes = {name: available_memory(name) for name in dict.fromkeys(map(device_name, devices))}
    if max_memory is None:
        return free_bytes
    limits = {}
    for key, limit in max_memory.items():
        name = device_name(f"cuda:{key}" if isinstance(key, int) else key)
        try:
            limits[name] = size_in_bytes(limit)
        except ValueError as error:
            msg = f"max_memory={limit!r} is not a size; use bytes, or a text such as '10GiB' or '500MB'."
            raise InvalidOptionError(msg) from error
    return {name: min(size, limits[name]) for name, size in free_bytes.items() if name in limits}


def check_cache_budget(budget: Any) -> float | int | None:
    """Check `kv_cache_memory`.

    Args:
        budget: A fraction of the free memory between 0 and 1, bytes, a text such as `"4GiB"`, or None.

    Returns:
        A float for a fraction, an int for bytes, or None.

    Raises:
        InvalidOptionError: If it is none of these.
    """
    if budget is None:
        return None
    if isinstance(budget, float) and 0 < budget <= 1:
        return budget
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 1:
        return budget
    if isinstance(budget, str):
        with contextlib.suppress(ValueError):
            if (size := size_in_bytes(budget)) > 0:
                return size
    msg = (
        f"kv_cache_memory={budget!r} is not allowed; give a fraction of the free memory such as 0.5, a number of "
        "bytes, or a text such as '4GiB'."
    )
    raise InvalidOptionError(msg)
