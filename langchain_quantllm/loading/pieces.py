"""Encoding a text in pieces, so that no token crosses a cut.

Knows tokenizers of transformers and no template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXTS = ("\n", "a", ".")
"""Texts to encode a piece behind; the tokens of most texts begin anew behind the first."""


def piece_ids(tokenizer: Any, pieces: Sequence[str], *, add_special_tokens: bool) -> list[int]:
    """Encode the pieces of a text.

    Args:
        tokenizer: A tokenizer of transformers.
        pieces: At least one; joined, they are the text.
        add_special_tokens: Whether the tokenizer adds its begin and end tokens to the whole.

    Returns:
        The token ids, which decode to the text.
    """

    def encode(text: str, *, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    first, *rest = map(valid_text, pieces)
    if not rest:
        return encode(first, special=add_special_tokens)
    ids = encode(first)
    for inner in _inner_ids(tokenizer, rest):
        ids += inner
    if not add_special_tokens:
        return ids
    bare, whole = encode("a"), encode("a", special=True)
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), len(whole))
    return [*whole[:at], *ids, *whole[at + len(bare) :]]


def _inner_ids(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Encode pieces from the middle of a text, without the space that some tokenizers put before a text."""
    found: dict[str, list[int]] = {"": []}
    for context in (*_CONTEXTS, ""):
        left = [piece for piece in dict.fromkeys(pieces) if piece not in found]
        if not left:
            break
        texts = [context, *(context + piece for piece in left)]
        head, *rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for piece, row in zip(left, rows, strict=True):
            if list(row[: len(head)]) == list(head):
                found[piece] = list(row[len(head) :])
    return [found[piece] for piece in pieces]


def valid_text(text: str) -> str:
    """Make a text that can be encoded: halves of characters, as cut JSON leaves them, are joined or become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
