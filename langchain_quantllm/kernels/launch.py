"""Launching the Triton kernels: programmatic dependent launch, padded sizes, Triton's interpreter.

With programmatic dependent launch a kernel starts while the one before it ends, and waits for its results. A kernel
calls `wait_for_inputs` before it reads another kernel's results, and before it writes. Kernels of many programs let the
next kernel begin after they have read their weights: earlier, its programs would occupy the place of their own.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

from dataclasses import fields
from functools import cache
from inspect import signature, unwrap
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-not-found,import-untyped,unused-ignore]  # fmt: skip
except ImportError:  # an older Triton, where `early` is never set
    gdc_launch_dependents = gdc_wait = None
if gdc_wait is not None and "_semantic" not in signature(unwrap(gdc_wait)).parameters:
    gdc_launch_dependents = gdc_wait = None  # Triton 3.4, whose compiler passes what its own function does not take

COMPILER_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch: products and sums are fused, which newer versions of Triton do only where it is said.

One kernel asks for the opposite.
"""

_HOPPER = (9, 0)
_EARLY: dict[str, Any] = {**COMPILER_OPTIONS, "early": True, "launch_pdl": True}
_LATE: dict[str, Any] = {**COMPILER_OPTIONS, "early": False}


def launch_options(device: torch.device) -> dict[str, Any]:
    """Return the options to launch a kernel with an argument `early` on a device."""
    return _EARLY if device.type == "cuda" and _begins_early(device) else _LATE


@cache
def _begins_early(device: torch.device) -> bool:
    if gdc_wait is None or torch.version.hip is not None or torch.cuda.get_device_capability(device) < _HOPPER:
        return False
    from triton.backends.nvidia.compiler import CUDAOptions  # type: ignore[import-not-found,import-untyped,unused-ignore]  # fmt: skip

    return any(option.name == "launch_pdl" for option in fields(CUDAOptions))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def wait_for_inputs(early: tl.constexpr) -> None:
    """Wait until the kernel before this one has ended and its results can be read."""
    if early:
        gdc_wait()


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def let_next_begin(early: tl.constexpr) -> None:
    """Let the next kernel begin once all programs of this one have reached this call; it waits for their end."""
    if early:
        gdc_launch_dependents()


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def prefetch(at: tl.tensor, count: tl.tensor, lines: tl.constexpr, early: tl.constexpr) -> None:
    """Ask for words of memory that depend on no kernel to be brought into the L2 cache, before `wait_for_inputs`.

    Args:
        at: Pointers to where runs of words of 4 bytes begin, of shape `(runs, 1)`.
        count: Words of a run: a scalar, or of the shape of `at`.
        lines: Lines of 128 bytes to ask for from each run, at most: a power of two.
        early: Whether the kernel begins before the one ahead of it ends; otherwise there is nothing to gain.
    """
    if early:
        word = 32 * tl.arange(0, lines)[None, :]
        address = (at + word).to(tl.int64)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [address, (word + 0 * address.to(tl.int32) < count).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@cache
def power_of_2(size: int, least: int = 1) -> int:
    """Round a size up to a power of two, as the sizes of tiles are."""
    return max(least, 1 << (size - 1).bit_length())


def dense_vectors(x: torch.Tensor) -> torch.Tensor:
    """Copy a tensor whose last dimension is strided: the kernels read whole vectors."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def dot(left: tl.tensor, right: tl.tensor, added: tl.tensor) -> tl.tensor:
    """Multiply in the dtype of both, float32 without TF32, and add to `added` in float32."""
    if INTERPRETED:
        # The interpreter stores bfloat16 as integers and would multiply these. Products of two are exact in float32.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, added, input_precision="ieee")


INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))
"""Whether the kernels run in Triton's interpreter, without a GPU and without PTX."""
