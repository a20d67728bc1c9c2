"""Log-likelihoods of continuations: against a count by hand, and by the engine's kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.harness import engine_products
from langchain_quantllm.bench.likelihood import score_continuations
from tests.support.models import tiny_model

PAIRS = [
    ([5, 6, 7], [8, 9]),
    ([5], [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]),
    ([5, 6, 7], [10]),
    ([5, 6, 7], [11]),  # shares its row with the one before
    ([90, 3, 44, 18, 2], [7, 7, 7]),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(128)


def count_by_hand(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    nats, is_greedy = 0.0, True
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation[:i]])).logits[0, -1].double()
        nats += math.log(torch.softmax(logits, -1)[token].item())
        is_greedy &= int(logits.argmax()) == token
    return nats, is_greedy


def greedy(model: Any, context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def test_scores_are_what_a_count_by_hand_gives(model: Any) -> None:
    pairs = [*PAIRS, ([5, 6, 7], greedy(model, [5, 6, 7], 4))]
    found = score_continuations(model, pairs)
    for score, pair in zip(found, pairs, strict=True):
        nats, is_greedy = count_by_hand(model, *pair)
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.is_greedy == is_greedy
    assert [score.is_greedy for score in found] == [False] * len(PAIRS) + [True]


def test_all_pairs_are_counted_as_batches_are_done(model: Any) -> None:
    counts: list[int] = []
    pairs = [([1 + i % 100], [2, 3]) for i in range(150)]
    assert len(score_continuations(model, pairs, done=counts.append)) == 150
    assert sum(counts) == 150
    assert len(counts) > 1


def test_the_beginning_of_what_is_too_long_is_cut_off(model: Any) -> None:
    context, continuation = [9, 8, 7, 6, 5], [4, 3]
    [found] = score_continuations(model, [(context, continuation)], most_tokens=4)
    assert found.nats == pytest.approx(count_by_hand(model, [7, 6, 5], continuation)[0], rel=1e-5)


@pytest.fixture(scope="module")
def int8_llm(short_smollm2: Path) -> Iterator[QuantizedHuggingFaceLLM]:
    llm = QuantizedHuggingFaceLLM(
        model_id=str(short_smollm2), quantization="int8", device="cpu", progress=False, kv_cache_memory="64MiB"
    )
    yield llm.load()
    llm.unload()


def test_our_int8_rounds_no_activations_and_is_nearer_to_its_own_weights(int8_llm: QuantizedHuggingFaceLLM) -> None:
    """The same int8 weights, dequantized, are the truth: LLM.int8() differs by its rounding of activations."""
    from langchain_quantllm.kernels.linear.reference import dequantize
    from langchain_quantllm.kernels.linear.weights import weight_of

    model = int8_llm.pipeline.model
    ids = torch.tensor([list(range(300, 364)), list(range(900, 964))])
    with torch.no_grad():
        by_layers = model(input_ids=ids).logits.double()
        with engine_products(int8_llm):
            by_engine = model(input_ids=ids).logits.double()
        hooks = []
        for module in model.modules():
            if (weight := weight_of(module)) is not None:
                dense = dequantize(weight, torch.float32)
                hooks.append(
                    module.register_forward_hook(
                        lambda _, args, __, dense=dense: torch.nn.functional.linear(args[0].float(), dense).to(args[0])
                    )
                )
        by_weights = model(input_ids=ids).logits.double()
        for hook in hooks:
            hook.remove()
        again = model(input_ids=ids).logits.double()

    def divergence(logits: torch.Tensor) -> float:
        expected = by_weights.log_softmax(-1)
        return float((expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean())

    assert len(hooks) == 14
    assert divergence(by_engine) < 0.25 * divergence(by_layers)  # of which bfloat16 makes most
    assert torch.equal(again, by_layers)  # outside of the block, the layers multiply


def test_padding_changes_no_score_by_the_engines_kernels(int8_llm: QuantizedHuggingFaceLLM) -> None:
    model = int8_llm.pipeline.model
    with engine_products(int8_llm):
        together = score_continuations(model, PAIRS)
        alone = [score_continuations(model, [pair])[0] for pair in PAIRS]
    for x, y in zip(together, alone, strict=True):
        assert x.nats == pytest.approx(y.nats, rel=0.02)  # bfloat16
