"""Matrices in bitsandbytes' formats, put together to stacks, and taken apart again for a checkpoint.

A checkpoint has the gate of an expert and what it is multiplied by as two matrices, and a model has one: its rows are
those of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from langchain_quantllm.compat.bitsandbytes import FourBitState, NestedScales
from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.kernels.experts.weights import FourBitStack, Int8Stack
from langchain_quantllm.kernels.linear import reference
from langchain_quantllm.kernels.linear.weights import FourBitWeight, Int8Weight

__all__ = [
    "FourBitMatrix",
    "Int8Matrix",
    "four_bit_fault",
    "four_bit_stack",
    "int8_fault",
    "int8_stack",
    "join",
    "join_int8",
    "split_four_bit",
    "split_int8",
]

FourBitMatrix: TypeAlias = "tuple[torch.Tensor, FourBitState]"
"""Bytes of two indices each, and the state; see `compat.bitsandbytes_matrices.quantize_four_bit`."""

Int8Matrix: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Codes of shape `(out_features, in_features)`, and scales of shape `(out_features,)`."""


def four_bit_fault(octets: torch.Tensor, state: FourBitState) -> str | None:
    """Return what is wrong with the sizes of a checkpoint's matrix, outside which the kernels would read; or None."""
    if len(state.shape) != 2 or min(state.shape) < 1:
        return f"its shape is {tuple(state.shape)}, not that of a matrix"
    sizes = [("a block of weights", state.block_size, 8)]
    blocks, scales = _blocks(math.prod(state.shape), state.block_size), state.scales
    needed = [("bytes", octets, math.prod(state.shape) // 2), ("scales", scales, blocks), ("codes", state.code, 16)]
    if (nested := state.nested) is not None:
        sizes.append(("a block of scales", nested.block_size, 1))
        outer = _blocks(blocks, nested.block_size)
        needed += [("codes of scales", nested.code, 256), ("scales of scales", nested.scales, outer)]
        needed.append(("offsets of scales", nested.offset, 1))
    for what, size, least in sizes:
        if type(size) is not int or size < least or size & (size - 1):
            return f"{what} has {size!r} elements, which is no power of 2 from {least} on"
    for what, tensor, count in needed:
        if tensor.numel() != count:
            return f"it has {tensor.numel()} {what}, and {count} are needed"
    if (scales.dtype == torch.uint8) != (nested is not None) or (nested is None and not scales.is_floating_point()):
        return f"its scales are {str(scales.dtype).removeprefix('torch.')}"
    return None


def int8_fault(codes: torch.Tensor, scales: torch.Tensor) -> str | None:
    """Return what is wrong with a checkpoint's matrix, as `four_bit_fault` does; or None."""
    if codes.dtype != torch.int8 or codes.dim() != 2:
        return (
            f"its codes are {str(codes.dtype).removeprefix('torch.')} of shape {tuple(codes.shape)}, not an int8 matrix"
        )
    if scales.numel() != len(codes):
        return f"it has {scales.numel()} scales, and {len(codes)} are needed"
    return None


def _blocks(elements: int, block_size: Any) -> int:
    """Count blocks; 0 for a size that `four_bit_fault` refuses."""
    return -(-elements // block_size) if type(block_size) is int and block_size > 0 else 0


def four_bit_stack(matrices: Sequence[FourBitMatrix], bias: torch.Tensor | None = None) -> FourBitStack:
    """Put the matrices of all experts together.

    Scales that are quantized stay so if those of every expert are.

    Raises:
        CheckpointError: If the matrices differ in their shapes, block sizes or codes.
    """
    if not all(state.nested is not None for _, state in matrices):
        matrices = [(octets, flat_scales(octets, state)) for octets, state in matrices]
    first = matrices[0][1]
    for number, (_, state) in enumerate(matrices):
        if _format(state) != _format(first) or not torch.equal(state.code, first.code):
            msg = f"expert {number} is quantized as {_format(state)}, and the first as {_format(first)}."
            raise CheckpointError(msg)
    outputs, inputs = first.shape
    states = [state for _, state in matrices]
    inner = [state.nested for state in states if state.nested is not None]
    code = first.code.float()
    return FourBitStack(
        kind=first.kind,
        in_features=inputs,
        out_features=outputs,
        words=torch.stack([octets for octets, _ in matrices]).view(torch.int32),
        code=code,
        scales=torch.stack([state.scales for state in states]),
        block_size=first.block_size,
        nested=bool(inner),
        nested_code=inner[0].code.float() if inner else code,
        nested_scales=torch.stack([nested.scales for nested in inner]) if inner else code,
        nested_block_size=inner[0].block_size if inner else 1,
        offset=torch.stack([nested.offset.float().reshape(()) for nested in inner]) if inner else code,
        bias=bias,
    )


def int8_stack(matrices: Sequence[Int8Matrix], bias: torch.Tensor | None = None) -> Int8Stack:
    """Put the matrices of all experts together."""
    outputs, inputs = matrices[0][0].shape
    codes = torch.stack([codes.reshape(-1) for codes, _ in matrices])
    scales = torch.stack([scales.float().reshape(-1) for _, scales in matrices])
    return Int8Stack(in_features=inputs, out_features=outputs, words=codes.view(torch.int32), scales=scales, bias=bias)


def join(parts: Sequence[FourBitMatrix]) -> FourBitMatrix:
    """Put matrices with the same inputs above each other, without another rounding.

    Scales that are quantized stay so only if all have the same offset, which stands once for a matrix.

    Raises:
        CheckpointError: If a block would have elements of two matrices, or the matrices differ in their format.
    """
    if len(parts) == 1:
        return parts[0]
    states = [state for _, state in parts]
    if not _join_nested(states):
        states = [flat_scales(octets, state) for octets, state in parts]
    first = states[0]
    for state in states:
        rows, inputs = state.shape
        if _format(replace(state, shape=first.shape)) != _format(first) or rows * inputs % state.block_size:
            msg = f"matrices of {inputs} inputs quantized as {_format(state)} and {_format(first)} cannot be joined."
            raise CheckpointError(msg)
    nested = first.nested
    if nested is not None:
        inner = torch.cat([state.nested.scales for state in states if state.nested is not None])
        nested = replace(nested, scales=inner)
    shape = (sum(state.shape[0] for state in states), first.shape[1])
    scales = torch.cat([state.scales for state in states])
    return torch.cat([octets for octets, _ in parts]), replace(first, shape=shape, scales=scales, nested=nested)


def join_int8(parts: Sequence[Int8Matrix]) -> Int8Matrix:
    """Put matrices with the same inputs above each other."""
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def split_four_bit(weight: FourBitWeight, parts: int) -> list[FourBitMatrix]:
    """Take a matrix apart into matrices of the same number of rows: what `join` put together, bit by bit."""
    octets = weight.words.view(torch.uint8)
    nested = None
    if weight.nested:
        nested = NestedScales(
            code=weight.nested_code,
            scales=weight.nested_scales,
            block_size=weight.nested_block_size,
            offset=weight.offset,
        )
    state = FourBitState(
        shape=(weight.out_features, weight.in_features),
        kind=weight.kind,
        code=weight.code,
        scales=weight.scales,
        block_size=weight.block_size,
        nested=nested,
        repacked=False,
    )
    blocks = len(state.scales) // parts
    if parts > 1 and nested is not None and blocks % nested.block_size:
        state = flat_scales(octets, state)
        nested = None
    shape = (weight.out_features // parts, weight.in_features)
    found = []
    for part in range(parts):
        inner = nested
        if inner is not None:
            outer = len(inner.scales) // parts
            inner = replace(inner, scales=inner.scales[part * outer : (part + 1) * outer])
        scales = state.scales[part * blocks : (part + 1) * blocks]
        size = len(octets) // parts
        own = replace(state, shape=shape, scales=scales, nested=inner)
        found.append((octets[part * size : (part + 1) * size], own))
    return found


def split_int8(weight: Int8Weight, parts: int) -> list[Int8Matrix]:
    """Take a matrix apart into matrices of the same number of rows."""
    codes = weight.words.view(torch.int8).reshape(weight.out_features, weight.in_features)
    return list(zip(codes.chunk(parts), weight.scales.chunk(parts), strict=True))


def flat_scales(octets: torch.Tensor, state: FourBitState) -> FourBitState:
    """Return a state whose scales are not quantized, of the same values."""
    if state.nested is None:
        return state
    inner = state.nested
    outputs, inputs = state.shape
    weight = FourBitWeight(
        kind=state.kind,
        in_features=inputs,
        out_features=outputs,
        words=octets.view(torch.int32),
        code=state.code,
        scales=state.scales,
        block_size=state.block_size,
        nested=True,
        nested_code=inner.code,
        nested_scales=inner.scales,
        nested_block_size=inner.block_size,
        offset=inner.offset,
        bias=None,
    )
    return replace(state, scales=reference.block_scales(weight, torch.float32), nested=None)


def _join_nested(states: Sequence[FourBitState]) -> bool:
    """Say whether the quantized scales of several matrices can stay as they are when these are joined."""
    inner = [state.nested for state in states if state.nested is not None]
    if len(inner) < len(states):
        return False
    return all(
        bool(nested.offset == inner[0].offset) and len(state.scales) % nested.block_size == 0
        for state, nested in zip(states, inner, strict=True)
    )


def _format(state: FourBitState) -> tuple[str, int, tuple[int, ...], int]:
    return state.kind, state.block_size, state.shape, 0 if state.nested is None else state.nested.block_size
