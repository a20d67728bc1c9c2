"""Counting tokens, and cutting very long texts without another result."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from transformers import AutoTokenizer

from langchain_quantllm.encoders.texts import cut_texts
from tests.support.encoder_models import minilm


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(minilm())


def _text(chance: random.Random, words: int) -> str:
    letters = "abcdefghijklmnop\u00e9\u4e2d"
    return " ".join("".join(chance.choices(letters, k=chance.randint(1, 12))) for _ in range(words))


def test_lengths_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    chance = random.Random(0)
    texts = ["", " ", "word", *[_text(chance, n) for n in (5, 50, 300)]]
    cut, lengths = cut_texts(tokenizer, texts, 256)
    assert lengths == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert cut == texts


@pytest.mark.parametrize("kind", ["words", "no spaces", "mostly spaces", "long lines", "emoji"])
def test_a_cut_text_has_the_same_first_tokens_as_the_whole(tokenizer: Any, kind: str) -> None:
    chance = random.Random(1)
    text = {
        "words": _text(chance, 20_000),
        "no spaces": "ab,cd;" * 30_000,
        "mostly spaces": (" " * 5_000 + "word") * 60,
        "long lines": "\n".join("x" * 3_000 + " y" for _ in range(100)),
        "emoji": "\U0001f600 text " * 20_000,
    }[kind]
    (cut,), (length,) = cut_texts(tokenizer, [text], 128)
    options = {"truncation": True, "max_length": 128}
    assert tokenizer(cut, **options)["input_ids"] == tokenizer(text, **options)["input_ids"]
    assert (length > 128) == (len(tokenizer(text)["input_ids"]) > 128)


def test_ten_megabytes_are_cut_without_tokenizing_them(tokenizer: Any) -> None:
    text = "some words of a very long book " * 330_000
    began = time.perf_counter()
    (cut,), (length,) = cut_texts(tokenizer, [text], 256)
    assert time.perf_counter() - began < 1.0  # tokenizing all of it takes some 10 s here
    assert len(cut) < 10_000
    assert length > 256
