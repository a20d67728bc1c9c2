"""bitsandbytes: the state of its quantized layers, its operations on a CPU, its import and its messages.

Layers are recognized by their attributes and class names; only `import_quietly` imports bitsandbytes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from langchain_quantllm.compat.library_logging import quiet_logger

if TYPE_CHECKING:
    import torch

_import_lock = threading.Lock()
_CASTS = "bitsandbytes.autograd._functions"
_KERNELS = "bitsandbytes.backends.cpu.ops"


def import_quietly() -> None:
    """Import bitsandbytes without a request to the network.

    On some CPUs it asks the Hub for a kernel while it is imported, if the package `kernels` is installed.
    Source: bitsandbytes/backends/cpu/ops.py.
    """
    with _import_lock:
        if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
            return
        before = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
        try:
            with quiet_logger(_KERNELS):
                import bitsandbytes  # noqa: F401
        except (ImportError, OSError, RuntimeError):  # a broken install: transformers reports it when needed
            pass
        finally:
            del sys.modules["kernels"]
            if before is not None:
                sys.modules["kernels"] = before


def filter_cast_warnings(model: Any) -> None:
    """Drop bitsandbytes' warning, at every int8 product of a model, that it casts bfloat16 to float16.

    Source: MatMul8bitLt in bitsandbytes/autograd/_functions.py.
    """
    logger = logging.getLogger(_CASTS)
    if any(map(is_int8_layer, model.modules())):
        logger.addFilter(_is_no_cast_warning)  # once, however often it is called


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def keep_odd_layers_unpacked(model: Any) -> None:
    """Keep 4-bit layers as they are stored whose size the CPU's own kernel cannot take; they are dequantized then.

    Their first forward fails otherwise. Source: `Linear4bit.forward` in bitsandbytes/nn/modules.py, and
    `_convert_weight_packed_for_cpu` in bitsandbytes/functional.py.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        outputs, inputs = state.shape
        if outputs % 32 or inputs % state.blocksize:
            module.support_avx512bf16_for_cpu = False


# Layers and their weights.


def is_int8_layer(module: Any) -> bool:
    """Say whether a module is an 8-bit layer."""
    return type(module).__name__ == "Linear8bitLt"


def int8_layer_of(linear: torch.nn.Linear) -> Any:
    """Make an 8-bit layer of a linear layer, on its device, with a copy of its weight.

    Source: `Linear8bitLt` and `Int8Params` in bitsandbytes/nn/modules.py.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight, has_bias = linear.weight.data, linear.bias is not None
    layer = Linear8bitLt(
        linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    layer.bias = linear.bias
    return layer.eval()


def is_quantized(weight: Any) -> bool:
    """Say whether a weight is quantized by bitsandbytes, to 4 or 8 bits."""
    import torch

    in_8_bits = hasattr(weight, "SCB") and weight.dtype == torch.int8
    return getattr(weight, "quant_state", None) is not None or in_8_bits


@dataclass(frozen=True, kw_only=True)
class NestedScales:
    """Scales of 4-bit blocks that are quantized themselves, as `code[indices] * scales + offset`.

    Args:
        code: 256 values, float32.
        scales: Scales of the scales, float32.
        block_size: Number of scales that share one.
        offset: Added to every scale.
    """

    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    offset: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FourBitState:
    """The quantization state of a 4-bit weight.

    Args:
        shape: `(out_features, in_features)`; another one if the weight was made by hand.
        kind: "nf4" or "fp4".
        code: The 16 values, of shape `(16,)`.
        scales: The largest magnitude of each block; indices into `nested.code` if the scales are quantized.
        block_size: Number of weights that share a scale.
        nested: The quantization of the scales; None if they are not quantized.
        repacked: Whether the weight was repacked for bitsandbytes' CPU kernel, as the first forward does on some CPUs.
    """

    shape: tuple[int, ...]
    kind: str
    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    nested: NestedScales | None
    repacked: bool


def four_bit_state(weight: Any) -> FourBitState | None:
    """Return the quantization state of a 4-bit weight; None for any other weight.

    Source: `QuantState` and `_convert_weight_packed_for_cpu` in bitsandbytes/functional.py.
    """
    state = getattr(weight, "quant_state", None)
    return None if state is None else state_from(state)


def state_from(state: Any) -> FourBitState:
    """Read a `QuantState` of bitsandbytes."""
    nested = None
    if (of_scales := getattr(state, "state2", None)) is not None:  # repacking removes it
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
    """Return the largest magnitude of each row of an 8-bit layer; None for any other layer.

    The first forward moves them from the weight into the layer's state.
    """
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not hasattr(weight, "SCB"):
        return None
    scales = weight.SCB if weight.SCB is not None else getattr(getattr(module, "state", None), "SCB", None)
    return scales if weight.dtype == torch.int8 else None


def block_magnitudes(module: Any) -> tuple[torch.Tensor, int] | None:
    """Compute the largest magnitude of each block of a layer's weight, and the block size; 0 if a block is a row.

    None for a layer that bitsandbytes did not quantize.
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
    """Return the unpacked shape of a layer's quantized weight; None for other layers."""
    weight = getattr(module, "weight", None)
    state = four_bit_state(weight)
    if state is not None:
        return state.shape
    return tuple(weight.shape) if type(weight).__name__ == "Int8Params" else None  # type: ignore[union-attr]


