"""A long run of the fast engine: thousands of requests of every kind, and a look at what they leave behind.

    python -m benchmarks.soak --requests 10000

Threads send requests of random lengths and options to one engine; some stop at strings, some are cancelled in the
middle, some are wrong, and now and then a forward fails. At the end no block and no sequence may be held, and there may
be no more threads, files, tensors or objects than halfway. Prints its counts as one line of JSON, and fails if anything
is left behind.
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
import types
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import QuantLLMError
from tests.support.models import llm_of, tiny_model

CONTEXT_TOKENS = 256
COUNTED = ("threads", "files", "tensors", "bytes of tensors")
"""Counts that may not grow in the second half."""


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


class Soak:
    """A tiny model's engine under load, and counts of everything that it may leave behind."""

    def __init__(self, threads: int, seed: int) -> None:
        """Make the model and its engine, with forwards that fail now and then."""
        self._threads = threads
        self.counts: collections.Counter[str] = collections.Counter()
        self._failures: list[BaseException] = []
        self._process = psutil.Process()
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        tokenizer = byte_tokenizer()
        model = tiny_model(len(tokenizer), seed=seed, context_tokens=CONTEXT_TOKENS)
        token_bytes = 2 * 2 * 32 * 4  # two layers, keys and values of one head of 32 in float32
        # Room for little more than one sequence of full length: sequences wait, and are preempted.
        self.llm = llm_of(model, tokenizer, kv_cache_memory=320 * token_bytes, engine="fast").load()
        self.llm.invoke(
            "warm", max_new_tokens=2, repetition_penalty=1.2
        )  # tensors that the engine makes once and keeps
        self.engine: Any = self.llm._engine()
        fails = random.Random(seed + 1)

        def fail_sometimes(module: Any, args: Any, kwargs: Any) -> None:
            if fails.random() < 0.0002:
                msg = "the device had a bad day"
                raise RuntimeError(msg)

        self._hook = model.register_forward_pre_hook(fail_sometimes, with_kwargs=True)

    def run(self, requests: int, seed: int) -> dict[str, Any]:
        """Send requests from all threads, and count what there is when all have ended."""
        numbers = iter(range(requests))

        def serve(caller: Caller) -> None:
            while not self._failures and next(numbers, None) is not None:
                try:
                    caller.call()
                except BaseException as error:
                    self._failures.append(error)

        callers = [
            threading.Thread(target=serve, args=(Caller(self.llm, seed + i, self.counts),))
            for i in range(self._threads)
        ]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        if self._failures:
            raise self._failures[0]
        del callers
        return settled(self._count)

    def _count(self) -> dict[str, Any]:
        """Count what there is when the engine rests."""
        deadline = time.monotonic() + 10
        # Streams that were cancelled last, and the end of the step in which the last sequence ended.
        while not _is_at_rest(self.engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        gc.collect()
        # By the type itself, since some objects look at who asks for their class.
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        known = self._known
        new = [t for t in tensors if id(t) not in known or known[id(t)]() is not t]
        if not known:
            known.update((id(t), weakref.ref(t)) for t in tensors)
        return {
            "blocks held": self.engine._blocks.held,
            "sequences": len(self.engine._scheduler.sequences),
            "threads": threading.active_count(),
            "files": self._process.num_fds(),
            "tensors": len(tensors),
            "bytes of tensors": sum(t.numel() * t.element_size() for t in tensors),
            "new tensors": [f"{list(t.shape)} {t.dtype} in {_holders(t)}" for t in new],
            "objects": len(gc.get_objects()),
            "MB resident": round(self._process.memory_info().rss / 1e6),
        }

    def close(self) -> None:
        """Remove the failing hook and unload the model."""
        self._hook.remove()
        self.llm.unload()


def soak(requests: int, threads: int = 8, *, seed: int = 0) -> dict[str, Any]:
    """Run the soak.

    Args:
        requests: How many requests.
        threads: How many callers at once.
        seed: Seed of every random choice.

    Returns:
        What happened, and what was left behind.
    """
    threads_before = _engine_threads()
    one = Soak(threads, seed)
    began = time.monotonic()
    half = one.run(requests // 2, seed)
    end = one.run(requests - requests // 2, seed + threads)
    found = {
        "requests": requests,
        "seconds": round(time.monotonic() - began, 1),
        "ended": dict(sorted(one.counts.items())),
        "halfway": half,
        "at the end": end,
        "preemptions since the last failure": one.engine._scheduler.preempted,
        "torch": torch.__version__,
    }
    one.close()
    found["threads after unload"] = _engine_threads() - threads_before
    return found


def _holders(tensor: torch.Tensor) -> str:
    """Describe the objects that hold a tensor: their types, and the keys of dictionaries."""
    here = sys._getframe().f_back
    holders = []
    for holder in gc.get_referrers(tensor):
        keys = [key for key, value in holder.items() if value is tensor] if isinstance(holder, dict) else []
        if holder is not here and not isinstance(holder, (list, types.CellType)):  # made by the search itself
            holders.append(f"{type(holder).__name__}{keys or ''}")
    return " ".join(holders)


def settled(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Count until two counts agree, for ten seconds at most: tensors of a running step are no leak."""
    deadline, seen = time.monotonic() + 10, look()
    while time.monotonic() < deadline:
        time.sleep(0.05)
        before, seen = seen, look()
        if all(seen[name] == before[name] for name in COUNTED):
            break
    return seen


def _is_at_rest(engine: Any) -> bool:
    """Whether the engine's thread waits for work, so that it holds no step's tensors.

    It is wrong now and then: the frames of a running generator change while they are read.
    """
    if engine._worker._waiting or engine._scheduler.sequences:
        return False
    frame = sys._current_frames().get(engine._worker._thread.ident)
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return "_run" not in names


def _engine_threads() -> int:
    return sum(thread.name == "quantllm-engine" for thread in threading.enumerate())


def left_behind(found: dict[str, Any]) -> list[str]:
    """List what a soak has left behind: anything held, and more of anything than halfway."""
    half, end = found["halfway"], found["at the end"]
    left = [name for name in ("blocks held", "sequences") if end[name]]
    left += [name for name in COUNTED if end[name] > half[name]]
    if end["objects"] > half["objects"] * 1.01:  # caches of the libraries fill up for a while
        left.append("objects")
    left += ["thread"] * bool(found["threads after unload"])
    return [*left, *end["new tensors"]] if left else []


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = soak(given.requests, given.threads, seed=given.seed)
    print(json.dumps(found))
    sys.exit(f"left behind: {left}" if (left := left_behind(found)) else 0)


if __name__ == "__main__":
    main()
