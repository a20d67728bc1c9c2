"""Which modules a scheme quantizes, and the bytes of each tensor that comes of it.

Owns the formulas of the formats and transformers' rule for what is left alone. Works on a model on
the meta device; reads no weights, and does not need gptqmodel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.transformers_quantizers import float32_patterns, replaced_by_bitsandbytes
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.memory.weights import Kind, WeightBytes, sum_by_kind
from langchain_quantllm.schemes import FP4, GPTQ, NF4, Int8, Scheme, Unquantized

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_GPTQ_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)
"""Source: `BLOCK_PATTERNS` of optimum/gptq/constants.py; only linears under the first that occurs are quantized."""

_STORAGE_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


def weight_bytes(
    model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype, options: Mapping[str, Any] | None = None
) -> WeightBytes:
    """Compute what a model takes once it is loaded under a scheme.

    Args:
        model: The model on the meta device, made in `dtype`.
        scheme: How the weights will be held.
        dtype: The dtype that the rest of the model is loaded in.
        options: The checkpoint's `quantization_config`, for what the scheme does not say (`group_size`).

    Returns:
        Bytes by kind, tied weights counted once.

    Raises:
        UnsupportedError: If no formula is known for the scheme, or GPTQ finds no block of layers.
    """
    return sum_by_kind(_sizes(model, scheme, dtype, options or {}))


def _sizes(
    model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype, options: Mapping[str, Any]
) -> Iterator[tuple[Kind, int]]:
    """Give (kind, bytes) of every tensor that the loaded model will hold."""
    quantized = quantized_linears(model, scheme, options)
    kept_in_float32 = _float32_pattern(model, dtype)
    seen: set[int] = set()
    for path, module in model.named_modules():
        features = quantized.get(path)
        owned: tuple[tuple[Kind, Any], ...] = (("unquantized", module._parameters), ("buffers", module._buffers))
        for kind, tensors in owned:
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if features is not None and name == "weight":
                    yield from (("quantized", size_bytes) for size_bytes in linear_bytes(scheme, *features, options))
                    continue
                float32 = tensor.is_floating_point() and kept_in_float32 and kept_in_float32.search(f"{path}.{name}")
                yield kind, 4 * tensor.numel() if float32 else tensor.nbytes


def _float32_pattern(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Match the names that stay in float32."""
    import torch

    patterns: set[str] = set()
    if dtype == torch.float16:
        patterns |= float32_patterns(model, strict=False)
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= float32_patterns(model, strict=True)
    return re.compile("|".join(p.replace("*", ".*") for p in sorted(patterns))) if patterns else None


def quantized_linears(
    model: PreTrainedModel, scheme: Scheme, options: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, int]]:
    """Say which linear layers of a model a scheme quantizes.

    Args:
        model: The model, on any device.
        scheme: How the weights will be held.
        options: The checkpoint's `quantization_config`, if it has one.

    Returns:
        Path of each such module with its (in_features, out_features).

    Raises:
        UnsupportedError: If no rule is known for the scheme, or GPTQ finds no block of layers.

    Source: `GPTQQuantizer.convert_model` in optimum/gptq/quantizer.py.
    """
    linears = dict(_linears(model))
    if isinstance(scheme, Unquantized):
        return {}
    if isinstance(scheme, GPTQ):
        return _gptq_linears(model, linears, options or {})
    if isinstance(scheme, Int8 | NF4 | FP4):
        skipped = scheme.transformers_config("bfloat16").llm_int8_skip_modules
        replaced = replaced_by_bitsandbytes(model, linears, skipped)
        return {path: features for path, features in linears.items() if path in replaced}
    method = getattr(scheme, "method", "") or scheme.name
    msg = f"The memory of a checkpoint in format {method!r} cannot be estimated; load it and read its memory report."
    raise UnsupportedError(msg)


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int]]]:
    """Give path and (in_features, out_features) of the layers that the quantizers replace."""
    from torch.nn import Linear
    from transformers import Conv1D

    for path, module in model.named_modules():
        if type(module) is Linear:  # subclasses, such as routers, are left alone by the quantizers
            yield path, (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            yield path, (in_features, out_features)


def _gptq_linears(
    model: PreTrainedModel, linears: dict[str, tuple[int, int]], options: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    paths = [path for path, _ in model.named_modules()]
    given = options.get("block_name_to_quantize")
    block = given or next((b for b in _GPTQ_BLOCKS if any(path.startswith(b) for path in paths)), None)
    if block is None:
        msg = f"GPTQ finds no block of layers in {type(model).__name__}; its config must say block_name_to_quantize."
        raise UnsupportedError(msg)
    kept = tuple(name for group in options.get("modules_in_block_to_quantize") or () for name in group)
    return {p: f for p, f in linears.items() if p.startswith(block) and (not kept or p.endswith(kept))}


def linear_bytes(
    scheme: Scheme, in_features: int, out_features: int, options: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Compute the bytes of each tensor that holds one quantized weight, its bias left out.

    Args:
        scheme: A bitsandbytes or GPTQ scheme.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        options: For GPTQ, the checkpoint's `quantization_config`; 4 bits and groups of 128 where it says nothing.

    Returns:
        Bytes of the packed weight, then of its scales, codes and zero points.

    Raises:
        UnsupportedError: If no formula is known for the scheme.

    Source: `Int8Params._quantize` (bitsandbytes/nn/modules.py), `quantize_4bit` and `quantize_blockwise`
    (bitsandbytes/functional.py), `GPTQQuantLinear` (gptqmodel/nn_modules/qlinear/__init__.py).
    """
    if isinstance(scheme, Int8):
        return in_features * out_features, 4 * out_features  # int8 rows, float32 scale per row (SCB)
    if isinstance(scheme, NF4 | FP4):
        return _linear_4bit_bytes(scheme, in_features * out_features)
    if isinstance(scheme, GPTQ):
        options = options or {}
        bits = scheme.bits or options.get("bits") or 4
        group_size = options.get("group_size", 128)
        groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
        packed_rows, packed_columns = math.ceil(in_features * bits / 32), math.ceil(out_features * bits / 32)
        # qweight, qzeros (int32), scales (float16), g_idx (int32)
        return 4 * packed_rows * out_features, 4 * groups * packed_columns, 2 * groups * out_features, 4 * in_features
    msg = f"No formula is known for the bytes of a linear layer under {scheme.name!r}."
    raise UnsupportedError(msg)


def _linear_4bit_bytes(scheme: NF4 | FP4, weights: int) -> tuple[int, ...]:
    blocks = math.ceil(weights / 64)
    storage_bytes = _STORAGE_BYTES[scheme.storage_dtype]
    packed_bytes = storage_bytes * ((weights + 1) // (2 * storage_bytes))
    code_bytes = 4 * 16
    if not scheme.double_quantization:
        return packed_bytes, 4 * blocks, code_bytes  # float32 absmax
    # uint8 absmax, its float32 offset, and the float32 absmax and code of the second quantization
    return packed_bytes, blocks, code_bytes, 4, 4 * math.ceil(blocks / 256), 4 * 256
