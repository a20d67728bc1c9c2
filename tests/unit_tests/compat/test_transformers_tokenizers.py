"""When transformers' tokenizers may be used by several threads at once, checked on real tokenizers."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langchain_quantllm.compat.transformers_tokenizers import encodes_without_change


def test_a_call_changes_nothing_where_this_is_said(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own("a text")
    assert encodes_without_change(own)
    before = own.backend_tokenizer.to_str()
    own("a text", add_special_tokens=False, verbose=False)
    assert own.backend_tokenizer.to_str() == before
    assert encodes_without_change(own)


def test_padding_truncation_and_split_special_tokens_are_changes(tokenizer: Any) -> None:
    for spoil in (
        lambda own: own.backend_tokenizer.enable_padding(),
        lambda own: own.backend_tokenizer.enable_truncation(4),
        lambda own: setattr(own.backend_tokenizer, "encode_special_tokens", not own.split_special_tokens),
    ):
        own = copy.deepcopy(tokenizer)
        spoil(own)
        assert not encodes_without_change(own)
        own("a text", verbose=False)
        assert encodes_without_change(own)  # the call has switched it off


def test_a_tokenizer_in_python_is_not_said_to_be_unchanged() -> None:
    assert not encodes_without_change(object())


def test_threads_that_encode_at_once_get_the_ids_of_one(tokenizer: Any) -> None:
    texts = [f"the sea is {i} " * 200 for i in range(8)]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(5):
            found = list(executor.map(lambda text: tokenizer(text, verbose=False)["input_ids"], texts))
            assert found == expected
