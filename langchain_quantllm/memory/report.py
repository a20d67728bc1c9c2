"""The memory report of one model: the stages of its life, its weights by kind, and what it saves.

Owns how measurements are put together and shown; takes none itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_quantllm.memory.bars import SIXTEEN_BITS, WEIGHTS, Bars, stage_bars
from langchain_quantllm.memory.measure import CpuReading, MemorySnapshot
from langchain_quantllm.memory.table import UNITS_NOTE, Stage, Table, Tabular, format_bytes, stage_table
from langchain_quantllm.memory.weights import WeightBytes


@dataclass(frozen=True, kw_only=True, repr=False)
class MemoryReport(Tabular):
    """Memory before, while and after a model was loaded, and while it generated.

    Args:
        model_id: Hub id or folder of the model.
        scheme_name: Name of the scheme that holds its weights.
        devices: Devices that its weights lie on, such as `("cuda:0",)`.
        weights: Bytes of its weights, by kind, measured.
        before: Readings before loading; None for a model that was handed in loaded.
        after_loading: Readings after loading.
        peak_loading: Most bytes in use while loading, by device, as `track_memory` gives them.
        after_generating: Readings after the last generation.
        peak_generating: Most bytes in use while generating, by device.
        bytes_16bit: Bytes of the same model in 16 bits, as `MemoryEstimate.bytes_16bit` gives them.
        kv_cache_bytes: Bytes of the KV cache at its largest.
        kv_pool_bytes: Bytes set aside for the KV cache; None where it grows as it needs to.
        kv_resident_bytes: Bytes of these that lie in main memory, which has them once they are written to; None where
            that is not known.
        weights_grown_bytes: Bytes that the weights take more than after loading, as where a CPU's kernels repack them.
        notes: What the numbers do not say; `memory_notes` writes them.
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
    notes: tuple[str, ...] = ()

    @property
    def saving(self) -> float | None:
        """Share of the 16-bit bytes that the weights save, 0.6 for 60%; None where those are not known."""
        return 1 - self.weights.total_bytes / self.bytes_16bit if self.bytes_16bit else None

    def summary(self) -> str:
        """Say it in one line: `cpu: 163 MB weights (int8), 40% less than 16 bits`."""
        line = f"{', '.join(self.devices)}: {format_bytes(self.weights.total_bytes)} weights ({self.scheme_name})"
        if self.saving is None or self.scheme_name == "none":
            return line
        return f"{line}, {abs(self.saving):.0%} {'less' if self.saving >= 0 else 'more'} than 16 bits"

    @property
    def headline(self) -> str:
        """What the weights take against 16 bits: `116 MB of weights instead of 269 MB in 16 bits: 57% less`."""
        line = f"{format_bytes(self.weights.total_bytes)} of weights"
        if self.bytes_16bit is None or self.saving is None:
            return line
        if abs(self.saving) < 0.005:
            return f"{line}, as in 16 bits"
        more_or_less = "less" if self.saving > 0 else "more"
        return f"{line} instead of {format_bytes(self.bytes_16bit)} in 16 bits: {abs(self.saving):.0%} {more_or_less}"

    @property
    def anonymous_growth(self) -> dict[str, int] | None:
        """Bytes by which the process's anonymous memory grew since loading, and what they are, by name.

        Returns:
            `kv_cache`, `weights`, `workspace` (all the rest: buffers of the engine and of kernels, code that the first
            call loads, heap kept for reuse, and what the program itself made meanwhile) and their sum, `total`. None
            where no text was generated yet, no weights lie on the CPU, the model was handed in loaded, or the system
            does not tell.
        """
        if self.before is None:
            return None
        loaded, generated = (
            None if stage is None else stage.reading("cpu") for stage in (self.after_loading, self.after_generating)
        )
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
            ax: The `matplotlib.axes.Axes` to draw on; None makes a figure of its own.

        Returns:
            The axes; `report.plot().figure.savefig("memory.png")` saves them. Sizes are in MB, or from 1 GB on in GB.

        Raises:
            MissingPackageError: If matplotlib is not installed.
        """
        return self._bars().draw(ax)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; sizes in bytes."""
        stages = {
            "before": self.before,
            "after_loading": self.after_loading,
            "after_generating": self.after_generating,
        }
        peaks = {"peak_loading": self.peak_loading, "peak_generating": self.peak_generating}
        return {
            "model_id": self.model_id,
            "scheme_name": self.scheme_name,
            "devices": list(self.devices),
            "weights": self.weights.to_dict(),
            "bytes_16bit": self.bytes_16bit,
            "saving": self.saving,
            "kv_cache_bytes": self.kv_cache_bytes,
            "kv_pool_bytes": self.kv_pool_bytes,
            "kv_resident_bytes": self.kv_resident_bytes,
            "weights_grown_bytes": self.weights_grown_bytes,
            "anonymous_growth": self.anonymous_growth,
            **{name: stage and stage.to_dict() for name, stage in stages.items()},
            **{name: None if peak is None else dict(peak) for name, peak in peaks.items()},
            "notes": list(self.notes),
        }

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
        kinds = {
            "quantized": self.weights.quantized_bytes,
            "unquantized": self.weights.unquantized_bytes,
            "buffers": self.weights.buffers_bytes,
            "offloaded": self.weights.offloaded_bytes,
        }
        parts = ", ".join(f"{format_bytes(size)} {kind}" for kind, size in kinds.items() if size)
        lines = [f"Weights: {format_bytes(self.weights.total_bytes)} = {parts}."]
        if self.kv_cache_bytes is not None:
            pool = f" of {format_bytes(self.kv_pool_bytes)} set aside for it" if self.kv_pool_bytes else ""
            lines.append(f"KV cache at its largest: {format_bytes(self.kv_cache_bytes)}{pool}.")
        if (growth := self.anonymous_growth) is not None:
            names = {"kv_cache": "KV cache", "weights": "repacked weights", "workspace": "workspace"}
            signed = [(growth[key], name) for key, name in names.items() if growth[key]]
            sum_of = " ".join(f"{'-' if size < 0 else '+'} {format_bytes(abs(size))} {name}" for size, name in signed)
            total = format_bytes(growth["total"])
            lines.append(f"Anonymous memory since loading: {total} more = {sum_of.removeprefix('+ ')}.")
        title = f"Memory of {self.model_id} ({self.scheme_name})"
        return stage_table(title, self._stages(), [*lines, *self.notes, UNITS_NOTE], headline=self.headline)
