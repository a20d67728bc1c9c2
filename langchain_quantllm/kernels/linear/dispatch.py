"""Products of 16-bit or float32 activations with quantized weights, which are read as the checkpoint stores them.

Owns how the kernels are launched: regime, tile sizes, grids, the sharing of long sums. What the functions mean is
`linear_reference`'s to say, which has them in plain torch. Knows tensors and weights; no model and no engine.

Two regimes. "vector", for up to 4 rows: each thread decodes what it loaded and multiplies it in float32. "tile", for
any number of rows: tensor cores multiply what was decoded in registers. Sums are added in an order that depends on
shapes alone, so that results are the same each time. Nothing is read back, and what is allocated depends on shapes
alone: calls may be captured in a CUDA graph. The device of the tensors must be the current one.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.kernels.launch import launch_options, wait_for_inputs
from langchain_quantllm.kernels.linear.bitsandbytes import row_tile_kernel, row_vector_kernel
from langchain_quantllm.kernels.linear.codebook import GROUPS_SHUFFLED, instructions
from langchain_quantllm.kernels.linear.dense import dense_linear
from langchain_quantllm.kernels.linear.dequantize import MAGIC, all_outputs
from langchain_quantllm.kernels.linear.gptq import packed_tile_kernel, packed_vector_kernel
from langchain_quantllm.kernels.linear.weights import (
    FourBitWeight,
    GPTQWeight,
    Int8Weight,
    RepackedWeight,
    Weight,
    codes_per_word,
    weight_of,
)

__all__ = ["MOST_FOUR_BIT_ROWS", "LinearConfig", "config_for", "grouped_linear", "quantized_linear", "weight_of"]

MOST_FOUR_BIT_ROWS = 64
"""Rows above which bitsandbytes' own way, to dequantize a matrix once, is the faster one."""

MOST_VECTOR_ROWS = 4
"""Most rows of the regime "vector"."""

MOST_WEIGHTS = 3
"""Most weights of one launch: query, key and value."""

_RULED_VECTOR_ROWS = 2
"""Most rows for which the rule chooses that."""

_WIDE = 64
"""Outputs of a launch for each multiprocessor, from which on they are many."""

_HOPPER = 9
"""Major compute capability of the H100 and H200."""

_ROOM_BYTES = 200 * 1024
"""Shared memory of a program from which on tiles are large."""

