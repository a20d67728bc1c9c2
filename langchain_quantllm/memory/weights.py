"""Bytes of a model's weights, by kind: measured on a loaded model, or computed for one on the meta device.

The computation follows transformers' rules for the modules that a scheme replaces, and the layout of each format; it
reads no weights.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from langchain_quantllm.compat.bitsandbytes import is_quantized, is_state, shape_of, states_of
from langchain_quantllm.compat.gptqmodel_rules import settings_of
from langchain_quantllm.compat.transformers_quantizers import (
    float32_patterns,
    replaced_by_awq,
    replaced_by_bitsandbytes,
)
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.memory.experts import expert_counts, expert_modules, quantized_projections
from langchain_quantllm.memory.output_head import head_bytes, head_of
from langchain_quantllm.schemes import AWQ, FP4, GPTQ, MXFP4, NF4, Int8, Scheme, Unquantized

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kind = Literal["quantized", "unquantized", "buffers", "experts", "offloaded"]

_CUDA_BLOCK_BYTES = 512
"""Source: `kMinBlockSize` of torch's c10/cuda/CUDACachingAllocator: every allocation is rounded up to it."""

_PACKED_NAMES = {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "blocks"}
"""Tensors of which GPTQ, AWQ, compressed-tensors, fp8 and mxfp4 linears have at least one, and no other module has."""

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


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of the weights of one model, by kind.

    Args:
        quantized_bytes: Packed weights with their scales, codes and zero points.
        unquantized_bytes: Parameters left in a float dtype: embeddings, output head, norms, biases.
        buffers_bytes: Buffers of modules that are not quantized, such as rotary frequencies.
        experts_bytes: Weights of a mixture's experts, quantized with their scales, or not; in none of the others.
        offloaded_bytes: Parameters that lie outside the model (accelerate's offload); not in the total.
        padding_bytes: Added by CUDA's allocator, which rounds every tensor up to 512 bytes; not in the total.
    """

    quantized_bytes: int
    unquantized_bytes: int
    buffers_bytes: int
    experts_bytes: int = 0
    offloaded_bytes: int = 0
    padding_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that lie in memory, without padding."""
        return self.quantized_bytes + self.unquantized_bytes + self.buffers_bytes + self.experts_bytes

    @property
    def cuda_bytes(self) -> int:
        """Least bytes that CUDA's allocator counts for them: the total with the padding."""
        return self.total_bytes + self.padding_bytes

    def to_dict(self) -> dict[str, int]:
        """Return the kinds and their total, ready for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def _sum_by_kind(sizes: Iterable[tuple[Kind, int]]) -> WeightBytes:
    """Add up the sizes of single tensors, given as (kind, bytes)."""
    totals = {"quantized": 0, "unquantized": 0, "buffers": 0, "experts": 0, "offloaded": 0, "padding": 0}
    for kind, size_bytes in sizes:
        totals[kind] += size_bytes
        if kind != "offloaded":
            totals["padding"] += -size_bytes % _CUDA_BLOCK_BYTES
    return WeightBytes(**{f"{kind}_bytes": total for kind, total in totals.items()})


# --- a loaded model ---


def weights_by_kind(model: torch.nn.Module) -> WeightBytes:
    """Measure the weights of a loaded model, shared memory counted once.

    Unlike transformers' `get_memory_footprint`, this counts the quantization state of bitsandbytes
    (absmax, codes, nested state, row scales) and looks into tensor subclasses (torchao).

    Args:
        model: Any loaded model, on any devices.

    Returns:
        The bytes by kind. On CUDA they are what the allocator was asked for
        (`torch.cuda.memory_stats()["requested_bytes.all.current"]`); `memory_allocated` also counts the rounding
        up to 512 bytes a tensor, and up to 1 MB a tensor where a cached block was not worth splitting.
    """
    return _sum_by_kind(_measured_sizes(model))


def _measured_sizes(model: torch.nn.Module) -> Iterator[tuple[Kind, int]]:
    """Yield (kind, bytes) of every distinct tensor of the model."""
    uncounted_bytes: dict[tuple[Any, int], int] = {}  # by storage
    seen: set[tuple[Any, ...]] = set()
    for kind, tensor in _tensors_by_kind(model):
        storage = None if tensor.device.type == "meta" else tensor.untyped_storage()
        place = (tensor.device, id(tensor) if storage is None else storage.data_ptr())
        view = (*place, tensor.storage_offset(), tensor.nbytes)
        if view in seen:
            continue
        seen.add(view)
        if storage is None:
            yield "offloaded", tensor.nbytes
            continue
        size_bytes = min(tensor.nbytes, uncounted_bytes.setdefault(place, storage.nbytes()))  # views may overlap
        uncounted_bytes[place] -= size_bytes
        yield kind, size_bytes


def _tensors_by_kind(model: torch.nn.Module) -> Iterator[tuple[Kind, torch.Tensor]]:
    """Yield every plain tensor of the model with its kind, shared ones as often as they occur."""
    experts = expert_modules(model)
    for module in model.modules():
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        buffers = {name: b for name, b in module._buffers.items() if b is not None}
        packed = bool(_PACKED_NAMES & {*parameters, *buffers}) or any(
            is_quantized(p) or _is_wrapper(p) for p in parameters.values()
        )
        for name, tensor in {**buffers, **parameters}.items():
            kind: Kind = "buffers" if name in buffers else "unquantized"
            if packed:
                kind = "unquantized" if name == "bias" else "quantized"
            if module in experts:
                kind = "experts"
            yield from ((kind, plain) for plain in _plain_tensors(tensor))
        if packed:  # state that lies beside the parameters: Linear8bitLt.state, repacked weights of GPTQ kernels
            state = [v for name, v in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
            yield from (("quantized", plain) for plain in _plain_tensors(state))


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a subclass over other tensors, as torchao's are; its own storage is empty then."""
    return type(tensor).__module__.startswith("torchao.") and hasattr(tensor, "__tensor_flatten__")


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors of a tensor with its quantization state, of a list, or of bitsandbytes' state objects."""
    import torch

    if isinstance(value, torch.Tensor) and _is_wrapper(value):
        names, _ = value.__tensor_flatten__()
        yield from _plain_tensors([getattr(value, name) for name in names])
    elif isinstance(value, torch.Tensor):
        yield value
        yield from _plain_tensors(states_of(value))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _plain_tensors(item)
    elif is_state(value):
        yield from _plain_tensors(list(vars(value).values()))


# --- a model on the meta device ---


def weight_bytes(
    model: PreTrainedModel,
    scheme: Scheme,
    dtype: torch.dtype,
    options: Mapping[str, Any] | None = None,
    *,
    packed_experts: bool = True,
    int8_head: bool = False,
) -> WeightBytes:
    """Compute the weights of a model as it will be loaded under a scheme.

    Args:
        model: The model on the meta device, made in `dtype`.
        scheme: Scheme of the weights.
        dtype: The dtype that the rest of the model is loaded in.
        options: The checkpoint's `quantization_config`, for what the scheme does not say (`group_size`).
        packed_experts: Whether the scheme quantizes the experts of a mixture too.
        int8_head: Whether the output head is in int8, whatever the scheme.

    Returns:
        Bytes by kind, tied weights counted once.

    Raises:
        UnsupportedError: If no formula is known for the scheme, or GPTQ finds no block of layers.
    """
    head = head_of(model) if int8_head else None
    sizes = _computed_sizes(model, scheme, dtype, options or {}, packed_experts, head)
    return _sum_by_kind(itertools.chain(sizes, (("quantized", size) for size in (head_bytes(head) if head else ()))))


def parameter_counts(model: PreTrainedModel) -> tuple[int, int]:
    """Count the parameters of a loaded model: those that are quantized, and all, as if unquantized."""
    shapes = {id(m.weight): shape for m in model.modules() if (shape := shape_of(m)) is not None}
    experts, _ = expert_counts(model)
    quantized = sum(map(math.prod, shapes.values())) + experts
    return quantized, quantized + sum(p.numel() for p in model.parameters() if id(p) not in shapes)


def expert_parameters(model: PreTrainedModel) -> int:
    """Count the parameters that hold the weights of all experts of a layer at once, and are not quantized."""
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name)


