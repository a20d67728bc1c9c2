"""Time to sample the tokens of a step in one kernel, beside plain torch.

    python -m benchmarks.sampling_speed --vocab 32000 151936 --rows 1 8 64

Needs a CUDA GPU. Microseconds of a CUDA graph that samples once, for greedy rows and several kinds of sampling. Logits
are random, spread as widely as a model's. Prints lines as they come, then one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from itertools import product as pairs
from typing import Any

import torch

from langchain_quantllm.bench.graph_timing import graph_us
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
"""Standard deviation of the logits, and the lead of the best one."""


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


def measure(kind: str, rows: int, vocab: int, shape: str) -> dict[str, float]:
    """Time one kind of sampling in torch and in the kernel."""
    from langchain_quantllm.kernels import sampling

    device, request = torch.device("cuda"), request_of(KINDS[kind])
    spread, lead = LOGITS[shape]
    logits = spread * torch.randn(rows, vocab, device=device)
    logits[torch.arange(rows), torch.randint(vocab, (rows,))] += lead
    logits = logits.to(torch.bfloat16)
    need = needs_of(request) | MASKS * (kind == "mask")
    mask = torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32, device=device) if kind == "mask" else None
    slots, uniforms = torch.arange(rows, device=device), torch.rand(rows, device=device)
    may_not_end = torch.zeros(rows, dtype=torch.bool, device=device)
    times = {}
    for name, kernel in (("torch_us", None), ("kernel_us", sampling)):
        sampler = BatchSampler(rows, vocab, device, kernels=kernel)
        sampler.set(range(rows), [request] * rows, [request.prompt_ids] * rows)
        body = functools.partial(sampler.sample, logits, slots, uniforms, may_not_end, need, mask)
        times[name] = round(graph_us([body], repeats=12, replays=10), 1)
    return times


def main() -> None:
    """Measure, and print lines, then one line of JSON."""
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
    print(json.dumps({"device": torch.cuda.get_device_name(), "sampling": result}))


if __name__ == "__main__":
    main()
