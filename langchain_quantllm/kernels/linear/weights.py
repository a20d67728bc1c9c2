"""Weights of linear layers, quantized or not, as the kernels read them.

Every large tensor is the layer's own, or a view of it. `compat` finds the tensors in a layer of bitsandbytes or
GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, TypeAlias

import torch

from langchain_quantllm.compat.bitsandbytes import FourBitState, four_bit_state, int8_scales
from langchain_quantllm.compat.gptqmodel import StoredTensors, stored_tensors
from langchain_quantllm.kernels.linear.int4pack import Int4PackWeight, int4_pack_weight

__all__ = [
    "FloatWeight",
    "FourBitWeight",
    "GPTQWeight",
    "Int4PackWeight",
    "Int8Weight",
    "RepackedWeight",
    "Weight",
    "float_weight_of",
    "weight_of",
]

_FEWEST_FLOAT_FEATURES = 128
"""Inputs and outputs from which on a weight that is not quantized has a kernel."""


@dataclass(frozen=True, kw_only=True)
class FourBitWeight:
    """A weight of bitsandbytes in nf4 or fp4: indices into 16 values, scaled in blocks.

    The element at flat place `i` of the row-major `(out_features, in_features)` is in byte `i // 2`, in the upper half
    of it where `i` is even, and has the scale at `i // block_size`.

    Args:
        kind: "nf4" or "fp4".
        in_features: Inputs, a multiple of 8, so that no word of 4 bytes belongs to two rows.
        out_features: Outputs.
        words: The indices of shape `(out_features * in_features / 8,)`, int32: a view of the layer's bytes.
        code: The 16 values of shape `(16,)`, float32.
        scales: The largest magnitude of each block, float32; with `nested`, indices into `nested_code`, uint8.
        block_size: Elements that share a scale: a power of two, at least 8.
        nested: Whether the scales are quantized, as `nested_code[scales] * nested_scales + offset`.
        nested_code: 256 values, float32; `code` if not `nested`.
        nested_scales: Scales of the scales, float32; `code` if not `nested`.
        nested_block_size: Scales that share one of `nested_scales`.
        offset: Added to every scale, of shape `()` or `(1,)`, float32; `code` if not `nested`.
        bias: The layer's bias of shape `(out_features,)`, or None.
    """

    kind: str
    in_features: int
    out_features: int
    words: torch.Tensor
    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    nested: bool
    nested_code: torch.Tensor
    nested_scales: torch.Tensor
    nested_block_size: int
    offset: torch.Tensor
    bias: torch.Tensor | None

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one launch must have in common."""
        nested = (self.nested, self.nested_block_size)
        return (
            FourBitWeight,
            self.kind,
            self.in_features,
            self.block_size,
            nested,
            _dtype(self.bias),
            self.words.device,
        )


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """A weight of bitsandbytes in 8 bits: `codes * scales / 127`, a scale for each output.

    Args:
        in_features: Inputs, a multiple of 4.
        out_features: Outputs.
        words: The codes of shape `(out_features * in_features / 4,)`, int32: a view of the layer's int8.
        scales: Magnitudes of shape `(out_features,)`, float32.
        bias: The layer's bias of shape `(out_features,)`, or None.
    """

    in_features: int
    out_features: int
    words: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one launch must have in common."""
        return (Int8Weight, self.in_features, _dtype(self.bias), self.words.device)


@dataclass(frozen=True, kw_only=True)
class GPTQWeight:
    """A weight of GPTQ in 2, 3, 4 or 8 bits: `(codes - zeros) * scales`, in groups of inputs.

    Args:
        in_features: Inputs, a multiple of `32 / bits`, and in 3 bits of 32.
        out_features: Outputs, likewise.
        bits: Bits of a code: 2, 3, 4 or 8.
        words: The codes, packed along the inputs, of shape `(in_features * bits / 32, out_features)`, int32; those of 3
            bits are one stream across words.
        zeros: The zero points as they are (v2), packed along the outputs, of shape
            `(groups, out_features * bits / 32)`, int32.
        scales: Scales of shape `(groups, out_features)`, floating.
        groups: The group of each input, of shape `(in_features,)`, int32.
        group_size: Inputs of a group, if groups are consecutive and a word has one group; 0 if each input must look up
            `groups` (act-order, or a size that is no power of two).
        zero_point: The zero point, if all are the same, as in symmetric checkpoints; otherwise -1.
        bias: The layer's bias of shape `(out_features,)`, or None.
    """

    in_features: int
    out_features: int
    bits: int
    words: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    group_size: int
    zero_point: int
    bias: torch.Tensor | None

    @property
    def per_word(self) -> int:
        """Codes that kernels decode at once: those of a word, or of the 3 bytes that hold 8 codes of 3 bits."""
        return codes_per_word(self.bits)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one launch must have in common."""
        groups = (self.group_size, self.zero_point)
        return (
            GPTQWeight,
            self.in_features,
            self.bits,
            groups,
            self.scales.dtype,
            _dtype(self.bias),
            self.words.device,
        )


