"""Linear layers with quantized weights on a GPU, which read the weights as the checkpoint stores them.

Chooses the kernel of a weight's format and launches it. The functions are documented in `linear.reference`. Sums are
added in an order that depends on shapes alone, so that results are the same each time. Nothing is read back, and
allocations depend on shapes alone, so that a call can be part of a CUDA graph. The device of the tensors must be the
current one.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import math
from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.launch import launch_options, power_of_2, wait_for_inputs
from langchain_quantllm.kernels.linear.bitsandbytes import row_tile_kernel, row_vector_kernel
from langchain_quantllm.kernels.linear.codebook import codes_ptx, lookup_ptx, pair_ptx
from langchain_quantllm.kernels.linear.config import LinearConfig, chip, config_for, most_rows
from langchain_quantllm.kernels.linear.decoding import MAGIC
from langchain_quantllm.kernels.linear.dense import dense_linear
from langchain_quantllm.kernels.linear.floating import float_vector_kernel
from langchain_quantllm.kernels.linear.gptq import packed_tile_kernel, packed_vector_kernel
from langchain_quantllm.kernels.linear.grouping import sum_of
from langchain_quantllm.kernels.linear.matrix import packed_matrix_kernel, row_matrix_kernel
from langchain_quantllm.kernels.linear.pairs import interleave
from langchain_quantllm.kernels.linear.tuned import tuned_config
from langchain_quantllm.kernels.linear.weights import (
    FloatWeight,
    FourBitWeight,
    GPTQWeight,
    Int4PackWeight,
    Int8Weight,
    RepackedWeight,
    Weight,
)

__all__ = ["MOST_FLOAT_ROWS", "MOST_FOUR_BIT_ROWS", "grouped_linear", "one_launch", "quantized_linear", "tiled_linear"]

MOST_FOUR_BIT_ROWS = math.inf
"""Rows above which bitsandbytes' own layer is faster: none."""

MOST_FLOAT_ROWS = 4
"""Most rows for which a weight that is not quantized has a kernel; cuBLAS multiplies more."""

_MOST_GROUPED = 3
"""Most weights of one launch: query, key and value."""

_MOST_TILE_ROWS = 64
_MOST_MATRIX_ROWS = 256
"""Most rows of one program."""

_FOLDED = 1024
"""Sums that one program adds up over the splits."""

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Triton's names of dtypes."""


def quantized_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, *, config: LinearConfig | None = None
) -> torch.Tensor:
    """Multiply activations by a quantized weight; see `reference.quantized_linear`.

    `config` is how to compute; None takes the one that was measured on this GPU, see `tuned`, or else `config_for`, and
    dequantizes the weight for more than `most_rows`, see `dense_linear`. Sums are in float32, and the result is
    contiguous, in the dtype of `x`.

    Raises:
        InvalidOptionError: If the config does not fit.
    """
    if config is None and not isinstance(weight, RepackedWeight | Int4PackWeight) and _is_long(x, weight):
        return dense_linear(x, weight, bias)
    return _launch(x, [weight], None if bias is None else [bias], config)[0]


def grouped_linear(
    x: torch.Tensor, weights: Sequence[Weight], *, config: LinearConfig | None = None
) -> list[torch.Tensor]:
    """Multiply the same activations by several weights, and add the bias of each.

    It is one launch for up to three weights of the same format that all or none have a bias; otherwise one for each.
    See `quantized_linear`.

    Raises:
        InvalidOptionError: If the config does not fit.
    """
    if not one_launch(weights) or (config is None and _is_long(x, weights[0])):
        return [quantized_linear(x, weight, weight.bias, config=config) for weight in weights]
    biases = [weight.bias for weight in weights if weight.bias is not None]
    return _launch(x, weights, biases or None, config)


def one_launch(weights: Sequence[Weight]) -> bool:
    """Whether `grouped_linear` multiplies by these weights in one launch, if the rows are not too many for that."""
    biases = [weight.bias for weight in weights if weight.bias is not None]
    alike = len({weight.layout for weight in weights}) == 1 and len(biases) in (0, len(weights))
    return alike and len(weights) <= _MOST_GROUPED


def tiled_linear(
    x: torch.Tensor, weights: Sequence[Weight], biases: Sequence[torch.Tensor] | None, *, tile_rows: int
) -> list[torch.Tensor]:
    """Multiply activations by up to three weights of one layout, in tiles of rows however many rows there are.

    How each tile is computed follows from the weights and the rule alone, so that a row's result does not depend on the
    others, nor on what was measured on this machine.

    Args:
        x: Activations of shape `(..., in_features)`.
        weights: The weights.
        biases: A bias for each, or None.
        tile_rows: See `LinearConfig`.
    """
    multiprocessors, is_roomy = chip(x.device)
    out_features = sum(weight.out_features for weight in weights)
    config = config_for(
        weights[0], tile_rows, multiprocessors, dtype=x.dtype, out_features=out_features, is_roomy=is_roomy
    )
    return _launch(x, weights, biases, replace(config, tile_rows=tile_rows))


