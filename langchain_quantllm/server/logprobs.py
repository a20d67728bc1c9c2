"""Log probabilities in the forms of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_quantllm.engine.stream import TokenLogprob

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write; the value of vLLM."""


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Any, *, as_ids: bool) -> None:
        """Take a tokenizer.

        Args:
            tokenizer: The model's.
            as_ids: Write `token_id:7` instead of a text, which two tokens may share.
        """
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        """Write a token."""
        return f"token_id:{token_id}" if self._as_ids else str(self._tokenizer.decode([token_id]))


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], texts: TokenTexts, offset: int, wanted: int
) -> dict[str, Any]:
    """Write the report of a completion, or of a part of it.

    Args:
        logprobs: One for each token.
        texts: The texts of tokens.
        offset: Characters of the completion before.
        wanted: How many alternatives are listed; the token itself is among them, one more if it is none of the first.
    """
    tokens = [texts(each.token_id) for each in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.logprob) for each in logprobs],
        "top_logprobs": [_alternatives(each, texts) for each in logprobs] if wanted else None,
        "text_offset": offsets,
    }


def _alternatives(of: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in (*of.top, (of.token_id, of.logprob)):
        found.setdefault(texts(token_id), _finite(logprob))  # of two tokens with one text, the likelier
    return found


def chat_logprobs(logprobs: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Write the report of a message, or of a part of it."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = texts(token_id)
        # A part of a character has no text.
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]} for each in logprobs
    ]
    return {"content": content, "refusal": None}