@dataclass(frozen=True, kw_only=True)
class RepackedWeight:
    """A weight of bitsandbytes in nf4 or fp4 that it has repacked for its own kernel, on CPUs with AVX512-BF16.

    Source: `_convert_weight_packed_for_cpu` in bitsandbytes/functional.py.

    Args:
        kind: "nf4" or "fp4".
        in_features: Inputs.
        out_features: Outputs, a multiple of 32.
        words: The indices of shape `(out_features, in_features / 2)`, uint8: 32 consecutive bytes for 32 outputs and 2
            inputs, the first 16 outputs in their lower halves.
        code: The 16 values of shape `(16,)`, float32.
        scales: The largest magnitude of each block, of shape `(in_features / block_size, out_features)`, bfloat16.
        block_size: Inputs that share a scale.
        bias: The layer's bias of shape `(out_features,)`, or None.
        joined: The concatenated weights of the layers with the same input, this one included; None if there are no
            others.
    """

    kind: str
    in_features: int
    out_features: int
    words: torch.Tensor
    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    bias: torch.Tensor | None
    joined: RepackedWeight | None = None

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one launch must have in common."""
        return (RepackedWeight, self.kind, self.in_features, self.block_size, self.words.device)


@dataclass(frozen=True, kw_only=True)
class FloatWeight:
    """A weight in 16 bits that is not quantized.

    Args:
        in_features: Inputs, a multiple of 8, so that each output's begin at 16 bytes.
        out_features: Outputs.
        words: The layer's weight of shape `(out_features, in_features)`, float16 or bfloat16.
        bias: The layer's bias of shape `(out_features,)`, or None.
    """

    in_features: int
    out_features: int
    words: torch.Tensor
    bias: torch.Tensor | None

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one launch must have in common."""
        return (FloatWeight, self.in_features, self.words.dtype, _dtype(self.bias), self.words.device)


Weight: TypeAlias = "FloatWeight | FourBitWeight | Int8Weight | GPTQWeight | RepackedWeight | Int4PackWeight"


def codes_per_word(bits: int) -> int:
    """Count the codes of a weight of GPTQ that kernels decode at once."""
    return 8 if bits == 3 else 32 // bits


def weight_of(module: torch.nn.Module) -> Weight | None:
    """Return the weight of a quantized linear layer, without copying it.

    For a layer of GPTQ it reads groups and zero points from the device: call it on loading a model, not in a step.

    Args:
        module: Any module. bitsandbytes' `Linear4bit` and `Linear8bitLt` must be quantized already; of
            GPTQModel, its torch and Triton layers, which hold zero points as they are (v2), and its layer for CPUs
            once a forward has packed it.

    Returns:
        The weight; None if the module is something else, or its storage has no kernel: inputs that do not fill whole
        words, 16-bit weights kept for training.
    """
    parameter: Any = getattr(module, "weight", None)
    if (state := four_bit_state(parameter)) is not None:
        return _four_bit(module, parameter, state)
    if (scales := int8_scales(module)) is not None:
        return _int8(module, parameter, scales)
    if (stored := stored_tensors(module)) is not None:
        return _gptq(module, stored)
    return int4_pack_weight(module)


def float_weight_of(module: torch.nn.Module) -> FloatWeight | None:
    """Return the weight of a linear layer that is not quantized, without copying it.

    Args:
        module: Any module.

    Returns:
        The weight; None if the module is no `torch.nn.Linear`, or its weight has no kernel: other dtypes, inputs that
        do not fill 16 bytes, layers smaller than a launch is worth, as those of an adapter.
    """
    if type(module) is not torch.nn.Linear:
        return None
    values = module.weight.detach()
    out_features, in_features = values.shape
    is_usual = values.dtype in (torch.float16, torch.bfloat16) and values.is_contiguous() and not in_features % 8
    if not is_usual or values.data_ptr() % 16 or min(in_features, out_features) < _FEWEST_FLOAT_FEATURES:
        return None
    return FloatWeight(in_features=in_features, out_features=out_features, words=values, bias=_bias(module))


