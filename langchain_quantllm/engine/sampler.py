"""Choosing the next token of many rows at once, on the device.

Owns the rows' sampling parameters as tensors, and the arithmetic from logits to token ids, in plain torch; a kernel
that does the same in one launch can be given. One uniform number per row and token comes from outside, so that a row's
tokens do not depend on the others. Every operation has fixed shapes: the whole can be captured in a CUDA graph.
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
        self._parameters = torch.tensor([self._row()] * (slots + 1), device=device)
        """What each row's options say, in the order of `_row`."""
        self._end_ids = torch.zeros(slots + 1, _END_IDS, dtype=torch.long, device=device)
        self.version = 0
        """Changes where tensors are replaced: graphs captured before have to be captured again."""
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
        at = self._bring(slots, torch.long)
        self._parameters[at] = self._bring([self._row(request) for request in requests], torch.float32)
        self._set_end_ids(at, [request.eos_token_ids + request.stop_token_ids for request in requests])
        for slot, request, seen in zip(slots, requests, ids, strict=True):
            if request.options.repetition_penalty != 1.0:
                if self._seen is None:
                    shape = (len(self.last_ids), self._vocab_size)
                    self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
                self._seen[slot] = False
                self._seen[slot, self._bring(sorted(set(seen)), torch.long)] = True

    def _set_end_ids(self, at: torch.Tensor, end_ids: Sequence[tuple[int, ...]]) -> None:
        width = max(self._end_ids.shape[1], *map(len, end_ids))
        if width > self._end_ids.shape[1]:
            # Rows that have fewer name their first again, which blocks nothing else.
            more = self._end_ids[:, :1].repeat(1, width - self._end_ids.shape[1])
            self._end_ids = torch.cat([self._end_ids, more], 1)
            self.version += 1
        padded = [(*ids, *([ids[0] if ids else 0] * (width - len(ids)))) for ids in end_ids]
        self._end_ids[at] = self._bring(padded, torch.long)

    def _bring(self, values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        """Bring numbers to the device, without waiting for what it has to do before."""
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

    def _row(self, request: Request | None = None) -> list[float]:
        """Give a row's temperature, top_k, top_p, min_p, penalty, whether it samples, and whether it has end tokens."""
        if request is None:
            return [1.0, self._vocab_size, 1.0, 0.0, 1.0, 0.0, 0.0]
        o = request.options
        top_k = min(o.top_k or self._vocab_size, self._vocab_size)
        has_end_ids = bool(request.eos_token_ids or request.stop_token_ids)
        return [o.temperature, top_k, o.top_p, o.min_p, o.repetition_penalty, o.do_sample, has_end_ids]

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
            slots: Place of each row, of shape `(rows,)`, int32 or int64.
            uniforms: A number in [0, 1) for each row, of shape `(rows,)`, float32.
            may_not_end: Whether a row's end tokens are out of the question, of shape `(rows,)`, bool or int32.
            need: What there is to do, as the flags above added up.
            mask: Allowed tokens as bits, lowest first, of shape `(rows, ceil(vocab / 32))`, int32.

        Returns:
            Token ids of shape `(rows,)`, int32; `NO_NUMBER` or `NOTHING_ALLOWED` where there is none.
        """
        if self._drawing is not None:
            return self._draw_at_once(logits, slots, uniforms, may_not_end, need, mask)
        slots = slots.long()
        scores = logits.float()
        parameters = self._parameters[slots][..., None]
        temperature, top_k, top_p, min_p, penalty, samples, has_end_ids = parameters.unbind(1)
        # Before anything is taken out of the scores, what is no number among it.
        broken = scores.amax(-1).isnan() if need & (BLOCKS | MASKS) else None
        if need & PENALIZES and self._seen is not None:
            scores = torch.where(self._seen[slots], torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if need & BLOCKS:
            end_ids = self._end_ids[slots]
            is_blocked = (may_not_end[:, None] != 0) & (has_end_ids != 0)
            blocked = torch.where(is_blocked, -torch.inf, scores.gather(1, end_ids))
            scores = scores.scatter(1, end_ids, blocked)
        if need & MASKS and mask is not None:
            allowed = ((mask[..., None] >> self._mask_bits) & 1).flatten(1)[:, : scores.shape[1]]
            scores = scores.masked_fill(allowed == 0, -torch.inf)
        best = scores.max(-1)
        ids = best.indices
        if need & SAMPLES:
            limits = (top_k, top_p) if need & SORTS else None
            sampled = self._sample(scores / temperature, uniforms, min_p, limits)
            ids = torch.where(samples[:, 0] != 0, sampled, ids)
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
        ids: torch.Tensor = self._drawing.sample(
            logits,
            slots,
            uniforms,
            may_not_end,
            mask if need & MASKS else None,
            parameters=self._parameters,
            end_ids=self._end_ids,
            seen=self._seen if need & PENALIZES else None,
            last_ids=self.last_ids,
            blocks=bool(need & BLOCKS),
            samples=bool(need & SAMPLES),
            sorts=bool(need & SORTS),
        )
        return ids

    @staticmethod
    def _sample(
        scores: torch.Tensor,
        uniforms: torch.Tensor,
        min_p: torch.Tensor,
        limits: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Draw by inverse CDF, in the order of token ids; limits are top_k and top_p.

        Source: the order and the rules of the warpers in transformers/generation/logits_process.py,
        with one change: tokens that tie with the last one kept by top_k or top_p are all kept.
        """
        least = torch.full_like(scores[:, :1], -torch.inf)
        if limits is not None:
            top_k, top_p = limits
            ordered = scores.sort(-1, descending=True).values
            least = ordered.gather(1, top_k.long() - 1)
            ordered = ordered.masked_fill(ordered < least, -torch.inf)
            probs = ordered.softmax(-1)
            above = probs.cumsum(-1) - probs  # of all tokens likelier than this one
            kept = (above < top_p).sum(-1, keepdim=True)
            least = torch.maximum(least, ordered.gather(1, (kept - 1).clamp(min=0)))
        least = torch.maximum(least, scores.amax(-1, keepdim=True) + min_p.log())
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
