"""New tokens per second of vLLM, offline, on the random checkpoints that `own_speed` measures.

Write the checkpoints where this package is:

    python -m benchmarks.vllm_speed --write FOLDER --shape llama-2-7b

and measure in an environment with vLLM, which needs no package of ours:

    python benchmarks/vllm_speed.py FOLDER/none
    python benchmarks/vllm_speed.py FOLDER/none --quantization bitsandbytes
    python benchmarks/vllm_speed.py FOLDER/gptq

Each number of requests runs once to warm up, then `--repeats` times; the median counts. Prompts count in the time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path


def write(folder: Path, shape: str, layers: int | None) -> None:
    """Write the checkpoints, in bfloat16 and as GPTQ with 4 bits."""
    from langchain_quantllm.bench.random_models import random_checkpoint

    random_checkpoint(shape, folder / "none", layers=layers)
    random_checkpoint(shape, folder / "gptq", gptq=True, layers=layers)


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by the number of requests."""
    from vllm import LLM, SamplingParams

    vocab = json.loads((given.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    llm = LLM(
        str(given.folder),
        quantization=given.quantization,
        max_model_len=2048,
        max_num_seqs=max(given.requests),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0, max_tokens=given.new_tokens, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    found = {}
    for requests in given.requests:
        taken = []
        for _ in range(given.repeats + 1):
            prompts = [
                {"prompt_token_ids": [draw.randrange(2, vocab) for _ in range(given.prompt_tokens)]}
                for _ in range(requests)
            ]
            begin = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            taken.append(time.perf_counter() - begin)
            assert all(len(output.outputs[0].token_ids) == given.new_tokens for output in outputs)
        found[str(requests)] = round(requests * given.new_tokens / statistics.median(taken[1:]), 1)
    return found


def main() -> None:
    """Write checkpoints, or measure one and print its line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="write the checkpoints into the folder instead")
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="with --write: layers of the model; those of the shape by default")
    parser.add_argument("--quantization", help="bitsandbytes: quantize to nf4 while loading")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.write:
        write(given.folder, given.shape, given.layers)
        return
    print(json.dumps({"folder": given.folder.name, "quantization": given.quantization, **measure(given)}))


if __name__ == "__main__":
    main()
