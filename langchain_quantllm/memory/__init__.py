"""Memory of a model: estimated before loading, measured while it lives, and reported."""

import importlib
from typing import TYPE_CHECKING, Any

from langchain_quantllm.memory.budget import check_cache_budget, check_fits
from langchain_quantllm.memory.cache_dtype import CACHE_DTYPES, check_8bit, check_cache_dtype, no_8bit_reason
from langchain_quantllm.memory.display import format_bytes
from langchain_quantllm.memory.estimate import MemoryEstimate, estimate_config, model_build_lock
from langchain_quantllm.memory.measure import (
    AcceleratorReading,
    CpuReading,
    MemorySnapshot,
    available_memory,
    release_heap,
    take_snapshot,
)
from langchain_quantllm.memory.output_head import check_head_dtype
from langchain_quantllm.memory.report import MemoryReport, TrackedMemory, memory_notes, track_memory
from langchain_quantllm.memory.weights import WeightBytes, weights_by_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    estimate_memory: Callable[..., MemoryEstimate]

__all__ = [
    "CACHE_DTYPES",
    "AcceleratorReading",
    "CpuReading",
    "MemoryEstimate",
    "MemoryReport",
    "MemorySnapshot",
    "TrackedMemory",
    "WeightBytes",
    "available_memory",
    "check_8bit",
    "check_cache_budget",
    "check_cache_dtype",
    "check_fits",
    "check_head_dtype",
    "estimate_config",
    "estimate_memory",
    "format_bytes",
    "memory_notes",
    "model_build_lock",
    "no_8bit_reason",
    "release_heap",
    "take_snapshot",
    "track_memory",
    "weights_by_kind",
]


def __getattr__(name: str) -> Any:
    """Import `estimate_memory` from the package, whose layers above find the config, at its first use."""
    if name == "estimate_memory":
        return getattr(importlib.import_module("langchain_quantllm"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
