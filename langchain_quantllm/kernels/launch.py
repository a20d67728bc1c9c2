"""Programmatic dependent launch: a kernel is made ready while the one before it ends, and waits for that.

Owns when that is possible, and the two instructions of it. Whatever a kernel reads of another kernel's and all that it
writes comes behind `wait_for_inputs`. Kernels of many programs let the next one begin when they have read their
weights: earlier, its programs would take the place of their own.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

from dataclasses import fields
from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-not-found,import-untyped,unused-ignore]  # fmt: skip
except ImportError:  # an older Triton, for which `early` is never set
    gdc_launch_dependents = gdc_wait = None

_HOPPER = (9, 0)
_EARLY: dict[str, Any] = {"early": True, "launch_pdl": True}
_LATE: dict[str, Any] = {"early": False}


def launch_options(device: torch.device) -> dict[str, Any]:
    """Give what a kernel with an argument `early` is launched with on a device."""
    return _EARLY if device.type == "cuda" and _begins_early(device) else _LATE


@cache
def _begins_early(device: torch.device) -> bool:
    if gdc_wait is None or torch.version.hip is not None or torch.cuda.get_device_capability(device) < _HOPPER:
        return False
    from triton.backends.nvidia.compiler import CUDAOptions  # type: ignore[import-not-found,import-untyped,unused-ignore]  # fmt: skip

    return any(option.name == "launch_pdl" for option in fields(CUDAOptions))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def wait_for_inputs(early: tl.constexpr) -> None:
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    if early:
        gdc_wait()


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def let_next_begin(early: tl.constexpr) -> None:
    """Let the next kernel begin as soon as all programs of this one have come here; it waits for their end."""
    if early:
        gdc_launch_dependents()
