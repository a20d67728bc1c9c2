"""Sampling in one kernel against sampling in plain torch, row by row and option by option.

Without a GPU the kernel runs in Triton's interpreter, which must be switched on before Triton is imported: one
subprocess runs this file as a module, all cases, and the tests look at what it reports. On a GPU the tests run the
same cases themselves, compiled.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.fusion.sampling import find_sampling_kernel, samples_alike
from langchain_quantllm.engine.sampler import MASKS, SAMPLES, SORTS, BatchSampler, needs_of
from tests.support.interpreter import report_cases
from tests.support.sampling import COMBINATIONS, VOCAB, Batch, Only, logits_of, request_of
from tests.support.selection import covering, slow_but

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 600 if DEVICE.type == "cuda" else 40


class OnDevice:
    """A sampler on the device of the kernel, driven with tensors of the CPU."""

    def __init__(self, slots: int, vocab: int, *, by_kernel: bool = True) -> None:
        from langchain_quantllm.kernels import sampling as kernels

        self._sampler = BatchSampler(slots, vocab, DEVICE, kernels=kernels if by_kernel else None)
        self.set = self._sampler.set

    @property
    def last_ids(self) -> torch.Tensor:
        return self._sampler.last_ids.cpu()

    def sample(self, *given: Any) -> torch.Tensor:
        logits, slots, uniforms, may_not_end, need, *mask = given
        moved = [one.to(DEVICE) for one in (logits, slots.int(), uniforms, may_not_end.int())]  # as in a step
        return self._sampler.sample(*moved, need, *(one if one is None else one.to(DEVICE) for one in mask)).cpu()


def sampled_by_kernel(requests: list[Any], steps: int, *, vocab: int = VOCAB, extra_need: int = 0) -> list[list[int]]:
    batch = Batch(requests, vocab=vocab)
    batch.sampler = OnDevice(len(requests), vocab)  # type: ignore[assignment]
    batch.sampler.set(batch.slots, requests, [request.prompt_ids for request in requests])
    return batch.run(steps, extra_need=extra_need)


def check_rows(requests: list[Any], steps: int = 4, **options: Any) -> None:
    found = sampled_by_kernel(requests, steps, **options)
    expected = Batch(requests, vocab=options.get("vocab", VOCAB)).run(steps)
    wrong = [(request.options, *pair) for request, *pair in zip(requests, found, expected, strict=True)]
    wrong = [one for one in wrong if one[1] != one[2]]
    assert not wrong, wrong[:3]


def check_combinations(rows: int = ROWS) -> None:
    """Rows with options of all kinds, each in its own combination, side by side."""
    check_rows(random.Random(3).sample(COMBINATIONS, rows), 3)


def check_every_option() -> None:
    """As `check_combinations`, with the fewest rows that have every value of every option."""
    names = ("temperature", "do_sample", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos")
    rows = {str(i): row for i, row in enumerate(COMBINATIONS)}
    chosen = covering(rows, lambda row: [(name, getattr(row.options, name)) for name in names])
    check_rows([rows[i] for i in sorted(chosen)], 2)


def check_no_more_than_needed(rows: int = ROWS // 2) -> None:
    """Each row by itself: what the kernel leaves out by its flags is nothing that a row needs."""
    for request in random.Random(4).sample(COMBINATIONS, rows):
        check_rows([request], 2)


def check_masks(count: int = ROWS // 2) -> None:
    rows = random.Random(5).sample(COMBINATIONS, count)
    check_rows([replace(row, mask=None if i % 3 == 0 else lambda i=i: Only(i)) for i, row in enumerate(rows)], 3)


def check_vocabularies(sizes: Sequence[int] = (2, 31, 33, 1000, 8192, 20_011)) -> None:
    """Of one block, of several, with a last one that is not full."""
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"top_k": 3},
        {"top_p": 0.7, "repetition_penalty": 2.0},
        {"top_k": 900, "top_p": 0.95},
        {"min_p": 0.01},
    ]
    for vocab in sizes:
        requests = [request_of(seed=i, prompt_ids=(1,), **options[i % 6]) for i in range(6)]
        check_rows(requests, 2, vocab=vocab)


def check_flat(scales: Sequence[float] = (0.01, 3.0, 6.0, 40.0), uniforms: Sequence[float] = (0.01, 0.7)) -> None:
    """Rows of which more lies near the best than can be set aside, or less than top_p wants."""
    vocab = 40_000
    options: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": 20_000},
        {"top_k": 30},
        {"top_k": 900},
        {"top_k": 25_000, "top_p": 0.5},
    ]
    for scale in scales:
        for i, chosen in enumerate(options):
            request = request_of(seed=i, temperature=1.0, **chosen)
            pair = [OnDevice(1, vocab), OnDevice(1, vocab, by_kernel=False)]
            logits = logits_of(i, 1, vocab, scale)
            for uniform in uniforms:
                given = (logits, torch.tensor([0]), torch.tensor([uniform]), torch.tensor([False]), SAMPLES | SORTS)
                found = []
                for sampler in pair:
                    sampler.set([0], [request], [(1,)])
                    found.append(int(sampler.sample(*given)))
                assert found[0] == found[1], (scale, chosen, uniform, found)


def check_few_allowed() -> None:
    """Fewer tokens than top_k asks for, as in constrained texts: those that the mask forbids are not missed."""
    vocab = 20_000
    for allowed in ([7], [3, 11_000, 19_999]):
        bits = torch.zeros(1, vocab // 32, dtype=torch.int32)
        for token in allowed:
            bits[0, token // 32] = -(2**31) if token % 32 == 31 else 1 << token % 32
        request = request_of(seed=1, temperature=3.0, top_k=20, top_p=0.9)
        sampler, other = OnDevice(1, vocab), OnDevice(1, vocab, by_kernel=False)
        need = MASKS | needs_of(request)
        for uniform in (0.05, 0.5, 0.95):
            given = (logits_of(4, 1, vocab), torch.tensor([0]), torch.tensor([uniform]), torch.tensor([False]), need)
            found = []
            for one in (sampler, other):
                one.set([0], [request], [(1,)])
                found.append(int(one.sample(*given, bits)))
            assert found[0] == found[1]
            assert found[0] in allowed


def check_dtypes(steps: int = 10) -> None:
    """Logits of 16 bits have ties: all that tie with the last that is kept are kept, in both."""
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"top_k": 7},
        {"top_p": 0.6},
        {"repetition_penalty": 1.3},
    ]
    for dtype in (torch.float16, torch.bfloat16):
        for i, chosen in enumerate(options):
            request = request_of(seed=i, **chosen)
            one, other = OnDevice(1, VOCAB), OnDevice(1, VOCAB, by_kernel=False)
            for sampler in (one, other):
                sampler.set([0], [request], [(1, 2)])
            for step in range(steps):
                given = (logits_of(step, 1).to(dtype), torch.tensor([0]), torch.tensor([0.1 * step]))
                given = (*given, torch.tensor([False]), needs_of(request))  # type: ignore[assignment]
                assert torch.equal(one.sample(*given), other.sample(*given))


def check_no_numbers() -> None:
    """A row of which a number is none, one that allows nothing, and their neighbours."""
    requests = [request_of(seed=i, temperature=1.0, top_p=0.9, repetition_penalty=1.2) for i in range(4)]
    sampler, other = OnDevice(4, VOCAB), OnDevice(4, VOCAB, by_kernel=False)
    for one in (sampler, other):
        one.set(range(4), requests, [(1,)] * 4)
    logits = logits_of(0, 4)
    logits[1, 50] = float("nan")
    bits = torch.full((4, 4), -1, dtype=torch.int32)
    bits[2] = 0
    need = needs_of(requests[0]) | MASKS
    given = (logits, torch.arange(4), torch.full((4,), 0.5), torch.zeros(4, dtype=torch.bool), need, bits)
    ids = sampler.sample(*given)
    assert ids[1] == -1
    assert ids[2] == -2
    assert torch.equal(ids, other.sample(*given))
    assert ((sampler.last_ids >= 0) & (sampler.last_ids < VOCAB)).all()


def check_infinite() -> None:
    """One number that is infinite is sampled for certain; those of minus infinity never are."""
    request = request_of(seed=1, temperature=0.5, top_p=0.9)
    sampler = OnDevice(1, VOCAB)
    sampler.set([0], [request], [(1,)])
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [5, 40]] = torch.tensor([0.0, 1.0])
    for need in (SAMPLES, SAMPLES | SORTS):
        found = {
            int(sampler.sample(logits, *(torch.tensor([v]) for v in (0, u, False)), need)) for u in (0.0, 0.5, 0.99)
        }
        assert found <= {5, 40}
    logits[0, 7] = torch.inf
    assert int(sampler.sample(logits, *(torch.tensor([v]) for v in (0, 0.7, False)), SAMPLES)) == 7


def check_shares(count: int = 400) -> None:
    """Uniform numbers in order give tokens in order, each its share."""
    logits = logits_of(2, 1, 10, 1.0)
    sampler = OnDevice(1, 10)
    sampler.set([0], [request_of(do_sample=True)], [(1,)])
    uniforms = (torch.arange(count) + 0.5) / count
    slots, ends = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
    sampled = sampler.sample(logits.expand(count, -1), slots, uniforms, ends, SAMPLES)
    assert sampled.tolist() == sorted(sampled.tolist())
    shares = torch.bincount(sampled.long(), minlength=10) / count
    assert torch.allclose(shares, logits.softmax(-1)[0], atol=2 / count)


def check_looked_at_before_it_is_used() -> None:
    """The kernel is compared with plain torch when an engine is made; one that samples otherwise is not taken."""
    from langchain_quantllm.kernels import sampling as kernels

    assert samples_alike(kernels, 300, DEVICE)
    assert not samples_alike(OneFurther, 300, DEVICE)


class OneFurther:
    """Samples the token behind the right one."""

    @staticmethod
    def sample(logits: torch.Tensor, *given: Any, **tables: Any) -> torch.Tensor:
        from langchain_quantllm.kernels import sampling as kernels

        return kernels.sample(logits.roll(1, -1), *given, **tables)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_rows"
}
SHORT: dict[str, Callable[[], None]] = {
    "no_more_than_needed, short": functools.partial(check_no_more_than_needed, 4),
    "masks, short": functools.partial(check_masks, 4),
    "vocabularies, short": functools.partial(check_vocabularies, (31, 8192)),
    "flat, short": functools.partial(check_flat, (3.0,), (0.7,)),
    "dtypes, short": functools.partial(check_dtypes, 1),
    "shares, short": functools.partial(check_shares, 60),
}
CHECKS |= SHORT
LONG = {"combinations", *(name.removesuffix(", short") for name in SHORT)}


def run(name: str, device: str) -> None:
    """Make a check; the device is `DEVICE`."""
    CHECKS[name]()


@pytest.mark.parametrize("name", slow_but(CHECKS.keys() - LONG, CHECKS))
def test_kernel(found: Any, name: str) -> None:
    found(name)


def test_none_on_a_cpu() -> None:
    assert find_sampling_kernel(300, torch.device("cpu")) is None


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))
