"""Streams that run while long prompts arrive: the gaps between their tokens, and how soon the prompts are read.

    python -m benchmarks.mixed_load FOLDER --quantization nf4

Lets streams run by themselves first, then submits the prompts, for one new token each. The prompts alone, without
streams, are the limit. Prints one line of JSON: medians over the repeats, in milliseconds, and the longest gap of all.
Text is held back until its last character is whole: where a chunk has several tokens, each has its part of the gap.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import threading
import time
from typing import Any

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.request import Request, plan_requests
from langchain_quantllm.errors import GenerationError


class MixedLoad:
    """Streams and prompts of random tokens, other ones each time."""

    def __init__(self, llm: QuantizedHuggingFaceLLM, streams: int, prompts: int, prompt_tokens: int) -> None:
        """Take the load's size; the streams' prompts have 30 tokens."""
        self._llm = llm
        self._streams, self._prompts, self._prompt_tokens = streams, prompts, prompt_tokens
        self._random = random.Random(0)
        self._engine = llm._engine()
        self.gaps: list[tuple[float, float]] = []
        """The gaps of the last run's streams: when each ended, in seconds after the prompts came, and its length."""

    def _requests(self, count: int, tokens: int, new_tokens: int) -> list[Request]:
        options = self._llm._options(None, {"max_new_tokens": new_tokens, "ignore_eos": True})
        most = self._engine.limits.vocab_size - 1
        requests = []
        for _ in range(count):
            ids = [self._random.randrange(10, most) for _ in range(tokens)]
            requests += plan_requests(ids, options, self._engine.limits)
        return requests

    def prompts(self) -> list[Request]:
        """Make new prompts. It takes longer than a step of the engine, and holds the interpreter's lock."""
        return self._requests(self._prompts, self._prompt_tokens, 1)

    def run_prompts(self, prompts: list[Request]) -> float:
        """Run prompts; returns seconds until the last one's first token."""
        began = time.monotonic()
        with self._engine.submit(prompts) as stream:
            for _ in stream:
                pass
        return time.monotonic() - began

    def run(self, before_s: float, new_tokens: int) -> dict[str, float]:
        """Run streams, then prompts beside them.

        Args:
            before_s: Seconds that the streams run by themselves.
            new_tokens: Tokens of each stream, enough for them to outlast the prompts.

        Returns:
            Median and longest gap before and while the prompts are read, and the prompts' time, in milliseconds.
        """
        prompts = self.prompts()
        stream = self._engine.submit(self._requests(self._streams, 30, new_tokens))
        chunks: list[list[tuple[float, int]]] = [[] for _ in range(self._streams)]

        def read() -> None:
            with contextlib.suppress(GenerationError):  # it is closed
                for chunk in stream:
                    chunks[chunk.row].append((time.monotonic(), len(chunk.token_ids)))

        reader = threading.Thread(target=read)
        reader.start()
        while min(map(len, chunks)) < 2:
            time.sleep(0.01)
        time.sleep(before_s)
        began = time.monotonic()
        prompts_s = self.run_prompts(prompts)
        if reader.is_alive():
            stream.close()
        else:
            print("the streams ended too soon: raise --new-tokens")
        reader.join()
        while self._engine._blocks.held:  # type: ignore[attr-defined]
            time.sleep(0.01)
        pairs = [pair for row in chunks for pair in itertools.pairwise(row)]
        self.gaps = [(b - began, (b - a) / tokens) for (a, _), (b, tokens) in pairs for _ in range(tokens)]
        alone = [gap for at_s, gap in self.gaps if at_s < 0]
        beside = [gap for at_s, gap in self.gaps if 0 <= at_s <= prompts_s]
        return {
            "gap_alone_ms": 1000 * statistics.median(alone),
            "gap_ms": 1000 * statistics.median(beside),
            "gap_mean_ms": 1000 * statistics.mean(beside),
            "gap_99_ms": 1000 * statistics.quantiles(beside, n=100)[-1],
            "longest_gap_ms": 1000 * max(beside),
            "prompts_ms": 1000 * prompts_s,
        }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--quantization")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=3000)
    parser.add_argument("--new-tokens", type=int, default=1000)
    parser.add_argument("--before-s", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--step-tokens", type=int, nargs="*", default=[], help="budgets of a step with decoding to try")
    arguments = parser.parse_args()
    llm = QuantizedHuggingFaceLLM(model_id=arguments.folder, quantization=arguments.quantization, progress=False)
    load = MixedLoad(llm, arguments.streams, arguments.prompts, arguments.prompt_tokens)
    engine: Any = llm._engine()
    for budget in arguments.step_tokens or [None]:
        if budget is not None:
            engine._step_tokens = (engine._step_tokens[0], budget)
            engine._scheduler.step_tokens_while_decoding = budget
        results = [load.run(arguments.before_s, arguments.new_tokens) for _ in range(arguments.repeats + 1)][1:]
        alone_ms = [1000 * load.run_prompts(load.prompts()) for _ in range(arguments.repeats)]
        medians = {key: round(statistics.median(r[key] for r in results), 1) for key in results[0]}
        medians["longest_gap_ms"] = round(max(r["longest_gap_ms"] for r in results), 1)
        print(json.dumps({"step_tokens": budget, **medians, "prompts_alone_ms": round(statistics.median(alone_ms), 1)}))


if __name__ == "__main__":
    main()
