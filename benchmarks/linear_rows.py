"""Where each way to multiply by a weight wins, by the number of rows, on a GPU.

    python -m benchmarks.linear_rows [--seconds 200] [--formats nf4,int8,gptq4,float] [--rows 1,128] [--json FILE]

For each number of rows, format and shape: the config that the rule chooses and a small grid around it, the dense way
(dequantize, then cuBLAS), cuBLAS with a weight in bfloat16, and the time that the memory or the tensor cores take at
least. Every config is first compared with float64. Kernels are compiled ahead by several processes, into Triton's cache
on the disk. A config that fails is reported and skipped; a measurement for which there is no time is skipped and
counted. Prints a line for each, and a table of whole steps; the JSON has every time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.linear_speed import bandwidth_bytes_s, error_of
from benchmarks.timing import LINEAR_SHAPES, random_weight
from langchain_quantllm.bench import linear_grid
from langchain_quantllm.bench.graph_timing import copies_beyond_l2, graph_us
from langchain_quantllm.bench.linear_grid import brief, weight_bytes
from langchain_quantllm.kernels.linear.config import LinearConfig, chip, config_for
from langchain_quantllm.kernels.linear.dense import dense_linear
from langchain_quantllm.kernels.linear.dispatch import grouped_linear
from langchain_quantllm.kernels.linear.weights import FloatWeight, Weight

DTYPE = torch.bfloat16
LAYERS = {"llama-2-7b": 32, "llama-3-8b": 32, "qwen2.5-1.5b": 28}
TESTED = (4096, (1024, 512, 256))
LARGEST_ERROR = 0.05
"""Of bfloat16: a few roundings, relative to the root mean square of the result."""

FLOATS = [(8, 256, 4, 3), (4, 512, 4, 3), (8, 128, 1, 4), (4, 256, 2, 4), (16, 256, 8, 3)]


def made_weight(kind: str, inputs: int, outputs: int) -> Weight:
    """Make a random weight; "float" is one in bfloat16."""
    if kind != "float":
        return random_weight(kind, inputs, outputs)
    values = torch.randn(outputs, inputs, device="cuda", dtype=DTYPE) / inputs**0.5
    return FloatWeight(in_features=inputs, out_features=outputs, words=values, bias=None)


def size_of(weight: Weight) -> int:
    """Count the bytes of a weight that a product reads."""
    return weight.words.numel() * 2 if isinstance(weight, FloatWeight) else weight_bytes(weight)


def grid(kind: str, rows: int, rule: LinearConfig) -> Iterator[LinearConfig]:
    """Yield the configs to measure, the rule's first."""
    if kind == "float":
        yield rule
        for outputs, words, warps, stages in FLOATS:
            for ahead in (0, 8):
                yield replace(rule, outputs=outputs, words=words, warps=warps, stages=stages, ahead=ahead)
        return
    per_word = 4 if kind == "int8" else 8
    yield from linear_grid.grid(rule, rows, per_word=per_word, is_packed=kind.startswith("gptq"), has_matrix=True)


def rule_for(kind: str, inputs: int, widths: Sequence[int], rows: int, weight: Weight) -> LinearConfig:
    """Return the rule's config for a group of weights."""
    multiprocessors, is_roomy = chip(torch.device("cuda", 0))
    large = replace(weight, in_features=inputs, out_features=widths[0])
    return config_for(large, rows, multiprocessors, dtype=DTYPE, out_features=sum(widths), is_roomy=is_roomy)


def attempt(kind: str, rows: int, config: LinearConfig, count: int) -> float | str:
    """Compile a config for a number of weights; returns its error, or the message of an exception."""
    try:
        torch.manual_seed(0)
        inputs, widths = TESTED
        weights = [made_weight(kind, inputs, width) for width in widths[:count]]
        x = torch.randn(rows, inputs, device="cuda", dtype=DTYPE)
        found = grouped_linear(x, weights, config=config)
        return max(error_of(one, x, weight) for one, weight in zip(found, weights, strict=True))
    except Exception as error:
        while error.__cause__:
            error = error.__cause__  # type: ignore[assignment]
        return f"{type(error).__name__}: {error}".strip().splitlines()[-1][-200:]


