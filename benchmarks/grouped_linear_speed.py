"""Time that `kernels.linear.cpu` saves in the engine's steps and in reading prompts, on a CPU.

    python -m benchmarks.grouped_linear_speed FOLDER

Both engines run their steps over the same weights in turns; for prompts the model is loaded anew. Prints the ratios of
the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import cpu as cpu_linear

ROUNDS, STEPS, POSITION = 12, 6, 60


def main() -> None:
    """Measure, and print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256], help="their tokens")
    asked = parser.parse_args()
    fields = {"model_id": asked.folder, "quantization": asked.quantization, "device": "cpu", "progress": False}
    llm = QuantizedHuggingFaceLLM(**fields)
    pipeline = llm.pipeline
    apart = ContinuousEngine(pipeline, kv_cache_memory="64MiB")
    fusion = Fusion(pipeline.model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    together = ContinuousEngine(pipeline, kv_cache_memory="64MiB", fusion=fusion)
    print(f"{fusion.summary[0].fused} layers")
    for rows in asked.rows:
        times: dict[ContinuousEngine, list[float]] = {apart: [], together: []}
        for _ in range(ROUNDS):
            for engine, taken in times.items():
                taken.append(engine.time_step(rows, POSITION, STEPS))
        ratio = statistics.median(times[apart]) / statistics.median(times[together])
        print(f"{rows} rows: a step with them is {ratio:.2f} times as fast", flush=True)
    apart.close()
    together.close()
    fusion.close()
    llm.unload()
    taken_s = {fuse: prompt_seconds(asked.prompts, fuse=fuse, **fields) for fuse in (False, True)}
    for tokens in asked.prompts:
        ratio = taken_s[False][tokens] / taken_s[True][tokens]
        print(f"a prompt of {tokens} tokens is read {ratio:.2f} times as fast", flush=True)


def prompt_seconds(lengths: list[int], **fields: Any) -> dict[int, float]:
    """Time the reading of prompts, each with one new token, through LangChain."""
    llm = QuantizedHuggingFaceLLM(max_new_tokens=1, prefix_caching=False, kv_cache_memory="64MiB", **fields)
    prompts, found = Prompts(llm.pipeline.tokenizer), {}
    for tokens in lengths:
        times = []
        for prompt in prompts.draw(6, tokens):
            began = time.perf_counter()
            llm.invoke(prompt)
            times.append(time.perf_counter() - began)
        found[tokens] = statistics.median(times[1:])
    llm.unload()
    return found


if __name__ == "__main__":
    main()
