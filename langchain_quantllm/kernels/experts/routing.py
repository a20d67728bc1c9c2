"""The order in which tiles of rows visit the experts, made on the device.

A row is a pair of a token and one of its experts, numbered token by token. Rows of one expert are put together and
filled up to whole tiles, so that a tile has one expert. Shapes depend on the number of rows alone, and nothing is read
back, so that a call can be part of a CUDA graph.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import launch_options, let_next_begin, power_of_2, wait_for_inputs

__all__ = ["Tiles", "most_tiles", "sort_into_tiles"]

_READ = 64
"""Rows that a program counts at once."""

_RANKED = 1024
"""Rows that a program puts in order at once."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows in tiles of one expert each.

    Args:
        rows: The rows of all tiles, of shape `(tiles * tile_rows,)`, int32; the number of rows where a tile has no
            further row. Undefined for tiles without an expert.
        experts: The expert of each tile, of shape `(tiles,)`, int32; -1 for tiles that are not needed, at the end.
        tile_rows: Rows of a tile.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    tile_rows: int


def most_tiles(rows: int, experts: int, tile_rows: int) -> int:
    """Count the tiles that rows may need at most."""
    used = min(rows, experts)
    return (rows + used * (tile_rows - 1)) // tile_rows


def sort_into_tiles(index: torch.Tensor, experts: int, tile_rows: int) -> Tiles:
    """Put rows into tiles, by their experts, in one launch.

    Args:
        index: The expert of each row, of shape `(rows,)`, contiguous integers; rows of other numbers are left out.
        experts: Number of experts.
        tile_rows: Rows of a tile.
    """
    rows = len(index)
    tiles = most_tiles(rows, experts, tile_rows)
    sorted_rows = torch.empty(tiles * tile_rows, dtype=torch.int32, device=index.device)
    of_tiles = torch.empty(tiles, dtype=torch.int32, device=index.device)
    if tiles:
        _sort_kernel[(experts,)](
            index, sorted_rows, of_tiles, rows, tiles,
            experts=experts, padded_experts=power_of_2(experts, 16), tile_rows=tile_rows, read=_READ,
            ranked=min(_RANKED, power_of_2(rows, 16)), num_warps=4, **launch_options(index.device),
        )  # fmt: skip
    return Tiles(rows=sorted_rows, experts=of_tiles, tile_rows=tile_rows)


@triton.jit(do_not_specialize=["rows", "tiles"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def _sort_kernel(
    index: tl.tensor,
    sorted_rows: tl.tensor,
    of_tiles: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    experts: tl.constexpr,
    padded_experts: tl.constexpr,
    tile_rows: tl.constexpr,
    read: tl.constexpr,
    ranked: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Write the rows of one expert and its tiles; grid `(experts,)`. Each program counts the rows of all experts."""
    wait_for_inputs(early)
    let_next_begin(early)
    mine = tl.program_id(0)
    number = tl.arange(0, padded_experts)
    seen = tl.zeros([read, padded_experts], tl.int32)
    for first in range(0, rows, read):
        place = first + tl.arange(0, read)
        expert = tl.load(index + place, mask=place < rows, other=-1).to(tl.int32)
        seen += (expert[:, None] == number[None, :]).to(tl.int32)
    counts = tl.where(number < experts, tl.sum(seen, 0), 0)
    needed = (counts + tile_rows - 1) // tile_rows
    tile = tl.sum(tl.where(number < mine, needed, 0))
    end = tile + tl.sum(tl.where(number == mine, needed, 0))

    done = tile * tile_rows
    for first in range(0, rows, ranked):
        place = first + tl.arange(0, ranked)
        expert = tl.load(index + place, mask=place < rows, other=-1).to(tl.int32)
        is_mine = (expert == mine).to(tl.int32)
        rank = tl.cumsum(is_mine, 0)
        tl.store(sorted_rows + done + rank - 1, place, mask=is_mine > 0)
        done += tl.sum(is_mine)
    rest = done + tl.arange(0, tile_rows)
    tl.store(sorted_rows + rest, tl.zeros([tile_rows], tl.int32) + rows, mask=rest < end * tile_rows)
    for first in range(tile, end, 16):
        place = first + tl.arange(0, 16)
        tl.store(of_tiles + place, tl.zeros([16], tl.int32) + mine, mask=place < end)
    if mine == experts - 1:
        for first in range(end, tiles, 16):
            place = first + tl.arange(0, 16)
            tl.store(of_tiles + place, tl.zeros([16], tl.int32) - 1, mask=place < tiles)
