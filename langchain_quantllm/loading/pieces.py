"""Encoding a text in pieces, so that no token crosses a cut.

Knows tokenizers of transformers and no template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Encode = Callable[[str], list[int]]

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
    for piece in rest:
        ids += _inner_ids(encode, piece) if piece else []
    if not add_special_tokens:
        return ids
    bare, whole = encode("a"), encode("a", special=True)
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), len(whole))
    return [*whole[:at], *ids, *whole[at + len(bare) :]]


def valid_text(text: str) -> str:
    """Make a text that can be encoded: halves of characters, as cut JSON leaves them, are joined or become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _inner_ids(encode: Encode, piece: str) -> list[int]:
    """Encode a piece from the middle of a text, without the space that some tokenizers put before a text."""
    for context in _CONTEXTS:
        head, both = encode(context), encode(context + piece)
        if both[: len(head)] == head:
            return both[len(head) :]
    return encode(piece)
