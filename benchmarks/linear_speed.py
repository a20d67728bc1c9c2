"""Speed of linear layers with quantized weights on a GPU, for the configs to choose between.

    python -m benchmarks.linear_speed [--seconds 200] [--formats nf4,int8] [--rows 1,8]

For each format, shape and number of rows: every config of a small grid, first compared with float64, then timed in a
CUDA graph over more distinct weights than the L2 cache holds. Beside the best one: the config that the rule chooses,
the time to read the weights at the bandwidth of a copy, and other libraries (`linear_peers`). Kernels are compiled
ahead by several processes, into Triton's cache on the disk. A config that fails is reported and skipped; a measurement
for which there is no time is skipped and counted. Prints tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product as pairs
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import LINEAR_SHAPES, random_weight
from langchain_quantllm.bench.graph_timing import copies_beyond_l2, graph_us
from langchain_quantllm.bench.linear_grid import relative_error, weight_bytes
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.config import MOST_VECTOR_ROWS, LinearConfig, chip, config_for
from langchain_quantllm.kernels.linear.dispatch import grouped_linear
from langchain_quantllm.kernels.linear.weights import Weight

FORMATS = ("nf4", "nf4-nested", "fp4", "int8", "gptq4", "gptq4-asymmetric", "gptq2", "gptq3", "gptq8")
DTYPE = torch.bfloat16
TESTED = 4096
# Outputs, words, warps, stages.
VECTOR_TILES = {
    "int8": [(8, 64, 1, 4), (4, 128, 1, 4), (8, 128, 1, 3), (16, 64, 1, 4), (8, 256, 2, 3)],
    "rows": [
        (16, 128, 4, 3), (8, 128, 1, 3), (16, 128, 2, 3), (8, 64, 1, 4), (16, 64, 1, 4), (32, 128, 4, 3),
        (16, 128, 4, 4), (8, 256, 2, 3),
    ],
    "packed": [
        (32, 32, 1, 3), (32, 64, 2, 3), (64, 32, 2, 3), (32, 32, 2, 3), (32, 64, 4, 3), (32, 16, 1, 4), (64, 64, 4, 3),
    ],
}  # fmt: skip
TILES = [(128, 32, 4, 3), (128, 16, 4, 4), (128, 32, 8, 3), (64, 32, 4, 3), (128, 16, 8, 4)]
WAYS = ("shuffle", "permute", "mixed", "table")


def configs(kind: str, rows: int) -> Iterator[LinearConfig]:
    """Yield the grid of a format: every way to look up with the first tiles, and the first way with the others."""
    format_, _, variant = kind.partition("-")
    packed, looked_up = format_.startswith("gptq"), format_ in ("nf4", "fp4")
    first = (WAYS if kind == "nf4" else WAYS[:2]) if looked_up else WAYS[-1:]
    # Formats that differ little from another one are measured with few configs.
    few = 2 if variant or format_ in ("fp4", "gptq2", "gptq3", "gptq8") else None
    if few and rows > 8:
        return
    if rows <= MOST_VECTOR_ROWS:
        for index, (outputs, words, warps, stages) in enumerate(
            VECTOR_TILES["packed" if packed else "int8" if format_ == "int8" else "rows"][:few]
        ):
            for way, splits in pairs(first if index == 0 else first[:1], (1, 2, 4, 8) if packed else (1, 2, 4)):
                yield LinearConfig(
                    regime="vector", outputs=outputs, words=words, splits=splits, warps=warps, stages=stages, decode=way
                )
    for index, (outputs, words, warps, stages) in enumerate(TILES[:few]):
        words = 2 * words if format_ == "int8" else words
        for way, splits in pairs(first[:2] if index == 0 else first[:1], (1, 2, 4, 8)):
            yield LinearConfig(
                regime="tile", outputs=outputs, words=words, splits=splits, warps=warps, stages=stages, decode=way
            )


def error_of(found: torch.Tensor, x: torch.Tensor, weight: Weight) -> float:
    """Return the error of a result, relative to the root mean square of the float64 result."""
    return relative_error(found, linear_reference.quantized_linear(x, weight))


def attempt(kind: str, rows: int, config: LinearConfig) -> float | str:
    """Compile a config for one, two and three weights; returns its error, or the message of an exception."""
    try:
        torch.manual_seed(0)
        weights = [random_weight(kind, TESTED, width) for width in (1024, 512, 256)]
        x = torch.randn(rows, TESTED, device="cuda", dtype=DTYPE)
        found = [grouped_linear(x, weights[:count], config=config) for count in (1, 2, 3)]
        return max(error_of(one, x, weight) for ones in found for one, weight in zip(ones, weights))  # noqa: B905
    except Exception as error:
        while error.__cause__:
            error = error.__cause__  # type: ignore[assignment]
        return f"{type(error).__name__}: {error}".strip().splitlines()[-1][-200:]


def compile_ahead(jobs: Sequence[tuple[str, int, LinearConfig]], seconds: float, processes: int) -> int:
    """Compile in other processes, into the cache on the disk; returns the number of finished jobs."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = [pool.apply_async(attempt, job) for job in jobs]
        until = time.monotonic() + seconds
        for result in results:
            result.wait(max(0.0, until - time.monotonic()))
        done = sum(result.ready() for result in results)
        pool.terminate()
    return done


