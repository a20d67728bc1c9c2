"""The experts of a mixture: whether bitsandbytes' formats fit their sizes, and the bytes and weights that they have.

Each expert's matrix is quantized by itself, so that its blocks and scales are its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.gptqmodel_rules import settings_of
from langchain_quantllm.compat.transformers_experts import Projection, is_experts, projections, unsupported_experts
from langchain_quantllm.compat.transformers_quantizers import replaced_by_bitsandbytes
from langchain_quantllm.schemes import AWQ, FP4, GPTQ, MXFP4, NF4, Int8, Scheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "BLOCK_SIZE",
    "expert_bytes",
    "expert_counts",
    "expert_modules",
    "quantized_projections",
    "unfit_reason",
    "unquantized_reasons",
]

BLOCK_SIZE = 64
"""Elements that share a scale in 4 bits. Source: `quantize_4bit` in bitsandbytes/functional.py."""

_NESTED_BLOCK_SIZE = 256


def unfit_reason(module: Any, bits: int) -> str | None:
    """Return why the weights of experts cannot be quantized to 4 or 8 bits.

    Args:
        module: Any module.
        bits: Bits of a weight, 4 or 8.

    Returns:
        The reason; None for experts that can be quantized, and for other modules.
    """
    if (reason := unsupported_experts(module)) is not None:
        return reason
    multiple = 8 if bits == 4 else 4
    for name, projection in projections(module).items():
        if projection.in_features % multiple:
            return f"{name} has {projection.in_features} inputs, no multiple of {multiple}"
        part = projection.out_features * projection.in_features // _parts_of(name)
        if bits == 4 and part % BLOCK_SIZE:
            return f"{name} has matrices of {part} elements, no multiple of {BLOCK_SIZE}"
    return None


def _parts_of(name: str) -> int:
    """Return how many matrices a projection is made of: 2 for a gate and what it is multiplied by."""
    return 2 if name == "gate_up_proj" else 1


def unquantized_reasons(model: Any, bits: int) -> dict[str, int]:
    """Return why experts of a loaded model are not quantized to 4 or 8 bits, with the number of their layers.

    Experts whose sizes fit were left out by `skip_modules`, or were not quantized in the checkpoint.
    """
    reasons: Counter[str] = Counter()
    for module in model.modules():
        reason = unfit_reason(module, bits)
        if reason is None and projections(module):
            reason = "they were to be left out, or the checkpoint has them so"
        if reason is not None:
            reasons[reason] += 1
    return dict(reasons)


def expert_modules(model: Any) -> set[Any]:
    """Return the modules that hold the weights of experts, and those inside them."""
    found = [m for m in model.modules() if is_experts(m) or unsupported_experts(m) is not None]
    return {inner for module in found for inner in module.modules()}


def expert_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Count the weights of experts: those that are quantized, which are no parameters of the model, and the others."""
    quantized = plain = 0
    for module in model.modules():
        if not is_experts(module):
            continue
        plain += sum(projection.elements for projection in projections(module).values())
        stacks = [child.stack for child in module.children() if hasattr(child, "stack")]
        quantized += sum(stack.experts * stack.in_features * stack.out_features for stack in stacks)
    return quantized, plain


def quantized_projections(
    model: PreTrainedModel, scheme: Scheme, options: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Find the parameters of experts that a scheme quantizes: the bytes of the tensors in the place of each."""
    experts = {path: found for path, module in model.named_modules() if (found := projections(module))}
    if isinstance(scheme, GPTQ | AWQ):
        usual = {"bits": scheme.mean_bits or 4, "group_size": scheme.group_size or 128, **options}
        packed = {(path, name): settings_of(usual, f"{path}.0.{name}") for path in experts for name in experts[path]}
        return {
            f"{path}.{name}": _gptq_bytes(experts[path][name], own["bits"], own.get("group_size", 128))
            for (path, name), own in packed.items()
            if own is not None
        }
    if isinstance(scheme, MXFP4):
        return {f"{path}.{name}": _mxfp4_bytes(p) for path, found in experts.items() for name, p in found.items()}
    if not isinstance(scheme, Int8 | NF4 | FP4):
        return {}
    skipped = scheme.transformers_config("bfloat16").llm_int8_skip_modules
    nested = not isinstance(scheme, Int8) and scheme.double_quantization
    sizes: dict[str, tuple[int, ...]] = {}
    for path, found in experts.items():
        paths = [path, *(f"{path}.{name}" for name in found)]
        fits = unfit_reason(model.get_submodule(path), scheme.bits) is None
        if fits and len(replaced_by_bitsandbytes(model, paths, skipped)) == len(paths):
            sizes |= {f"{path}.{name}": expert_bytes(p, scheme.bits, nested=nested) for name, p in found.items()}
    return sizes


def expert_bytes(projection: Projection, bits: int, *, nested: bool = False) -> tuple[int, ...]:
    """Compute the bytes of the tensors with the weights of one projection of all experts.

    Args:
        projection: The projection.
        bits: Bits of a weight, 4 or 8.
        nested: Whether the scales of 4-bit weights are quantized too.
    """
    experts, outputs, weights = projection.experts, projection.out_features, projection.elements
    if bits == 8:
        return weights, 4 * experts * outputs
    blocks = math.ceil(outputs * projection.in_features / BLOCK_SIZE)
    words = weights // 2
    code = 4 * 16
    if not nested:
        return words, 4 * experts * blocks, code, 0
    outer = math.ceil(blocks / _NESTED_BLOCK_SIZE)
    return words, experts * blocks, code, 4 * experts * outer, 4 * 256, 4 * experts


def _mxfp4_bytes(projection: Projection) -> tuple[int, ...]:
    """Compute the bytes of the weights of one projection of all experts in mxfp4: values of 4 bits, scales of 8."""
    return projection.elements // 2, projection.elements // 32


def _gptq_bytes(projection: Projection, bits: float, group_size: int) -> tuple[int, ...]:
    """Compute the bytes of the weights of one projection of all experts, quantized by GPTQ.

    Args:
        projection: The projection.
        bits: Bits of a weight; a mean where they differ by layer.
        group_size: Inputs that share a scale; -1 for all.
    """
    experts, outputs, inputs = projection.experts, projection.out_features, projection.in_features
    groups = 1 if group_size == -1 else math.ceil(inputs / group_size)
    words, zeros = math.ceil(inputs * bits / 32) * outputs, groups * math.ceil(outputs * bits / 32)
    return 4 * experts * words, 4 * experts * zeros, 2 * experts * groups * outputs, 4 * experts * inputs
