"""New tokens per second of this package, through LangChain, on the checkpoints that `vllm_speed --write` wrote.

    python -m benchmarks.own_speed FOLDER/none --schemes nf4 int8 bfloat16
    python -m benchmarks.own_speed FOLDER/gptq

Each number of requests runs once to warm up, then `--repeats` times; the median counts. Prompts count in the time.
Prints a line of JSON for each scheme, with what the engine says of itself and the time to load.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.prompts import Prompts

AS_WRITTEN = "as-written"
"""The scheme of a checkpoint that is quantized already, or of one in 16 bits."""


def measure(
    folder: Path,
    scheme: str,
    requests: Sequence[int],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the tokens per second of each number of requests at once.

    Args:
        folder: The checkpoint.
        scheme: A name for `quantization`, a dtype with "float" in its name, or `AS_WRITTEN`.
        requests: Numbers of requests.
        prompt_tokens: Length of each prompt, drawn anew for each run.
        new_tokens: Length of each text.
        repeats: Runs after the one that warms up.
        fields: More fields of the object, such as `device_map`.

    Returns:
        `rates`, in tokens/s by number of requests; `load_s`; `graphs`, `fused` and `reason` of `engine_info`;
        `weights_gib`, of all devices.
    """
    own: dict[str, Any] = {"dtype": scheme} if "float" in scheme else {"quantization": scheme}
    if scheme == AS_WRITTEN:
        own = {}
    began = time.perf_counter()
    llm = QuantizedHuggingFaceLLM(
        model_id=str(folder),
        max_new_tokens=new_tokens,
        ignore_eos=True,
        prefix_caching=False,
        progress=False,
        engine="fast",
        batch_size=max(requests),
        **own,
        **fields,
    )
    info = llm.engine_info
    load_s = time.perf_counter() - began
    prompts, rates = Prompts(llm.pipeline.tokenizer), {}
    for count in requests:
        times_s = []
        for _ in range(repeats + 1):
            texts: list[Any] = list(prompts.draw(count, prompt_tokens))
            began = time.perf_counter()
            llm.batch(texts, config={"max_concurrency": count})
            times_s.append(time.perf_counter() - began)
        rates[count] = round(count * new_tokens / statistics.median(times_s[1:]), 1)
    weights = llm.memory_report().weights
    found = {
        "rates": rates,
        "load_s": round(load_s, 1),
        "graphs": llm.engine_info.graphs,
        "fused": dict(info.fused),
        "reason": llm.engine_info.reason,
        "weights_gib": round(weights.total_bytes / 2**30, 2),
    }
    llm.unload()
    return found


def main() -> None:
    """Measure the schemes, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemes", nargs="+", default=[AS_WRITTEN])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for scheme in given.schemes:
        found = measure(
            given.folder, scheme, given.requests, prompt_tokens=given.prompt_tokens, new_tokens=given.new_tokens,
            repeats=given.repeats, fields={},
        )  # fmt: skip
        print(json.dumps({"folder": given.folder.name, "scheme": scheme, **found}), flush=True)


if __name__ == "__main__":
    main()
