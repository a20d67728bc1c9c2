"""Experts on a GPU: products of rows with the weights of the experts that they are routed to.

Chooses the kernels and launches them. The functions are documented in `experts.reference`. Few rows take three
launches: the first product with its gating, the second product, the sums over each token's experts; with tiles, one
before them puts the rows in order. A row's result does not depend on the other rows, but for the choice between these
two ways. Nothing is read back, and allocations depend on shapes alone, so that a call can be part of a CUDA graph. The
device of the tensors must be the current one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import gcd
from typing import Any

import torch

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.activation import ACTIVATIONS
from langchain_quantllm.kernels.experts.config import ExpertsConfig, config_for
from langchain_quantllm.kernels.experts.gating import Gating
from langchain_quantllm.kernels.experts.products import sum_kernel, tile_kernel, vector_kernel
from langchain_quantllm.kernels.experts.routing import Tiles, sort_into_tiles
from langchain_quantllm.kernels.experts.weights import (
    MXFP4_BLOCK,
    FloatStack,
    FourBitStack,
    GPTQStack,
    Int8Stack,
    Mxfp4Stack,
    Stack,
)
from langchain_quantllm.kernels.launch import launch_options, power_of_2
from langchain_quantllm.kernels.linear.codebook import CODEBOOKS, MXFP4, lookup_ptx
from langchain_quantllm.kernels.linear.config import LinearConfig, chip
from langchain_quantllm.kernels.linear.decoding import MAGIC
from langchain_quantllm.kernels.linear.dispatch import DTYPES, shared_chunk
from langchain_quantllm.kernels.linear.weights import codes_per_word

__all__ = ["experts", "tiled_experts"]

_SUMMED = 1024
"""Most sums of one program."""

_MOST_UNIT = 16
"""The largest power of two that is compiled in as a divisor of a row's words: Triton itself notices multiples of 16."""


