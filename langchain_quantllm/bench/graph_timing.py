"""Timing of kernels in CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

_BEYOND_L2_BYTES = 160 * 2**20


def graph_us(calls: Sequence[Callable[[], Any]], *, repeats: int = 8, replays: int = 1) -> float:
    """Capture calls in one CUDA graph, and time its replays.

    Args:
        calls: The calls, of which the first two warm up.
        repeats: Measurements, of which the median counts.
        replays: Replays of one measurement.

    Returns:
        Microseconds of one call.
    """
    for call in [*calls, *calls][:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (replays * len(calls)))
    return float(statistics.median(times))


def copies_beyond_l2(size: int) -> int:
    """Count how many distinct weights of a size in bytes the L2 cache cannot hold."""
    return max(2, min(64, -(-_BEYOND_L2_BYTES // size)))
