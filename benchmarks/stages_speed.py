"""Two GPUs beside one: tokens per second of a model whose layers are divided among them, and of the same on one.

    python -m benchmarks.stages_speed [--shape llama-2-7b] [--schemes nf4 int8 gptq bfloat16] [--requests 1 8 64]

Weights are random. With `--same-gpu` both stages run on one GPU: what copies, graphs of their own and turns cost by
themselves. Medians of rounds after one for warming up; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.own_speed import AS_WRITTEN, measure
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
    print("| scheme | requests | tokens/s on one | tokens/s in two stages | times |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[bool, Path] = {}
        for scheme in asked.schemes:
            is_packed = scheme == "gptq"
            if is_packed not in made:
                made[is_packed] = random_checkpoint(asked.shape, Path(folder) / f"gptq-{is_packed}", gptq=is_packed)
            compare(scheme, made[is_packed], asked)


def compare(scheme: str, folder: Path, asked: argparse.Namespace) -> None:
    """Measure a scheme on one GPU and in two stages, and print its lines."""

    def rates(device_map: Any) -> dict[str, Any]:
        return measure(
            folder,
            AS_WRITTEN if scheme == "gptq" else scheme,
            asked.requests,
            prompt_tokens=asked.prompt,
            new_tokens=asked.tokens,
            repeats=asked.rounds,
            fields={"device_map": device_map},
        )

    one = rates({"": 0})
    with divided_by_hand(SHAPES[asked.shape]["num_hidden_layers"] // 2, is_wanted=asked.same_gpu):
        two = rates({"": 0} if asked.same_gpu else "balanced")
    print(f"<!-- {scheme}: graphs {two['graphs']}, loaded in {two['load_s']} s, {two['reason']} -->")
    for requests, alone in one["rates"].items():
        apart = two["rates"][requests]
        print(f"| {scheme} | {requests} | {alone:.0f} | {apart:.0f} | {apart / alone:.2f} |", flush=True)


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
