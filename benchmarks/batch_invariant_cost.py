"""The price of `batch_invariant=True`: milliseconds of a decode step and of reading a prompt, with and without it.

    python -m benchmarks.batch_invariant_cost FOLDER [--schemes bfloat16 nf4] [--rows 1 8] [--prompts 256]

Both engines stand over the same weights and run in turns, on a GPU if there is one. Medians; prints a table in
Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.prompts import Prompts

POSITION = 60
"""Position of a decode step."""


def main() -> None:
    """Measure, and print a line for each scheme and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an unquantized checkpoint, or a quantized one with --schemes checkpoint")
    parser.add_argument("--schemes", nargs="+", default=["float32", "bfloat16", "nf4", "int8"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="+", default=[256], help="their tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="decode steps of a round")
    asked = parser.parse_args()
    print("| scheme | what | ms without | ms with | times as long |\n|---|---|---|---|---|", flush=True)
    for scheme in asked.schemes:
        measure(scheme, asked)


def measure(scheme: str, asked: argparse.Namespace) -> None:
    """Measure one scheme: a name of `SCHEMES`, a dtype, or "checkpoint" for how the checkpoint is quantized."""
    fields = {"dtype": scheme} if "float" in scheme else {"quantization": None if scheme == "checkpoint" else scheme}
    cache = "4GiB" if torch.cuda.is_available() else "64MiB"
    ordinary = QuantizedHuggingFaceLLM(
        model_id=asked.folder, max_new_tokens=1, prefix_caching=False, kv_cache_memory=cache, progress=False, **fields
    )
    invariant = ordinary.model_copy(update={"batch_invariant": True})
    llms = (ordinary, invariant)
    engines: list[Any] = [llm._engine() for llm in llms]
    assert engines[1].info.batch_invariant
    for rows in asked.rows:
        report(scheme, f"a step of {rows}", [
            [engine.time_step(rows, POSITION, asked.steps) for engine in engines] for _ in range(asked.rounds)
        ])  # fmt: skip
    prompts = Prompts(ordinary.pipeline.tokenizer)
    for tokens in asked.prompts:
        drawn = prompts.draw(asked.rounds + 1, tokens)
        times = [[seconds(llm, prompt) for llm in llms] for prompt in drawn]
        report(scheme, f"a prompt of {tokens}", times[1:])
    ordinary.unload()


def seconds(llm: QuantizedHuggingFaceLLM, prompt: str) -> float:
    """Time the reading of a prompt, with one new token."""
    began = time.perf_counter()
    llm.invoke(prompt)
    return time.perf_counter() - began


def report(scheme: str, what: str, times_s: list[list[float]]) -> None:
    """Print the medians of rounds of two times each."""
    without, with_it = (1000 * statistics.median(column) for column in zip(*times_s, strict=True))
    print(f"| {scheme} | {what} | {without:.1f} | {with_it:.1f} | {with_it / without:.2f} |", flush=True)


if __name__ == "__main__":
    main()
