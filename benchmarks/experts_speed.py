"""Speed of mixtures of experts with quantized weights: one layer's experts, and a whole decode step.

    python -m benchmarks.experts_speed [--shapes qwen3-30b-a3b] [--formats nf4,gptq4,float] [--rows 1,8,32,64] [--grid]
    python -m benchmarks.experts_speed --step nf4,gptq --layers 24

For each shape, format and number of tokens: the experts of one layer, by what the rule chooses and with `--grid` by
other configs, in a CUDA graph over different choices of experts; beside them the time to read the weights of the chosen
experts at the bandwidth of a copy, and transformers' own experts in 16 bits. With `--step`, a decode step of a model of
random weights, loaded in each scheme ("gptq", "mxfp4" and "none" among them), with and without the step for experts.
Without a GPU, tiny sizes in plain torch: only to see that it runs. Prints lines as they come, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from langchain_quantllm.bench.graph_timing import graph_us
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.kernels.experts import reference
from langchain_quantllm.kernels.experts.config import ExpertsConfig, config_for
from langchain_quantllm.kernels.experts.gating import SILU, Gating
from langchain_quantllm.kernels.experts.weights import (
    FloatStack,
    FourBitStack,
    GPTQStack,
    Int8Stack,
    Mxfp4Stack,
    Stack,
)
from langchain_quantllm.kernels.linear.bit_packing import pack_bits
from langchain_quantllm.kernels.linear.codebook import CODEBOOKS

FORMATS = ("nf4", "nf4-nested", "int8", "gptq4", "gptq3", "gptq2", "gptq8", "mxfp4", "float")
CHOICES = 12
"""Different choices of experts in one graph."""

STEPS, REPEATS = 30, 3


class Layer:
    """The sizes of the experts of one layer of a shape."""

    def __init__(self, shape: str) -> None:
        """Read the shape's config."""
        config = SHAPES[shape]
        self.is_oss = config["model_type"] == "gpt_oss"
        self.hidden: int = config["hidden_size"]
        self.inner: int = config["intermediate_size"] if self.is_oss else config["moe_intermediate_size"]
        self.experts: int = config["num_local_experts"] if self.is_oss else config["num_experts"]
        self.chosen: int = config["num_experts_per_tok"]
        oss = Gating(activation=SILU, is_interleaved=True, alpha=1.702, limit=7.0, shift=1.0)
        self.gating = oss if self.is_oss else Gating(activation=SILU)

    def stacks(self, kind: str, device: str) -> tuple[Stack, Stack]:
        """Make random weights of both products."""
        sizes = ((2 * self.inner, self.hidden), (self.hidden, self.inner))
        first, second = (random_stack(kind, self.experts, *size, device, biased=self.is_oss) for size in sizes)
        return first, second