def _computed_sizes(
    model: PreTrainedModel,
    scheme: Scheme,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    packed_experts: bool,
    left_out: torch.nn.Linear | None,
) -> Iterator[tuple[Kind, int]]:
    """Yield (kind, bytes) of every tensor of the loaded model but one layer's own weight."""
    quantized = _quantized_linears(model, scheme, options)
    packed = quantized_projections(model, scheme, options) if packed_experts else {}
    kept_in_float32 = _float32_pattern(model, dtype)
    experts = expert_modules(model)
    seen: set[int] = set()
    for path, module in model.named_modules():
        features = quantized.get(path)
        owned: tuple[tuple[Kind, Any], ...] = (("unquantized", module._parameters), ("buffers", module._buffers))
        for kind, tensors in owned:
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in seen or (module is left_out and name == "weight"):
                    continue
                seen.add(id(tensor))
                own: Kind = "experts" if module in experts else kind
                if features is not None and name == "weight":
                    own_options = settings_of(options, path) or options
                    sizes = _linear_bytes(scheme, *features, own_options)
                    yield from (("quantized", size_bytes) for size_bytes in sizes)
                    continue
                if (stacked := packed.get(f"{path}.{name}")) is not None:
                    yield from ((own, size_bytes) for size_bytes in stacked)
                    continue
                float32 = tensor.is_floating_point() and kept_in_float32 and kept_in_float32.search(f"{path}.{name}")
                yield own, 4 * tensor.numel() if float32 else tensor.nbytes


