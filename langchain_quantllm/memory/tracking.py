"""Memory around any piece of code: before it, after it, and the most in between.

Owns the peaks: CUDA's and XPU's process-wide counters, which it resets, and a thread that samples the
resident memory. Knows no model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langchain_quantllm.memory.measure import MemorySnapshot, resident_bytes, take_snapshot
from langchain_quantllm.memory.notes import memory_notes
from langchain_quantllm.memory.table import UNITS_NOTE, Stage, Table, Tabular, stage_table

if TYPE_CHECKING:
    import torch

_lock = threading.Lock()
_open: list[TrackedMemory] = []
"""Trackers whose block is still running: a reset of the process-wide counters must not lose their peaks."""


class TrackedMemory(Tabular):
    """What `track_memory` gives: the memory before and after its block, and the peak inside.

    Attributes:
        before: Readings when the block began.
        after: Readings when it ended; None while it runs.
        notes: What the numbers do not say, in sentences.
    """

    def __init__(self, before: MemorySnapshot) -> None:
        """Start from the readings before the block."""
        self.before = before
        self.after: MemorySnapshot | None = None
        self.notes = memory_notes(before)
        self._peak_bytes = {r.device: r.used_bytes for r in before.readings}

    @property
    def peak(self) -> Mapping[str, int]:
        """Most bytes in use inside the block, by device; what is known so far while it runs."""
        if self.after is None:
            with _lock:
                _fold_counters([self])
        return dict(self._peak_bytes)

    def raise_peak(self, device: str, used_bytes: int | None) -> None:
        """Take note of bytes that were in use on a device that is tracked."""
        if used_bytes is not None and device in self._peak_bytes:
            self._peak_bytes[device] = max(self._peak_bytes[device], used_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Give everything, ready for JSON."""
        return {
            "before": self.before.to_dict(),
            "peak": dict(self.peak),
            "after": None if self.after is None else self.after.to_dict(),
            "notes": list(self.notes),
        }

    def _table(self) -> Table:
        stages: dict[str, Stage | None] = {"before": self.before, "peak": self.peak, "after": self.after}
        return stage_table("Memory of a block of code", stages, [*self.notes, UNITS_NOTE])


@contextmanager
def track_memory(
    devices: Iterable[str | torch.device] | None = None, *, interval_s: float = 0.01
) -> Iterator[TrackedMemory]:
    """Measure the memory around a block of code.

    Resets the peak counters of PyTorch's allocators, which belong to the whole process. Blocks may be nested or
    run in several threads; each then also sees the memory of the others.

    Args:
        devices: Accelerators to measure beside the CPU; as for `take_snapshot`.
        interval_s: Seconds between two looks at the resident memory; a shorter peak on the CPU can be missed.

    Yields:
        The measurement, complete when the block has ended, with an error too.

    Raises:
        InvalidOptionError: If a device name is not understood.
        UnsupportedError: If a device is not there.
    """
    chosen = None if devices is None else list(devices)
    tracked = TrackedMemory(take_snapshot(chosen))
    with _lock:
        _fold_counters(_open)
        for device in _counted(tracked):
            _backend(device).reset_peak_memory_stats(device)
        _open.append(tracked)
    stopped = threading.Event()
    sampler = threading.Thread(target=_sample, args=(tracked, stopped, interval_s), daemon=True)
    sampler.start()
    try:
        yield tracked
    finally:
        stopped.set()
        sampler.join()
        with _lock:
            _fold_counters(_open)
            _open.remove(tracked)
        tracked.after = take_snapshot(chosen)
        for reading in tracked.after.readings:
            tracked.raise_peak(reading.device, reading.used_bytes)


def _sample(tracked: TrackedMemory, stopped: threading.Event, interval_s: float) -> None:
    while not stopped.wait(interval_s):
        tracked.raise_peak("cpu", resident_bytes())


def _fold_counters(trackers: Iterable[TrackedMemory]) -> None:
    """Take the allocators' peak counters, as they stand, into the peaks of these trackers."""
    for tracked in trackers:
        for device in _counted(tracked):
            tracked.raise_peak(device, _backend(device).max_memory_allocated(device))


def _counted(tracked: TrackedMemory) -> list[str]:
    """Name the devices of a tracker that have a peak counter."""
    return [r.device for r in tracked.before.readings if r.device.startswith(("cuda", "xpu"))]


def _backend(device: str) -> Any:
    import torch

    return getattr(torch, device.split(":")[0])
