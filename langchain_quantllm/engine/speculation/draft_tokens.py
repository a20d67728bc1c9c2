"""The tokens of one round of a draft model: read from the device, and held to the masks of their sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from langchain_quantllm.engine.request import ForeseeingMask
from langchain_quantllm.engine.sampler import PendingTokens
from langchain_quantllm.engine.sequence import Sequence as Row


class DraftTokens:
    """The tokens of one round of proposals, read from the device at its end; with masks, one after another."""

    def __init__(self, rows: Sequence[Row], vocab_size: int, own_vocab_size: int) -> None:
        """Begin with none.

        Args:
            rows: The sequences.
            vocab_size: Width of the logits of the model that the tokens are proposed to.
            own_vocab_size: Token ids of the draft model lie below this.
        """
        self._vocab_size = min(vocab_size, own_vocab_size)
        self._mask_words = -(-vocab_size // 32)
        self._pending: list[tuple[Sequence[Row], PendingTokens]] = []
        self._tokens: dict[Row, list[int]] = {row: [] for row in rows}
        self._ended: set[Row] = set()
        self._masks: dict[Row, Any] = {}
        for row in rows:
            if isinstance(row.mask, ForeseeingMask):  # others get no proposals
                try:
                    self._masks[row] = row.mask.fork()
                except Exception:  # which the sequence's own step meets
                    self._masks[row] = None
                    self._ended.add(row)

    @property
    def has_masks(self) -> bool:
        """Whether any sequence has a mask."""
        return bool(self._masks)

    def goes_on(self, row: Row) -> bool:
        """Whether further tokens may be proposed to a sequence, as far as is known."""
        return row not in self._ended

    def add(self, rows: Sequence[Row], tokens: PendingTokens) -> None:
        """Add tokens; a sequence's proposal ends before one that is none of its model, and behind an end token."""
        self._pending.append((rows, tokens))
        if self._masks:
            self._read()

    def tokens(self) -> dict[Row, tuple[int, ...]]:
        """Wait for all tokens, and return them by sequence."""
        self._read()
        return {row: tuple(tokens) for row, tokens in self._tokens.items()}

    def _read(self) -> None:
        for rows, pending in self._pending:
            for row, token in zip(rows, pending.wait()[0], strict=True):
                if row in self._ended:
                    continue
                if not 0 <= token < self._vocab_size:
                    self._ended.add(row)
                    continue
                self._tokens[row].append(token)
                if token in row.request.end_token_ids or not self._advance(row, token):
                    self._ended.add(row)
        self._pending.clear()

    def _advance(self, row: Row, token: int) -> bool:
        """Advance the mask of a sequence; false if the text ends with the token, or the mask fails."""
        if (mask := self._masks.get(row)) is None:
            return True
        try:
            mask.accept(token)
        except Exception:  # which the sequence's own mask would meet, if the text gets there
            return False
        return True

    def fill(self, rows: Sequence[Row], blank: Any) -> torch.Tensor:
        """Fill the masks of the next tokens: of shape `(rows, words)`, for the draft model's vocabulary."""
        bits: torch.Tensor = blank(len(rows))
        own = torch.full((1, self._mask_words), -1, dtype=torch.int32)
        words = min(bits.shape[1], self._mask_words)
        for i, row in enumerate(rows):
            if (mask := self._masks.get(row)) is None:
                continue
            own.fill_(-1)
            try:
                is_bound = mask.fill(own)
            except Exception:
                self._ended.add(row)
                continue
            if mask.ended:
                self._ended.add(row)
            elif is_bound:
                bits[i] = 0
                bits[i, :words] = own[0, :words]
        return bits