def _float32_pattern(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Match the names of parameters that stay in float32; None if there are none."""
    import torch

    patterns: set[str] = set()
    if dtype == torch.float16:
        patterns |= float32_patterns(model, strict=False)
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= float32_patterns(model, strict=True)
    return re.compile("|".join(p.replace("*", ".*") for p in sorted(patterns))) if patterns else None


def _quantized_linears(
    model: PreTrainedModel, scheme: Scheme, options: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Find the linear layers that a scheme quantizes: path and (in_features, out_features) of each.

    Source: `GPTQQuantizer.convert_model` in optimum/gptq/quantizer.py.
    """
    if isinstance(scheme, Unquantized | MXFP4):
        return {}
    linears = dict(_linears(model))
    if isinstance(scheme, GPTQ):
        paths = [path for path, _ in model.named_modules()]
        given = options.get("block_name_to_quantize")
        block = given or next((b for b in _GPTQ_BLOCKS if any(path.startswith(b) for path in paths)), None)
        if block is None:
            msg = (
                f"GPTQ finds no block of layers in {type(model).__name__}; its config must say block_name_to_quantize."
            )
            raise UnsupportedError(msg)
        kept = tuple(name for group in options.get("modules_in_block_to_quantize") or () for name in group)
        found = {p: f for p, f in linears.items() if p.startswith(block) and (not kept or p.endswith(kept))}
        return {p: f for p, f in found.items() if settings_of(options, p) is not None}
    if isinstance(scheme, Int8 | NF4 | FP4):
        skipped = scheme.transformers_config("bfloat16").llm_int8_skip_modules
        replaced = replaced_by_bitsandbytes(model, linears, skipped)
        return {path: features for path, features in linears.items() if path in replaced}
    if isinstance(scheme, AWQ):
        replaced = replaced_by_awq(model, linears, options.get("modules_to_not_convert"))
        return {path: features for path, features in linears.items() if path in replaced}
    method = getattr(scheme, "method", "") or scheme.name
    msg = f"The memory of a checkpoint in format {method!r} cannot be estimated; load it and read its memory report."
    raise UnsupportedError(msg)


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and (in_features, out_features) of the layers that quantizers may replace."""
    from torch.nn import Linear
    from transformers import Conv1D

    for path, module in model.named_modules():
        if type(module) is Linear:  # quantizers leave subclasses, such as routers, alone
            yield path, (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            yield path, (in_features, out_features)


def _linear_bytes(scheme: Scheme, in_features: int, out_features: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Compute the bytes of the tensors of one quantized weight: packed weight, then scales, codes and zero points.

    For GPTQ and AWQ, `options` is the checkpoint's `quantization_config`; 4 bits and groups of 128 by default.

    Source: `Int8Params._quantize` (bitsandbytes/nn/modules.py), `quantize_4bit` and `quantize_blockwise`
    (bitsandbytes/functional.py), `GPTQQuantLinear` (gptqmodel/nn_modules/qlinear/__init__.py).
    """
    if isinstance(scheme, Int8):
        return in_features * out_features, 4 * out_features  # int8 rows, float32 scale per row (SCB)
    if isinstance(scheme, GPTQ):
        bits = options.get("bits") or scheme.mean_bits or 4
        group_size = options.get("group_size", 128)
        groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
        packed_rows, packed_columns = math.ceil(in_features * bits / 32), math.ceil(out_features * bits / 32)
        # qweight, qzeros (int32), scales (float16), g_idx (int32)
        return 4 * packed_rows * out_features, 4 * groups * packed_columns, 2 * groups * out_features, 4 * in_features
    if isinstance(scheme, AWQ):
        group_size = scheme.group_size or 128
        groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
        # qweight, qzeros (int32), scales (float16), and the g_idx (int32) of a layer of GPTQ, which loading makes of it
        return in_features * out_features // 2, groups * out_features // 2, 2 * groups * out_features, 4 * in_features
    assert isinstance(scheme, NF4 | FP4)  # _quantized_linears refuses all others
    weights = in_features * out_features
    blocks = math.ceil(weights / 64)
    storage_bytes = _STORAGE_BYTES[scheme.storage_dtype]
    packed_bytes = storage_bytes * ((weights + 1) // (2 * storage_bytes))
    code_bytes = 4 * 16
    if not scheme.double_quantization:
        return packed_bytes, 4 * blocks, code_bytes  # float32 absmax
    # uint8 absmax, its float32 offset, and the float32 absmax and code of the second quantization
    return packed_bytes, blocks, code_bytes, 4, 4 * math.ceil(blocks / 256), 4 * 256
