"""What drawing a step's tokens takes in one kernel, beside plain torch's.

    python -m benchmarks.sampling_speed --vocab 32000 151936 --rows 1 8 64

Needs a CUDA GPU. Microseconds of a CUDA graph that draws once, for greedy rows and several kinds of sampling. Logits
are random, spread as widely as a model's. Prints lines as they come, and one line of JSON in the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product as pairs
from typing import Any

import torch

from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.sampler import MASKS, BatchSampler, needs_of
from langchain_quantllm.options import normalize, resolve

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k and top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "and a penalty": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    "mask": {},
}
LOGITS = {"peaked": (2.0, 18.0), "spread": (3.0, 0.0), "flat": (0.5, 0.0)}
"""How far logits are spread, and how far the best of them stands out."""


def request_of(options: dict[str, Any]) -> Request:
    return Request(
        prompt_ids=(1, 2, 3),
        max_new_tokens=100,
        min_new_tokens=0,
        options=resolve([normalize(options)], {}),
        sample_index=0,
        seed=0,
        eos_token_ids=(0,),
    )


def microseconds(body: Callable[[], Any]) -> float:
    """Time a body in a graph of its own; the median of several replays."""
    for _ in range(2):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 100)
    return round(statistics.median(times), 1)


def measure(kind: str, rows: int, vocab: int, shape: str) -> dict[str, float]:
    """Time one kind of drawing in both ways."""
    from langchain_quantllm.kernels import sampling as drawing

    device, request = torch.device("cuda"), request_of(KINDS[kind])
    spread, lead = LOGITS[shape]
    logits = spread * torch.randn(rows, vocab, device=device)
    logits[torch.arange(rows), torch.randint(vocab, (rows,))] += lead
    logits = logits.to(torch.bfloat16)
    need = needs_of(request) | MASKS * (kind == "mask")
    mask = torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32, device=device) if kind == "mask" else None
    slots, uniforms = torch.arange(rows, device=device), torch.rand(rows, device=device)
    may_not_end = torch.zeros(rows, dtype=torch.bool, device=device)
    found = {}
    for name, way in (("torch_us", None), ("kernel_us", drawing)):
        sampler = BatchSampler(rows, vocab, device, drawing=way)
        sampler.set(range(rows), [request] * rows, [request.prompt_ids] * rows)
        found[name] = microseconds(
            lambda sampler=sampler: sampler.sample(logits, slots, uniforms, may_not_end, need, mask)
        )
    return found


def main() -> None:
    """Measure, print lines, and one line of JSON in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--logits", nargs="+", default=["peaked"], choices=list(LOGITS))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    result = []
    with torch.no_grad():
        for vocab, kind, shape, rows in pairs(asked.vocab, asked.kinds, asked.logits, asked.rows):
            found = measure(kind, rows, vocab, shape)
            result.append({"vocab": vocab, "kind": kind, "logits": shape, "rows": rows, **found})
            print(f"{vocab} {kind}, {shape}, {rows} rows: {found['torch_us']} µs in torch, {found['kernel_us']} in one")
    print(json.dumps({"device": torch.cuda.get_device_name(), "drawing": result}))


if __name__ == "__main__":
    main()
