"""bitsandbytes' layers and operations: what their weights carry, its products on a CPU, and what it says at import.

Layers are told by what they carry; only `import_quietly` imports bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.library_logging import quiet_logger

if TYPE_CHECKING:
    import torch

_import_lock = threading.Lock()
_CASTS = "bitsandbytes.autograd._functions"
_KERNELS = "bitsandbytes.backends.cpu.ops"


def import_quietly() -> None:
    """Import transformers and bitsandbytes without anything going to the network.

    On some CPUs bitsandbytes asks the Hub for a kernel while it is imported, if the package
    `kernels` is installed. Source: bitsandbytes/backends/cpu/ops.py.
    """
    with _import_lock:
        if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
            return
        before = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
        try:
            with quiet_logger(_KERNELS):
                import bitsandbytes  # noqa: F401
        except (ImportError, OSError, RuntimeError):  # a broken install: transformers says what is wrong, when needed
            pass
        finally:
            del sys.modules["kernels"]
            if before is not None:
                sys.modules["kernels"] = before


def filter_cast_warnings(model: Any) -> None:
    """Keep bitsandbytes from saying at every int8 product of a model that it casts bfloat16 to float16.

    Source: MatMul8bitLt in bitsandbytes/autograd/_functions.py.
    """
    logger = logging.getLogger(_CASTS)
    if any(map(is_int8_layer, model.modules())) and _not_about_casts not in logger.filters:
        logger.addFilter(_not_about_casts)


def _not_about_casts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


# Layers and their weights.


def is_int8_layer(module: Any) -> bool:
    """Say whether a module is a layer in 8 bits."""
    return type(module).__name__ == "Linear8bitLt"


def is_quantized(weight: Any) -> bool:
    """Say whether a weight is one of bitsandbytes, in 4 bits or 8, quantized already."""
    import torch

    in_8_bits = hasattr(weight, "SCB") and weight.dtype == torch.int8
    return getattr(weight, "quant_state", None) is not None or in_8_bits


@dataclass(frozen=True, kw_only=True)
class NestedScales:
    """Scales of 4-bit blocks that are quantized themselves, as `code[scales] * own_scales + offset`.

    Args:
        code: 256 values, float32.
        scales: Scales of the scales, float32.
        block_size: Scales that share one.
        offset: What is added to every scale.
    """

    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    offset: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FourBitState:
    """What a weight in 4 bits says of itself.

    Args:
        shape: Outputs and inputs; what else it has where it was made by hand.
        kind: "nf4" or "fp4".
        code: The 16 values of shape `(16,)`.
        scales: The largest magnitude of each block; indices into `nested.code` where there is that.
        block_size: Weights that share a scale.
        nested: How scales are quantized; None where they are not.
        repacked: Whether it is laid out anew for a CPU's own product, as a first forward does on some.
    """

    shape: tuple[int, ...]
    kind: str
    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    nested: NestedScales | None
    repacked: bool


def four_bit_state(weight: Any) -> FourBitState | None:
    """Read what a weight in 4 bits says of itself; None of any other.

    Source: `QuantState` and `_convert_weight_packed_for_cpu` in bitsandbytes/functional.py.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return None
    nested = None
    if (of_scales := getattr(state, "state2", None)) is not None:  # which repacking takes away
        nested = NestedScales(
            code=of_scales.code,
            scales=of_scales.absmax,
            block_size=of_scales.blocksize,
            offset=state.offset,
        )
    return FourBitState(
        shape=tuple(state.shape or ()),
        kind=state.quant_type,
        code=state.code,
        scales=state.absmax,
        block_size=state.blocksize,
        nested=nested,
        repacked=bool(getattr(state, "packing_format_for_cpu", False)),
    )


def int8_scales(module: Any) -> torch.Tensor | None:
    """Read the largest magnitude of each row of a layer in 8 bits; None of any other.

    They move from the weight into the layer's state with its first forward.
    """
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not hasattr(weight, "SCB"):
        return None
    scales = weight.SCB if weight.SCB is not None else getattr(getattr(module, "state", None), "SCB", None)
    return scales if weight.dtype == torch.int8 else None


def block_magnitudes(module: Any) -> tuple[torch.Tensor, int] | None:
    """Compute the largest magnitude of each block of a layer's weight, and the weights of a block; 0 for a row.

    None of a layer that is not quantized by bitsandbytes.
    """
    state = four_bit_state(getattr(module, "weight", None))
    if state is None:
        scales = int8_scales(module)
        return None if scales is None else (scales.float().clone(), 0)
    if state.nested is None:
        return state.scales.float().clone(), state.block_size
    from bitsandbytes.functional import dequantize_blockwise

    own = module.weight.quant_state
    return (dequantize_blockwise(own.absmax, own.state2) + own.offset).float(), state.block_size


def shape_of(module: Any) -> tuple[int, ...] | None:
    """Return the shape that a layer's quantized weight has unpacked; None of a layer that has none."""
    weight = getattr(module, "weight", None)
    state = four_bit_state(weight)
    if state is not None:
        return state.shape
    return tuple(weight.shape) if type(weight).__name__ == "Int8Params" else None  # type: ignore[union-attr]


def states_of(weight: Any) -> list[Any]:
    """List what a weight carries beside its own numbers: scales, codes, and state objects (see `is_state`)."""
    return [state for name in ("quant_state", "CB", "SCB") if (state := getattr(weight, name, None)) is not None]


def is_state(value: Any) -> bool:
    """Say whether an object holds the state of a quantized weight, among its attributes."""
    return type(value).__name__ in ("QuantState", "MatmulLtState")


# Operations.


def four_bit_product(
    x: torch.Tensor,
    words: torch.Tensor,
    shape: tuple[int, int],
    scales: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Multiply by a weight that is repacked for this CPU."""
    import torch

    return torch.ops.bitsandbytes.gemv_4bit.default(x, words, shape, scales, code, block_size)


def dequantized(
    octets: torch.Tensor, scales: torch.Tensor, block_size: int, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Unpack a weight in 4 bits, or a part of one that whole blocks make up."""
    import torch

    return torch.ops.bitsandbytes.dequantize_4bit.default(octets, scales, block_size, kind, shape, dtype)