def _dtype(bias: torch.Tensor | None) -> torch.dtype | None:
    return None if bias is None else bias.dtype


def _bias(module: torch.nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None


def _words(stored: torch.Tensor) -> torch.Tensor | None:
    """View contiguous storage as words; None if it is not aligned."""
    flat = stored.detach().reshape(-1).view(torch.uint8)
    if not stored.is_contiguous() or flat.data_ptr() % 16 or flat.numel() % 4:
        return None
    return flat.view(torch.int32)


def _four_bit(module: torch.nn.Module, parameter: Any, state: FourBitState) -> FourBitWeight | RepackedWeight | None:
    if len(state.shape) != 2:
        return None
    out_features, in_features = state.shape
    if state.repacked:
        return RepackedWeight(
            kind=state.kind,
            in_features=in_features,
            out_features=out_features,
            words=parameter.data.detach(),
            code=state.code.detach(),
            scales=state.scales,
            block_size=state.block_size,
            bias=_bias(module),
        )
    words, nested = _words(parameter.data), state.nested
    if words is None or gcd(in_features, state.block_size) % 8 or words.numel() * 8 != out_features * in_features:
        return None
    code = state.code.detach().float().contiguous()
    return FourBitWeight(
        kind=state.kind,
        in_features=in_features,
        out_features=out_features,
        words=words,
        code=code,
        scales=state.scales.float() if nested is None else state.scales,
        block_size=state.block_size,
        nested=nested is not None,
        nested_code=code if nested is None else nested.code.float(),
        nested_scales=code if nested is None else nested.scales.float(),
        nested_block_size=1 if nested is None else nested.block_size,
        offset=code if nested is None else nested.offset.float(),
        bias=_bias(module),
    )


def _int8(module: torch.nn.Module, parameter: Any, scales: torch.Tensor) -> Int8Weight | None:
    out_features, in_features = parameter.shape
    words = _words(parameter.data)
    if words is None or in_features % 4:
        return None
    return Int8Weight(
        in_features=in_features,
        out_features=out_features,
        words=words,
        scales=scales.detach().float().reshape(-1),
        bias=_bias(module),
    )


def _gptq(module: Any, stored: StoredTensors) -> GPTQWeight | None:
    bits, words, zeros, scales, groups = stored.bits, stored.words, stored.zeros, stored.scales, stored.groups
    if bits not in (2, 3, 4, 8) or words.dtype != torch.int32:
        return None
    packed, out_features = words.shape
    in_features = packed * 32 // bits
    shapes = zeros.shape == (len(scales), out_features * bits // 32) and scales.shape[1] == out_features
    if not shapes or stored.in_features not in (None, in_features) or groups.shape != (in_features,):
        return None
    if in_features * bits != packed * 32 or out_features * bits % 32:  # of 3 bits, 32 codes fill 3 words
        return None
    if not all(tensor.is_contiguous() for tensor in (words, zeros, scales, groups)):
        return None
    if int(groups.min()) < 0 or int(groups.max()) >= len(scales):
        return None  # GPTQModel counts these from the end
    return GPTQWeight(
        in_features=in_features,
        out_features=out_features,
        bits=bits,
        words=words.detach(),
        zeros=zeros.detach(),
        scales=scales.detach(),
        groups=groups.detach(),
        group_size=group_size_of(groups, len(scales), codes_per_word(bits)),
        zero_point=_zero_point(zeros, bits),
        bias=_bias(module),
    )


def group_size_of(groups: torch.Tensor, count: int, per_word: int) -> int:
    """Find the size of consecutive groups; 0 if they are not consecutive, or kernels cannot use the size."""
    size = len(groups) if count == 1 else -(-len(groups) // count)
    usable = count == 1 or (size % per_word == 0 and not size & size - 1)
    regular = torch.arange(len(groups), dtype=groups.dtype, device=groups.device) // size
    return size if usable and bool((groups == regular).all()) else 0


def _zero_point(zeros: torch.Tensor, bits: int) -> int:
    """Find the zero point of all groups; -1 if they differ."""
    first = int(zeros.flatten()[0]) & (1 << bits) - 1
    # Words in which every code is the first one, as signed numbers; in 3 bits codes are aligned to every third word.
    count = 3 if bits == 3 else 1
    stream = sum(first << place for place in range(0, 32 * count, bits))
    words = [(stream >> 32 * i) & 0xFFFFFFFF for i in range(count)]
    same = torch.tensor([word - (word >> 31 << 32) for word in words], dtype=zeros.dtype, device=zeros.device)
    return first if bool((zeros.reshape(-1, count) == same).all()) else -1