def _is_long(x: torch.Tensor, weight: Weight) -> bool:
    return bool(x.numel() > most_rows(weight, x.dtype) * x.shape[-1])


def _launch(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor] | None,
    config: LinearConfig | None,
) -> list[torch.Tensor]:
    """Multiply by weights of one layout in one launch, and add up the splits in another."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, widths = flat.shape[0], tuple(weight.out_features for weight in weights)
    config = config or tuned_config(weights[0], rows, sum(widths), x.dtype, x.device)
    if config is None:
        multiprocessors, is_roomy = chip(x.device)
        config = config_for(
            weights[0], rows, multiprocessors, dtype=x.dtype, out_features=sum(widths), is_roomy=is_roomy
        )
    config.check(rows, x.dtype)
    out = x.new_empty(rows * sum(widths))
    if rows:
        target = out if config.splits == 1 else x.new_empty((config.splits, out.numel()), dtype=torch.float32)
        _multiply(flat, weights, biases if config.splits == 1 else None, target, config)
        if config.splits > 1:
            _fold_kernel[(-(-out.numel() // _FOLDED),)](
                target, out, tuple(biases or [out]), widths, rows,
                weights=len(weights), biased=biases is not None,
                splits=config.splits, tile=_FOLDED, num_warps=4, **launch_options(x.device),
            )  # fmt: skip
    shape = x.shape[:-1]
    parts = out.split([rows * width for width in widths])
    return [part.view(*shape, width) for part, width in zip(parts, widths, strict=True)]


def _multiply(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor] | None,
    target: torch.Tensor,
    config: LinearConfig,
) -> None:
    """Launch the kernel of the format and the regime."""
    rows, first = x.shape[0], weights[0]
    if isinstance(first, RepackedWeight | Int4PackWeight):
        raise UnsupportedError("a weight that was repacked for a CPU has no kernel in Triton.")
    widths = tuple(weight.out_features for weight in weights)
    pointers, constants = _format(weights, x.dtype, config)
    constants |= {
        "weights": len(weights),
        "biased": biases is not None,
        "outputs": config.outputs,
        "words": config.words,
        "ahead": config.ahead,
        "num_warps": config.warps,
    } | launch_options(x.device)
    if config.registers and x.device.type == "cuda" and torch.version.hip is None:
        constants["maxnreg"] = config.registers
    per_word = _per_word(first)
    row_words = first.in_features // per_word
    grid: tuple[int, ...] = (sum(-(-width // config.outputs) for width in widths), config.splits)
    pointers += [tuple(biases or [target]), widths, row_words]  # without biases: never read
    if isinstance(first, FloatWeight):
        constants |= {"rows": rows, "stages": config.stages}
        float_vector_kernel[grid](x, target, *pointers, x.stride(0), config.splits, **constants)
        return
    kernel = _KERNELS[isinstance(first, GPTQWeight), config.regime]
    if config.regime == "vector":
        constants |= {"rows": rows, "stages": config.stages}
        kernel[grid](x, target, *pointers, x.stride(0), config.splits, MAGIC, **constants)
        return
    most = _MOST_TILE_ROWS if config.regime == "tile" else _MOST_MATRIX_ROWS
    padded = config.tile_rows or min(most, power_of_2(rows, 16))
    constants |= {"padded_rows": padded, "dtype": DTYPES[x.dtype], "num_stages": config.stages}
    tiles = -(-rows // padded)
    grid = (*grid, tiles)
    strides = [x.stride(0)]
    if config.regime == "matrix":
        padded_words = -(-row_words // config.words) * config.words
        x = interleave(
            x, per_word=per_word, neighbours=isinstance(first, FourBitWeight),
            padded_rows=tiles * padded, padded_words=padded_words,
        )  # fmt: skip
        strides = [padded_words, x.stride(0)]
    kernel[grid](x, target, *pointers, *strides, config.splits, rows, **constants)


_KERNELS = {
    (False, "vector"): row_vector_kernel,
    (False, "tile"): row_tile_kernel,
    (False, "matrix"): row_matrix_kernel,
    (True, "vector"): packed_vector_kernel,
    (True, "tile"): packed_tile_kernel,
    (True, "matrix"): packed_matrix_kernel,
}
"""By whether words are packed along the inputs, and the regime."""


def _format(weights: Sequence[Any], dtype: torch.dtype, config: LinearConfig) -> tuple[list[Any], dict[str, Any]]:
    """Return the tensors of weights of one layout, and the constants of their format."""
    first = weights[0]
    if isinstance(first, FloatWeight):
        return [_all(weights, "words")], {}
    pointers: list[Any] = [_all(weights, "words"), _all(weights, "scales")]
    if isinstance(first, GPTQWeight):
        pointers += [_all(weights, "zeros"), _all(weights, "groups")]
        constants: dict[str, Any] = {
            "bits": first.bits,
            "per_word": first.per_word,
            "group_size": first.group_size,
            "zero_point": first.zero_point,
            "chunk": shared_chunk(first.in_features, first.group_size, first.per_word, config.words),
        }
        if config.regime == "matrix":
            pointers.pop()
            constants["ptx"] = codes_ptx(first.bits, str(dtype)[6:])
        return pointers, constants
    if isinstance(first, FourBitWeight):
        pointers += [_all(weights, name) for name in ("nested_code", "nested_scales", "offset")]
        pointers.append(first.code)
    else:  # without nested scales and code: never read
        pointers += [pointers[1]] * 3 + [first.scales]
    return pointers, _row_format(first, dtype, config)


def _per_word(weight: Weight) -> int:
    """Count the values of a word."""
    if isinstance(weight, GPTQWeight):
        return weight.per_word
    return 8 if isinstance(weight, FourBitWeight) else 2 if isinstance(weight, FloatWeight) else 4


def _all(weights: Sequence[Any], name: str) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(weight, name) for weight in weights)


def shared_chunk(in_features: int, size: int, per_word: int, words: int) -> int:
    """Count the consecutive words of a tile that always have the same scale."""
    if size == in_features or not size:
        return words
    return min(words, gcd(in_features, size) // per_word)


def _row_format(weight: FourBitWeight | Int8Weight, dtype: torch.dtype, config: LinearConfig) -> dict[str, Any]:
    """Return the constants of a format that is stored row by row."""
    if isinstance(weight, Int8Weight):
        ptx = codes_ptx(8, str(dtype)[6:]) if config.regime == "matrix" else ""
        constants = {"bits": 8, "block_size": 64, "chunk": 1, "nested": False, "nested_block_size": 1, "ptx": ptx}
        return constants | ({"decode": ""} if config.regime == "vector" else {})
    # Blocks continue from one row to the next.
    chunk = min(config.words, gcd(weight.in_features, weight.block_size) // 8)
    constants = {
        "bits": 4,
        "block_size": weight.block_size,
        "chunk": chunk,
        "nested": weight.nested,
        "nested_block_size": weight.nested_block_size,
    }
    if config.regime == "vector":
        # In registers, two values at a time are float16.
        in_registers = config.decode in ("permute", "mixed")
        ptx = lookup_ptx(config.decode, weight.kind, "float16") if in_registers else ""
        return constants | {"decode": config.decode, "ptx": ptx}
    in_registers = config.decode != "table" and dtype != torch.float32
    if config.regime == "matrix":
        return constants | {"ptx": pair_ptx(weight.kind, str(dtype)[6:]) if in_registers else ""}
    return constants | {"ptx": lookup_ptx(config.decode, weight.kind, str(dtype)[6:]) if in_registers else ""}


@triton.jit(do_not_specialize=["rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def _fold_kernel(
    parts: tl.tensor,
    out: tl.tensor,
    biases: tl.tuple,
    widths: tl.tuple,
    rows: tl.tensor,
    weights: tl.constexpr,
    biased: tl.constexpr,
    splits: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Add up the splits of `tile` sums, in order, and the bias; grid `(tiles of sums,)`."""
    wait_for_inputs(early)
    count = rows * sum_of(widths, weights)
    index = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = index < count
    total = tl.zeros([tile], tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(parts + split * count.to(tl.int64) + index, mask=inside, other=0.0)
    if biased:
        end = rows * widths[0]
        total += tl.load(biases[0] + index % widths[0], mask=index < end, other=0.0).to(tl.float32)
        if weights > 1:
            start = end
            end += rows * widths[1]
            mine = (index >= start) & (index < end)
            total += tl.load(biases[1] + (index - start) % widths[1], mask=mine, other=0.0).to(tl.float32)
        if weights > 2:
            start = end
            mine = (index >= start) & inside
            total += tl.load(biases[2] + (index - start) % widths[2], mask=mine, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)
