"""Perplexity: against a count by hand, against transformers' own loss, and in every scheme."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.quality import Reference, evaluation_text, perplexity
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from tests.support.bench import with_begin_token
from tests.support.models import tiny_model

TEXT = "The river rose in the night, and by morning the lower field was a lake. Nobody had moved the sheep. " * 3


@pytest.fixture(scope="module")
def tiny_causal_lm(tokenizer: Any) -> Any:
    return tiny_model(len(tokenizer), context_tokens=64)


def count_by_hand(model: Any, windows: list[list[int]]) -> tuple[float, int]:
    """One token after the other, each from a forward over what is before it in its window."""
    nats, tokens = 0.0, 0
    for window in windows:
        for i in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window[:i]])).logits[0, -1]
            nats -= math.log(torch.softmax(logits.double(), -1)[window[i]].item())
            tokens += 1
    return nats / tokens, tokens


def test_perplexity_is_what_a_count_by_hand_gives(tiny_causal_lm: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    windows = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    loss_nats, tokens = count_by_hand(tiny_causal_lm, windows)
    found = perplexity(tiny_causal_lm, tokenizer, TEXT, window_tokens=16)
    assert found.tokens == tokens == len(ids) - len(windows)  # the first of a window has nothing before it
    assert found.loss_nats == pytest.approx(loss_nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss_nats), rel=1e-4)


def test_every_window_has_the_begin_token(tiny_causal_lm: Any, tokenizer: Any) -> None:
    begins = with_begin_token(tokenizer)
    begins.bos_token = begins.convert_ids_to_tokens(0)
    ids = begins(TEXT, add_special_tokens=False)["input_ids"]
    windows = [[0, *ids[i : i + 15]] for i in range(0, len(ids), 15)]
    loss_nats, tokens = count_by_hand(tiny_causal_lm, windows)
    found = perplexity(tiny_causal_lm, begins, TEXT, window_tokens=16)
    assert found.tokens == tokens == len(ids)
    assert found.loss_nats == pytest.approx(loss_nats, rel=1e-5)


def test_perplexity_is_the_loss_of_the_model_itself(llm: QuantizedHuggingFaceLLM) -> None:
    model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss.item()
    found = perplexity(model, tokenizer, TEXT, window_tokens=512)
    assert found.loss_nats == pytest.approx(own, rel=1e-5)
    assert found.perplexity < 40  # English, to a model of English


def test_a_trained_model_finds_words_in_order_likelier(llm: QuantizedHuggingFaceLLM) -> None:
    words = TEXT.split()
    model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
    shuffled = " ".join(sorted(words, key=lambda word: word[::-1]))
    in_order = perplexity(model, tokenizer, TEXT)
    assert perplexity(model, tokenizer, shuffled).loss_nats > in_order.loss_nats + 1


def test_schemes_lose_little(llm: QuantizedHuggingFaceLLM, quantized_llm: QuantizedHuggingFaceLLM) -> None:
    full = perplexity(llm.pipeline.model, llm.pipeline.tokenizer, TEXT)
    found = perplexity(quantized_llm.pipeline.model, quantized_llm.pipeline.tokenizer, TEXT)
    assert found.tokens == full.tokens
    assert abs(found.loss_nats - full.loss_nats) < 0.5
    assert found.loss_nats != full.loss_nats


def test_max_tokens_cuts_the_text(tiny_causal_lm: Any, tokenizer: Any) -> None:
    found = perplexity(tiny_causal_lm, tokenizer, TEXT, window_tokens=16, max_tokens=20)
    assert found.tokens == 20 - 2
    ids = tokenizer(TEXT)["input_ids"]
    assert found.loss_nats == pytest.approx(count_by_hand(tiny_causal_lm, [ids[:16], ids[16:20]])[0], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "the text of 0 characters is too short"),
        ("a", {}, "the text of 1 characters is too short"),
        (TEXT, {"window_tokens": 1}, "window_tokens=1 is not allowed"),
        (TEXT, {"window_tokens": 65}, "more than the model's context of 64"),
        (TEXT, {"max_tokens": 0}, "max_tokens=0 is not allowed"),
    ],
)
def test_what_cannot_be_scored_is_told(
    tiny_causal_lm: Any, tokenizer: Any, text: str, options: dict[str, int], said: str
) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        perplexity(tiny_causal_lm, tokenizer, text, **{"window_tokens": 16, **options})


def test_logits_that_are_no_numbers_are_an_error(tokenizer: Any) -> None:
    broken = tiny_model(len(tokenizer))
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(GenerationError, match="not numbers"):
        perplexity(broken, tokenizer, TEXT)


def test_there_is_a_text(tokenizer: Any) -> None:
    assert len(tokenizer(evaluation_text())["input_ids"]) > 2048


def test_a_model_has_no_distance_from_itself(tiny_causal_lm: Any, tokenizer: Any) -> None:
    found = Reference(tiny_causal_lm, tokenizer, TEXT, window_tokens=16).distance(tiny_causal_lm)
    assert abs(found.kl_nats.mean) < 1e-4  # kept in float16
    assert found.loss_increase_nats.mean == 0
    assert found.agreement.mean == 1
    assert found.perplexity == perplexity(tiny_causal_lm, tokenizer, TEXT, window_tokens=16)


def test_the_divergence_is_what_a_sum_over_the_vocabulary_gives(tiny_causal_lm: Any, tokenizer: Any) -> None:
    other = tiny_model(len(tokenizer), seed=1, context_tokens=64)
    found = Reference(tiny_causal_lm, tokenizer, TEXT, window_tokens=16).distance(other)
    ids = tokenizer(TEXT)["input_ids"]
    divergences, same, increases = [], [], []
    for window in (ids[i : i + 16] for i in range(0, len(ids), 16)):
        with torch.no_grad():
            p, q = (
                torch.softmax(model(input_ids=torch.tensor([window])).logits[0, :-1].double(), -1)
                for model in (tiny_causal_lm, other)
            )
        divergences += (p * (p / q).log()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).double().tolist()
        increases += [math.log(p[i, token] / q[i, token]) for i, token in enumerate(window[1:])]
    for interval, values in (
        (found.kl_nats, divergences),
        (found.agreement, same),
        (found.loss_increase_nats, increases),
    ):
        assert interval.mean == pytest.approx(sum(values) / len(values), rel=1e-2, abs=1e-4)
        assert interval.low <= interval.mean <= interval.high
    assert found.kl_nats.low < found.kl_nats.high


def test_an_interval_of_more_text_is_narrower(tiny_causal_lm: Any, tokenizer: Any) -> None:
    other = tiny_model(len(tokenizer), seed=1, context_tokens=64)
    text = evaluation_text()
    few, many = (
        Reference(tiny_causal_lm, tokenizer, text, window_tokens=64, max_tokens=count).distance(other).kl_nats
        for count in (512, 8192)
    )
    assert many.high - many.low < 0.5 * (few.high - few.low)  # sixteen times the text: a quarter in theory


def test_a_vocabulary_of_another_size_is_refused(tiny_causal_lm: Any, tokenizer: Any) -> None:
    reference = Reference(tiny_causal_lm, tokenizer, TEXT, window_tokens=16)
    with pytest.raises(InvalidOptionError, match="and the reference"):
        reference.distance(tiny_model(len(tokenizer) + 8, context_tokens=64))