def experts(
    x: torch.Tensor,
    first: Sequence[Stack],
    second: Stack,
    index: torch.Tensor,
    weights: torch.Tensor,
    gating: Gating,
    *,
    config: ExpertsConfig | None = None,
) -> torch.Tensor:
    """Compute the experts of each token; see `reference.experts`.

    `config` is how to compute; None takes `config_for`. Sums are in float32; what is between the two products, and what
    an expert gives for a token, are rounded to the dtype of `x`.

    Raises:
        InvalidOptionError: If the config does not fit.
        UnsupportedError: If the stacks of the first product differ in more than their numbers.
    """
    tokens, chosen = index.shape
    gates, ups = _gates_and_ups(first, gating)
    if config is None:
        _, is_roomy = chip(x.device)
        config = config_for(gates, second, tokens, chosen, dtype=x.dtype, is_gated=gating.is_gated, is_roomy=is_roomy)
    config.check()
    x = x if x.stride(1) == 1 else x.contiguous()
    index, weights = index.contiguous(), weights.contiguous()
    out = x.new_empty(tokens, second.out_features)
    if not tokens:
        return out
    rows = tokens * chosen
    tiles = None
    if config.first.regime == "tile":
        tiles = sort_into_tiles(index.view(-1), second.experts, config.first.tile_rows)
    inner = x.new_empty(rows, second.in_features)
    _multiply(x, inner, index, tiles, gates, ups, config.first, gating, rows_of_x=chosen)
    parts = x.new_empty(rows, second.out_features)
    _multiply(inner, parts, index, tiles, second, second, config.second, None, rows_of_x=1)
    tile = min(_SUMMED, power_of_2(second.out_features, 16))
    sum_kernel[(tokens, -(-second.out_features // tile))](
        parts, index, weights, out, second.experts, second.out_features,
        chosen=chosen, tile=tile, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out


def tiled_experts(
    x: torch.Tensor,
    first: Sequence[Stack],
    second: Stack,
    index: torch.Tensor,
    weights: torch.Tensor,
    gating: Gating,
    *,
    tile_rows: int,
) -> torch.Tensor:
    """Compute experts in tiles of `tile_rows` rows however many rows there are.

    How each tile is computed follows from the weights alone, so that a row's result does not depend on the others.
    """
    _, is_roomy = chip(x.device)
    tokens, chosen = index.shape
    config = config_for(
        first[0], second, tokens, chosen,
        dtype=x.dtype, is_gated=gating.is_gated, is_roomy=is_roomy, tile_rows=tile_rows,
    )  # fmt: skip
    return experts(x, first, second, index, weights, gating, config=config)


def _gates_and_ups(first: Sequence[Stack], gating: Gating) -> tuple[Stack, Stack]:
    """Return the stacks of gates and of ups, which may be one, in a form that both have.

    Raises:
        UnsupportedError: If they have none, or there are more than two stacks.
    """
    gates, ups = first[0], first[-1]
    if len(first) == 1:
        return gates, ups
    if len(first) > 2 or not gating.is_gated or gating.is_interleaved or gates.out_features != ups.out_features:
        msg = f"its first product has {len(first)} weights, which are not its gates and its ups"
        raise UnsupportedError(msg)
    if isinstance(gates, GPTQStack) and isinstance(ups, GPTQStack):
        # Both are stored; these only say what holds for all groups.
        if gates.group_size != ups.group_size:
            gates, ups = replace(gates, group_size=0), replace(ups, group_size=0)
        if gates.zero_point != ups.zero_point:
            gates, ups = replace(gates, zero_point=-1), replace(ups, zero_point=-1)
    if type(gates) is not type(ups) or _constants(gates) != _constants(ups) or _steps(gates) != _steps(ups):
        msg = "its gates and its ups are stored in two ways"
        raise UnsupportedError(msg)
    if (gates.bias is None) != (ups.bias is None):
        msg = "only one of its gates and its ups has a bias"
        raise UnsupportedError(msg)
    return gates, ups


def _multiply(
    x: torch.Tensor,
    out: torch.Tensor,
    index: torch.Tensor,
    tiles: Tiles | None,
    stack: Stack,
    up_stack: Stack,
    config: LinearConfig,
    gating: Gating | None,
    *,
    rows_of_x: int,
) -> None:
    """Launch one product, with the gating after it."""
    rows, results = out.shape
    is_gated = gating is not None and gating.is_gated
    step, up_start = 1, 0
    if gating is not None and is_gated and stack is up_stack:
        step, up_start = (2, 1) if gating.is_interleaved else (1, results)
    if stack.out_features != (2 * results if is_gated and stack is up_stack else results):
        msg = f"its products do not fit: one has {stack.out_features} outputs where {results} are read"
        raise UnsupportedError(msg)
    constants = _constants(stack)
    row_words = stack.in_features // constants["per_word"]
    unit = gcd(row_words, _MOST_UNIT)
    constants |= _gating_constants(gating) | {
        "unit": unit,
        "chunk": _chunk(stack, config.words),
        "biased": stack.bias is not None,
        "outputs": config.outputs,
        "words": config.words,
        "num_warps": config.warps,
        "ptx": _ptx(stack, config, x.dtype),
    }
    constants |= launch_options(x.device)
    weights = [_pointers(stack), _strides(stack), _bias(stack, out)]
    weights += [_pointers(up_stack), _strides(up_stack), _bias(up_stack, out), _code(stack, x.device)]
    scalars = [rows_of_x, x.stride(0), row_words // unit, stack.out_features, results, step, up_start, *_steps(stack)]
    programs = -(-results // config.outputs)
    if tiles is None:
        vector_kernel[(programs, rows)](
            x, out, index, *weights, stack.experts, *scalars, MAGIC,
            decode=config.decode, stages=config.stages, **constants,
        )  # fmt: skip
        return
    tile_kernel[(len(tiles.experts), programs)](
        x, out, tiles.rows, tiles.experts, *weights, rows, *scalars,
        tile_rows=tiles.tile_rows, dtype=DTYPES[x.dtype], num_stages=config.stages, **constants,
    )  # fmt: skip


# The arguments of a format.


def _constants(stack: Stack) -> dict[str, Any]:
    """Return what is compiled in for a format, and does not depend on the config."""
    found: dict[str, Any] = {
        "layout": "rows", "bits": 4, "per_word": 8, "block_size": MXFP4_BLOCK, "scaling": "plain",
        "nested_block_size": 1, "zero_point": 0, "lower_first": False,
    }  # fmt: skip
    if isinstance(stack, FloatStack):
        return found | {"layout": "values", "bits": 16, "per_word": 1}
    if isinstance(stack, Int8Stack):
        return found | {"bits": 8, "per_word": 4}
    if isinstance(stack, Mxfp4Stack):
        return found | {"scaling": "exponents", "lower_first": True}
    if isinstance(stack, FourBitStack):
        scaling = "nested" if stack.nested else "plain"
        return found | {
            "block_size": stack.block_size,
            "scaling": scaling,
            "nested_block_size": stack.nested_block_size,
        }
    return found | {
        "layout": "packed",
        "bits": stack.bits,
        "per_word": codes_per_word(stack.bits),
        "block_size": stack.group_size,
        "zero_point": stack.zero_point,
    }


def _gating_constants(gating: Gating | None) -> dict[str, Any]:
    if gating is None:
        gating, activation = Gating(activation="", is_gated=False), -1
    else:
        activation = ACTIVATIONS[gating.activation]
    return {
        "is_gated": gating.is_gated,
        "activation": activation,
        "alpha": gating.alpha,
        "limit": gating.limit or 0.0,
        "limits_activated": gating.limits_activated,
        "shift": gating.shift,
    }


def _chunk(stack: Stack, words: int) -> int:
    """Count the consecutive words of a tile that always have the same scale."""
    if isinstance(stack, GPTQStack):
        return shared_chunk(stack.in_features, stack.group_size, codes_per_word(stack.bits), words)
    if isinstance(stack, FourBitStack):  # blocks continue from one row to the next
        return min(words, gcd(stack.in_features, stack.block_size) // 8)
    return min(words, MXFP4_BLOCK // 8) if isinstance(stack, Mxfp4Stack) else 1


def _ptx(stack: Stack, config: LinearConfig, dtype: torch.dtype) -> str:
    """Write the instructions that look up values of 4 bits; see `linear.dispatch`."""
    kind = stack.kind if isinstance(stack, FourBitStack) else MXFP4
    if not isinstance(stack, FourBitStack | Mxfp4Stack):
        return ""
    if config.regime == "vector":
        return lookup_ptx(config.decode, kind, "float16") if config.decode in ("permute", "mixed") else ""
    in_registers = config.decode != "table" and dtype != torch.float32
    return lookup_ptx(config.decode, kind, str(dtype)[6:]) if in_registers else ""


def _pointers(stack: Stack) -> tuple[torch.Tensor, ...]:
    """Return five tensors of a stack; those that a format lacks are never read."""
    if isinstance(stack, FloatStack):
        return (stack.values,) * 5
    if isinstance(stack, GPTQStack):
        return (stack.words, stack.scales, stack.zeros, stack.groups, stack.words)
    if isinstance(stack, FourBitStack):
        return (stack.words, stack.scales, stack.nested_code, stack.nested_scales, stack.offset)
    return (stack.words, stack.scales, stack.scales, stack.scales, stack.scales)


def _strides(stack: Stack) -> tuple[int, ...]:
    """Return how far the tensors of one expert are from those of the next one."""
    shared: tuple[int, ...] = ()
    if isinstance(stack, FourBitStack):
        shared = (2,) if stack.nested else (2, 3, 4)
    return tuple(0 if i in shared else tensor.stride(0) for i, tensor in enumerate(_pointers(stack)))


def _steps(stack: Stack) -> tuple[int, int]:
    """Return the strides of an output and of an input of values."""
    return stack.values.stride()[1:] if isinstance(stack, FloatStack) else (1, 1)


def _bias(stack: Stack, other: torch.Tensor) -> torch.Tensor:
    return other if stack.bias is None else stack.bias  # without biases: never read


def _code(stack: Stack, device: torch.device) -> torch.Tensor:
    if isinstance(stack, FourBitStack):
        return stack.code
    return _e2m1(device) if isinstance(stack, Mxfp4Stack) else _pointers(stack)[0]


@cache
def _e2m1(device: torch.device) -> torch.Tensor:
    return torch.tensor(CODEBOOKS[MXFP4], dtype=torch.float32, device=device)
