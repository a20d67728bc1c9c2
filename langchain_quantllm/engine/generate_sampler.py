"""The sampler of one request under `generate`, by transformers' own warpers.

One uniform number decides each token. It comes from the request's own generator: the rest of the batch does not
matter, and torch's global generators are never used. Knows tensors; no text, no model and no scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.stream import TokenLogprob

if TYPE_CHECKING:
    import torch


class RowSampler:
    """Samples the tokens of one request."""

    def __init__(self, request: Request) -> None:
        """Build the request's warpers, generator and mask."""
        self._request = request
        self._options = request.options
        self._random = request.random_numbers()
        self._warpers = _warpers(request) if request.options.do_sample else []
        self._mask = None if request.mask is None else request.mask()

    @property
    def ended(self) -> bool:
        """Whether the mask has ended the text."""
        return self._mask is not None and self._mask.ended

    def sample(self, logits: torch.Tensor, token_ids: Sequence[int]) -> tuple[int, TokenLogprob | None]:
        """Sample the next token.

        Args:
            logits: Logits of shape `(vocab,)` in float32; may be overwritten.
            token_ids: Tokens sampled so far.

        Returns:
            The token id, and its log probability before any option, if asked for.
        """
        import torch

        options = self._options
        raw = logits.clone() if options.logprobs is not None else logits
        blocked = self._request.end_token_ids
        if blocked and (options.ignore_eos or len(token_ids) < self._request.min_new_tokens):
            logits[list(blocked)] = -torch.inf
        if options.repetition_penalty != 1.0:
            _penalize(logits, [*self._request.prompt_ids, *token_ids], options.repetition_penalty)
        if self._mask is not None:
            bits = torch.full((1, -(-len(logits) // 32)), -1, dtype=torch.int32, device="cpu")
            if self._mask.fill(bits):
                allowed = (bits[0, :, None] >> torch.arange(32, dtype=torch.int32, device="cpu")) & 1
                logits[(allowed.flatten()[: len(logits)] == 0).to(logits.device)] = -torch.inf
        if not options.do_sample:
            token_id = int(logits.argmax())
        else:
            scores = logits[None]
            for warp in self._warpers:
                scores = warp(None, scores)
            cumulative = scores[0].double().softmax(-1).cumsum(-1)
            threshold = self._random.random() * float(cumulative[-1])
            # The first token whose cumulative probability lies above it: never one of probability 0.
            token_id = int(torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(cumulative) - 1))
        if self._mask is not None:
            self._mask.accept(token_id)
        if options.logprobs is None:
            return token_id, None
        return token_id, _logprob(raw, token_id, options.logprobs, self._request.reported_ids)


def _penalize(logits: torch.Tensor, seen_ids: Sequence[int], penalty: float) -> None:
    """Make seen tokens less likely. Source: https://arxiv.org/abs/1909.05858, section 4.1."""
    import torch

    ids = torch.tensor(sorted(set(seen_ids)), device=logits.device)
    seen = logits[ids]
    logits[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _warpers(request: Request) -> list[Any]:
    """Build transformers' own warpers, in the order of `GenerationMixin._get_logits_processor`."""
    import transformers as lp

    o = request.options
    built = [
        lp.TemperatureLogitsWarper(float(o.temperature)) if o.temperature != 1 else None,
        lp.TopHLogitsWarper(top_h=o.top_h) if o.top_h < 1 else None,
        lp.TopKLogitsWarper(top_k=o.top_k) if o.top_k else None,
        lp.TopPLogitsWarper(top_p=float(o.top_p)) if o.top_p < 1 else None,
        lp.MinPLogitsWarper(min_p=float(o.min_p)) if o.min_p else None,
        lp.TypicalLogitsWarper(mass=o.typical_p) if o.typical_p < 1 else None,
        lp.EpsilonLogitsWarper(epsilon=o.epsilon_cutoff) if o.epsilon_cutoff else None,
        lp.EtaLogitsWarper(epsilon=o.eta_cutoff, device="cpu") if o.eta_cutoff else None,
    ]
    return [warper for warper in built if warper is not None]


def _logprob(logits: torch.Tensor, token_id: int, alternatives: int, reported_ids: Sequence[int] = ()) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    if reported_ids:
        reported = tuple((i, float(logprobs[i])) for i in reported_ids)
        return TokenLogprob(token_id=token_id, logprob=float(logprobs[token_id]), top=reported)
    best = logprobs.topk(min(alternatives, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(logprobs[token_id]), top=top)
