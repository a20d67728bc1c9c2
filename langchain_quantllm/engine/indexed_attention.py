"""Indexers, which choose the tokens that an attention sees, in a forward over packed tokens of several sequences.

An indexer wants each sequence in a row of its own, with the keys of all its tokens so far. So its `forward` is
replaced: the sequences with one new token run as batches of shape `(rows, 1)`, each chunk of a prompt as `(1, tokens)`.
Its keys lie in the blocks of the KV cache, beside the layer's keys and values.

Source:
    DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_indexers import IndexCache, arguments_for, indexers
from langchain_quantllm.engine.adapter_choice import AdapterChoice
from langchain_quantllm.engine.attention import Batch, LayerPool, PagedForward, Span
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement
from langchain_quantllm.engine.gather_attention import cut_widths
from langchain_quantllm.engine.index_trial import IndexTrial
from langchain_quantllm.errors import UnsupportedError

_SCORES = 2**25
"""Most scores of an indexer's heads at once, unless `_LEAST_QUERIES` take more."""

_LEAST_QUERIES = 16


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Tokens that an indexer runs at once: single ones of several sequences, or some of one.

    Args:
        tokens: Index of each token in the pack, of shape `(tokens,)`, int64, on the layer's device.
        is_one_row: Whether they are of one sequence.
        positions: Position of each in its sequence, of shape `(rows, tokens of a row)`, int64.
        blocks: Blocks of the rows' sequences, of shape `(rows, width)`, int64; a sequence's last one again as padding.
        length: Tokens of the longest of these sequences, the new ones included.
    """

    tokens: torch.Tensor
    is_one_row: bool
    positions: torch.Tensor
    blocks: torch.Tensor
    length: int

    def take(self, packed: torch.Tensor) -> torch.Tensor:
        """Take its tokens from a tensor of shape `(1, all tokens, ...)`, in the shape that an indexer runs."""
        own = packed[0].index_select(0, self.tokens.to(packed.device))
        return own[None] if self.is_one_row else own[:, None]

    def update(self, pool: LayerPool, keys: torch.Tensor) -> torch.Tensor:
        """Store its keys, of shape `(rows, tokens of a row, dim)`; returns those of all tokens: `(rows, length, dim)`.

        Where a sequence is shorter, there may be any numbers.
        """
        stored = pool.index_keys
        assert stored is not None
        flat = stored.view(-1, stored.shape[-1])
        blocks = self.blocks.gather(1, self.positions // BLOCK_TOKENS)
        places = blocks * BLOCK_TOKENS + self.positions % BLOCK_TOKENS
        flat.index_copy_(0, places.flatten(), keys.flatten(0, 1).to(stored.dtype))
        gathered = stored.index_select(0, self.blocks.flatten())
        return gathered.view(len(self.blocks), -1, stored.shape[-1])[:, : self.length]

    @property
    def mask(self) -> torch.Tensor:
        """The positions that each token may see, of shape `(rows, tokens of a row, length)`, bool."""
        return torch.arange(self.length, device=self.positions.device) <= self.positions[..., None]


class IndexedLayers(PatchedModules):
    """The layers of a model whose attention sees chosen tokens.

    Attributes:
        most_chosen: How many tokens the indexers choose at most: each number once, in order.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Patch the indexers until `close`."""
        self._trial: IndexTrial | None = None
        self.most_chosen: list[int] = []
        super().__init__(model)

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        found = list(indexers(self._model))
        self.most_chosen = sorted({module.index_topk for module in found})
        return ((module, self._run) for module in found)

    def note(self, checked_tokens: int) -> str:
        """Say how many tokens are chosen, and how far this was checked, for `EngineInfo.reason`."""
        most = ", ".join(map(str, self.most_chosen))
        note = f"its attention sees {most} chosen tokens, gathered by PyTorch"
        if checked_tokens <= max(self.most_chosen, default=0):
            note += f"; the check was of texts of {checked_tokens} tokens, with fewer chosen"
        return note

    @contextlib.contextmanager
    def trial(self, most: int | None) -> Iterator[IndexTrial]:
        """Run a trial in this engine's forwards: indexers choose at most so many tokens, so that a short text shows it.

        None lets them choose as many as always.
        """
        self._trial = IndexTrial(most)
        try:
            yield self._trial
        finally:
            self._trial = None

    def _run(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if any(isinstance(value, IndexCache) for value in (*args, *kwargs.values())):  # of another patch: as it is
            return forward(*args, **kwargs)
        trial = self._trial
        if context.attention is None:
            replayed = None if trial is None else trial.replay(module, *args, **kwargs)
            return forward(*args, **kwargs) if replayed is None else replayed
        if trial is not None:
            forward = trial.forward(module)
        chosen = _choose(context, context.attention, module, forward, args, kwargs)
        if trial is not None:
            trial.record(module, context.attention.batch, chosen)
        return chosen


def _choose(
    context: ForwardContext,
    paged: PagedForward,
    module: Any,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Run an indexer over packed tokens.

    Returns:
        The positions that each token sees, of shape `(1, tokens, chosen)`, int32, padded with -1.
    """
    pool, batch, adapters = paged.pool(module.layer_idx), paged.batch, context.adapters
    if pool.index_keys is None:
        msg = "its indexer keeps no keys"
        raise UnsupportedError(msg)
    device, tokens = pool.index_keys.device, len(batch.slots)
    key = (device, "parts of an indexer", module.n_heads)
    parts = batch.cached(key, lambda: _parts_of(batch, device, module.n_heads))
    found: list[torch.Tensor] = []
    try:
        for part in parts:
            cache = IndexCache(lambda keys, part=part: part.update(pool, keys))  # type: ignore[misc]
            mask = part.mask
            context.adapters = _adapters_of(part, adapters)

            def take(packed: torch.Tensor, part: _Part = part) -> torch.Tensor:
                return part.take(packed) if packed.shape[:2] == (1, tokens) else packed

            given = arguments_for(module, args, kwargs, take=take, mask=mask, cache=cache)
            indices = forward(**given)
            if indices.is_floating_point() or indices.shape[:2] != part.positions.shape:
                msg = "its indexer gives something other than indices"
                raise UnsupportedError(msg)
            found.append(torch.where(indices <= part.positions[..., None], indices, -1).flatten(0, 1).int())
    finally:
        context.adapters = adapters
    out = found[0].new_full((1, tokens, max(indices.shape[-1] for indices in found)), -1)
    for part, indices in zip(parts, found, strict=True):
        out[0, part.tokens, : indices.shape[-1]] = indices
    return out


