"""Choosing how a quantized linear layer is computed on a GPU: regime, tile sizes, splits.

Three regimes. "vector", for up to 4 rows: each thread decodes the words that it loaded and multiplies in float32.
"tile", for any number of rows: tensor cores multiply values that were decoded in registers. "matrix", for tens to
hundreds of rows: likewise, and a kernel before it brings the activations into the order of the codes. For more rows a
weight is dequantized once, and cuBLAS multiplies: see `most_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels.linear.codebook import GROUPS_SHUFFLED
from langchain_quantllm.kernels.linear.weights import FloatWeight, GPTQWeight, Int8Weight, Weight, codes_per_word

MOST_VECTOR_ROWS = 4
"""Most rows of the regime "vector"."""

_RULED_VECTOR_ROWS = 2
"""Most rows for which the rule chooses "vector"."""

_MOST_TILE_ROWS = 64
"""Most rows for which the rule chooses "tile"."""

_MOST_MATRIX_ROWS = {"four bits": 320, "int8": 512, "gptq": 384}
"""Rows above which a weight is dequantized and multiplied by cuBLAS, by format."""

_AHEAD = {"vector": 0, "tile": 0, "matrix": 4, "float": 8}
"""Lines of 128 bytes, or rows of packed words, that a program asks for early, by regime; see `LinearConfig`."""

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
        regime: "vector", "tile" or "matrix".
        outputs: Outputs of one program: a power of two; of "tile" at least 16, of "matrix" 64.
        words: Words of each output that a program reads at once: a power of two, at least 4, 16 for "tile", and 8 for
            "matrix".
        splits: Programs that share the inputs of an output. With more than 1, a second kernel adds their sums.
        warps: Warps of a program.
        stages: Tiles loaded ahead.
        decode: How indices of nf4 and fp4 are looked up: "table", in memory; "permute", "mixed" or "shuffle", in
            registers, in PTX. For activations in float32: "table", and in the regime "vector" also "shuffle"; in the
            regime "matrix": "table" or "permute".
        tile_rows: Rows of one program, a power of two: of the regime "tile" from 16 to 64, of "matrix" from 16 to 256;
            0 for as few as hold all rows, up to the most.
        ahead: Lines of 128 bytes of each output, or rows of packed words, that a program asks for before it waits for
            the kernel ahead of it: 0 or a power of two.
        registers: Most registers of a thread; 0 for as many as the compiler takes.
    """

    regime: str
    outputs: int
    words: int
    splits: int = 1
    warps: int = 4
    stages: int = 1
    decode: str = "shuffle"
    tile_rows: int = 0
    ahead: int = 0
    registers: int = 0

    def check(self, rows: int, dtype: torch.dtype | None = None) -> None:
        """Raise an InvalidOptionError if the config does not fit a number of rows, or activations of a dtype."""
        ways = ("table", "permute") if self.regime == "matrix" else ("table", *GROUPS_SHUFFLED)
        if self.regime not in ("vector", "tile", "matrix") or self.decode not in ways:
            raise InvalidOptionError(f"a product has no regime {self.regime!r} with decode {self.decode!r}.")
        if self.regime == "matrix" and dtype == torch.float32:
            raise InvalidOptionError("the regime 'matrix' takes float16 and bfloat16, not float32: use 'tile'.")
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
    if isinstance(weight, FloatWeight):
        return _FLOAT
    bits = 8 if isinstance(weight, Int8Weight) else weight.bits if isinstance(weight, GPTQWeight) else 4
    out_features = out_features or weight.out_features
    packed = isinstance(weight, GPTQWeight)
    if has_matrix(weight, dtype):
        kind = _kind(weight)
        if rows > _MOST_TILE_ROWS:
            per_word = codes_per_word(bits)
            return _matrix_rule(kind, per_word, weight.in_features, out_features, rows, multiprocessors, is_roomy)
        if is_roomy and bits == _FEW_ROWS_BITS[kind] and rows > _RULED_VECTOR_ROWS:
            config = _few_rows(kind, weight.in_features, out_features, rows, multiprocessors)
            if config is not None:
                return config
    config = _rule(packed, bits, weight.in_features, out_features, rows, multiprocessors, dtype, is_roomy)
    if not isinstance(weight, GPTQWeight):
        return config
    words = config.words
    if weight.zero_point < 0 and config.regime == "vector":  # there are not enough registers
        words = (8 if bits < 4 else 16) if not weight.group_size else words // 2 if rows > 1 else words
    # With act-order each input has its own scale and zero point to load: too much to load ahead.
    return replace(config, words=words, stages=config.stages if weight.group_size else 1)


