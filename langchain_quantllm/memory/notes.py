"""What measured memory does not say, in sentences for a report.

Owns the pitfalls of each backend's numbers; a note is given only where it applies.
"""

from __future__ import annotations

from langchain_quantllm.memory.measure import AcceleratorReading, CpuReading, MemorySnapshot
from langchain_quantllm.memory.weights import WeightBytes


def memory_notes(snapshot: MemorySnapshot, weights: WeightBytes | None = None) -> tuple[str, ...]:
    """Say which pitfalls apply to the numbers of a snapshot.

    Args:
        snapshot: Readings of the devices in question.
        weights: Weights of the model, if the numbers are those of a model.

    Returns:
        Sentences, those on accelerators first.
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
    without_peak = [r.device for r in accelerators if r.peak_allocated_bytes is None]
    if without_peak:
        notes.append(f"{', '.join(without_peak)} has no peak counter; its peak is the higher of before and after.")
    unseen = [r.device for r in accelerators if r.device.startswith("cuda") and r.process_bytes is None]
    if unseen:
        notes.append(
            f"NVML shows no memory of this process on {', '.join(unseen)} (no driver library, a container, or MIG), so"
            " the CUDA context cannot be told apart."
        )
    tells_parts = any(isinstance(r, CpuReading) and r.anonymous_bytes is not None for r in snapshot.readings)
    notes.append(
        "Resident memory is that of the whole process. Its anonymous part is the process's own; pages mapped from"
        " files, such as weights in safetensors and libraries, the system takes back when memory is short."
        if tells_parts
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
