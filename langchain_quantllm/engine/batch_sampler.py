"""Choosing the next token of many rows at once, on the device.

Owns the rows' sampling parameters as tensors, and the arithmetic from logits to token ids, in plain torch; a kernel that
does the same in one launch can be given. One
uniform number per row and token comes from outside, so that a row's tokens do not depend on the
others. Every operation has fixed shapes: the whole can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from langchain_quantllm.engine.request import Request

BLOCKS, PENALIZES, MASKS, SAMPLES, SORTS = 1, 2, 4, 8, 16
"""What the drawing of a step may have to do; added up over its rows, so that no step does more than one needs."""

NO_NUMBER, NOTHING_ALLOWED = -1, -2
"""What stands in the place of a token: the logits were no numbers, or no token was allowed."""

_END_IDS = 8  # of a row, at first


def needs_of(request: Request) -> int:
    """Find what a request needs at every step: the flags above, but for `BLOCKS`, which changes from step to step."""
    o = request.options
    return (
        PENALIZES * (o.repetition_penalty != 1.0)
        | MASKS * (request.mask is not None)
        | SAMPLES * o.do_sample
        | SORTS * (o.do_sample and (o.top_k > 0 or o.top_p < 1.0))
    )


class BatchSampler:
    """Draws one token for each of several rows."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device, *, drawing: Any = None) -> None:
        """Make room for so many rows; one more takes what only fills up a batch.

        Args:
            slots: Most rows.
            vocab_size: Width of their logits.
            device: Where these are.
            drawing: `kernels.drawing`, which draws in one kernel; None to draw in plain torch.
        """
        self._drawing = drawing
        self._vocab_size = vocab_size
        self._device = device
        self.last_ids = torch.zeros(slots + 1, dtype=torch.long, device=device)
        """The last token of each row, of shape `(slots + 1,)`: what its next step takes in."""
        self._temperature = torch.ones(slots + 1, device=device)
        self._top_k = torch.full((slots + 1,), vocab_size, dtype=torch.long, device=device)
        self._top_p = torch.ones(slots + 1, device=device)
        self._min_p = torch.zeros(slots + 1, device=device)
        self._penalty = torch.ones(slots + 1, device=device)
        self._samples = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self._end_ids = torch.zeros(slots + 1, _END_IDS, dtype=torch.long, device=device)
        self.version = 0
        """Changes where tensors are replaced: graphs captured before have to be captured again."""
        self._has_end_ids = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self._seen: torch.Tensor | None = None
        self._yes = torch.ones((), dtype=torch.bool, device=device)
        self._mask_bits = torch.arange(32, dtype=torch.int32, device=device)

    @property
    def draws_at_once(self) -> bool:
        """Whether one kernel draws."""
        return self._drawing is not None

    def set(self, slots: Sequence[int], requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> None:
        """Set the parameters of rows that are about to draw their first token.

        Args:
            slots: Their places.
            requests: Their requests.
            ids: All their tokens so far, the prompt's included.
        """
        options = [request.options for request in requests]
        at = self._tensor(slots, torch.long)
        self._temperature[at] = self._tensor([o.temperature for o in options], torch.float32)
        self._top_k[at] = self._tensor([o.top_k or self._vocab_size for o in options], torch.long)
        self._top_p[at] = self._tensor([o.top_p for o in options], torch.float32)
        self._min_p[at] = self._tensor([o.min_p for o in options], torch.float32)
        self._penalty[at] = self._tensor([o.repetition_penalty for o in options], torch.float32)
        self._samples[at] = self._tensor([o.do_sample for o in options], torch.bool)
        self._set_end_ids(at, [request.eos_token_ids + request.stop_token_ids for request in requests])
        for slot, request, seen in zip(slots, requests, ids, strict=True):
            if request.options.repetition_penalty != 1.0:
                if self._seen is None:
                    shape = (len(self.last_ids), self._vocab_size)
                    self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
                self._seen[slot] = False
                self._seen[slot, self._tensor(sorted(set(seen)), torch.long)] = True

    def _set_end_ids(self, at: torch.Tensor, end_ids: Sequence[tuple[int, ...]]) -> None:
        width = max(self._end_ids.shape[1], *map(len, end_ids))
        if width > self._end_ids.shape[1]:
            # Rows that have fewer name their first again, which blocks nothing else.
            more = self._end_ids[:, :1].repeat(1, width - self._end_ids.shape[1])
            self._end_ids = torch.cat([self._end_ids, more], 1)
            self.version += 1
        self._has_end_ids[at] = self._tensor([bool(ids) for ids in end_ids], torch.bool)
        padded = [(*ids, *([ids[0] if ids else 0] * (width - len(ids)))) for ids in end_ids]
        self._end_ids[at] = self._tensor(padded, torch.long)

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def draw(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        uniforms: torch.Tensor,
        may_not_end: torch.Tensor,
        need: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw a token for each row, and keep it as the row's last.

        Args:
            logits: Of shape `(rows, vocab)`, any float dtype; not changed.
            slots: Place of each row, of shape `(rows,)`, int64.
            uniforms: A number in [0, 1) for each row, of shape `(rows,)`, float32.
            may_not_end: Whether a row's end tokens are out of the question, of shape `(rows,)`, bool.
            need: What there is to do, as the flags above added up.
            mask: Allowed tokens as bits, lowest first, of shape `(rows, ceil(vocab / 32))`, int32.

        Returns:
            Token ids of shape `(rows,)`, int32; `NO_NUMBER` or `NOTHING_ALLOWED` where there is none.
        """
        if self._drawing is not None:
            return self._draw_at_once(logits, slots, uniforms, may_not_end, need, mask)
        scores = logits.float()
        # Before anything is taken out of the scores, what is no number among it.
        broken = scores.amax(-1).isnan() if need & (BLOCKS | MASKS) else None
        if need & PENALIZES and self._seen is not None:
            penalty = self._penalty[slots][:, None]
            scores = torch.where(self._seen[slots], torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if need & BLOCKS:
            end_ids = self._end_ids[slots]
            is_blocked = (may_not_end & self._has_end_ids[slots])[:, None]
            blocked = torch.where(is_blocked, -torch.inf, scores.gather(1, end_ids))
            scores = scores.scatter(1, end_ids, blocked)
        if need & MASKS and mask is not None:
            allowed = ((mask[..., None] >> self._mask_bits) & 1).flatten(1)[:, : scores.shape[1]]
            scores = scores.masked_fill(allowed == 0, -torch.inf)
        best = scores.max(-1)
        ids = best.indices
        if need & SAMPLES:
            sampled = self._sample(scores, slots, uniforms, sorts=bool(need & SORTS))
            ids = torch.where(self._samples[slots], sampled, ids)
        self.last_ids[slots] = ids
        if need & PENALIZES and self._seen is not None:
            self._seen.index_put_((slots, ids), self._yes)
        ids = torch.where(best.values == -torch.inf, NOTHING_ALLOWED, ids)
        return torch.where(best.values.isnan() if broken is None else broken, NO_NUMBER, ids).int()

    def _draw_at_once(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        uniforms: torch.Tensor,
        may_not_end: torch.Tensor,
        need: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        ids: torch.Tensor = self._drawing.draw(
            logits,
            slots,
            uniforms,
            may_not_end,
            mask if need & MASKS else None,
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
            penalty=self._penalty,
            is_sampled=self._samples,
            end_ids=self._end_ids,
            has_end_ids=self._has_end_ids,
            seen=self._seen if need & PENALIZES else None,
            last_ids=self.last_ids,
            blocks=bool(need & BLOCKS),
            samples=bool(need & SAMPLES),
            sorts=bool(need & SORTS),
        )
        return ids

    def _sample(
        self, scores: torch.Tensor, slots: torch.Tensor, uniforms: torch.Tensor, *, sorts: bool
    ) -> torch.Tensor:
        """Draw by inverse CDF, in the order of token ids.

        Source: the order and the rules of the warpers in transformers/generation/logits_process.py,
        with one change: tokens that tie with the last one kept by top_k or top_p are all kept.
        """
        scores = scores / self._temperature[slots][:, None]
        least = torch.full_like(scores[:, :1], -torch.inf)
        if sorts:
            ordered = scores.sort(-1, descending=True).values
            least = ordered.gather(1, (self._top_k[slots] - 1).clamp(max=scores.shape[1] - 1)[:, None])
            ordered = ordered.masked_fill(ordered < least, -torch.inf)
            probs = ordered.softmax(-1)
            above = probs.cumsum(-1) - probs  # of all tokens likelier than this one
            kept = (above < self._top_p[slots][:, None]).sum(-1, keepdim=True)
            least = torch.maximum(least, ordered.gather(1, (kept - 1).clamp(min=0)))
        least = torch.maximum(least, scores.amax(-1, keepdim=True) + self._min_p[slots].log()[:, None])
        probs = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        cumulative = probs.double().cumsum(-1)
        drawn = uniforms.double()[:, None] * cumulative[:, -1:]
        # The first token whose cumulative probability lies above the number: never one of probability 0.
        return torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.shape[1] - 1)[:, 0]


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, alternatives: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the log probabilities of drawn tokens, and the likeliest ones, before any option.

    Args:
        logits: Of shape `(rows, vocab)`.
        token_ids: Of shape `(rows,)`; -1 stands for none.
        alternatives: How many of the likeliest.

    Returns:
        Log probabilities of shape `(rows,)`; ids and log probabilities of the likeliest, `(rows, alternatives)`.
    """
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(alternatives, logprobs.shape[1]), -1)
    chosen = logprobs.gather(1, token_ids.long().clamp(min=0)[:, None])[:, 0]
    return chosen, best.indices, best.values
