"""bitsandbytes: single matrices, quantized by its functions, and their tensors in a checkpoint.

A checkpoint has the tensors of a quantized layer beside its weight, under names that end as they do here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.bitsandbytes import FourBitState, state_from
from langchain_quantllm.compat.bitsandbytes_scales import refine_state

if TYPE_CHECKING:
    import torch

__all__ = [
    "FOUR_BIT_NAMES",
    "INT8_NAMES",
    "quantize_four_bit",
    "quantize_int8",
    "read_four_bit",
    "read_int8",
    "stored_four_bit",
    "stored_int8",
]

FOUR_BIT_NAMES = (
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight.nested_quant_map",
    "weight.nested_absmax",
    "weight.quant_map",
    "weight.absmax",
    "weight",
)
"""Names of the tensors of a layer in 4 bits. Source: `QuantState.as_dict` in bitsandbytes/functional.py."""

INT8_NAMES = ("weight_format", "weight", "SCB")
"""Names of the tensors of a layer in 8 bits. Source: `Linear8bitLt._save_to_state_dict` in bitsandbytes/nn/modules.py.
"""

_ROW_MAJOR = 0
"""Value of `weight_format`. Source: `LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING` in bitsandbytes/utils.py."""


def quantize_four_bit(
    matrix: torch.Tensor, kind: str, *, nested: bool, least_error: bool = False
) -> tuple[torch.Tensor, FourBitState]:
    """Quantize a matrix to 4 bits.

    Args:
        matrix: The matrix of shape `(out_features, in_features)`, floating, contiguous.
        kind: "nf4" or "fp4".
        nested: Whether the scales are quantized too.
        least_error: Whether each block gets the scale of the least squared error; see `bitsandbytes_scales`.

    Returns:
        Bytes of two indices each, of shape `(out_features * in_features / 2,)`, and the state.
    """
    from bitsandbytes.functional import quantize_4bit

    octets, state = quantize_4bit(matrix, compress_statistics=nested, quant_type=kind)
    if least_error:
        refine_state(octets, state, matrix)
    return octets.reshape(-1), state_from(state)


def quantize_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of a matrix to 8 bits, in float16 as the layers of bitsandbytes do.

    Returns:
        The codes of the matrix's shape, int8, and the largest magnitude of each row, float32.
    """
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(matrix.to(torch.float16))
    return codes, scales


def read_four_bit(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, FourBitState]:
    """Read a matrix in 4 bits from its tensors in a checkpoint, by the names of `FOUR_BIT_NAMES`.

    Returns:
        As of `quantize_four_bit`.
    """
    import torch
    from bitsandbytes.functional import QuantState

    weight = tensors["weight"]
    state = QuantState.from_dict({name: t for name, t in tensors.items() if name != "weight"}, device=weight.device)
    return weight.contiguous().view(torch.uint8).reshape(-1), state_from(state)


def read_int8(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a matrix in 8 bits from its tensors in a checkpoint, by the names of `INT8_NAMES`.

    Returns:
        As of `quantize_int8`.
    """
    return tensors["weight"], tensors["SCB"].float()


def stored_four_bit(
    octets: torch.Tensor, state: FourBitState, *, dtype: torch.dtype, storage: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors of a matrix in 4 bits for a checkpoint, by the names of `FOUR_BIT_NAMES`.

    Args:
        octets: As of `quantize_four_bit`.
        state: The state.
        dtype: Dtype of the matrix before it was quantized.
        storage: Dtype of the tensor with the bytes.
    """
    from bitsandbytes.functional import QuantState

    nested: dict[str, Any] = {}
    if (inner := state.nested) is not None:
        inner_state = QuantState(
            absmax=inner.scales, blocksize=inner.block_size, code=inner.code, dtype=inner.scales.dtype
        )
        nested = {"offset": inner.offset, "state2": inner_state}
    own = QuantState(
        absmax=state.scales,
        shape=_size(state.shape),
        code=state.code.clone(),  # safetensors writes no tensor twice
        blocksize=state.block_size,
        quant_type=state.kind,
        dtype=dtype,
        **nested,
    )
    packed = {f"weight.{name}": tensor for name, tensor in own.as_dict(packed=True).items()}
    return {"weight": octets.view(storage).reshape(-1, 1), **packed}


def stored_int8(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a matrix in 8 bits for a checkpoint, by the names of `INT8_NAMES`."""
    import torch

    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8)}


def _size(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.Size(shape)
