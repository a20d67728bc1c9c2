"""Reports of memory use: of a block of code (`track_memory`), and of one model (`MemoryReport`)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from langchain_quantllm.memory.display import (
    SIXTEEN_BITS,
    UNITS_NOTE,
    WEIGHTS,
    Bars,
    Stage,
    Table,
    format_bytes,
    stage_bars,
    stage_table,
)
from langchain_quantllm.memory.measure import (
    AcceleratorReading,
    CpuReading,
    MemorySnapshot,
    backend_of,
    resident_bytes,
    take_snapshot,
)
from langchain_quantllm.memory.weights import WeightBytes

if TYPE_CHECKING:
    import torch

_lock = threading.Lock()
_open: list[TrackedMemory] = []
"""Trackers whose block is still running: a reset of the process-wide counters must not lose their peaks."""


class _Report:
    """Base of reports, shown as a table: as text when printed, as HTML in Jupyter."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Lay the report out as a plain text table; `to_dict` is there for programs."""
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def memory_notes(snapshot: MemorySnapshot, weights: WeightBytes | None = None) -> tuple[str, ...]:
    """List the limits of a snapshot's numbers, as sentences for a report.

    Args:
        snapshot: Readings of the devices in question.
        weights: Weights of the model, if the numbers are those of a model.

    Returns:
        The sentences that apply, those on accelerators first.
    """
    accelerators = [r for r in snapshot.readings if isinstance(r, AcceleratorReading)]
    notes = []
    if accelerators:
        notes.append(
            "Allocated and reserved memory are those of this process's PyTorch allocator; the use of the whole device"
            " also counts other processes, the driver's context and libraries."
        )
    if any(r.peak_allocated_bytes is not None for r in accelerators):
        notes.append("Peaks of PyTorch's allocator are process-wide: tensors of other threads are in them.")
    if without_peak := [r.device for r in accelerators if r.peak_allocated_bytes is None]:
        notes.append(f"{', '.join(without_peak)} has no peak counter; its peak is the higher of before and after.")
    if unseen := [r.device for r in accelerators if r.device.startswith("cuda") and r.process_bytes is None]:
        notes.append(
            f"NVML shows no memory of this process on {', '.join(unseen)} (no driver library, a container, or MIG), so"
            " the CUDA context cannot be told apart."
        )
    has_parts = any(isinstance(r, CpuReading) and r.anonymous_bytes is not None for r in snapshot.readings)
    notes.append(
        "Resident memory is that of the whole process. Its anonymous part is the process's own; the system can"
        " reclaim pages mapped from files, such as weights in safetensors and libraries, when memory is short."
        if has_parts
        else "Resident memory is that of the whole process, with its libraries and mapped pages of weight files, which"
        " this system does not tell apart."
    )
    notes.append(
        "The peak of resident memory is sampled: the system's own counts from the start of the process and cannot be"
        " reset."
    )
    if weights is not None and weights.offloaded_bytes:
        notes.append("Some weights are offloaded and lie outside the model; they are not in its total.")
    return tuple(notes)


# --- a block of code ---


