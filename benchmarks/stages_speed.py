"""Two GPUs beside one: tokens per second of a model whose layers are divided among them, and of the same on one.

    python -m benchmarks.stages_speed [--shape llama-2-7b] [--schemes nf4 int8 gptq bfloat16] [--requests 1 8 64]

Weights are random. With `--same-gpu` both stages run on one GPU: what copies, graphs of their own and turns cost by
themselves. Medians of rounds after one for warming up; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.engine import stages


def main() -> None:
    """Measure, and print a line for each scheme and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=["nf4", "int8", "gptq", "bfloat16"])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--same-gpu", action="store_true", help="both stages on one GPU")
    asked = parser.parse_args()
    stages.CAPTURES = True
    print("| scheme | requests | tokens/s on one | tokens/s in two stages | times |\n|---|---|---|---|---|", flush=True)
    for scheme in asked.schemes:
        with tempfile.TemporaryDirectory() as folder:
            made = random_checkpoint(asked.shape, Path(folder) / "model", gptq=scheme == "gptq")
            one = rates(made, scheme, {"device_map": {"": 0}}, asked)
            with divided_by_hand(SHAPES[asked.shape]["num_hidden_layers"] // 2, is_wanted=asked.same_gpu):
                spread = {"device_map": {"": 0} if asked.same_gpu else "balanced"}
                two = rates(made, scheme, spread, asked)
        for requests, alone, apart in zip(asked.requests, one, two, strict=True):
            print(f"| {scheme} | {requests} | {alone:.0f} | {apart:.0f} | {apart / alone:.2f} |", flush=True)


def rates(folder: Any, scheme: str, spread: dict[str, Any], asked: argparse.Namespace) -> list[float]:
    """Measure the tokens per second of each number of requests at once."""
    fields: dict[str, Any] = {"dtype": scheme} if "float" in scheme else {"quantization": scheme}
    if scheme == "gptq":
        fields = {}
    llm = QuantizedHuggingFaceLLM(
        model_id=str(folder),
        max_new_tokens=asked.tokens,
        ignore_eos=True,
        prefix_caching=False,
        progress=False,
        engine="fast",
        batch_size=max(asked.requests),
        **spread,
        **fields,
    )
    print(f"<!-- {scheme}, {spread}: {llm.engine_info} -->", flush=True)
    prompts, found = Prompts(llm.pipeline.tokenizer), []
    for requests in asked.requests:
        times_s = []
        for _ in range(asked.rounds + 1):
            texts = prompts.draw(requests, asked.prompt)
            began = time.perf_counter()
            llm.batch(texts, config={"max_concurrency": requests})
            times_s.append(time.perf_counter() - began)
        found.append(requests * asked.tokens / statistics.median(times_s[1:]))
    llm.unload()
    return found


@contextmanager
def divided_by_hand(layer: int, *, is_wanted: bool) -> Iterator[None]:
    """Let models on one GPU run in two stages, the second from this layer on."""
    before = stages.find_stages
    if is_wanted:
        stages.find_stages = lambda model: stages.Stages(model, first_layers=(layer,))
    try:
        yield
    finally:
        stages.find_stages = before


if __name__ == "__main__":
    main()
