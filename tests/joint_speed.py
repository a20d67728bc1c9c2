"""What the products of `cpu_products` save on a CPU: the engine's step with them, and without.

    python -m tests.joint_speed FOLDER

Both engines run over the same weights in turns; prints the medians of their steps and the ratio.
"""

from __future__ import annotations

import argparse
import statistics

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.fast_engine import FastEngine
from langchain_quantllm.engine.fusion import PRODUCT, Fusion
from langchain_quantllm.kernels import cpu_products, fused_reference

ROUNDS, STEPS, POSITION = 12, 6, 60


def main() -> None:
    """Measure, and print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    asked = parser.parse_args()
    llm = QuantizedHuggingFaceLLM(model_id=asked.folder, quantization=asked.quantization, device="cpu", progress=False)
    pipeline = llm.pipeline
    apart = FastEngine(pipeline, kv_cache_memory="64MiB")
    fusion = Fusion(pipeline.model, kernels=fused_reference, products=cpu_products, kinds=(PRODUCT,))
    together = FastEngine(pipeline, kv_cache_memory="64MiB", fusion=fusion)
    print(f"{fusion.summary[0].fused} layers")
    for rows in asked.rows:
        times: dict[FastEngine, list[float]] = {apart: [], together: []}
        for _ in range(ROUNDS):
            for engine, taken in times.items():
                taken.append(engine.time_step(rows, POSITION, STEPS))
        ratio = statistics.median(times[apart]) / statistics.median(times[together])
        print(f"{rows} rows: a step with them is {ratio:.2f} times as fast", flush=True)
    apart.close()
    together.close()
    fusion.close()


if __name__ == "__main__":
    main()
