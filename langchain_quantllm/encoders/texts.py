"""Texts before an encoder: counting their tokens, and cutting very long ones without tokenizing all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CHARS_PER_TOKEN = 16
"""Characters of a text that are tokenized at first, for each token that is wanted; most texts have 3 to 5."""

_SPARE_TOKENS = 64
"""Tokens behind the wanted ones that must be there as well: those at a cut may not be those of the whole text."""

_FEWEST_CHARS = 4096


def cut_texts(tokenizer: Any, texts: Sequence[str], most_tokens: int | None) -> tuple[list[str], list[int]]:
    """Count the tokens of texts, special tokens included.

    Args:
        tokenizer: The model's tokenizer; without truncation and padding of its own during the call.
        texts: The texts, their prompts included.
        most_tokens: Tokens that the model reads; None is all.

    Returns:
        The texts, very long ones cut to a beginning with the same first `most_tokens` tokens, and their numbers of
        tokens. Of a text that was cut, the number is that of its beginning, which is more than `most_tokens`.
    """
    if not hasattr(tokenizer, "all_special_ids"):  # a model that looks up words
        return list(texts), [max(1, len(text) // 4) for text in texts]
    if most_tokens is None:
        return list(texts), _count(tokenizer, texts)
    most_chars = max(_FEWEST_CHARS, _CHARS_PER_TOKEN * most_tokens)
    cut = [_beginning(text, most_chars) for text in texts]
    lengths = _count(tokenizer, cut)
    for index, text in enumerate(texts):
        size = most_chars
        while len(cut[index]) < len(text) and lengths[index] < most_tokens + _SPARE_TOKENS:
            size *= 4
            cut[index] = _beginning(text, size)
            lengths[index] = _count(tokenizer, [cut[index]])[0]
    return cut, lengths


def _beginning(text: str, most_chars: int) -> str:
    """Return the first characters of a text, up to a space where there is one in the second half."""
    if len(text) <= most_chars:
        return text
    end = max(text.rfind(" ", most_chars // 2, most_chars), text.rfind("\n", most_chars // 2, most_chars))
    return text[: end if end > 0 else most_chars]


def _count(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    return [len(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]