_MOST_TILE_ROWS = 64
_FOLDED = 1024
"""Sums that one program adds up of the splits."""

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How a product is computed; results are the same but for rounding.

    Args:
        regime: "vector" or "tile".
        outputs: Outputs of one program: a power of two; of "tile" at least 16.
        words: Words of each output that a program takes at once: a power of two, at least 4, and 16 for "tile".
        splits: Programs that share the inputs of an output. With more than 1, a second kernel adds up.
        warps: Warps of a program.
        stages: Tiles that are loaded ahead.
        decode: How indices of nf4 and fp4 are looked up: "table", in memory; "permute", "mixed" or "shuffle", in
            registers, in PTX. Activations in float32 have "table", and in the regime "vector" also "shuffle".
    """

    regime: str
    outputs: int
    words: int
    splits: int = 1
    warps: int = 4
    stages: int = 1
    decode: str = "shuffle"


def quantized_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, *, config: LinearConfig | None = None
) -> torch.Tensor:
    """Multiply activations by a quantized weight: `linear_reference.product`.

    Args:
        x: Activations of shape `(..., in_features)`, float16, bfloat16 or float32.
        weight: The weight, on the same device.
        bias: What is added, of shape `(out_features,)`, contiguous, floating; None for nothing: the weight's own is
            not looked at.
        config: How to compute; None for `config_for`.

    Returns:
        `x @ w.T + bias` of shape `(..., out_features)`, contiguous, in the dtype of `x`; summed in float32.

    Without a config, a weight of GPTQ or int8 is made dense for more than 64 rows: see `dense_products`.

    Raises:
        InvalidOptionError: If the config does not fit.
    """
    if config is None and _is_long(x) and isinstance(weight, Int8Weight | GPTQWeight):
        return dense_linear(x, weight, bias)
    return _launch(x, [weight], None if bias is None else [bias], config)[0]


def grouped_linear(
    x: torch.Tensor, weights: Sequence[Weight], *, config: LinearConfig | None = None
) -> list[torch.Tensor]:
    """Multiply the same activations by several weights, and add the bias of each.

    One launch computes them if they are at most three, of the same format, and all or none have a bias; otherwise
    there is one for each.

    Args:
        x: Activations of shape `(..., in_features)`, float16, bfloat16 or float32.
        weights: Weights of the same inputs, on the same device.
        config: How to compute; None for `config_for`.

    Returns:
        A product for each weight, as `product` gives it.

    Raises:
        InvalidOptionError: If the config does not fit.
    """
    biases = [weight.bias for weight in weights if weight.bias is not None]
    alike = len({weight.layout for weight in weights}) == 1 and len(biases) in (0, len(weights))
    if not alike or len(weights) > MOST_WEIGHTS or (config is None and _is_long(x)):
        return [quantized_linear(x, weight, weight.bias, config=config) for weight in weights]
    return _launch(x, weights, biases or None, config)


def _is_long(x: torch.Tensor) -> bool:
    return bool(x.numel() > _MOST_TILE_ROWS * x.shape[-1])


def config_for(
    weight: Weight,
    rows: int,
    multiprocessors: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out_features: int | None = None,
    is_roomy: bool = True,
) -> LinearConfig:
    """Choose how to compute a product.

    Args:
        weight: The weight, or one of several that are multiplied together.
        rows: Rows of activations.
        multiprocessors: Multiprocessors of the device.
        dtype: Of the activations.
        out_features: Outputs of all weights together; None for those of `weight`.
        is_roomy: Whether a program may have 200 KB of shared memory. Others are given tiles that fit into 96 KB.

    Returns:
        A config that fits the weight.
    """
    bits = 8 if isinstance(weight, Int8Weight) else weight.bits if isinstance(weight, GPTQWeight) else 4
    out_features = out_features or weight.out_features
    packed = isinstance(weight, GPTQWeight)
    config = _rule(packed, bits, weight.in_features, out_features, rows, multiprocessors, dtype, is_roomy)
    if not isinstance(weight, GPTQWeight):
        return config
    words = config.words
    if weight.zero_point < 0 and config.regime == "vector":  # there are not enough registers
        words = (8 if bits < 4 else 16) if not weight.group_size else words // 2 if rows > 1 else words
    # With act-order each input has a scale and a zero point of its own to load: too much to load ahead.
    return replace(config, words=words, stages=config.stages if weight.group_size else 1)


@cache
def _rule(
    packed: bool,
    bits: int,
    in_features: int,
    out_features: int,
    rows: int,
    multiprocessors: int,
    dtype: torch.dtype,
    is_roomy: bool,
) -> LinearConfig:
    """Choose by what was fastest on an H200: `python -m benchmarks.linear_speed`."""
    row_words = in_features // codes_per_word(bits)
    if rows <= _RULED_VECTOR_ROWS:
        regime, decode = "vector", "shuffle"
        shape, wanted, most = _vector_tile(packed, bits, rows, out_features // multiprocessors)
    else:
        shape = _tile(packed, bits, rows) if is_roomy else (64, max(16, 4 * bits), 4, 4 if rows <= 32 else 3)
        exact = dtype == torch.float32
        if exact:  # takes twice the room, and no tensor cores
            shape = 16, 16, 4, 3
        regime, wanted, most = "tile", 2, 8 if packed or bits == 8 else 4
        decode = "table" if exact else "permute" if rows > 16 and is_roomy else "shuffle"
    outputs, words, warps, stages = shape
    splits = _splits(-(-out_features // outputs), wanted * multiprocessors, min(most, -(-row_words // words)))
    return LinearConfig(
        regime=regime, outputs=outputs, words=words, splits=splits, warps=warps, stages=stages, decode=decode
    )


def _vector_tile(packed: bool, bits: int, rows: int, share: int) -> tuple[tuple[int, int, int, int], int, int]:
    """Give a tile of the regime "vector", how many programs a multiprocessor should have, and most splits.

    The tile is outputs, words, warps and stages. `share` is how many outputs there are for a multiprocessor: where they
    are many, programs of fewer warps fill it as well, and wait less for each other.
    """
    if packed:  # rows are read across: a program has 128 bytes of each, and few programs would read long columns
        return (32, 32 if bits > 3 or rows == 1 else 16, 1, 3), 8, 4
    if bits == 8 and rows == 1:
        return ((8, 64, 1, 4) if share >= _WIDE else (4, 128, 1, 4)), 1, 2
    if bits == 8:
        return (16, 64, 1, 4), 8, 4
    if rows > 1:
        return (8, 128, 1, 3), 1, 2
    tile = (16, 64, 1, 4) if share >= 2 * _WIDE else (16, 128, 2, 3) if share >= _WIDE else (16, 128, 4, 3)
    return tile, 1, 2


def _tile(packed: bool, bits: int, rows: int) -> tuple[int, int, int, int]:
    """Give outputs, words, warps and stages of the regime "tile", for 200 KB of shared memory."""
    if packed:
        return 128, 16 if bits < 8 else 32, 8 if rows > 32 else 4, 4
    if bits == 8:
        return 128, 32, 4, 4
    return (128, 32, 4, 3) if rows <= 16 else (128, 32, 8, 3)


def _splits(programs: int, wanted: int, most: int) -> int:
    """Give the least power of two with which there are enough programs, up to `most`."""
    splits = 1
    while programs * splits < wanted and 2 * splits <= most:
        splits *= 2
    return splits


def _launch(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor] | None,
    config: LinearConfig | None,
) -> list[torch.Tensor]:
    """Multiply by weights of one layout, all in one launch, and add up the splits in another."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, widths = flat.shape[0], [weight.out_features for weight in weights]
    if config is None:
        multiprocessors, is_roomy = _chip(x.device)
        config = config_for(
            weights[0], rows, multiprocessors, dtype=x.dtype, out_features=sum(widths), is_roomy=is_roomy
        )
    _check(config, rows)
    out = x.new_empty(rows * sum(widths))
    if rows:
        target = out if config.splits == 1 else x.new_empty((config.splits, out.numel()), dtype=torch.float32)
        _multiply(flat, weights, biases if config.splits == 1 else None, target, config)
        if config.splits > 1:
            sizes, addends = _three(widths), _three(biases or [out])
            _fold_kernel[(-(-out.numel() // _FOLDED),)](
                target, out, *addends, *sizes, rows, weights=len(weights), biased=biases is not None,
                splits=config.splits, block=_FOLDED, num_warps=4, **launch_options(x.device),
            )  # fmt: skip
    shape = x.shape[:-1]
    parts = out.split([rows * width for width in widths])
    return [part.view(*shape, width) for part, width in zip(parts, widths, strict=True)]


def _check(config: LinearConfig, rows: int) -> None:
    if config.regime not in ("vector", "tile") or config.decode not in ("table", *GROUPS_SHUFFLED):
        raise InvalidOptionError(f"A product has no regime {config.regime!r} with decode {config.decode!r}.")
    if config.regime == "vector" and rows > MOST_VECTOR_ROWS:
        raise InvalidOptionError(
            f"The regime 'vector' takes up to {MOST_VECTOR_ROWS} rows, not {rows}: use 'tile', or leave config out."
        )


def _multiply(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor] | None,
    target: torch.Tensor,
    config: LinearConfig,
) -> None:
    """Launch the kernel of the format and the regime."""
    rows, first = x.shape[0], weights[0]
    if isinstance(first, RepackedWeight):
        raise UnsupportedError("A weight that was repacked for a CPU has no kernel in Triton.")
    widths = [weight.out_features for weight in weights]
    given: dict[str, Any] = {
        "weights": len(weights),
        "biased": biases is not None,
        "outputs": config.outputs,
        "words": config.words,
        "num_warps": config.warps,
    } | launch_options(x.device)
    grid: tuple[int, ...] = (sum(-(-width // config.outputs) for width in widths), config.splits)
    scalars: list[Any] = [*_three(widths)]
    if config.regime == "vector":
        given |= {"rows": rows, "stages": config.stages}
    else:
        padded = min(_MOST_TILE_ROWS, max(16, 1 << (rows - 1).bit_length()))
        given |= {"padded_rows": padded, "dtype": _DTYPES[x.dtype], "num_stages": config.stages}
        grid = (*grid, -(-rows // padded))
    addends = biases or [target] * len(weights)
    pointers: list[Any] = []
    if isinstance(first, GPTQWeight):
        for weight, bias in zip(_three(weights), _three(addends), strict=True):
            pointers += [weight.words, weight.scales, weight.zeros, weight.groups, bias]
        per_word = first.per_word
        given |= {
            "bits": first.bits,
            "per_word": per_word,
            "group_size": first.group_size,
            "zero_point": first.zero_point,
        }
        given["chunk"] = _chunk(first.in_features, first.group_size, per_word, config.words)
        kernel = packed_vector_kernel if config.regime == "vector" else packed_tile_kernel
    else:
        for weight, bias in zip(_three(weights), _three(addends), strict=True):
            pointers += [weight.words, weight.scales, *_nested(weight), bias]
        per_word = 8 if isinstance(first, FourBitWeight) else 4
        pointers.append(first.code if isinstance(first, FourBitWeight) else first.scales)
        given |= _row_format(first, x.dtype, config)
        kernel = row_vector_kernel if config.regime == "vector" else row_tile_kernel
    scalars += [first.in_features // per_word, x.stride(0), config.splits]
    scalars.append(MAGIC if config.regime == "vector" else rows)
    kernel[grid](x, target, *pointers, *scalars, **given)


def _three(values: Sequence[Any]) -> list[Any]:
    """Repeat the last value: kernels have arguments for as many weights."""
    return [*values, *[values[-1]] * (MOST_WEIGHTS - len(values))]


def _nested(weight: FourBitWeight | Int8Weight) -> list[torch.Tensor]:
    """Give the tensors of quantized scales, or stand-ins that are not read."""
    if isinstance(weight, Int8Weight):
        return [weight.scales] * 3
    return [weight.nested_code, weight.nested_scales, weight.offset]


def _chunk(in_features: int, size: int, per_word: int, words: int) -> int:
    """Count the words that follow each other in a tile and always have one scale."""
    if size == in_features or not size:
        return words
    return min(words, gcd(in_features, size) // per_word)


def _row_format(weight: FourBitWeight | Int8Weight, dtype: torch.dtype, config: LinearConfig) -> dict[str, Any]:
    """Give the constants of a format that lies in rows."""
    if isinstance(weight, Int8Weight):
        constants = {"bits": 8, "block_size": 64, "chunk": 1, "nested": False, "nested_block_size": 1, "ptx": ""}
        return constants | ({"decode": ""} if config.regime == "vector" else {})
    # Blocks do not begin anew with a row.
    chunk = min(config.words, gcd(weight.in_features, weight.block_size) // 8)
    constants = {
        "bits": 4,
        "block_size": weight.block_size,
        "chunk": chunk,
        "nested": weight.nested,
        "nested_block_size": weight.nested_block_size,
    }
    if config.regime == "vector":
        # In float32, values come from float16 unless one at a time.
        in_registers = config.decode in ("permute", "mixed")
        ptx = instructions(config.decode, weight.kind, "float16") if in_registers else ""
        return constants | {"decode": config.decode, "ptx": ptx}
    in_registers = config.decode != "table" and dtype != torch.float32
    return constants | {"ptx": instructions(config.decode, weight.kind, str(dtype)[6:]) if in_registers else ""}


@cache
def _chip(device: torch.device) -> tuple[int, bool]:
    """Give a device's multiprocessors, and whether their shared memory is as large as an H100's."""
    if device.type != "cuda":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    # Not every PyTorch tells; of the chips before it, none has so much.
    room = getattr(properties, "shared_memory_per_multiprocessor", _ROOM_BYTES if properties.major == _HOPPER else 0)
    return int(properties.multi_processor_count), bool(room >= _ROOM_BYTES)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def _fold_kernel(
    parts: tl.tensor,
    out: tl.tensor,
    bias_1: tl.tensor,
    bias_2: tl.tensor,
    bias_3: tl.tensor,
    outputs_1: tl.tensor,
    outputs_2: tl.tensor,
    outputs_3: tl.tensor,
    rows: tl.tensor,
    weights: tl.constexpr,
    biased: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Add up the splits of `block` sums, in order, and the bias; grid `(blocks of sums,)`."""
    wait_for_inputs(early)
    count = rows * all_outputs(outputs_1, outputs_2, outputs_3, weights)
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < count
    found = tl.zeros([block], tl.float32)
    for split in tl.static_range(splits):
        found += tl.load(parts + split * count.to(tl.int64) + index, mask=inside, other=0.0)
    if biased:
        end = rows * outputs_1
        found += tl.load(bias_1 + index % outputs_1, mask=index < end, other=0.0).to(tl.float32)
        if weights > 1:
            start = end
            end += rows * outputs_2
            mine = (index >= start) & (index < end)
            found += tl.load(bias_2 + (index - start) % outputs_2, mask=mine, other=0.0).to(tl.float32)
        if weights > 2:
            start = end
            mine = (index >= start) & inside
            found += tl.load(bias_3 + (index - start) % outputs_3, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + index, found.to(out.dtype.element_ty), mask=inside)
