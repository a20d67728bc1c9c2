"""GPUs that products are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the rule asks a device for, and the shared memory of a block.

    Source: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications"; the multiprocessors
    from NVIDIA's white papers of the chips.
    """

    capability: int
    multiprocessors: int
    block_bytes: int
    is_roomy: bool = False


CHIPS = {
    "A100": Chip(80, 108, 163 * 1024),
    "A10": Chip(86, 72, 99 * 1024),
    "RTX 3090": Chip(86, 82, 99 * 1024),
    "RTX 4090": Chip(89, 128, 99 * 1024),
    "L4": Chip(89, 58, 99 * 1024),
    "H100": Chip(90, 132, 227 * 1024, is_roomy=True),
}
