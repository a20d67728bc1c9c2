"""Measurement of the memory in use and still free, device by device: PyTorch's allocators, drivers, operating system.

The limits of each number are documented with its field.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_PARTS = {"anonymous_bytes": "RssAnon", "file_bytes": "RssFile", "shared_bytes": "RssShmem"}
_ACCELERATORS = ("cuda", "xpu", "mps")


@dataclass(frozen=True, kw_only=True)
class AcceleratorReading:
    """Memory of one accelerator at one moment; None where the backend does not report a number.

    Args:
        device: Name as torch knows it, such as `"cuda:0"`.
        name: Name of the hardware.
        allocated_bytes: Tensors of this process, as its PyTorch allocator counts them.
        reserved_bytes: Memory that the allocator holds from the driver, cached free blocks included.
        peak_allocated_bytes: Largest `allocated_bytes` since the counter was last reset anywhere in this process.
        driver_used_bytes: In use on the whole device: other processes and the CUDA context included.
        driver_total_bytes: Size of the device's memory.
        process_bytes: Memory of this process by NVML, the CUDA context included; None where NVML sees no processes, as
            in most containers.
    """

    device: str
    name: str
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int | None
    driver_used_bytes: int | None
    driver_total_bytes: int | None
    process_bytes: int | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of this process's tensors."""
        return self.allocated_bytes

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes of this process's tensors since the counter was reset."""
        return self.peak_allocated_bytes


@dataclass(frozen=True, kw_only=True)
class CpuReading:
    """Main memory at one moment.

    Args:
        device: Always `"cpu"`.
        name: Name of the processor.
        resident_bytes: Resident memory of this whole process, interpreter and libraries included.
        anonymous_bytes: The part of it that no file backs: tensors, objects, the heap. None where the system does not
            report it, as outside Linux.
        file_bytes: The part that maps files, such as weights in safetensors and libraries: the system takes these
            pages back when memory is short, and reads them again. None likewise.
        shared_bytes: The part that is shared memory (shmem, tmpfs). None likewise. The three add up to
            `resident_bytes`.
        peak_resident_bytes: Most resident since the process started; the system offers no reset.
        available_bytes: Memory for new allocations without swapping, a container's limit respected.
        total_bytes: Size of the main memory.
    """

    device: str = "cpu"
    name: str
    resident_bytes: int
    peak_resident_bytes: int
    available_bytes: int
    total_bytes: int
    anonymous_bytes: int | None = None
    file_bytes: int | None = None
    shared_bytes: int | None = None

    @property
    def used_bytes(self) -> int:
        """Resident bytes of this process."""
        return self.resident_bytes

    @property
    def peak_bytes(self) -> int:
        """Most resident bytes of this process since it started."""
        return self.peak_resident_bytes


Reading = AcceleratorReading | CpuReading


@dataclass(frozen=True, kw_only=True)
class MemorySnapshot:
    """The readings of several devices at one moment."""

    readings: tuple[Reading, ...]

    def reading(self, device: str) -> Reading | None:
        """Return the reading of a device, or None if it was not read."""
        return next((r for r in self.readings if r.device == device), None)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the readings by device, ready for JSON."""
        return {r.device: asdict(r) for r in self.readings}


def take_snapshot(devices: Iterable[str | torch.device] | None = None) -> MemorySnapshot:
    """Read the memory in use now.

    Args:
        devices: Accelerators to read beside the CPU. None reads the current one and those that this process
            already holds memory on: reading any other would put a CUDA context of some hundred MB there.

    Raises:
        InvalidOptionError: If a device name is not understood.
        UnsupportedError: If a device is not there.
    """
    names = _default_accelerators() if devices is None else [device_name(d) for d in devices]
    accelerators = [_read_accelerator(n) for n in dict.fromkeys(names) if n != "cpu"]
    return MemorySnapshot(readings=(*accelerators, _read_cpu()))


def available_memory(device: str | torch.device) -> int:
    """Return the bytes that new tensors may take on a device.

    Args:
        device: `"cpu"`, `"cuda:0"`, `"xpu:0"` or `"mps"`.

    Returns:
        On an accelerator, the driver's free memory and the free blocks cached by this process's allocator, which may be
        fragmented. On the CPU, the system's available memory, or the rest of the container's limit if that is less.

    Raises:
        InvalidOptionError: If the device name is not understood.
        UnsupportedError: If the device is not there, or does not report its free memory.
    """
    name = device_name(device)
    if name == "cpu":
        return _read_cpu().available_bytes
    reading = _read_accelerator(name)
    if reading.driver_total_bytes is None or reading.driver_used_bytes is None:
        msg = f"Device {name!r} does not report its free memory; pass max_memory for it."
        raise UnsupportedError(msg)
    cached_bytes = reading.reserved_bytes - reading.allocated_bytes
    return max(0, reading.driver_total_bytes - reading.driver_used_bytes + cached_bytes)


def release_heap() -> None:
    """Return freed memory of the heap to the system; does nothing where the C library is not glibc.

    glibc keeps freed blocks of up to 32 MB for reuse. Quantizing and repacking weights frees several times their size
    in such blocks.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# --- devices ---