def random_stack(kind: str, experts: int, outputs: int, inputs: int, device: str, *, biased: bool) -> Stack:
    """Make weights of random bits, with scales of about the size that they have in models."""
    dtype = torch.bfloat16
    bias = torch.randn(experts, outputs, dtype=dtype, device=device) if biased else None
    common: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "bias": bias}

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (experts, *shape), dtype=torch.int32, device=device)

    if kind == "float":
        values = torch.randn(experts, outputs, inputs, dtype=dtype, device=device) * inputs**-0.5
        return FloatStack(values=values, **common)
    if kind == "int8":
        scales = torch.rand(experts, outputs, device=device) / 16 + 0.01
        return Int8Stack(words=words(outputs * inputs // 4), scales=scales, **common)
    if kind == "mxfp4":
        exponents = torch.full((experts, outputs, inputs // 32), 121, dtype=torch.uint8, device=device)
        return Mxfp4Stack(words=words(outputs, inputs // 8), scales=exponents, **common)
    if kind.startswith("gptq"):
        bits, size = int(kind[4:]), 128 if inputs % 128 == 0 else 32
        groups = inputs // size
        zeros = pack_bits(torch.full((groups, outputs), 1 << bits - 1, dtype=torch.uint8), bits).to(device)
        return GPTQStack(
            bits=bits,
            words=words(inputs * bits // 32, outputs),
            zeros=zeros.expand(experts, -1, -1).contiguous(),
            scales=((torch.rand(experts, groups, outputs, device=device) + 0.5) / (4 << bits)).half(),
            groups=(torch.arange(inputs, dtype=torch.int32, device=device) // size).expand(experts, -1).contiguous(),
            group_size=size,
            zero_point=1 << bits - 1,
            **common,
        )
    code = torch.tensor(CODEBOOKS["nf4"], device=device)
    blocks, is_nested = outputs * inputs // 64, kind.endswith("nested")
    nested: dict[str, Any] = {"nested_code": code, "nested_scales": code, "nested_block_size": 1, "offset": code}
    scales = torch.rand(experts, blocks, device=device) / 16 + 0.01
    if is_nested:
        scales = torch.randint(0, 256, (experts, blocks), dtype=torch.uint8, device=device)
        nested = {
            "nested_code": torch.linspace(-1, 1, 256, device=device),
            "nested_scales": torch.rand(experts, -(-blocks // 256), device=device) / 32,
            "nested_block_size": 256,
            "offset": torch.full((experts,), 0.05, device=device),
        }
    return FourBitStack(
        kind="nf4", words=words(outputs * inputs // 8), code=code, scales=scales, block_size=64, nested=is_nested,
        **nested, **common,
    )  # fmt: skip


def expert_bytes(stack: Stack) -> int:
    """Count the bytes of the weights and scales of one expert."""
    read = [stack.values] if isinstance(stack, FloatStack) else [stack.words, stack.scales]
    return int(sum(tensor.numel() * tensor.element_size() for tensor in read) // stack.experts)


def choices(layer: Layer, rows: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Choose experts for some tokens, several times, with their weights."""
    made = torch.Generator().manual_seed(rows)
    found = []
    for _ in range(CHOICES):
        scores = torch.rand(rows, layer.experts, generator=made).topk(layer.chosen, -1)
        found.append((scores.indices.to(device), scores.values.to(device, torch.bfloat16)))
    return found


def configs(rule: ExpertsConfig) -> Iterator[ExpertsConfig]:
    """Yield the rule's config, and others that differ in one product."""
    yield rule
    is_vector = rule.first.regime == "vector"
    ways = ("shuffle", "permute", "mixed")
    for part in ("first", "second"):
        base = getattr(rule, part)
        for outputs in (8, 16, 32) if is_vector else (64, 128):
            for words in (32, 64, 128) if is_vector else (16, 32):
                for warps in (1, 2, 4) if is_vector else (4, 8):
                    for stages in (3, 4):
                        config = replace(base, outputs=outputs, words=words, warps=warps, stages=stages)
                        yield replace(rule, **{part: config})
    for way in ways:
        yield replace(rule, first=replace(rule.first, decode=way), second=replace(rule.second, decode=way))


def brief(config: ExpertsConfig) -> str:
    """Write a config in one line."""
    parts = [f"{c.outputs}x{c.words} w{c.warps} s{c.stages} {c.decode}" for c in (config.first, config.second)]
    return f"{config.first.regime} {config.first.tile_rows} " + " | ".join(parts)


def rule_of(layer: Layer, first: Stack, second: Stack, rows: int) -> ExpertsConfig:
    """Return the config that the rule chooses."""
    from langchain_quantllm.kernels.linear.config import chip

    is_roomy = chip(torch.device("cuda"))[1]
    return config_for(first, second, rows, layer.chosen, dtype=torch.bfloat16, is_gated=True, is_roomy=is_roomy)


def compile_share(shape: str, kind: str, rows: int, share: int, shares: int) -> None:
    """Run some of the grid's configs once, for Triton's cache on the disk."""
    from langchain_quantllm.kernels.experts import dispatch

    layer = Layer(shape)
    first, second = layer.stacks(kind, "cuda")
    x = torch.randn(rows, layer.hidden, dtype=torch.bfloat16, device="cuda")
    (index, weights), *_ = choices(layer, rows, "cuda")
    for config in list(dict.fromkeys(configs(rule_of(layer, first, second, rows))))[share::shares]:
        with contextlib.suppress(Exception):  # the main process reports it
            dispatch.experts(x, [first], second, index, weights, gating=layer.gating, config=config)


def compile_ahead(cells: list[tuple[str, str, int]], processes: int, seconds: float) -> None:
    """Compile the grids of all cells in other processes."""
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        jobs = [(*cell, share, processes) for cell in cells for share in range(processes)]
        results = [pool.apply_async(compile_share, job) for job in jobs]
        for result in results:
            result.wait(max(0.0, began + seconds - time.perf_counter()))
        done = sum(result.ready() for result in results)
        pool.terminate()
    print(f"{done} of {len(jobs)} shares compiled ahead in {time.perf_counter() - began:.0f} s", flush=True)


def measure_layer(shape: str, kind: str, rows: int, rate: float, *, grid: bool, deadline: float) -> dict[str, Any]:
    """Time the experts of one layer on a GPU."""
    from langchain_quantllm.kernels.experts import dispatch

    layer = Layer(shape)
    first, second = layer.stacks(kind, "cuda")
    x = torch.randn(rows, layer.hidden, dtype=torch.bfloat16, device="cuda")
    chosen = choices(layer, rows, "cuda")
    touched = statistics.mean(len(index.unique()) for index, _ in chosen)
    limit_us = touched * (expert_bytes(first) + expert_bytes(second)) / rate * 1e6
    rule = rule_of(layer, first, second, rows)
    expected = reference.experts(x[:2], [first], second, chosen[0][0][:2], chosen[0][1][:2], layer.gating)
    times: list[tuple[float, str]] = []
    failed = {}
    for config in dict.fromkeys(configs(rule) if grid else [rule]):
        if time.perf_counter() > deadline:
            break
        call = functools.partial(dispatch.experts, x, [first], second, gating=layer.gating, config=config)
        calls = [functools.partial(call, index=index, weights=weights) for index, weights in chosen]
        try:
            found = calls[0]()[:2]
            error = float((found.float() - expected.float()).norm() / expected.float().norm())
            if not error < 2.0**-5:
                failed[brief(config)] = f"error {error:.2g}"
                continue
            times.append((graph_us(calls), brief(config)))
        except Exception as error:
            failed[brief(config)] = str(error)[-200:]
    best = min(times, default=(float("nan"), "-"))
    ruled = times[0][0] if times and times[0][1] == brief(rule) else float("nan")
    print(
        f"{shape:14} {kind:10} {rows:5} tokens: rule {ruled:8.2f} µs, best {best[0]:8.2f} ({best[1]}), reading"
        f" {limit_us:7.2f}, {len(failed)} failed",
        flush=True,
    )
    return {
        "shape": shape, "format": kind, "rows": rows, "rule_us": ruled, "rule": brief(rule), "best_us": best[0],
        "best": best[1], "limit_us": limit_us, "experts_touched": touched, "failed": failed,
        "all": [(round(us, 2), config) for us, config in sorted(times)[:12]],
    }  # fmt: skip


def measure_transformers(shape: str, rows: int) -> dict[str, Any]:
    """Time transformers' own experts in 16 bits, in its two ways that a graph can hold."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from langchain_quantllm.compat.transformers_experts import is_experts

    layer = Layer(shape)
    options = {**SHAPES[shape], "num_hidden_layers": 1, "vocab_size": 64}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options)).to(torch.bfloat16).eval()
    experts = next(module for module in model.modules() if is_experts(module))
    x = torch.randn(rows, layer.hidden, dtype=torch.bfloat16, device="cuda")
    found: dict[str, Any] = {"shape": shape, "rows": rows}
    for name in ("grouped_mm", "batched_mm"):
        if name == "batched_mm" and rows > 8:  # copies the weights of every row
            continue
        calls = [
            functools.partial(ALL_EXPERTS_FUNCTIONS[name], experts, x, index, weights)
            for index, weights in choices(layer, rows, "cuda")
        ]
        try:
            with torch.no_grad():
                found[name] = round(graph_us(calls), 2)
        except Exception as error:
            found[name] = str(error)[-200:]
    print(f"{shape:14} transformers {rows:5} tokens: {found}", flush=True)
    return found


def measure_step(shape: str, scheme: str, rows: list[int], layers: int | None, position: int) -> dict[str, Any]:
    """Time a captured decode step of a whole model, with all fused steps, and with all but that for experts."""
    from langchain_quantllm import QuantizedHuggingFaceLLM
    from langchain_quantllm.engine.continuous import ContinuousEngine
    from langchain_quantllm.engine.fusion.fuse import EXPERTS, KINDS, Fusion

    began = time.perf_counter()
    result: dict[str, Any] = {"shape": shape, "scheme": scheme, "layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        packed = {"gptq": scheme == "gptq", "mxfp4": scheme == "mxfp4"}
        random_checkpoint(shape, Path(folder), layers=layers, **packed)
        quantization = None if scheme in ("none", "gptq", "mxfp4") else scheme
        llm = QuantizedHuggingFaceLLM(model_id=folder, quantization=quantization, device="cuda:0", progress=False)
        llm.load()
        result["load_s"] = round(time.perf_counter() - began, 1)
        for name, kinds in (("all", KINDS), ("without", tuple(kind for kind in KINDS if kind != EXPERTS))):
            fusion = Fusion(llm.pipeline.model, kinds=kinds)
            engine = ContinuousEngine(llm.pipeline, kv_cache_memory="24GiB", fusion=fusion)
            try:
                times: dict[int, float] = {}
                for count in rows:
                    taken = [engine.time_step(count, position, STEPS) for _ in range(REPEATS)]
                    times[count] = statistics.median(seconds or math.nan for seconds in taken)
                    if not engine.info.graphs:
                        break
                result[name] = {
                    "step_ms": {str(count): round(1e3 * taken, 3) for count, taken in times.items()},
                    "tokens_s": {str(count): round(count / taken) for count, taken in times.items()},
                    "reason": engine.info.reason,
                    "fused": {kind.kind: kind.fused for kind in fusion.summary},
                    "left": {kind.kind: dict(kind.left) for kind in fusion.summary if kind.left},
                }
                print(f"{shape} {scheme} {name}: {result[name]['tokens_s']} tokens/s", flush=True)
            finally:
                engine.close()
                fusion.close()
                torch.cuda.empty_cache()
        llm.unload()
    return result


def try_out() -> None:
    """Run every format in plain torch with tiny sizes, as where there is no GPU."""
    layer = Layer("tiny-mixture")
    x = torch.randn(3, layer.hidden)
    index, weights = choices(layer, 3, "cpu")[0]
    for kind in FORMATS:
        first, second = layer.stacks(kind, "cpu")
        began = time.perf_counter()
        found = reference.experts(x, [first], second, index, weights, layer.gating, dtype=torch.float32)
        taken = time.perf_counter() - began
        size = expert_bytes(first) + expert_bytes(second)
        print(
            f"{kind:10} {1e3 * taken:6.1f} ms in plain torch, {size} bytes an expert, finite: {found.isfinite().all()}"
        )


def main() -> None:
    """Measure, and print lines, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b-a3b")
    parser.add_argument("--formats", default="nf4,gptq4,float")
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--grid", action="store_true", help="other configs as well")
    parser.add_argument("--processes", type=int, default=12, help="that compile the grid ahead")
    parser.add_argument("--step", default="", help="schemes of whole models, such as nf4,gptq; in place of layers")
    parser.add_argument("--layers", type=int, help="layers of whole models; all by default")
    parser.add_argument("--position", type=int, default=158, help="where in their texts the rows are")
    parser.add_argument("--seconds", type=float, default=200.0, help="what does not begin within these is left out")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        try_out()
        return
    began, rows = time.perf_counter(), [int(count) for count in asked.rows.split(",")]
    deadline = began + asked.seconds
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if asked.step:
        result["steps"] = [
            measure_step(shape, scheme, rows, asked.layers, asked.position)
            for shape in asked.shapes.split(",")
            for scheme in asked.step.split(",")
            if time.perf_counter() < deadline
        ]
    else:
        from benchmarks.linear_speed import bandwidth_bytes_s

        rate = bandwidth_bytes_s()
        print(f"{result['device']}: a copy moves {rate / 1e12:.2f} TB/s", flush=True)
        result |= {"layers": [], "transformers": []}
        if asked.grid:
            cells = [(s, k, n) for s in asked.shapes.split(",") for n in rows for k in asked.formats.split(",")]
            compile_ahead(cells, asked.processes, 0.6 * asked.seconds)
        for shape in asked.shapes.split(","):
            for count in rows:
                for kind in asked.formats.split(","):
                    if time.perf_counter() < deadline:
                        found = measure_layer(shape, kind, count, rate, grid=asked.grid, deadline=deadline)
                        result["layers"].append(found)
                        torch.cuda.empty_cache()
                if time.perf_counter() < deadline:
                    result["transformers"].append(measure_transformers(shape, count))
                    torch.cuda.empty_cache()
    print(json.dumps(result | {"total_s": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
