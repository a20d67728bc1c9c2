"""Time of a decode step's attention in one layer, beside PyTorch's attention over contiguous keys.

    python -m benchmarks.attention_speed --rows 1 8 64 --lengths 60 512 4096
    python -m benchmarks.attention_speed --rows 8 --lengths 3900 --kv auto fp8 int8

Needs a CUDA GPU. Microseconds of one call in a CUDA graph of several layers, each with its own keys, and the time to
read these at 4 TB/s. With `--tiles` (keys, warps, stages) and `--alone`, the kernel is timed with each of them. Prints
lines as they come, then one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from itertools import product as pairs
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import ATTENTION_SHAPES
from langchain_quantllm.bench.graph_timing import graph_us
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.kernels import kv_quantization, reference

LAYERS = 8
BYTES_PER_US = 4e6


class Layers:
    """Queries, and keys and values of several layers in blocks of random order."""

    def __init__(self, shape: str, rows: int, length: int, kv: str) -> None:
        heads, kv_heads, dim = ATTENTION_SHAPES[shape]
        made = {"dtype": torch.bfloat16, "device": "cuda"}
        width = -(-length // BLOCK_TOKENS)
        self.kv_heads, self.dim, self.length = kv_heads, dim, length
        self.query = torch.randn(1, rows, heads, dim, **made).transpose(1, 2)
        blocks = rows * width
        self.pools: list[torch.Tensor] = []
        self.scales: list[kv_quantization.KVScales | None] = []
        for _ in range(LAYERS):
            numbers = torch.randn(blocks, BLOCK_TOKENS, kv_heads, 2 * dim, **made)
            pool, scales = (numbers, None) if kv == "auto" else _rounded(numbers, dim, kv)
            self.pools.append(pool)
            self.scales.append(scales)
        self.table = torch.randperm(rows * width, device="cuda").view(rows, width).int()
        self.rows = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.positions = torch.full((rows,), length - 1, dtype=torch.int32, device="cuda")
        of_token = sum(t[0].nbytes for t in (self.pools[0], getattr(self.scales[0], "pairs", None)) if t is not None)
        self.bytes = rows * length * of_token // BLOCK_TOKENS

    def ours(self) -> float:
        """Compare the kernel with the reference, and time it."""
        from langchain_quantllm.kernels import attention as attention_kernels

        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        splits = attention_kernels.default_splits(len(self.rows), self.kv_heads, multiprocessors)
        arrivals = attention_kernels.arrivals(multiprocessors, torch.device("cuda"))
        given: dict[str, Any] = {"value_dim": self.dim, "scale": self.dim**-0.5}
        at = (self.table, self.rows, self.positions)

        def run(pool: torch.Tensor, scales: kv_quantization.KVScales | None) -> torch.Tensor:
            options = {"splits": splits, "arrivals": arrivals, "scales": scales, **given}
            return attention_kernels.decode_attention(self.query, pool, *at, **options)

        layers = list(zip(self.pools, self.scales, strict=True))
        expected = reference.decode_attention(self.query, self.pools[0], *at, scales=self.scales[0], **given)
        for _ in range(2):
            torch.testing.assert_close(run(*layers[0]), expected, rtol=2e-2, atol=2e-2)
        us = graph_us([functools.partial(run, *layer) for layer in layers], repeats=12, replays=10)
        assert not arrivals.any()
        return round(us, 2)

    def dense(self) -> float:
        """Time PyTorch's attention over contiguous keys and values."""
        shape = (len(self.rows), self.kv_heads, self.length, self.dim)
        made = {"dtype": torch.bfloat16, "device": "cuda"}
        layers = [(torch.randn(shape, **made), torch.randn(shape, **made)) for _ in range(LAYERS)]
        query = self.query[0].transpose(0, 1)[:, :, None].contiguous()

        def run(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] > self.kv_heads)

        return round(graph_us([functools.partial(run, *layer) for layer in layers], repeats=12, replays=10), 2)


def _rounded(numbers: torch.Tensor, dim: int, kv: str) -> tuple[torch.Tensor, kv_quantization.KVScales]:
    """Round the keys and values of blocks to 8 bits."""
    dtype = kv_quantization.KV_DTYPES[kv]
    keys, of_keys = kv_quantization.quantize(numbers[..., :dim], dtype)
    values, of_values = kv_quantization.quantize(numbers[..., dim:], dtype)
    pairs = torch.cat([of_keys, of_values], -1).transpose(1, 2).contiguous()
    factors = torch.ones(numbers.shape[2], dim, device=numbers.device)
    return torch.cat([keys, values], -1), kv_quantization.KVScales(pairs, factors)


def main() -> None:
    """Time the shapes, rows and lengths of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(ATTENTION_SHAPES), choices=list(ATTENTION_SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[60, 512, 4096])
    parser.add_argument("--kv", nargs="+", default=["auto"], choices=["auto", *kv_quantization.KV_DTYPES])
    parser.add_argument("--tiles", nargs="+", help="keys,warps,stages; the module's own without")
    parser.add_argument("--alone", nargs="+", type=int, help="the module's own without")
    asked = parser.parse_args()
    from langchain_quantllm.kernels.attention import decode

    tiles = [tuple(map(int, one.split(","))) for one in asked.tiles or ()] or [None]
    found = []
    for shape, rows, length, kv in pairs(asked.shapes, asked.rows, asked.lengths, asked.kv):
        layers = Layers(shape, rows, length, kv)
        limit = round(layers.bytes / BYTES_PER_US, 2)
        line: dict[str, Any] = {"shape": shape, "rows": rows, "length": length, "kv": kv, "limit_us": limit}
        if kv == "auto":
            line["dense_us"] = layers.dense()
        for tile, alone in pairs(tiles, asked.alone or [None]):
            if tile is not None:
                decode._decode_tiles = lambda *_, tile=tile: tile
            if alone is not None:
                decode._ALONE_TILES = alone
            try:
                line[f"ours_us {tile or ''} {alone or ''}".strip()] = layers.ours()
            except Exception as error:  # too much shared memory, for example
                print(f"{tile}, {alone}: {error!r}"[:200])
        print(line, flush=True)
        found.append(line)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