def device_name(device: str | torch.device) -> str:
    """Return the one name of a device that readings use: `"cpu"`, `"mps"`, or a type with its number.

    Raises:
        InvalidOptionError: If the name is not understood.
        UnsupportedError: If the device is not there.
    """
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        msg = f"device={str(device)!r} is not a device; use 'cpu', 'cuda:0', 'xpu:0' or 'mps'."
        raise InvalidOptionError(msg) from error
    if parsed.type == "cpu":
        return "cpu"
    if parsed.type not in _ACCELERATORS:
        msg = f"device={str(device)!r} has no memory that can be measured; use 'cpu', 'cuda:0', 'xpu:0' or 'mps'."
        raise InvalidOptionError(msg)
    backend = backend_of(parsed.type)
    count = backend.device_count() if backend.is_available() else 0
    if (parsed.index or 0) >= count:
        msg = f"Device {str(device)!r} is not there: torch sees {count} of type {parsed.type!r} on this machine."
        raise UnsupportedError(msg)
    if parsed.type == "mps":
        return "mps"
    return f"{parsed.type}:{backend.current_device() if parsed.index is None else parsed.index}"


def backend_of(device: str) -> Any:
    """Return torch's module for a type of accelerator; `torch.cuda` and `torch.xpu` have the same functions."""
    import torch

    return getattr(torch, device.split(":")[0])


def _default_accelerators() -> list[str]:
    for kind in _ACCELERATORS:
        backend = backend_of(kind)
        if backend.is_available():
            if kind == "mps":
                return ["mps"]
            current = backend.current_device()
            held = [i for i in range(backend.device_count()) if i == current or backend.memory_reserved(i)]
            return [f"{kind}:{i}" for i in held]
    return []


def _read_accelerator(name: str) -> AcceleratorReading:
    backend = backend_of(name)
    if name == "mps":
        reserved_bytes = backend.driver_allocated_memory()
        return AcceleratorReading(
            device=name,
            name="Apple GPU",
            allocated_bytes=backend.current_allocated_memory(),
            reserved_bytes=reserved_bytes,
            peak_allocated_bytes=None,
            driver_used_bytes=reserved_bytes,  # Metal reports this process only
            driver_total_bytes=backend.recommended_max_memory(),
        )
    properties = backend.get_device_properties(name)
    free_bytes, total_bytes = backend.mem_get_info(name)
    return AcceleratorReading(
        device=name,
        name=properties.name,
        allocated_bytes=backend.memory_allocated(name),
        reserved_bytes=backend.memory_reserved(name),
        peak_allocated_bytes=backend.max_memory_allocated(name),
        driver_used_bytes=total_bytes - free_bytes,
        driver_total_bytes=total_bytes,
        process_bytes=_nvml_process_bytes(str(getattr(properties, "uuid", ""))) if name.startswith("cuda") else None,
    )


def _nvml_process_bytes(uuid: str) -> int | None:
    """Ask NVML for the bytes of this process on the device with this UUID; its numbering differs from torch's."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)


# --- main memory ---


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _resident_parts(status: Path = _STATUS) -> dict[str, int]:
    """Read the parts of the resident memory, which the kernel adds up to VmRSS; empty where it does not report them.

    Source: RssAnon, RssFile and RssShmem of proc_pid_status(5), in kB of 1,024 bytes.
    """
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return {field: int(lines[key].split()[0]) * 1024 for field, key in _PARTS.items()}
    except (OSError, KeyError, ValueError, IndexError):
        return {}


def _read_cpu() -> CpuReading:
    import psutil

    memory = psutil.virtual_memory()
    left_bytes = _container_left_bytes()
    parts: dict[str, Any] = _resident_parts()
    now_bytes = sum(parts.values()) if parts else resident_bytes()
    return CpuReading(
        name=platform.processor() or platform.machine() or "CPU",
        resident_bytes=now_bytes,
        peak_resident_bytes=max(now_bytes, _peak_resident_bytes()),  # Linux updates its peak late
        available_bytes=memory.available if left_bytes is None else min(memory.available, left_bytes),
        total_bytes=memory.total,
        **parts,
    )


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def _container_left_bytes(folder: Path = _CGROUP) -> int | None:
    """Compute the rest of a container's memory limit; None without one. File pages that can be dropped count as free.

    Source: memory.max, memory.current and memory.stat of https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    try:
        limit = (folder / "memory.max").read_text().strip()
        current_bytes = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - current_bytes + int(stat.get("inactive_file", 0)))
