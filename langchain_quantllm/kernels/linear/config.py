"""Choosing how a quantized linear layer is computed on a GPU: regime, tile sizes, splits.

Two regimes. "vector", for up to 4 rows: each thread decodes the words that it loaded and multiplies in float32. "tile",
for any number of rows: tensor cores multiply values that were decoded in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels.linear.codebook import GROUPS_SHUFFLED
from langchain_quantllm.kernels.linear.weights import GPTQWeight, Int8Weight, Weight, codes_per_word

MOST_VECTOR_ROWS = 4
"""Most rows of the regime "vector"."""

_RULED_VECTOR_ROWS = 2
"""Most rows for which the rule chooses "vector"."""

_WIDE = 64
"""Outputs for each multiprocessor that count as many."""

_HOPPER = 9
"""Major compute capability of the H100 and H200."""

_ROOM_BYTES = 200 * 1024
"""Shared memory of a program from which on tiles are large."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How a quantized linear layer is computed; results differ only in rounding.

    Args:
        regime: "vector" or "tile".
        outputs: Outputs of one program: a power of two; of "tile" at least 16.
        words: Words of each output that a program reads at once: a power of two, at least 4, and 16 for "tile".
        splits: Programs that share the inputs of an output. With more than 1, a second kernel adds their sums.
        warps: Warps of a program.
        stages: Tiles loaded ahead.
        decode: How indices of nf4 and fp4 are looked up: "table", in memory; "permute", "mixed" or "shuffle", in
            registers, in PTX. For activations in float32: "table", and in the regime "vector" also "shuffle".
        tile_rows: Rows of one program of the regime "tile", a power of two from 16 to 64; 0 for as few as hold all
            rows, up to 64.
    """

    regime: str
    outputs: int
    words: int
    splits: int = 1
    warps: int = 4
    stages: int = 1
    decode: str = "shuffle"
    tile_rows: int = 0

    def check(self, rows: int) -> None:
        """Raise an InvalidOptionError if the config does not fit a number of rows."""
        if self.regime not in ("vector", "tile") or self.decode not in ("table", *GROUPS_SHUFFLED):
            raise InvalidOptionError(f"a product has no regime {self.regime!r} with decode {self.decode!r}.")
        if self.regime == "vector" and rows > MOST_VECTOR_ROWS:
            raise InvalidOptionError(
                f"the regime 'vector' takes up to {MOST_VECTOR_ROWS} rows, not {rows}: use 'tile', or leave config out."
            )


def config_for(
    weight: Weight,
    rows: int,
    multiprocessors: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out_features: int | None = None,
    is_roomy: bool = True,
) -> LinearConfig:
    """Choose how to compute a linear layer.

    Args:
        weight: The weight, or one of a group.
        rows: Rows of activations.
        multiprocessors: Multiprocessors of the device.
        dtype: Dtype of the activations.
        out_features: Outputs of all weights of the group; None for those of `weight`.
        is_roomy: Whether a program may have 200 KB of shared memory; otherwise tiles fit into 96 KB.

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
    # With act-order each input has its own scale and zero point to load: too much to load ahead.
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
    """Choose what was fastest on an H200: `python -m benchmarks.linear_speed`."""
    row_words = in_features // codes_per_word(bits)
    if rows <= _RULED_VECTOR_ROWS:
        regime, decode = "vector", "shuffle"
        shape, wanted, most = _vector_tile(packed, bits, rows, out_features // multiprocessors)
    else:
        shape = _tile(packed, bits, rows) if is_roomy else (64, max(16, 4 * bits), 4, 4 if rows <= 32 else 3)
        exact = dtype == torch.float32
        if exact:  # needs twice the memory, and no tensor cores
            shape = 16, 16, 4, 3
        regime, wanted, most = "tile", 2, 8 if packed or bits == 8 else 4
        decode = "table" if exact else "permute" if rows > 16 and is_roomy else "shuffle"
    outputs, words, warps, stages = shape
    splits = _splits(-(-out_features // outputs), wanted * multiprocessors, min(most, -(-row_words // words)))
    return LinearConfig(
        regime=regime, outputs=outputs, words=words, splits=splits, warps=warps, stages=stages, decode=decode
    )


def _vector_tile(packed: bool, bits: int, rows: int, share: int) -> tuple[tuple[int, int, int, int], int, int]:
    """Return a tile of the regime "vector", the wanted programs of a multiprocessor, and the most splits.

    The tile is outputs, words, warps and stages. `share` is the number of outputs for a multiprocessor: if there are
    many, programs of fewer warps fill it as well, and wait less for each other.
    """
    if packed:  # a program reads 128 bytes of each row of words; without splits few programs would read long columns
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
    """Return outputs, words, warps and stages of the regime "tile", for 200 KB of shared memory."""
    if packed:
        return 128, 16 if bits < 8 else 32, 8 if rows > 32 else 4, 4
    if bits == 8:
        return 128, 32, 4, 4
    return (128, 32, 4, 3) if rows <= 16 else (128, 32, 8, 3)


def _splits(programs: int, wanted: int, most: int) -> int:
    """Return the smallest power of two that gives enough programs, up to `most`."""
    splits = 1
    while programs * splits < wanted and 2 * splits <= most:
        splits *= 2
    return splits


@cache
def chip(device: torch.device) -> tuple[int, bool]:
    """Return a device's multiprocessors, and whether their shared memory is as large as an H100's."""
    if device.type != "cuda":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    # Older PyTorch does not report it; no chip before Hopper has so much.
    room = getattr(properties, "shared_memory_per_multiprocessor", _ROOM_BYTES if properties.major == _HOPPER else 0)
    return int(properties.multi_processor_count), bool(room >= _ROOM_BYTES)
