"""Sampling the next tokens of a batch, on the device.

Owns the sequences' sampling parameters as tensors, and the arithmetic from logits to token ids, in plain torch; a
kernel that does the same in one launch can be passed in. One uniform number per sequence and token comes from outside,
so that a sequence's tokens do not depend on the others. Every operation has fixed shapes: the whole can be captured in
a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from langchain_quantllm.engine.request import Request

BLOCKS, PENALIZES, MASKS, SAMPLES, SORTS = 1, 2, 4, 8, 16
"""What the sampling of a step needs, combined over its sequences: block end tokens, penalize, mask, sample, sort."""

NO_NUMBER, NOTHING_ALLOWED = -1, -2
"""Results in place of a token id: the logits were NaN, or no token was allowed."""

_END_IDS = 8  # of a sequence, at first


def needs_of(request: Request) -> int:
    """Combine the flags that a request needs at every step; `BLOCKS` changes from step to step."""
    o = request.options
    return (
        PENALIZES * (o.repetition_penalty != 1.0)
        | MASKS * (request.mask is not None)
        | SAMPLES * o.do_sample
        | SORTS * (o.do_sample and (o.top_k > 0 or o.top_p < 1.0))
    )


class PendingTokens:
    """Sampled tokens on their way to the host."""

    def __init__(
        self,
        sequences: Sequence[Any],
        ids: torch.Tensor,
        logprobs: tuple[torch.Tensor, ...] | None,
        verified: Sequence[Any] = (),
    ) -> None:
        """Begin to copy them.

        Args:
            sequences: The sequences that they belong to.
            ids: The tokens, one for each sequence, or as the rows of a verify step say.
            logprobs: See `log_probabilities`.
            verified: The rows of a verify step.
        """
        self.sequences = sequences
        self.verified = verified
        self._ids = ids.to("cpu", non_blocking=True)
        self._logprobs = None if logprobs is None else [t.to("cpu", non_blocking=True) for t in logprobs]
        self._event: Any = None
        if ids.device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(ids.device))
        elif ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)

    def wait(self) -> tuple[list[int], list[tuple[float, list[int], list[float]]] | None]:
        """Wait for the copy.

        Returns:
            A token id for each sequence, below 0 if there is none (see `BatchSampler.sample`); and, if asked for, each
            one's log probability with the ids and log probabilities of the likeliest tokens.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._logprobs is None:
            return self._ids.tolist(), None
        chosen, best_ids, best = (t.tolist() for t in self._logprobs)
        return self._ids.tolist(), list(zip(chosen, best_ids, best, strict=True))


class SlotTables(NamedTuple):
    """The sampling of each slot; see `kernels.sampling.sample`."""

    parameters: torch.Tensor
    end_ids: torch.Tensor
    seen: torch.Tensor | None
    last_ids: torch.Tensor


