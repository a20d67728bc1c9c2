"""Random prompts of exact lengths in tokens, for any tokenizer."""

from __future__ import annotations

import random
from typing import Any

from langchain_quantllm.errors import InvalidOptionError

_TRIES = 500
_CANDIDATES = 4096
_WORDS = 64


class Prompts:
    """Random texts of exact lengths in tokens, each used once."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        """Find tokens that stay the same between others: whole words, or characters where there are few words."""
        self._tokenizer = tokenizer
        self._random = random.Random(seed)  # noqa: S311  (no secrets here)
        self._given: set[str] = set()
        self._added_tokens = len(self._encode(""))
        ids = self._random.sample(range(len(tokenizer)), min(_CANDIDATES, len(tokenizer)))
        stable = [i for i in ids if self._is_stable(i)]
        words = [i for i in stable if self._is_word(i)]
        self._pool = words if len(words) >= _WORDS else stable
        if len(self._pool) < 2:
            msg = f"{type(tokenizer).__name__} has no tokens that stay the same when their text is encoded again."
            raise InvalidOptionError(msg)

    def draw(self, count: int, tokens: int) -> list[str]:
        """Make prompts.

        Args:
            count: How many.
            tokens: Length of each, tokens that the tokenizer adds included.
        """
        return [self._draw([], tokens) for _ in range(count)]

    def draw_sharing(self, count: int, shared_tokens: int, tokens: int) -> list[str]:
        """Make prompts of `tokens` tokens of which the first `shared_tokens` are the same in all, and no others."""
        for _ in range(_TRIES):
            head = self._choose(shared_tokens - self._added_tokens)
            texts = [self._draw(head, tokens) for _ in range(count)]
            if len({tuple(self._encode(text)[:shared_tokens]) for text in texts}) == 1:
                return texts
        raise InvalidOptionError(_no_prompts(shared_tokens))

    def _draw(self, head: list[int], tokens: int) -> str:
        """Continue a beginning with random tokens up to a length."""
        missing = most = tokens - self._added_tokens - len(head)
        for _ in range(_TRIES):
            text = self._decode([*head, *self._choose(missing)])
            surplus = len(self._encode(text)) - tokens
            if not surplus and text not in self._given:
                self._given.add(text)
                return text
            missing = min(2 * most, max(1, missing - surplus))
        raise InvalidOptionError(_no_prompts(tokens))

    def _choose(self, count: int) -> list[int]:
        return self._random.choices(self._pool, k=count)

    def _encode(self, text: str, *, bare: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=not bare, verbose=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _is_stable(self, token_id: int) -> bool:
        text = self._decode([token_id])
        twice = [token_id, token_id]
        return text.isprintable() and bool(text.strip()) and self._encode(self._decode(twice), bare=True) == twice

    def _is_word(self, token_id: int) -> bool:
        words = self._decode([token_id, token_id]).split()
        return len(words) == 2 and words[0].isalpha()


def _no_prompts(tokens: int) -> str:
    return f"no prompts of exactly {tokens} tokens were found in {_TRIES} tries; ask for another length."
