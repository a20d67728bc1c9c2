"""Configs of quantized linear layers on a GPU around the rule's, for benches to measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from langchain_quantllm.kernels.linear.config import LinearConfig
from langchain_quantllm.kernels.linear.weights import FourBitWeight, GPTQWeight, Int8Weight

QuantizedWeight = FourBitWeight | GPTQWeight | Int8Weight

# Outputs, words of 8 codes, rows, warps, stages, registers.
_MATRICES = [
    (256, 16, 128, 16, 3, 0), (128, 16, 128, 8, 2, 128), (128, 16, 128, 8, 3, 0), (128, 32, 128, 8, 2, 0),
    (64, 16, 128, 4, 2, 128), (128, 16, 256, 8, 2, 0), (128, 16, 64, 4, 3, 0), (256, 16, 64, 8, 3, 0),
]  # fmt: skip
_MAIN_ROWS = 128
"""Rows for which all of the grid is measured; others above 64 take its first ones."""

_FEWER_ROWS = [(128, 16, 4, 4), (256, 16, 8, 3)]  # outputs, words, warps, stages


def grid(rule: LinearConfig, rows: int, *, per_word: int, is_packed: bool, has_matrix: bool) -> Iterator[LinearConfig]:
    """Yield the configs to measure, the rule's first.

    Args:
        rule: The rule's config.
        rows: Rows of activations.
        per_word: Codes of a word: 8 for 4 bits, 4 for 8.
        is_packed: Whether words are packed along the inputs, as in GPTQ.
        has_matrix: Whether the regime "matrix" can multiply; see `config.has_matrix`.
    """
    yield rule
    if rows > 64:
        for index, (outputs, words, tile_rows, warps, stages, registers) in enumerate(_MATRICES):
            if (tile_rows == 256 and rows <= 128) or (rows != _MAIN_ROWS and index > 2 and tile_rows != 256):
                continue
            yield from _splits(_matrix(per_word, outputs, words, tile_rows, warps, stages, registers), (1, 2, 3, 4, 8))
        return
    few, many = (32, 128) if is_packed else (4, 16)  # rows of words, or lines of each output
    for ahead in (0, few, many) if rows == 1 else (0, many):
        yield replace(rule, ahead=ahead)
    yield from _splits(rule, (1, 2, 4, 8))
    if rows >= 4 and has_matrix:
        tile_rows = max(16, 1 << (rows - 1).bit_length())
        for outputs, words, warps, stages in _FEWER_ROWS:
            yield from _splits(_matrix(per_word, outputs, words, tile_rows, warps, stages, 0), (2, 4, 8))


def neighbours(config: LinearConfig) -> Iterator[LinearConfig]:
    """Yield configs that differ in one size by a factor of 2, or in the tiles loaded ahead by 1."""
    for name in ("outputs", "words", "warps"):
        size = getattr(config, name)
        for other in (size // 2, 2 * size):
            yield replace(config, **{name: other})
    for stages in (config.stages - 1, config.stages + 1):
        yield replace(config, stages=stages)


def _matrix(
    per_word: int, outputs: int, words: int, tile_rows: int, warps: int, stages: int, registers: int
) -> LinearConfig:
    """Make a config of the regime "matrix", for words of 8 codes, or for as many inputs in other words."""
    return LinearConfig(
        regime="matrix", outputs=outputs, words=words * 8 // per_word, warps=warps, stages=stages, decode="permute",
        tile_rows=tile_rows, ahead=4, registers=registers,
    )  # fmt: skip


def _splits(config: LinearConfig, counts: Sequence[int]) -> Iterator[LinearConfig]:
    for count in counts:
        yield replace(config, splits=count)


def brief(config: LinearConfig) -> str:
    """Write a config in short."""
    letter = {"vector": "v", "tile": "t", "matrix": "m"}[config.regime]
    rows = f"r{config.tile_rows}" if config.tile_rows else ""
    return (
        f"{letter}{config.outputs}x{config.words}{rows}/{config.splits} w{config.warps} s{config.stages}"
        f" a{config.ahead}{f' reg{config.registers}' if config.registers else ''}"
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of a result, relative to the root mean square of the right one."""
    return float((found.to(expected.dtype) - expected).abs().max() / expected.square().mean().sqrt())


def weight_bytes(weight: QuantizedWeight) -> int:
    """Count the bytes of a weight that a product reads."""
    read = [weight.words, weight.scales]
    if isinstance(weight, GPTQWeight) and weight.zero_point < 0:
        read.append(weight.zeros)
    return sum(tensor.numel() * tensor.element_size() for tensor in read)
