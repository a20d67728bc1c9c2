"""The check of what indexers choose, apart from what attention makes of the chosen tokens.

Two tokens with almost the same score change places by rounding, and a short text shows it in its logits. So the model's
own forward attends to the tokens that the engine has chosen, and its own indexers say how many of them they would not
have chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from langchain_quantllm.compat.transformers_indexers import limited_forward
from langchain_quantllm.engine.attention import Batch
from langchain_quantllm.errors import UnsupportedError

_LAST = 3  # tokens of a text that are counted apart, too: they are decoded
_MOST_OTHERS = {torch.float32: 0.005, torch.float64: 0.005}
_MOST_OTHERS_16BIT = 0.1  # of tokens chosen at random, almost half would differ


class IndexTrial:
    """What the indexers of a model choose in a trial of the engine, and in the model's own forwards afterwards."""

    def __init__(self, most: int | None) -> None:
        """Begin a trial.

        Args:
            most: How many tokens an indexer chooses at most; None for its own number.
        """
        self._most = most
        # By layer and slot: the texts that have run there one after another, by position.
        self._chosen: dict[tuple[int, int], list[dict[int, torch.Tensor]]] = {}
        self._tokens: int | None = None  # of the text that is replayed
        self._counted: set[tuple[int, int]] = set()  # texts by their tokens, and layers
        self._others, self._all = [0, 0], [0, 0]  # choices that differ, and all: of all tokens, and of the last ones

    def forward(self, module: Any) -> Callable[..., torch.Tensor]:
        """Return the forward of an indexer for the engine's steps."""
        return limited_forward(module, self._limit(module))

    def _limit(self, module: Any) -> int:
        return int(module.index_topk if self._most is None else min(self._most, module.index_topk))

    def record(self, module: Any, batch: Batch, chosen: torch.Tensor) -> None:
        """Keep the positions that an indexer has chosen in a step of the engine, of shape `(1, tokens, chosen)`."""
        places = zip(batch.slots.tolist(), batch.positions.tolist(), chosen[0].cpu(), strict=True)
        for slot, position, of_token in places:
            texts = self._chosen.setdefault((module.layer_idx, slot), [{}])
            if position in texts[-1]:
                texts.append({})
            texts[-1][position] = of_token[of_token >= 0].long()

    @contextlib.contextmanager
    def replaying(self, tokens: int) -> Iterator[None]:
        """Let the model's own forwards choose what the engine has chosen in its text of so many tokens."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def replay(self, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Run an indexer in the model's own forward; None if the engine's choice is not being replayed."""
        texts = [
            text for (layer, _), all_texts in self._chosen.items() if layer == module.layer_idx for text in all_texts
        ]
        of_text = next((text for text in texts if len(text) == self._tokens), None)
        if of_text is None:
            return None
        ranked = limited_forward(module, 2**31)(*args, **kwargs)  # all, in the order of their scores
        tokens, length = ranked.shape[1:]
        # Once for a whole text: a model in pieces, or that rounds more, may differ from itself.
        counts = tokens == len(of_text) and (tokens, module.layer_idx) not in self._counted
        if counts:
            self._counted.add((tokens, module.layer_idx))
        limit = self._limit(module)
        chosen = ranked[..., : min(limit, length)].clone()
        for i, position in enumerate(range(length - tokens, length)):
            own = min(limit, position + 1)
            theirs = of_text[position].to(ranked.device)
            others = own - int(torch.isin(theirs, ranked[0, i, :own]).sum())
            for kind in range(1 + (position >= len(of_text) - _LAST)) if counts else ():
                self._others[kind] += others
                self._all[kind] += own
            chosen[0, i] = theirs[0]  # once more instead of none
            chosen[0, i, : len(theirs)] = theirs
        return chosen

    def check(self, dtype: torch.dtype) -> None:
        """Check that the engine's indexers choose what the model's do, up to rounding.

        Raises:
            UnsupportedError: If not.
        """
        most = _MOST_OTHERS.get(dtype, _MOST_OTHERS_16BIT)
        for others, count in zip(self._others, self._all, strict=True):
            if others > most * count:
                msg = f"its indexers choose other tokens over KV cache blocks: {others} of {count}"
                raise UnsupportedError(msg)