def has_matrix(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether the regime "matrix" multiplies activations of a dtype: not float32, nor by weights with act-order."""
    return dtype != torch.float32 and not (isinstance(weight, GPTQWeight) and not weight.group_size)


def most_rows(weight: Weight, dtype: torch.dtype) -> int:
    """Return the rows up to which kernels multiply by a weight as it is stored, faster than cuBLAS by a dense one."""
    if isinstance(weight, FloatWeight):
        return MOST_VECTOR_ROWS
    if not has_matrix(weight, dtype):
        return _MOST_TILE_ROWS
    return _MOST_MATRIX_ROWS[_kind(weight)]


def _kind(weight: Weight) -> str:
    return "gptq" if isinstance(weight, GPTQWeight) else "int8" if isinstance(weight, Int8Weight) else "four bits"


_FLOAT = LinearConfig(regime="vector", outputs=8, words=256, warps=4, stages=3, decode="table", ahead=_AHEAD["float"])
"""For a weight that is not quantized, whose words are two values."""


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
    # With 128 registers two programs of 8 warps run on a multiprocessor; a few more would leave one.
    registers = 128 if packed and regime == "tile" and warps == 8 and bits == 4 else 0
    splits = _splits(-(-out_features // outputs), wanted * multiprocessors, min(most, -(-row_words // words)))
    return LinearConfig(
        regime=regime, outputs=outputs, words=words, splits=splits, warps=warps, stages=stages, decode=decode,
        ahead=_AHEAD[regime],
        registers=registers,
    )  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class _MatrixTile:
    """A size of the regime "matrix", and how many of its programs a multiprocessor holds."""

    outputs: int
    rows: int
    warps: int
    stages: int
    registers: int
    resident: int


_MATRIX_TILES = {
    "four bits": _MatrixTile(outputs=128, rows=128, warps=8, stages=2, registers=128, resident=2),
    "int8": _MatrixTile(outputs=128, rows=128, warps=8, stages=3, registers=0, resident=1),
    "gptq": _MatrixTile(outputs=256, rows=128, warps=16, stages=3, registers=0, resident=1),
}
"""The fastest on an H200 from 65 rows on, by format: `python -m benchmarks.linear_rows`."""

_SMALL_MATRIX_TILE = _MatrixTile(outputs=128, rows=128, warps=8, stages=2, registers=128, resident=2)
"""For 96 KB of shared memory."""

_MATRIX_INPUTS = 128
"""Inputs that a program of "matrix" reads at once."""

_FEW_ROWS_BITS = {"four bits": 4, "int8": 8, "gptq": 4}
"""Bits for which "matrix" was measured against "tile" with 3 to 64 rows, by format."""

_L2_BYTES_US = 5.0e6
"""Bytes that all multiprocessors of an H200 read from the L2 cache in a microsecond."""

_SUMS_US = 3.0
"""Microseconds of a kernel that adds up splits, apart from its reading."""

_MOST_MATRIX_SPLITS = 8


@cache
def _matrix_rule(
    kind: str, per_word: int, in_features: int, out_features: int, rows: int, multiprocessors: int, is_roomy: bool
) -> LinearConfig:
    """Choose the splits with which the least is read from the L2 cache, waves that are not full and sums included."""
    words = 128 // per_word
    row_words = in_features // per_word
    tile = _MATRIX_TILES[kind] if is_roomy else _SMALL_MATRIX_TILE
    columns, tiles = -(-out_features // tile.outputs), -(-rows // tile.rows)
    read = columns * tiles * in_features * (2 * tile.rows + 4 * tile.outputs // per_word)

    def taken_us(splits: int) -> float:
        programs, slots = columns * tiles * splits, tile.resident * multiprocessors
        filled = programs / (-(-programs // slots) * slots)
        summed = (8 * splits + 2) * rows * out_features / _L2_BYTES_US + _SUMS_US if splits > 1 else 0.0
        return read / _L2_BYTES_US / filled + summed

    splits = min(range(1, min(_MOST_MATRIX_SPLITS, -(-row_words // words)) + 1), key=taken_us)
    return LinearConfig(
        regime="matrix", outputs=tile.outputs, words=words, splits=splits, warps=tile.warps, stages=tile.stages,
        decode="permute", tile_rows=tile.rows, ahead=_AHEAD["matrix"], registers=tile.registers,
    )  # fmt: skip


@cache
def _few_rows(kind: str, in_features: int, out_features: int, rows: int, multiprocessors: int) -> LinearConfig | None:
    """Choose "matrix" for up to 64 rows where it was faster on an H200 than "tile"; None where it was not."""
    share = out_features // multiprocessors
    tile_rows = max(16, 1 << (rows - 1).bit_length())
    outputs, warps, stages, wanted = 128, 4, 4, 2
    if kind == "gptq" and rows <= 16:
        if share < _WIDE:
            return None
        outputs, warps, stages = 256, 8, 3
    elif kind == "int8" and rows <= 32 and share >= 2 * _WIDE:
        if rows > 16:
            outputs, warps, stages = 256, 8, 3
    elif kind == "four bits" and rows <= 16 and share >= 2 * _WIDE:
        wanted = _MOST_MATRIX_SPLITS
    elif kind != "gptq":
        return None
    most = min(_MOST_MATRIX_SPLITS, -(-in_features // _MATRIX_INPUTS))
    splits = _splits(-(-out_features // outputs), wanted * multiprocessors, most)
    return LinearConfig(
        regime="matrix", outputs=outputs, words=16 if kind != "int8" else 32, splits=splits, warps=warps,
        stages=stages, decode="permute", tile_rows=tile_rows, ahead=_AHEAD["matrix"],
    )  # fmt: skip


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
