"""oneDNN: its product of float32 matrices on a CPU, which PyTorch's compiler calls by a name of its own.

PyTorch multiplies float32 by another library, whose sums depend on the number of rows more often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_linear() -> bool:
    """Whether this PyTorch has the product."""
    import torch

    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a weight.

    Args:
        x: Of shape `(rows, in_features)`, float32, on the CPU.
        weight: Of shape `(out_features, in_features)`, likewise; any strides.

    Returns:
        `x @ weight.T` of shape `(rows, out_features)`.

    Source: `_linear_pointwise` in torch/_inductor/mkldnn_ir.py.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