class TrackedMemory(_Report):
    """Memory before and after a block of code, and its peak inside, as `track_memory` measures them.

    Attributes:
        before: Readings when the block began.
        after: Readings when it ended; None while it runs.
        notes: Limits of the numbers, in sentences.
    """

    def __init__(self, before: MemorySnapshot) -> None:
        """Start from the readings before the block."""
        self.before = before
        self.after: MemorySnapshot | None = None
        self.notes = memory_notes(before)
        self._peak_bytes = {r.device: r.used_bytes for r in before.readings}
        self._counted = [r.device for r in before.readings if r.device.startswith(("cuda", "xpu"))]
        """Devices whose allocator counts its peak."""

    @property
    def peak(self) -> Mapping[str, int]:
        """Most bytes in use inside the block, by device; the peak so far while it runs."""
        if self.after is None:
            with _lock:
                self._read_counters()
        return dict(self._peak_bytes)

    def raise_peak(self, device: str, used_bytes: int | None) -> None:
        """Record the bytes in use on a tracked device, if they are a new peak."""
        if used_bytes is not None and device in self._peak_bytes:
            self._peak_bytes[device] = max(self._peak_bytes[device], used_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {name: _plain(getattr(self, name)) for name in ("before", "peak", "after", "notes")}

    def _table(self) -> Table:
        stages: dict[str, Stage | None] = {"before": self.before, "peak": self.peak, "after": self.after}
        return stage_table("Memory of a block of code", stages, [*self.notes, UNITS_NOTE])

    def _read_counters(self) -> None:
        """Raise the peaks to the allocators' counters."""
        for device in self._counted:
            self.raise_peak(device, backend_of(device).max_memory_allocated(device))


@contextmanager
def track_memory(
    devices: Iterable[str | torch.device] | None = None, *, interval_s: float = 0.01
) -> Iterator[TrackedMemory]:
    """Measure the memory around a block of code.

    Resets the peak counters of PyTorch's allocators, which belong to the whole process. Blocks may be nested or
    run in several threads; each then also sees the memory of the others.

    Args:
        devices: Accelerators to measure beside the CPU; as for `take_snapshot`.
        interval_s: Seconds between two samples of the resident memory; a shorter peak on the CPU can be missed.

    Yields:
        The measurement, complete when the block ends, even by an exception.

    Raises:
        InvalidOptionError: If a device name is not understood.
        UnsupportedError: If a device is not there.
    """
    chosen = None if devices is None else list(devices)
    tracked = TrackedMemory(take_snapshot(chosen))
    with _lock:
        _read_all_counters()
        for device in tracked._counted:
            backend_of(device).reset_peak_memory_stats(device)
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
            _read_all_counters()
            _open.remove(tracked)
        tracked.after = take_snapshot(chosen)
        for reading in tracked.after.readings:
            tracked.raise_peak(reading.device, reading.used_bytes)


def _sample(tracked: TrackedMemory, stopped: threading.Event, interval_s: float) -> None:
    while not stopped.wait(interval_s):
        tracked.raise_peak("cpu", resident_bytes())


def _read_all_counters() -> None:
    for tracked in _open:
        tracked._read_counters()


# --- a model ---


@dataclass(frozen=True, kw_only=True, repr=False)
class MemoryReport(_Report):
    """Memory before, during and after a model was loaded, and while it generated.

    Args:
        model_id: Hub id or folder of the model.
        scheme_name: Name of the scheme of its weights.
        devices: Devices of its weights, such as `("cuda:0",)`.
        weights: Bytes of its weights, by kind, measured.
        before: Readings before loading; None for a model that was passed in loaded.
        after_loading: Readings after loading.
        peak_loading: Most bytes in use while loading, by device, as `track_memory` measures them.
        after_generating: Readings after the last generation.
        peak_generating: Most bytes in use while generating, by device.
        bytes_16bit: Bytes of the same model in 16 bits, from `MemoryEstimate.bytes_16bit`.
        kv_cache_bytes: Bytes of the KV cache at its largest.
        kv_pool_bytes: Bytes reserved for the KV cache; None where it grows on demand.
        kv_resident_bytes: The part of these in main memory, which grows as the cache is written; None where unknown.
        weights_grown_bytes: Growth of the weights since loading, as where a CPU's kernels repack them.
        draft_weights_bytes: Bytes of the weights of draft models that propose tokens to it; None without any.
        draft_kv_pool_bytes: Bytes reserved for their KV caches.
        notes: Limits of the numbers, from `memory_notes`.
    """

    model_id: str
    scheme_name: str
    devices: tuple[str, ...]
    weights: WeightBytes
    before: MemorySnapshot | None = None
    after_loading: MemorySnapshot | None = None
    peak_loading: Mapping[str, int] | None = field(default=None, hash=False)
    after_generating: MemorySnapshot | None = None
    peak_generating: Mapping[str, int] | None = field(default=None, hash=False)
    bytes_16bit: int | None = None
    kv_cache_bytes: int | None = None
    kv_pool_bytes: int | None = None
    kv_resident_bytes: int | None = None
    weights_grown_bytes: int = 0
    draft_weights_bytes: int | None = None
    draft_kv_pool_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def saving(self) -> float | None:
        """Share of the 16-bit bytes that the weights save, 0.6 for 60%; None where they are not known."""
        return 1 - self.weights.total_bytes / self.bytes_16bit if self.bytes_16bit else None

    def summary(self) -> str:
        """Summarize in one line: `cpu: 163 MB weights (int8), 40% less than 16 bits`."""
        line = f"{', '.join(self.devices)}: {format_bytes(self.weights.total_bytes)} weights ({self.scheme_name})"
        return line if self.saving is None or self.scheme_name == "none" else f"{line}, {self._difference} than 16 bits"

    @property
    def headline(self) -> str:
        """The weights compared with 16 bits: `116 MB of weights instead of 269 MB in 16 bits: 57% less`."""
        line = f"{format_bytes(self.weights.total_bytes)} of weights"
        if self.bytes_16bit is None or self.saving is None:
            return line
        if abs(self.saving) < 0.005:
            return f"{line}, as in 16 bits"
        return f"{line} instead of {format_bytes(self.bytes_16bit)} in 16 bits: {self._difference}"

    @property
    def _difference(self) -> str:
        saving = self.saving or 0
        return f"{abs(saving):.0%} {'less' if saving >= 0 else 'more'}"

    @property
    def anonymous_growth(self) -> dict[str, int] | None:
        """Growth of the process's anonymous memory since loading in bytes, by cause.

        Returns:
            `kv_cache`, `weights`, `workspace` (all the rest: buffers of the engine and of kernels, code that the first
            call loads, heap kept for reuse, and the program's own objects) and their sum, `total`. None where no text
            was generated yet, no weights lie on the CPU, the model was passed in loaded, or the system does not
            report it.
        """
        if self.before is None or self.after_loading is None or self.after_generating is None:
            return None
        loaded, generated = self.after_loading.reading("cpu"), self.after_generating.reading("cpu")
        if "cpu" not in self.devices or not (isinstance(loaded, CpuReading) and isinstance(generated, CpuReading)):
            return None
        if loaded.anonymous_bytes is None or generated.anonymous_bytes is None:
            return None
        total_bytes = generated.anonymous_bytes - loaded.anonymous_bytes
        named = {"kv_cache": self.kv_resident_bytes or 0, "weights": self.weights_grown_bytes}
        return {**named, "workspace": total_bytes - sum(named.values()), "total": total_bytes}

    def plot(self, ax: Any = None) -> Any:
        """Draw the stages and the weights as bars, beside the weights in 16 bits, with matplotlib.

        Args:
            ax: The `matplotlib.axes.Axes` to draw on; None makes a new figure.

        Returns:
            The axes; `report.plot().figure.savefig("memory.png")` saves them. Sizes are in MB, or from 1 GB on in GB.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        return self._bars().plot(ax)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON; sizes in bytes."""
        names = (*(f.name for f in fields(self)), "saving", "anonymous_growth")
        return {name: _plain(getattr(self, name)) for name in names}

    def _stages(self) -> dict[str, Stage | None]:
        return {
            "before": self.before,
            "peak, loading": self.peak_loading,
            "loaded": self.after_loading,
            "peak, generating": self.peak_generating,
            "generated": self.after_generating,
        }

    def _repr_html_(self) -> str:
        return self._table().to_html(picture=self._bars().to_html())

    def _bars(self) -> Bars:
        weights = {f"weights, {self.scheme_name}": (WEIGHTS, self.weights.total_bytes)}
        if self.bytes_16bit is not None:
            weights["weights, 16 bits"] = (SIXTEEN_BITS, self.bytes_16bit)
        return stage_bars(self._stages(), self.devices, weights)

    def _table(self) -> Table:
        sizes = self.weights.to_dict()
        kinds = [
            (kind, sizes[f"{kind}_bytes"]) for kind in ("quantized", "experts", "unquantized", "buffers", "offloaded")
        ]
        parts = ", ".join(f"{format_bytes(size)} {kind}" for kind, size in kinds if size)
        lines = [f"Weights: {format_bytes(self.weights.total_bytes)} = {parts}."]
        if self.kv_cache_bytes is not None:
            pool = f" of {format_bytes(self.kv_pool_bytes)} set aside for it" if self.kv_pool_bytes else ""
            lines.append(f"KV cache at its largest: {format_bytes(self.kv_cache_bytes)}{pool}.")
        if self.draft_weights_bytes is not None:
            sizes_of_draft = (self.draft_weights_bytes, self.draft_kv_pool_bytes or 0)
            weights, pool = map(format_bytes, sizes_of_draft)
            lines.append(f"Draft model, beside these: {weights} of weights, {pool} set aside for its KV cache.")
        if (growth := self.anonymous_growth) is not None:
            names = {"kv_cache": "KV cache", "weights": "repacked weights", "workspace": "workspace"}
            signed = [(growth[key], name) for key, name in names.items() if growth[key]]
            sum_of = " ".join(f"{'-' if size < 0 else '+'} {format_bytes(abs(size))} {name}" for size, name in signed)
            total = format_bytes(growth["total"])
            lines.append(f"Anonymous memory since loading: {total} more = {sum_of.removeprefix('+ ')}.")
        title = f"Memory of {self.model_id} ({self.scheme_name})"
        return stage_table(title, self._stages(), [*lines, *self.notes, UNITS_NOTE], headline=self.headline)


def _plain(value: Any) -> Any:
    """Convert a record, mapping or tuple to JSON's dicts and lists."""
    if isinstance(value, MemorySnapshot | WeightBytes):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
