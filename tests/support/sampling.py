"""Requests and batches for the tests of sampling, and the chi-square of sampled tokens."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.engine.generate_sampler import RowSampler
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.sampler import BLOCKS, MASKS, BatchSampler, needs_of
from langchain_quantllm.options import normalize, resolve


def request_of(
    seed: int = 0, sample_index: int = 0, prompt_ids: tuple[int, ...] = (1, 2, 3), **options: Any
) -> Request:
    resolved = resolve([normalize(options)], {})
    return Request(
        prompt_ids=prompt_ids,
        max_new_tokens=100,
        min_new_tokens=resolved.min_new_tokens,
        options=resolved,
        sample_index=sample_index,
        seed=seed,
        eos_token_ids=(0,),
    )


def chi_square(sampled: list[int], probabilities: torch.Tensor) -> tuple[float, int]:
    """Compute chi-square and its degrees of freedom: tokens expected five times and more, and the rest as one bin."""
    counts, n = Counter(sampled), len(sampled)
    expected = (probabilities.double() * n).tolist()
    often = [i for i, e in enumerate(expected) if e >= 5]
    bins = [(counts[i], expected[i]) for i in often]
    rest = (n - sum(c for c, _ in bins), n - sum(e for _, e in bins))
    if rest[1] >= 5:
        bins.append(rest)
    return sum((c - e) ** 2 / e for c, e in bins), len(bins) - 1


VOCAB = 101
"""No multiple of 32: the last word of a mask is not full."""


CPU = torch.device("cpu")


STEPS = 8


def logits_of(seed: int, rows: int, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


class Only:
    """A mask that allows some tokens at random, others at every step, all of them at every fifth."""

    def __init__(self, seed: int, vocab: int = VOCAB, share: float = 0.3) -> None:
        self._random = random.Random(seed)
        self._vocab, self._share = vocab, share
        self._step = 0
        self.ended = False
        self.allowed: list[set[int]] = []
        self.accepted: list[int] = []

    def fill(self, bits: torch.Tensor) -> bool:
        self._step += 1
        if self._step % 5 == 0:
            self.allowed.append(set(range(self._vocab)))
            return False
        allowed = {i for i in range(self._vocab) if self._random.random() < self._share}
        allowed |= {self._vocab - 1, 31}  # the last of the vocabulary, and a word's sign bit
        bits.zero_()
        for i in allowed:
            word = bits[0, i // 32].item() | (1 << i % 32)
            bits[0, i // 32] = (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)
        self.allowed.append(allowed)
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


class Batch:
    """Requests that are sampled together, as the continuous engine does it."""

    def __init__(self, requests: Sequence[Request], *, slots: Sequence[int] | None = None, vocab: int = VOCAB) -> None:
        self.requests = list(requests)
        self.slots = list(range(len(self.requests))) if slots is None else list(slots)
        self.vocab = vocab
        self.sampler = BatchSampler(max(self.slots) + 1, vocab, CPU)
        self.sampled: list[list[int]] = [[] for _ in self.requests]
        self.masks = [None if request.mask is None else request.mask() for request in self.requests]
        self._randoms = [random.Random(f"{r.seed}:{r.sample_index}") for r in self.requests]
        ids = [request.prompt_ids for request in self.requests]
        self.sampler.set(self.slots, self.requests, ids)

    def step(self, logits: torch.Tensor, *, extra_need: int = 0) -> list[int]:
        need, may_not_end = extra_need, []
        for request, sampled in zip(self.requests, self.sampled, strict=True):
            may_not_end.append(request.options.ignore_eos or len(sampled) < request.min_new_tokens)
            need |= needs_of(request)
        need |= BLOCKS * any(may_not_end)
        uniforms = [
            generator.random() if request.options.do_sample else 0.0
            for generator, request in zip(self._randoms, self.requests, strict=True)
        ]
        bits = None
        if need & MASKS:
            bits = torch.full((len(self.requests), -(-self.vocab // 32)), -1, dtype=torch.int32)
            for i, mask in enumerate(self.masks):
                if mask is not None and not mask.fill(bits[i : i + 1]):
                    bits[i] = -1
        before = logits.clone()
        sampled = self.sampler.sample(
            logits,
            torch.tensor(self.slots),
            torch.tensor(uniforms, dtype=torch.float32),
            torch.tensor(may_not_end),
            need,
            bits,
        )
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        assert sampled.shape == (len(self.requests),)
        ids = sampled.tolist()
        for row, token_id in enumerate(ids):
            self.sampled[row].append(token_id)
            mask = self.masks[row]
            if mask is not None:
                mask.accept(token_id)
            if token_id >= 0:
                assert self.sampler.last_ids[self.slots[row]] == token_id
        return ids

    def run(self, steps: int = STEPS, *, seed: int = 0, extra_need: int = 0) -> list[list[int]]:
        for step in range(steps):
            self.step(
                torch.stack([self.logits(i, step, seed) for i in range(len(self.requests))]), extra_need=extra_need
            )
        return self.sampled

    def logits(self, row: int, step: int, seed: int) -> torch.Tensor:
        """Compute the logits of a request, which do not depend on its place in the batch."""
        request = self.requests[row]
        return logits_of(seed + 7919 * request.seed + 101 * request.sample_index + step, 1, self.vocab)[0]


def alone(request: Request, steps: int = STEPS, *, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Sample a row's tokens with the plain engine's sampler, over the same logits."""
    sampler, sampled = RowSampler(request), []
    for step in range(steps):
        logits = logits_of(seed + 7919 * request.seed + 101 * request.sample_index + step, 1, vocab)[0]
        sampled.append(sampler.sample(logits, sampled)[0])
    return sampled


def every_combination() -> list[Request]:
    """One request for every combination of the options, each with its own seed and prompt."""
    axes: list[list[dict[str, Any]]] = [
        [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"temperature": 0.0}, {"do_sample": True}],
        [{}, {"top_k": 1}, {"top_k": 7}, {"top_k": 5000}],
        [{}, {"top_p": 0.3}, {"top_p": 0.9}],
        [{}, {"min_p": 0.1}],
        [{}, {"repetition_penalty": 1.4}, {"repetition_penalty": 0.7}],
        [{}, {"min_new_tokens": 6}, {"ignore_eos": True}],
    ]
    requests = []
    for i, parts in enumerate(itertools.product(*axes)):
        options: dict[str, Any] = {}
        for part in parts:
            options |= part
        if options.get("temperature") == 0.0:
            options = {name: value for name, value in options.items() if name not in ("top_k", "top_p", "min_p")}
        prompt = tuple(random.Random(i).choices(range(VOCAB), k=1 + i % 40))
        request = request_of(seed=i, prompt_ids=prompt, **options)
        ends = [(0,), (), (3, 50), tuple(range(0, 100, 9))][i % 4]
        stops = [(), (100,)][i // 4 % 2]
        requests.append(replace(request, eos_token_ids=ends, stop_token_ids=stops))
    return requests


COMBINATIONS = every_combination()