def _parts_of(batch: Batch, device: torch.device, heads: int) -> list[_Part]:
    """Divide a batch: sequences of one new token by their lengths, and each chunk, so that scores fit `_SCORES`."""
    # In a batch that decodes, the order alone tells which token is a span's.
    rows = [(i if batch.decodes else span.first, span) for i, span in enumerate(batch.spans) if span.count == 1]
    rows = sorted(rows, key=lambda row: row[1].position, reverse=True)
    widths = [span.position // BLOCK_TOKENS + 1 for _, span in rows]
    most_blocks = max(1, _SCORES // (heads * BLOCK_TOKENS))
    parts = [_part_of_rows(batch, rows[start:stop], device) for start, stop in cut_widths(widths, most_blocks)]
    for span in batch.spans:
        if span.count > 1:
            at_once = max(_LEAST_QUERIES, _SCORES // (heads * (span.position + span.count)))
            starts = range(0, span.count, at_once)
            parts += [_part_of_span(batch, span, at, min(at + at_once, span.count), device) for at in starts]
    return parts


def _part_of_rows(batch: Batch, rows: Sequence[tuple[int, Span]], device: torch.device) -> _Part:
    slots = torch.tensor([span.slot for _, span in rows])[:, None]
    last = torch.tensor([span.position for _, span in rows])[:, None]
    length = int(last.max()) + 1
    columns = torch.minimum(torch.arange(-(-length // BLOCK_TOKENS)), last // BLOCK_TOKENS)
    return _Part(
        tokens=torch.tensor([token for token, _ in rows]).to(device),
        is_one_row=False,
        positions=last.to(device),
        blocks=batch.table[slots.to(batch.table.device), columns.to(batch.table.device)].to(device).long(),
        length=length,
    )


def _part_of_span(batch: Batch, span: Span, start: int, stop: int, device: torch.device) -> _Part:
    length = span.position + stop
    return _Part(
        tokens=torch.arange(span.first + start, span.first + stop, device=device),
        is_one_row=True,
        positions=torch.arange(span.position + start, length, device=device)[None],
        blocks=batch.table[span.slot, : -(-length // BLOCK_TOKENS)].to(device).long()[None],
        length=length,
    )


def _adapters_of(part: _Part, adapters: AdapterChoice | None) -> AdapterChoice | None:
    if adapters is None:
        return None
    of_tokens = adapters.of_tokens
    return replace(adapters, of_tokens=of_tokens[part.tokens.to(of_tokens.device)], masks={})