def bandwidth_bytes_s() -> float:
    """Measure a copy: bytes read and written in a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_us([lambda: target.copy_(source)] * 4) * 1e-6)


def brief(config: LinearConfig) -> str:
    letter = "v" if config.regime == "vector" else "t"
    return f"{letter}{config.outputs}x{config.words}/{config.splits} w{config.warps} s{config.stages} {config.decode}"


class Bench:
    """The results, and the time to stop."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.failed: dict[str, str] = {}
        self.left_out = 0
        self.rows: list[dict[str, Any]] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def sound(self, kind: str, rows: int) -> list[LinearConfig]:
        """Return the configs that compile and give the right result."""
        found = []
        for config in configs(kind, rows):
            if self.late:
                self.left_out += 1
                continue
            error = attempt(kind, rows, config)
            # A few roundings of bfloat16: weights, scales, result.
            if isinstance(error, float) and error < 0.05:
                found.append(config)
            else:
                self.failed[f"{kind} {rows} {brief(config)}"] = str(error)
        return found

    def measure(
        self, kind: str, shape: tuple[int, tuple[int, ...]], rows: int, sound: list[LinearConfig], rate: float
    ) -> None:
        """Time every config on the weights of one input, and print the best."""
        inputs, widths = shape
        size = sum(weight_bytes(random_weight(kind, inputs, width)) for width in widths)
        groups = [[random_weight(kind, inputs, width) for width in widths] for _ in range(copies_beyond_l2(size))]
        x = torch.randn(rows, inputs, device="cuda", dtype=DTYPE)
        multiprocessors, is_roomy = chip(x.device)
        rule = config_for(groups[0][0], rows, multiprocessors, dtype=DTYPE, out_features=sum(widths), is_roomy=is_roomy)
        times: list[tuple[float, LinearConfig]] = []
        for config in dict.fromkeys([rule, *sound]):
            if self.late:
                self.left_out += 1
                continue
            try:
                calls = [lambda group=group, config=config: grouped_linear(x, group, config=config) for group in groups]
                times.append((graph_us(calls), config))
            except Exception as error:
                self.failed[f"{kind} {shape} {rows} {brief(config)}"] = str(error)[-200:]
        if not times:
            return
        ruled = next((taken for taken, config in times if config == rule), None)
        times.sort(key=lambda pair: pair[0])
        limit = size / rate * 1e6
        self.rows.append(
            {
                "format": kind, "inputs": inputs, "outputs": widths, "rows": rows, "us": round(times[0][0], 2),
                "share": round(limit / times[0][0], 3), "limit_us": round(limit, 2), "config": asdict(times[0][1]),
                "rule_us": ruled and round(ruled, 2),
                "all": [(round(taken, 2), brief(config)) for taken, config in times],
            }
        )  # fmt: skip
        ruled_text = f"{ruled:7.2f}" if ruled else "      –"
        print(
            f"{kind:16} {inputs:5}→{widths} {rows:3} {times[0][0]:7.2f} µs {limit / times[0][0]:4.0%}"
            f" rule {ruled_text} {brief(rule)} | {brief(times[0][1]):34} | {times[-1][0]:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--shapes", default=",".join(LINEAR_SHAPES))
    parser.add_argument("--rule-only", action="store_true", help="only what the rule chooses, nothing else of the grid")
    parser.add_argument(
        "--beside", default="bfloat16,bitsandbytes nf4,bitsandbytes int8,tinygemm int4", help="neighbours, or 'all'"
    )
    parser.add_argument("--beside-seconds", type=float, default=120, help="for each")
    parser.add_argument("--json", type=Path, help="a file for what was measured")
    parser.add_argument("--processes", type=int, default=min(14, (os.cpu_count() or 2) - 1))
    given = parser.parse_args()
    formats, counts = given.formats.split(","), [int(count) for count in given.rows.split(",")]
    bench = Bench(given.seconds)
    started = time.monotonic()
    # Kernels do not depend on the shape, nor on how many splits there are.
    grid = [] if given.rule_only else pairs(counts, formats)
    wanted = [(kind, rows, config) for rows, kind in grid for config in configs(kind, rows)]
    jobs = list(
        dict.fromkeys((kind, rows, replace(config, splits=min(config.splits, 2))) for kind, rows, config in wanted)
    )
    done = compile_ahead(jobs, 0.45 * given.seconds, given.processes) if given.processes > 1 and jobs else 0
    print(f"{done} of {len(jobs)} kernels compiled ahead in {time.monotonic() - started:.0f} s", flush=True)
    rate = bandwidth_bytes_s()
    print(f"{torch.cuda.get_device_name()}: a copy moves {rate / 1e12:.2f} TB/s", flush=True)
    sound = {}
    for rows, kind in pairs(counts, formats):
        sound[kind, rows] = [] if given.rule_only else bench.sound(kind, rows)
        for shape in [shape for name in given.shapes.split(",") for shape in LINEAR_SHAPES[name]]:
            if bench.late:
                bench.left_out += 1
                continue
            bench.measure(kind, shape, rows, sound[kind, rows], rate)
    from benchmarks.linear_peers import NEIGHBOURS, measured

    beside = []
    for name in NEIGHBOURS if given.beside == "all" else filter(None, given.beside.split(",")):
        beside.append(measured(name, given.shapes.split(","), counts, given.beside_seconds))
        print(json.dumps(beside[-1]), flush=True)
    for name, why in bench.failed.items():
        print(f"FAILED {name}: {why}")
    print(f"{bench.left_out} measurements left out for time; {time.monotonic() - started:.0f} s in all")
    report = {
        "device": torch.cuda.get_device_name(), "copy_tb_s": round(rate / 1e12, 3), "products": bench.rows,
        "beside": beside, "failed": bench.failed, "left_out": bench.left_out,
    }  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
