"""Retrieval over long context: facts at several depths of a long text, and a question for each.

The texts are the package's own, the facts are numbers of places, so that nothing of them is known from training. A text
is asked for all of its facts, and its tokens are computed once.

Source: Hsieh et al., RULER: What's the real context size of your long-context language models?, 2024: a needle among
others of its kind.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from langchain_quantllm.bench.answers import check_data, shares
from langchain_quantllm.bench.generation import most_tokens
from langchain_quantllm.bench.quality import evaluation_text
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where facts lie: 0 is the beginning of the text."""

_ANSWER_TOKENS = 8
_ROOM_TOKENS = 100
"""Tokens of a prompt that are facts and the question: some fifteen for each, by tokenizers that write single digits."""


def long_texts(tokenizer: Any, tokens: int, count: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Write texts with facts; the same each time.

    Args:
        tokenizer: The model's tokenizer.
        tokens: Length of each with its question, nearly.
        count: How many.

    Returns:
        Each text, with place and number of its facts in the order of `DEPTHS`.
    """
    numbers = random.Random(0)  # noqa: S311  (no secrets here)
    ids = tokenizer(evaluation_text(), add_special_tokens=False, verbose=False)["input_ids"]
    room = tokens - _ROOM_TOKENS
    found = []
    for i in range(count):
        start = i * room % len(ids)
        part = tokenizer.decode((ids[start:] + ids * (room // len(ids) + 1))[:room])
        facts = [(place, str(numbers.randrange(1000, 10000))) for place in numbers.sample(_places(), len(DEPTHS))]
        pieces, begin = [], 0
        for depth, (place, number) in zip(DEPTHS, facts, strict=True):
            end = _sentence_end(part, int(depth * len(part)))
            pieces += [part[begin:end], f" The secret number of the {place} is {number}. "]
            begin = end
        found.append(("".join([*pieces, part[begin:]]).strip(), facts))
    return found


def measure_retrieval(
    llm: QuantizedHuggingFaceLLM, tokens: int, questions: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Ask for the facts of long texts.

    Args:
        llm: The model, with prefix caching.
        tokens: Length of the prompts.
        questions: How many, at least; each text has `len(DEPTHS)`.

    Returns:
        Case and values of the share of numbers that were found, with `by_depth`, the share at each of `DEPTHS`.

    Raises:
        InvalidOptionError: If the model's context or KV cache has no room for so many tokens.
    """
    if tokens + _ANSWER_TOKENS > (most := most_tokens(llm)):
        msg = f"prompts of {tokens} tokens do not fit into the {most} of the model's context or the KV cache."
        raise InvalidOptionError(msg)
    hits: list[bool] = []
    for text, facts in long_texts(llm.pipeline.tokenizer, tokens, -(-questions // len(DEPTHS))):
        prompts = [f"{text}\n\nThe secret number of the {place} is" for place, _ in facts]
        # The first alone: the others find its blocks.
        answers = [llm.invoke(prompts[0], max_new_tokens=_ANSWER_TOKENS)]
        found = llm.generate(prompts[1:], max_new_tokens=_ANSWER_TOKENS)
        answers += [row[0].text for row in found.generations]
        hits += [number in answer for answer, (_, number) in zip(answers, facts, strict=True)]
    by_depth = [sum(hits[i :: len(DEPTHS)]) / len(hits[i :: len(DEPTHS)]) for i in range(len(DEPTHS))]
    return [({"tokens": tokens}, {**shares(hits), "by_depth": by_depth})]


def _places() -> Sequence[str]:
    places: list[str] = check_data()["places"]
    return places


def _sentence_end(text: str, at: int) -> int:
    """Find the end of a sentence near a place; the place itself where there is none behind it."""
    if at == 0:
        return 0
    found = text.find(". ", at)
    return at if found < 0 else found + 1
