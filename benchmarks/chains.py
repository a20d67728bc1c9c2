"""Chains on a CPU: the fast engine beside transformers' `generate` through langchain-huggingface, in one run.

    python -m benchmarks.chains FOLDER --quantization nf4

One request, and eight chains at once from eight threads, each by both in turn, three times; prints
medians and ratios as one line of JSON. Equal prompts and equal token counts; prefix sharing off.
Times are those of this machine: only the ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from langchain_quantllm import QuantizedHuggingFaceLLM

PROMPT = PromptTemplate.from_template("Question: what is {number} plus one, and why?\nAnswer:")


def rate_tok_s(chain: Any, chains: int, new_tokens: int) -> float:
    """Run so many chains at once and give their new tokens per second, prompts included."""
    with ThreadPoolExecutor(chains) as threads:
        began = time.perf_counter()
        list(threads.map(lambda i: chain.invoke({"number": i}), range(chains)))
        return chains * new_tokens / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    options = {"max_new_tokens": given.new_tokens, "min_new_tokens": given.new_tokens}
    llm = QuantizedHuggingFaceLLM(
        model_id=given.model, quantization=given.quantization, prefix_caching=False, progress=False, **options
    ).load()
    theirs = llm.to_huggingface_pipeline()
    theirs.pipeline._forward_params |= {**options, "do_sample": False}
    chains = {"ours": PROMPT | llm | StrOutputParser(), "generate": PROMPT | theirs | StrOutputParser()}
    found: dict[str, Any] = {"engine": llm.engine_info.name, "threads": torch.get_num_threads()}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for count in (1, 8):
        rates: dict[str, list[float]] = {name: [] for name in chains}
        for repeat in range(given.repeats + 1):
            for name, chain in chains.items():
                rate = rate_tok_s(chain, count, given.new_tokens)
                if repeat:  # the first is to warm up
                    rates[name].append(rate)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        found[f"{count} at once, tokens/s"] = {name: round(rate, 1) for name, rate in medians.items()}
        found[f"{count} at once, ours / generate"] = round(medians["ours"] / medians["generate"], 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