def states_of(weight: Any) -> list[Any]:
    """List a weight's scales, codes and state objects (see `is_state`)."""
    return [state for name in ("quant_state", "CB", "SCB") if (state := getattr(weight, name, None)) is not None]


def is_state(value: Any) -> bool:
    """Say whether an object is the state of a quantized weight, with tensors among its attributes."""
    return type(value).__name__ in ("QuantState", "MatmulLtState")


# Operations.


_ARGUMENTS = """ct.c_int64(M), ct.c_int64(N), ct.c_int64(K), get_ptr(A), get_ptr(B), get_ptr(absmax), get_ptr(out),
ct.c_int64(blocksize), ct.c_int64(x_strideM), ct.c_int64(out_strideM),"""
"""What bitsandbytes passes to its library's product of a repacked weight. Source: bitsandbytes/backends/cpu/ops.py."""


@functools.cache
def _library_product(kind: str) -> Callable[..., None] | None:
    """Find the library's product of a repacked weight; None unless bitsandbytes itself calls it as we do."""
    name = f"gemv_4bit_inference_cpu_{kind}_bf16"
    try:
        from bitsandbytes.backends.cpu import ops
        from bitsandbytes.cextension import lib

        call = f"lib.{name}({_ARGUMENTS})".replace(" ", "").replace("\n", "")
        if call not in "".join(inspect.getsource(ops).split()):
            return None
        product: Any = lib._lib[name]  # by index it is a function object of our own
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError):
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    product.argtypes = (number, number, number, pointer, pointer, pointer, pointer, number, number, number)
    product.restype = None
    return cast("Callable[..., None]", product)


def four_bit_product(
    words: torch.Tensor, shape: tuple[int, int], scales: torch.Tensor, code: torch.Tensor, block_size: int, kind: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the product of activations of shape `(..., inputs)` with a 4-bit weight that is repacked for this CPU.

    The operation of bitsandbytes takes as long to reach its library as that takes for a small layer, so the library is
    called without it where that can be.

    Args:
        words: The repacked indices.
        shape: Outputs and inputs.
        scales: Magnitudes of the blocks, bfloat16.
        code: The 16 values.
        block_size: Inputs that share a scale.
        kind: "nf4" or "fp4".
    """
    import torch

    def by_operation(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.bitsandbytes.gemv_4bit.default(x, words, shape, scales, code, block_size)

    product, (outputs, inputs), bfloat16 = _library_product(kind), shape, torch.bfloat16
    if product is None or scales.dtype != bfloat16 or not (scales.is_contiguous() and words.is_contiguous()):
        return by_operation
    at, scales_at = words.data_ptr(), scales.data_ptr()  # of tensors that `by_operation` keeps

    def by_library(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != bfloat16:
            return by_operation(x)
        x = x.contiguous()
        found = x.new_empty((*x.shape[:-1], outputs))
        rows = x.numel() // inputs
        product(rows, outputs, inputs, x.data_ptr(), at, scales_at, found.data_ptr(), block_size, inputs, outputs)
        return found

    return by_library


def dequantized(
    octets: torch.Tensor, scales: torch.Tensor, block_size: int, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize a 4-bit weight, or a part of it that consists of whole blocks."""
    import torch

    return torch.ops.bitsandbytes.dequantize_4bit.default(octets, scales, block_size, kind, shape, dtype)
