"""Choosing how routed rows are multiplied on a GPU: regime and sizes of tiles, as `LinearConfig`s without splits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels.experts.weights import FloatStack, GPTQStack, Int8Stack, Stack
from langchain_quantllm.kernels.launch import power_of_2
from langchain_quantllm.kernels.linear.config import LinearConfig

__all__ = ["ExpertsConfig", "config_for"]

_MOST_VECTOR_TOKENS = 2
"""Tokens up to which each row is multiplied by itself, however many experts there are."""

_FEWEST_TILE_ROWS, _MOST_TILE_ROWS = 16, 64


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """How the two products of experts are computed; results differ only in rounding.

    Args:
        first: How the first product is computed, in `LinearConfig`'s terms and without splits. "vector" decodes a
            weight for every row; "tile" decodes it once for `tile_rows` rows of the same expert.
        second: How the second one is computed, in the same regime and with the same `tile_rows`.
    """

    first: LinearConfig
    second: LinearConfig

    def check(self) -> None:
        """Raise an InvalidOptionError if the configs do not fit each other."""
        for config in (self.first, self.second):
            config.check(1)
            if config.splits != 1:
                raise InvalidOptionError(f"products of experts have no splits, not splits={config.splits}: use 1.")
        if (self.first.regime, self.first.tile_rows) != (self.second.regime, self.second.tile_rows):
            raise InvalidOptionError(
                "both products of experts take the same regime and tile_rows: use "
                f"{self.first.regime!r} and {self.first.tile_rows} for the second one, too."
            )
        if self.first.regime == "tile" and self.first.tile_rows < _FEWEST_TILE_ROWS:
            raise InvalidOptionError(
                f"tiles of experts have from {_FEWEST_TILE_ROWS} rows on, not {self.first.tile_rows}: use a power of 2."
            )


def config_for(
    first: Stack,
    second: Stack,
    tokens: int,
    chosen: int,
    *,
    dtype: torch.dtype,
    is_gated: bool,
    is_roomy: bool,
    tile_rows: int | None = None,
) -> ExpertsConfig:
    """Choose how to compute experts.

    Args:
        first: Weights of the first product, or of its gates.
        second: Weights of the second product.
        tokens: Number of tokens.
        chosen: Experts of each.
        dtype: Dtype of the activations.
        is_gated: Whether the first product has two weights.
        is_roomy: Whether a program may have 200 KB of shared memory.
        tile_rows: Rows of a tile, to use tiles in any case; None for a choice by the number of rows.
    """
    rows = tokens * chosen
    if tile_rows is None:
        if tokens <= _MOST_VECTOR_TOKENS or 2 * rows <= first.experts:
            return ExpertsConfig(first=_vector(_format(first), is_gated), second=_vector(_format(second), False))
        wanted = power_of_2(-(-rows // first.experts))
        tile_rows = min(_MOST_TILE_ROWS, max(_FEWEST_TILE_ROWS, wanted))
    return ExpertsConfig(
        first=_tile(_format(first), dtype, is_gated, is_roomy, tile_rows),
        second=_tile(_format(second), dtype, False, is_roomy, tile_rows),
    )


def _format(stack: Stack) -> tuple[str, int, bool, bool]:
    """Return the layout of `parts`, a weight's bits, whether groups are in any order, and whether there is one zero."""
    if isinstance(stack, GPTQStack):
        return "packed", stack.bits, not stack.group_size, stack.zero_point >= 0
    if isinstance(stack, FloatStack):
        return "values", 8 * stack.values.element_size(), False, True
    return "rows", 8 if isinstance(stack, Int8Stack) else 4, False, True


@cache
def _vector(form: tuple[str, int, bool, bool], is_gated: bool) -> LinearConfig:
    """Choose tiles that give several programs to each multiprocessor with a row of 8 experts."""
    layout, bits, any_order, has_one_zero = form
    if layout == "packed":  # a program reads 128 bytes of each row of words
        words, warps = (8, 1) if any_order else (64, 4) if is_gated and has_one_zero and bits > 3 else (32, 4)
        return LinearConfig(regime="vector", outputs=32, words=words, warps=warps, stages=1 if any_order else 3)
    if layout == "values":
        return LinearConfig(regime="vector", outputs=8 if is_gated else 16, words=256, warps=4, stages=3)
    outputs = 8 if is_gated else 16
    return LinearConfig(
        regime="vector", outputs=outputs, words=64 if bits == 4 else 128, warps=2, stages=3, decode="shuffle"
    )


@cache
def _tile(
    form: tuple[str, int, bool, bool], dtype: torch.dtype, is_gated: bool, is_roomy: bool, tile_rows: int
) -> LinearConfig:
    """Choose tiles as `linear.config` does, of half the outputs if a program has two weights."""
    layout, bits, any_order, _ = form
    if dtype == torch.float32:  # needs twice the memory, and no tensor cores
        return LinearConfig(regime="tile", outputs=16, words=16, warps=4, stages=2, decode="table", tile_rows=tile_rows)
    outputs = 128 if is_roomy and not is_gated else 64
    warps = 8 if tile_rows > _MOST_TILE_ROWS // 2 and outputs == 2 * _MOST_TILE_ROWS else 4
    is_small = layout == "packed" and bits < 8
    # Of many rows, the inputs fill the shared memory: less of each leaves room for another program.
    words = 64 if layout == "values" else 16 if is_small or tile_rows > 2 * _FEWEST_TILE_ROWS else 32
    decode = "permute" if tile_rows > _FEWEST_TILE_ROWS and is_roomy else "shuffle"
    stages = 1 if any_order else 4 if is_small and is_roomy else 3
    return LinearConfig(
        regime="tile", outputs=outputs, words=words, warps=warps, stages=stages, decode=decode, tile_rows=tile_rows
    )
