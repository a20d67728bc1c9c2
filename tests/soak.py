"""A long run of the fast engine: thousands of requests of every kind, and a look at what they leave behind.

    python -m tests.soak --requests 10000

Threads send requests of random lengths and options to one engine; some stop at strings, some are
cancelled in the middle, some are wrong, and now and then a forward fails. In the end no page may be
held, no row, thread or file may be left, and memory may not have grown between the middle and the
end. Prints what it did as one line of JSON, and fails if anything is left.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import random
import sys
import threading
import time
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import QuantLLMError
from tests.unit_tests.models import llm_of, tiny_model

CONTEXT_TOKENS = 256


def byte_tokenizer() -> Any:
    """Make a tokenizer with a token for every byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Caller:
    """One thread's requests."""

    def __init__(self, llm: QuantizedHuggingFaceLLM, seed: int, counts: collections.Counter[str]) -> None:
        """Begin with a seed of its own."""
        self._llm = llm
        self._random = random.Random(seed)
        self._counts = counts
        self._said: list[str] = []

    def call(self) -> None:
        """Send one request and note how it ended."""
        kind = self._random.choices(
            ["plain", "sampled", "stopped", "cancelled", "several", "wrong", "long", "turn"], [4, 3, 2, 3, 1, 1, 1, 2]
        )[0]
        try:
            getattr(self, f"_{kind}")()
            self._counts[kind] += 1
        except QuantLLMError as error:
            self._counts[f"{kind}: {type(error).__name__}"] += 1

    def _prompt(self, most: int = 100) -> str:
        return "".join(self._random.choices("abcdefgh ", k=self._random.randint(1, most)))

    def _plain(self) -> None:
        text = self._llm.invoke(self._prompt(), max_new_tokens=self._random.randint(1, 40))
        assert isinstance(text, str)

    def _sampled(self) -> None:
        options = {"temperature": self._random.uniform(0.2, 2), "top_p": self._random.uniform(0.1, 1)}
        options |= {"top_k": self._random.randint(0, 50), "seed": self._random.randint(0, 100)}
        options |= {"repetition_penalty": self._random.choice([1.0, 1.2]), "logprobs": self._random.choice([None, 2])}
        prompt = self._prompt()
        first = self._llm.invoke(prompt, max_new_tokens=12, **options)
        assert self._llm.invoke(prompt, max_new_tokens=12, **options) == first, "a seed gave two texts"

    def _stopped(self) -> None:
        stop = self._random.choices("abcdefghijklmnop", k=3)
        text = self._llm.invoke(self._prompt(), max_new_tokens=40, stop=stop)
        assert not any(s in text for s in stop)

    def _cancelled(self) -> None:
        pieces = self._llm.stream(self._prompt(), max_new_tokens=60)
        for _, _ in zip(pieces, range(self._random.randint(0, 6)), strict=False):
            pass
        pieces.close()  # type: ignore[attr-defined]

    def _several(self) -> None:
        result = self._llm.generate([self._prompt(), self._prompt()], n=3, temperature=1.0, max_new_tokens=10)
        assert [len(generations) for generations in result.generations] == [3, 3]

    def _wrong(self) -> None:
        given = self._random.choice([{"top_p": 7}, {"max_new_tokens": 0}, {"nonsense": 1}])
        self._llm.invoke(self._prompt(), **given)

    def _long(self) -> None:
        self._llm.invoke(self._prompt() * CONTEXT_TOKENS, max_new_tokens=5)

    def _turn(self) -> None:
        if not self._said or len(self._said[-1]) > 150:
            self._said.append("a common beginning of some length, ")
        self._said[-1] += self._llm.invoke(self._said[-1], max_new_tokens=10)


def soak(requests: int, threads: int = 8, *, seed: int = 0) -> dict[str, Any]:
    """Run the soak.

    Args:
        requests: How many requests.
        threads: How many callers at once.
        seed: What every random choice begins with.

    Returns:
        What happened, and what was left behind.
    """
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), seed=seed, context_tokens=CONTEXT_TOKENS)
    token_bytes = 2 * 2 * 32 * 4  # two layers, keys and values of one head of 32 in float32
    # Room for little more than one row of full length: rows wait, and are put back.
    llm = llm_of(model, tokenizer, kv_cache_memory=320 * token_bytes, engine="fast").load()
    llm.invoke("warm", max_new_tokens=2)
    engine: Any = llm._engine()
    fails = random.Random(seed + 1)

    def fail_sometimes(module: Any, args: Any, kwargs: Any) -> None:
        if fails.random() < 0.0002:
            msg = "the device had a bad day"
            raise RuntimeError(msg)

    hook = model.register_forward_pre_hook(fail_sometimes, with_kwargs=True)
    counts: collections.Counter[str] = collections.Counter()
    left = iter(range(requests))
    lock = threading.Lock()
    failures: list[BaseException] = []
    memory: list[int] = []
    process = psutil.Process()
    before = {"threads": threading.active_count(), "files": process.num_fds()}

    def serve(caller: Caller) -> None:
        while not failures:
            with lock:
                number = next(left, None)
            if number is None:
                return
            if number % (requests // 20 or 1) == 0:
                gc.collect()
                memory.append(process.memory_info().rss)
            try:
                caller.call()
            except BaseException as error:
                failures.append(error)

    began = time.monotonic()
    callers = [threading.Thread(target=serve, args=(Caller(llm, seed + i, counts),)) for i in range(threads)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    if failures:
        raise failures[0]
    took_s = time.monotonic() - began
    deadline = time.monotonic() + 10
    while engine._pages.held and time.monotonic() < deadline:  # streams that were cancelled last
        time.sleep(0.05)
    hook.remove()
    del callers
    gc.collect()
    found = {
        "requests": requests,
        "seconds": round(took_s, 1),
        "ended": dict(sorted(counts.items())),
        "pages held": engine._pages.held,
        "rows": len(engine._jobs) + len(engine._scheduler.running) + len(engine._scheduler.waiting),
        "threads": threading.active_count() - before["threads"],
        "files": process.num_fds() - before["files"],
        "MB at every twentieth": [round(size / 1e6) for size in memory],
        "put back": engine.put_back,
        "torch": torch.__version__,
    }
    llm.unload()
    found["threads after unload"] = sum(t.name == "quantllm-engine" for t in threading.enumerate())
    return found


LEFT_BEHIND = ("pages held", "rows", "threads", "files", "threads after unload")


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = soak(given.requests, given.threads, seed=given.seed)
    print(json.dumps(found))
    sys.exit(any(found[name] for name in LEFT_BEHIND))


if __name__ == "__main__":
    main()