class BatchSampler:
    """Samples one token for each sequence of a batch."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device, *, kernels: Any = None) -> None:
        """Allocate the parameters; one slot more takes the padding of a batch.

        Args:
            slots: Most sequences.
            vocab_size: Width of the logits.
            device: The device of the logits.
            kernels: The module `kernels.sampling`, which samples in one kernel; None for plain torch.
        """
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._device = device
        self.last_ids = torch.zeros(slots + 1, dtype=torch.long, device=device)
        """The last token of each sequence, of shape `(slots + 1,)`: the input of its next step."""
        self._parameters = torch.tensor([self._row()] * (slots + 1), dtype=torch.float32, device=device)
        """The options of each sequence, in the order of `_row`."""
        self._end_ids = torch.zeros(slots + 1, _END_IDS, dtype=torch.long, device=device)
        self.version = 0
        """Changes when a tensor is replaced: graphs have to be captured again."""
        self._seen: torch.Tensor | None = None
        self._yes = torch.ones((), dtype=torch.bool, device=device)
        self._mask_bits = torch.arange(32, dtype=torch.int32, device=device)

    @property
    def has_kernel(self) -> bool:
        """Whether one kernel samples."""
        return self._kernels is not None

    def set(self, slots: Sequence[int], requests: Sequence[Request], ids: Sequence[Sequence[int]]) -> None:
        """Set the parameters of sequences before their first token is sampled.

        Args:
            slots: Their slots.
            requests: Their requests.
            ids: All their tokens so far, with the prompts.
        """
        at = self._to_device(slots, torch.long)
        self._parameters[at] = self._to_device([self._row(request) for request in requests], torch.float32)
        self._set_end_ids(at, [request.end_token_ids for request in requests])
        for slot, request, seen in zip(slots, requests, ids, strict=True):
            if request.options.repetition_penalty != 1.0:
                if self._seen is None:
                    shape = (len(self.last_ids), self._vocab_size)
                    self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
                self._seen[slot] = False
                self._seen[slot, self._to_device(sorted(set(seen)), torch.long)] = True

    def _set_end_ids(self, at: torch.Tensor, end_ids: Sequence[tuple[int, ...]]) -> None:
        width = max(self._end_ids.shape[1], *map(len, end_ids))
        if width > self._end_ids.shape[1]:
            # A sequence with fewer repeats its first one, which blocks nothing else.
            more = self._end_ids[:, :1].repeat(1, width - self._end_ids.shape[1])
            self._end_ids = torch.cat([self._end_ids, more], 1)
            self.version += 1
        padded = [(*ids, *([ids[0] if ids else 0] * (width - len(ids)))) for ids in end_ids]
        self._end_ids[at] = self._to_device(padded, torch.long)

    def _to_device(self, values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        """Copy numbers to the device without waiting for its earlier work."""
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

    def _row(self, request: Request | None = None) -> list[float]:
        """List temperature, top_k, top_p, min_p, penalty, whether it samples, and whether it has end tokens."""
        if request is None:
            return [1.0, self._vocab_size, 1.0, 0.0, 1.0, 0.0, 0.0]
        o = request.options
        top_k = min(o.top_k or self._vocab_size, self._vocab_size)
        has_end_ids = bool(request.end_token_ids)
        return [o.temperature, top_k, o.top_p, o.min_p, o.repetition_penalty, o.do_sample, has_end_ids]

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        uniforms: torch.Tensor,
        may_not_end: torch.Tensor,
        need: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample a token for each sequence, and keep it as its last.

        Args:
            logits: Of shape `(rows, vocab)`, any float dtype; not changed.
            slots: Slot of each sequence, of shape `(rows,)`, int32 or int64.
            uniforms: A number in [0, 1) for each sequence, of shape `(rows,)`, float32.
            may_not_end: Whether a sequence's end tokens are blocked, of shape `(rows,)`, bool or int32.
            need: The combined flags of the sequences.
            mask: Allowed tokens as bits, lowest first, of shape `(rows, ceil(vocab / 32))`, int32.

        Returns:
            Token ids of shape `(rows,)`, int32; `NO_NUMBER` or `NOTHING_ALLOWED` in place of a missing one.
        """
        tables = SlotTables(self._parameters, self._end_ids, self._seen, self.last_ids)
        return self._sample(logits, slots, uniforms, may_not_end, need, mask, tables)

    def sample_ahead(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        uniforms: torch.Tensor,
        may_not_end: torch.Tensor,
        need: int,
        mask: torch.Tensor | None,
        proposed: torch.Tensor,
        firsts: torch.Tensor,
    ) -> torch.Tensor:
        """Sample a token at each of several positions of sequences, as if the tokens proposed before it were theirs.

        Nothing is kept; see `keep`. For the other arguments and the result see `sample`.

        Args:
            logits: Those after each position.
            slots: Slot of each position's sequence.
            uniforms: The number of each position.
            may_not_end: Whether end tokens are blocked at each position.
            need: The combined flags of the sequences.
            mask: Allowed tokens at each position.
            proposed: The proposed token that each position begins with, of shape `(rows,)`, int32; below 0 for none.
            firsts: Row of the first position of each one's sequence, of shape `(rows,)`, int64.
        """
        slots = slots.long()
        rows = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
        seen = self._seen_ahead(slots, proposed, firsts) if need & PENALIZES else None
        tables = SlotTables(self._parameters[slots], self._end_ids[slots], seen, torch.zeros_like(slots))
        return self._sample(logits, rows, uniforms, may_not_end, need, mask, tables)

    def _seen_ahead(self, slots: torch.Tensor, proposed: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor | None:
        """Compute the tokens of each position's text: those of its sequence, and the proposed ones up to it."""
        if self._seen is None:
            return None
        rows = torch.arange(len(slots), device=slots.device)
        is_before = (rows[None] > firsts[:, None]) & (rows[None] <= rows[:, None])
        # A position without so many before it repeats its sequence's last token, which is seen already.
        tokens = torch.where(is_before & (proposed >= 0), proposed.long(), self.last_ids[slots][:, None])
        seen: torch.Tensor = self._seen[slots]
        return seen.index_put_((rows[:, None].expand_as(tokens), tokens), self._yes)

    def keep(self, slots: torch.Tensor, ids: torch.Tensor, is_right: torch.Tensor, is_last: torch.Tensor) -> None:
        """Keep tokens of `sample_ahead`.

        Args:
            slots: Slot of each token's sequence, of shape `(rows,)`.
            ids: The tokens, of shape `(rows,)`; below 0 for none.
            is_right: Whether a token is one of its text, of shape `(rows,)`, bool.
            is_last: Whether it is the last one of them, of shape `(rows,)`, bool.
        """
        padding = len(self.last_ids) - 1
        slots, ids = slots.long(), ids.long().clamp(min=0)
        self.last_ids[torch.where(is_last, slots, padding)] = ids
        if self._seen is not None:
            self._seen.index_put_((torch.where(is_right, slots, padding), ids), self._yes)

    def _sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        uniforms: torch.Tensor,
        may_not_end: torch.Tensor,
        need: int,
        mask: torch.Tensor | None,
        tables: SlotTables,
    ) -> torch.Tensor:
        if self._kernels is not None:
            sampled: torch.Tensor = self._kernels.sample(
                logits,
                slots,
                uniforms,
                may_not_end,
                mask if need & MASKS else None,
                parameters=tables.parameters,
                end_ids=tables.end_ids,
                seen=tables.seen if need & PENALIZES else None,
                last_ids=tables.last_ids,
                blocks=bool(need & BLOCKS),
                samples=bool(need & SAMPLES),
                sorts=bool(need & SORTS),
            )
            return sampled
        slots = slots.long()
        scores = logits.float()
        parameters = tables.parameters[slots][..., None]
        temperature, top_k, top_p, min_p, penalty, samples, has_end_ids = parameters.unbind(1)
        # Looked for before scores are masked, which may remove the NaN.
        broken = scores.amax(-1).isnan() if need & (BLOCKS | MASKS) else None
        if need & PENALIZES and tables.seen is not None:
            scores = torch.where(
                tables.seen[slots], torch.where(scores < 0, scores * penalty, scores / penalty), scores
            )
        is_blocked = (may_not_end[:, None] != 0) & (has_end_ids != 0) if need & BLOCKS else None
        scores = self._masked(scores, tables.end_ids[slots], is_blocked, mask if need & MASKS else None)
        best = scores.max(-1)
        ids = best.indices
        if need & SAMPLES:
            limits = (top_k, top_p) if need & SORTS else None
            ids = torch.where(
                samples[:, 0] != 0, self._sample_scores(scores / temperature, uniforms, min_p, limits), ids
            )
        tables.last_ids[slots] = ids
        if need & PENALIZES and tables.seen is not None:
            tables.seen.index_put_((slots, ids), self._yes)
        ids = torch.where(best.values == -torch.inf, NOTHING_ALLOWED, ids)
        return torch.where(best.values.isnan() if broken is None else broken, NO_NUMBER, ids).int()

    def _masked(
        self, scores: torch.Tensor, end_ids: torch.Tensor, is_blocked: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Set the scores of blocked end tokens and of masked tokens to minus infinity."""
        if is_blocked is not None:
            scores = scores.scatter(1, end_ids, torch.where(is_blocked, -torch.inf, scores.gather(1, end_ids)))
        if mask is not None:
            allowed = ((mask[..., None] >> self._mask_bits) & 1).flatten(1)[:, : scores.shape[1]]
            scores = scores.masked_fill(allowed == 0, -torch.inf)
        return scores

    @staticmethod
    def _sample_scores(
        scores: torch.Tensor,
        uniforms: torch.Tensor,
        min_p: torch.Tensor,
        limits: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Sample by inverse CDF, in the order of token ids; limits are top_k and top_p.

        Source: the order and the rules of the warpers in transformers/generation/logits_process.py,
        with one change: all tokens that tie with the last one kept by top_k or top_p are kept.
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
        threshold = uniforms.double()[:, None] * cumulative[:, -1:]
        # The first token whose cumulative probability lies above the threshold: never one of probability 0.
        return torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)[:, 0]


def log_probabilities(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    alternatives: int,
    reported_ids: Sequence[int] = (),
    named_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the log probabilities of sampled tokens and of the likeliest ones, before any option.

    Args:
        logits: Of shape `(rows, vocab)`.
        token_ids: Of shape `(rows,)`; below 0 for none.
        alternatives: How many of the likeliest.
        reported_ids: Further tokens to report, behind the likeliest.
        named_logits: Finer logits of these, of shape `(rows, reported)`, float32; None takes those of `logits`.

    Returns:
        Log probabilities of shape `(rows,)`; ids and log probabilities of the likeliest, `(rows, alternatives)`,
        and of the further ones behind them.
    """
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(alternatives, logprobs.shape[1]), -1)
    chosen = logprobs.gather(1, token_ids.long().clamp(min=0)[:, None])[:, 0]
    if not reported_ids:
        return chosen, best.indices, best.values
    further = torch.tensor(reported_ids, dtype=torch.long).to(logits.device, non_blocking=True)
    ids = torch.cat([best.indices, further.expand(len(logprobs), -1)], 1)
    if named_logits is None:
        reported = logprobs[:, further]
    else:
        reported = named_logits.to(logits.device) - logits.float().logsumexp(-1, keepdim=True)
    return chosen, ids, torch.cat([best.values, reported], 1)