def compiled(jobs: Sequence[tuple[Any, ...]], seconds: float, processes: int) -> dict[tuple[Any, ...], float | str]:
    """Compile in other processes, into the cache on the disk; returns what came of each job that was done in time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = {job: pool.apply_async(attempt, job) for job in jobs}
        until = time.monotonic() + seconds
        done: dict[tuple[Any, ...], float | str] = {}
        for job, result in results.items():
            result.wait(max(0.0, until - time.monotonic()))
            if result.ready():
                done[job] = result.get()
        pool.terminate()
    return done


def compile_key(kind: str, rows: int, config: LinearConfig, count: int) -> tuple[Any, ...]:
    """Return the job that compiles what a measurement needs: splits and rows of the tile regimes do not matter."""
    if config.regime == "vector":
        return kind, rows, replace(config, splits=min(config.splits, 2)), count
    tile_rows = config.tile_rows or min(64, max(16, 1 << (rows - 1).bit_length()))
    return kind, tile_rows, replace(config, splits=min(config.splits, 2), tile_rows=tile_rows), count


def flops_s() -> float:
    """Measure a large product in bfloat16: operations in a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / (graph_us([lambda: a @ b] * 3, repeats=4) * 1e-6)


class Bench:
    """The results, and the time to stop."""

    def __init__(self, seconds: float, rate: float, flops: float) -> None:
        self.end = time.monotonic() + seconds
        self.rate, self.flops = rate, flops
        self.left_out = 0
        self.failed: dict[str, str] = {}
        self.cells: list[dict[str, Any]] = []

    def time(self, calls: Sequence[Any], name: str) -> float | None:
        """Time calls in a graph; returns None if there is no time, or they fail."""
        if time.monotonic() > self.end:
            self.left_out += 1
            return None
        try:
            return graph_us(calls, repeats=5)
        except Exception as error:
            self.failed[name] = str(error)[-200:]
            return None

    def cell(self, kind: str, inputs: int, widths: Sequence[int], rows: int, configs: Sequence[LinearConfig]) -> None:
        """Measure every way of one product, and print the best."""
        size = sum(size_of(made_weight(kind, inputs, width)) for width in widths)
        groups = [[made_weight(kind, inputs, width) for width in widths] for _ in range(copies_beyond_l2(size))]
        x = torch.randn(rows, inputs, device="cuda", dtype=DTYPE)
        name = f"{kind} {inputs}→{list(widths)} {rows}"
        times: list[tuple[float, LinearConfig]] = []
        for config in configs:
            calls = [lambda group=group, config=config: grouped_linear(x, group, config=config) for group in groups]
            if (taken := self.time(calls, f"{name} {brief(config)}")) is not None:
                times.append((taken, config))
        ways: dict[str, float | None] = {}
        if kind != "float" and rows > 16:
            dense: list[Any] = [lambda group=group: [dense_linear(x, one) for one in group] for group in groups]
            ways["dense_us"] = self.time(dense, f"{name} dense")
        values = [[torch.empty(w, inputs, device="cuda", dtype=DTYPE).normal_() for w in widths] for _ in range(3)]
        ways["bf16_us"] = self.time([lambda v=v: [linear(x, one) for one in v] for v in values], f"{name} bf16")
        limit = max(size / self.rate, 2 * rows * inputs * sum(widths) / self.flops) * 1e6
        rule = next((taken for taken, config in times if config == configs[0]), None)
        times.sort(key=lambda pair: pair[0])
        found = {"format": kind, "rows": rows, "inputs": inputs, "outputs": list(widths), "limit_us": limit, **ways}
        found |= {"rule_us": rule, "rule": brief(configs[0]), "best_us": times[0][0] if times else None}
        found |= {"best": asdict(times[0][1]) if times else None}
        self.cells.append(found | {"all": [(round(taken, 2), brief(config)) for taken, config in times]})
        best = f"{times[0][0]:7.2f} {brief(times[0][1])}" if times else "      –"
        others = " ".join(f"{key[:-3]} {_text(value)}" for key, value in ways.items())
        ruled = f"rule {_text(rule)} {brief(configs[0]):32}"
        print(
            f"{rows:4} {kind:6} {inputs:5}→{sum(widths):5} {ruled} | best {best:42} | {others} limit {limit:.1f}",
            flush=True,
        )


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def summary(cells: Sequence[dict[str, Any]], layers: int) -> None:
    """Print the milliseconds of all layers' products, by format and rows."""
    print("\nms for all layers: format, rows | rule | best of the grid | dense way | cuBLAS bfloat16 | limit")
    sums: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        sums[cell["format"], cell["rows"]].append(cell)
    for (kind, rows), group in sums.items():
        texts = []
        for key in ("rule_us", "best_us", "dense_us", "bf16_us", "limit_us"):
            values = [cell.get(key) for cell in group]
            texts.append("–" if None in values else f"{sum(values) * layers / 1000:.3f}")  # type: ignore[arg-type]
        print(f"{kind:6} {rows:4} | " + " | ".join(texts))


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--formats", default="nf4,gptq4,int8,float")
    parser.add_argument("--rows", default="128,1,64,8,96,256,32,512,4", help="the most important first")
    parser.add_argument("--shape", default="llama-2-7b", choices=list(LAYERS))
    parser.add_argument("--rule-only", action="store_true", help="only what the rule chooses, nothing else of the grid")
    parser.add_argument("--compile-seconds", type=float, default=90, help="at most, of all seconds")
    parser.add_argument("--json", type=Path, help="a file for what was measured")
    parser.add_argument("--processes", type=int, default=min(15, (os.cpu_count() or 2) - 1))
    given = parser.parse_args()
    started = time.monotonic()
    shapes = LINEAR_SHAPES[given.shape]
    plan: dict[tuple[Any, ...], list[LinearConfig]] = {}
    for rows in map(int, given.rows.split(",")):
        for kind in given.formats.split(","):
            if kind == "float" and rows > 4:
                continue
            small = made_weight(kind, 128, 128)
            for inputs, widths in shapes:
                rule = rule_for(kind, inputs, widths, rows, small)
                configs = [rule] if given.rule_only else list(dict.fromkeys(grid(kind, rows, rule)))
                plan[rows, kind, inputs, widths] = configs
    keys = {
        (cell, config): compile_key(cell[1], cell[0], config, len(cell[3]))
        for cell, configs in plan.items()
        for config in configs
    }
    jobs = list(dict.fromkeys(keys.values()))
    results = compiled(jobs, given.compile_seconds, given.processes)
    print(f"{len(results)} of {len(jobs)} kernels compiled in {time.monotonic() - started:.0f} s", flush=True)
    wrong = {job: found for job, found in results.items() if isinstance(found, str) or not found < LARGEST_ERROR}
    for (kind, rows, config, _), found in wrong.items():
        print(f"FAILED {kind} {rows} {brief(config)}: {found}", flush=True)
    rate, flops = bandwidth_bytes_s(), flops_s()
    print(
        f"{torch.cuda.get_device_name()}: a copy moves {rate / 1e12:.2f} TB/s, a product has {flops / 1e12:.0f} TFLOP/s"
    )
    bench = Bench(given.seconds - (time.monotonic() - started), rate, flops)
    for cell, configs in plan.items():
        rows, kind, inputs, widths = cell
        sound = [config for config in configs if keys[cell, config] in results and keys[cell, config] not in wrong]
        bench.left_out += len(configs) - len(sound)
        if sound:
            bench.cell(kind, inputs, widths, rows, sound)
    summary(bench.cells, LAYERS[given.shape])
    for name, why in bench.failed.items():
        print(f"FAILED {name}: {why}")
    print(f"{bench.left_out} measurements left out; {time.monotonic() - started:.0f} s in all")
    if given.json:
        report = {"device": torch.cuda.get_device_name(), "copy_tb_s": rate / 1e12, "tflop_s": flops / 1e12}
        report |= {"cells": bench.cells, "failed": {str(job): why for job, why in wrong.items()} | bench.failed}
        given.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
