"""PyTorch's products with weights of 4 and 8 bits on a CPU, whose names begin with an underscore."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INT8_ALIGNMENT = 32
"""The kernel of 8 bits reads 32 inputs at a time without checking bounds, and needs activations aligned to 32 bytes.

Source: aten/src/ATen/native/cpu/int8mm_kernel.cpp in torch.
"""


def int8_product() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Find the product of rows in bfloat16 with int8 codes and a scale for each output, if it is fast.

    On Windows it multiplies number by number.
    """
    import torch

    return None if sys.platform == "win32" else getattr(torch, "_weight_int8pack_mm", None)


def int4_product() -> Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor] | None:
    """Find the product of rows in bfloat16 with codes of 4 bits, packed for this CPU; None if PyTorch has none.

    It takes the rows, the packed codes, the inputs of a group, and scales and offsets of shape `(groups, outputs, 2)`:
    a weight is `(code - 8) * scale + offset`.
    Source: aten/src/ATen/native/cpu/int4mm_kernel.cpp in torch.
    """
    import torch

    operation: Any = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
    return None if operation is None else operation.default
