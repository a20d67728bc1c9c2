"""Time that each kind of fused step saves in a captured decode step, and the time of each fused kernel.

    python -m benchmarks.fusion_speed --shape llama-2-7b --quantization nf4

Needs a CUDA GPU. The model has random weights of the shape, on which speed does not depend. The step is measured with
each kind alone, with all, and with none, in one process over the same weights; kernels beside plain torch, and
liger-kernel if it is installed. Prints lines as they come, then one line of JSON. Measurements that cannot begin within
`--seconds` are skipped, and named.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronized_s
from langchain_quantllm import GPTQ, QuantizedHuggingFaceLLM
from langchain_quantllm.bench.graph_timing import graph_us
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.fusion.fuse import GATED_MLP, KINDS, LINEAR, NORM, RESIDUAL, ROTARY, Fusion
from langchain_quantllm.kernels import reference
from langchain_quantllm.memory import CACHE_DTYPES

VARIANTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": KINDS,
    "small": tuple(kind for kind in KINDS if kind != LINEAR),
    "linear": (LINEAR,),
    "norm": (NORM,),
    "rotary": (ROTARY,),
    "gated_mlp": (GATED_MLP,),
    "norm+residual": (NORM, RESIDUAL),
}
STEPS, REPEATS, CALLS = 30, 3, 32


def kernels_of(graph: Any) -> tuple[int, list[dict[str, Any]]]:
    """Profile one replay; returns the number of its kernels, and the slowest ones."""
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        graph.replay()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            totals.setdefault(event.name, []).append(event.time_range.elapsed_us())
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:14]
    top = [{"kernel": name[:80], "calls": len(us), "us": round(sum(us), 1)} for name, us in longest]
    return sum(map(len, totals.values())), top


def measure_steps(
    pipeline: Any, kinds: tuple[str, ...], rows: list[int], position: int, cache: str, cache_dtype: str
) -> dict[str, Any]:
    """Time the captured step with some kinds fused."""
    began = synchronized_s()
    fusion = Fusion(pipeline.model, kinds=kinds) if kinds else None
    build_s = synchronized_s() - began
    engine = ContinuousEngine(pipeline, kv_cache_memory=cache, kv_cache_dtype=cache_dtype, fusion=fusion)
    try:
        found: dict[str, Any] = {"build_s": round(build_s, 2), "graphs": engine.info.graphs, "step_ms": {}}
        if fusion is not None:
            found["unsupported_reason"] = fusion.unsupported_reason
            found["fused"] = {kind.kind: kind.fused for kind in fusion.summary}
            found["left"] = {kind.kind: dict(kind.left) for kind in fusion.summary if kind.left}
        for count in rows:
            times = [engine.time_step(count, position, STEPS) for _ in range(REPEATS)]
            found["step_ms"][str(count)] = round(1e3 * statistics.median(times), 4)
        graphs = engine._runner._decode_graphs
        if rows[0] in graphs:
            found["kernels"], found["longest"] = kernels_of(graphs[rows[0]])
        found["why_no_graphs"] = engine._runner.no_graph_reason
        return found
    finally:
        engine.close()
        if fusion is not None:
            fusion.close()
        torch.cuda.empty_cache()


def us_of(body: Callable[[int], Any]) -> float:
    """Time one call of a body in a graph of many calls, each on tensors of its own, in microseconds."""
    return round(graph_us([functools.partial(body, i) for i in range(CALLS)], repeats=5, replays=10), 2)


def measure_kernels(shape: dict[str, int], rows: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Time every fused kernel beside its plain torch version, for a step of some rows."""
    from langchain_quantllm.kernels import norms

    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv_heads, dim = shape["num_key_value_heads"], shape.get("head_dim", width // heads)
    made = {"dtype": dtype, "device": "cuda"}
    x, residual = torch.randn(2, CALLS, 1, rows, width, **made)
    gate, up = torch.randn(2, CALLS, 1, rows, inner, **made)
    weight = torch.randn(width, **made)
    query = torch.randn(CALLS, 1, rows, heads, dim, **made).transpose(2, 3)
    key, value = torch.randn(2, CALLS, 1, rows, kv_heads, dim, **made).transpose(3, 4)
    cos, sin = torch.randn(2, 1, rows, dim, **made)
    kv = torch.zeros(CALLS, rows + 1, BLOCK_TOKENS, kv_heads, 2 * dim, **made)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    table, positions = (slots + 1)[:, None].contiguous(), torch.zeros_like(slots)

    def rotate(module: Any) -> Callable[[int], Any]:
        return lambda i: module.rotate_and_write(query[i], key[i], value[i], cos, sin, kv[i], table, slots, positions)

    bodies: dict[str, Callable[[Any], Callable[[int], Any]]] = {
        "rms_norm": lambda module: lambda i: module.rms_norm(x[i], weight, 1e-5),
        "add_rms_norm": lambda module: lambda i: module.add_rms_norm(x[i], residual[i], weight, 1e-5),
        "add_layer_norm": lambda module: lambda i: module.add_layer_norm(x[i], residual[i], weight, weight, 1e-5),
        "silu_mul": lambda module: lambda i: module.activation_mul(gate[i], up[i], reference.SILU),
        "gelu_tanh_mul": lambda module: lambda i: module.activation_mul(gate[i], up[i], reference.GELU_TANH),
        "rotate_and_write": rotate,
    }
    with torch.no_grad():
        times = {
            name: {"fused_us": us_of(make(norms)), "torch_us": us_of(make(reference))} for name, make in bodies.items()
        }
        for name, body in liger_bodies(x, residual, gate, up, weight, (query, key, cos, sin)).items():
            times[name]["liger_us"] = us_of(body)
    return times


def liger_bodies(
    x: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    rotated: tuple[torch.Tensor, ...],
) -> dict[str, Callable[[int], Any]]:
    """Return the same calls of liger-kernel, if it is installed; its rotation writes no cache."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward
        from liger_kernel.ops.geglu import geglu_forward
        from liger_kernel.ops.rms_norm import rms_norm_forward
        from liger_kernel.ops.rope import rope_forward
        from liger_kernel.ops.swiglu import swiglu_forward
    except ImportError:
        return {}
    query, key, cos, sin = rotated
    return {
        "rms_norm": lambda i: rms_norm_forward(x[i], weight, 1e-5, 0.0, "llama", False),
        "add_rms_norm": lambda i: fused_add_rms_norm_forward(x[i], residual[i], weight, 1e-5, 0.0, "llama"),
        "silu_mul": lambda i: swiglu_forward(gate[i], up[i]),
        "gelu_tanh_mul": lambda i: geglu_forward(gate[i], up[i]),
        "rotate_and_write": lambda i: rope_forward(query[i], key[i], cos, sin),
    }


def main() -> None:
    """Measure, and print lines, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=sorted(SHAPES))
    parser.add_argument("--quantization", default="nf4", help="a scheme, 'gptq', or 'none'")
    parser.add_argument("--kernel", default="auto", help="of GPTQ")
    parser.add_argument("--bits", type=int, default=4, help="of GPTQ")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--position", type=int, default=158, help="where in their texts the rows are")
    parser.add_argument("--kv-cache", default="8GiB")
    parser.add_argument("--kv-cache-dtypes", nargs="+", default=["auto"], choices=CACHE_DTYPES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=110.0, help="what does not begin within these is left out")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    began, left_out = time.perf_counter(), []
    result: dict[str, Any] = {"shape": asked.shape, "quantization": asked.quantization, "position": asked.position}
    if asked.quantization == "gptq":
        result["bits"] = asked.bits
    result |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    dtype = torch.float16 if asked.quantization == "gptq" else torch.bfloat16
    result["kernel_us"] = {}
    for rows in asked.rows:
        result["kernel_us"][str(rows)] = found = measure_kernels(SHAPES[asked.shape], rows, dtype)
        print(f"{rows} rows: " + ", ".join(f"{k} {t}" for k, t in found.items()))
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(asked.shape, Path(folder), gptq=asked.quantization == "gptq", bits=asked.bits)
        scheme = GPTQ(kernel=asked.kernel) if asked.quantization == "gptq" else asked.quantization
        llm = QuantizedHuggingFaceLLM(
            model_id=folder,
            quantization=None if scheme == "none" else scheme,
            device="cuda:0",
            progress=False,
        )
        llm.load()
        result["load_s"] = round(time.perf_counter() - began, 1)
        print(f"loaded after {result['load_s']} s")
        result["variants"] = {}
        for name in asked.variants:
            if time.perf_counter() - began > asked.seconds:
                left_out.append(name)
                continue
            for dtype in asked.kv_cache_dtypes:
                label = name if dtype == "auto" else f"{name}, KV cache in {dtype}"
                cache = (asked.kv_cache, dtype)
                found = measure_steps(llm.pipeline, VARIANTS[name], asked.rows, asked.position, *cache)
                result["variants"][label] = found
                shown = f"{found['step_ms']} ms, {found.get('kernels')} kernels, after {found['build_s']} s"
                print(f"{label}: {shown}", flush=True)
    result |= {"left_out": left_out, "total_s": round(time.perf_counter() - began, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
