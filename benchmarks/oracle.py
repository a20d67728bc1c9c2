"""The oracle of the soak and the stress: whether a request's tokens are those that the plain model gives.

One forward of the plain model over prompt and answer gives the scores that every token was sampled from. A greedy token
must be the likeliest, a seeded one that which the request's own uniform number falls on; each within what two orders of
adding float32 numbers may differ by, which counts as a tie. The options are carried out here once more, in float64 and
row by row, without code of the engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from langchain_quantllm.engine.request import Request, TokenMask

TOLERANCE = 1e-3
"""Largest difference of two scores that counts as a tie, in standard deviations of a token's scores."""


@dataclass
class Verdict:
    """The tokens of one or more answers, and how many of them were ties or wrong.

    `faults` says of each wrong one what it was.
    """

    tokens: int = 0
    ties: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Verdict) -> None:
        """Add another verdict to this one."""
        self.tokens += other.tokens
        self.ties += other.ties
        self.faults += other.faults


class Oracle:
    """A plain model that nothing else uses."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take the model: in float32, its weights those of the model that is checked."""
        self._model: Any = model
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def logits(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
        """Run one forward; returns the logits that each token was sampled from, of shape `(tokens, vocab)`."""
        given = torch.tensor([[*prompt_ids, *token_ids[:-1]]], device=self._device)
        logits: torch.Tensor = self._model(given, attention_mask=torch.ones_like(given)).logits
        return logits[0, len(prompt_ids) - 1 :]

    def check_greedy(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Verdict:
        """Check the tokens of a greedy answer without further options; no tokens are right."""
        if not token_ids:
            return Verdict()
        logits = self.logits(prompt_ids, token_ids)
        best = logits.max(-1)
        chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0]
        gaps = ((best.values - chosen) / logits.std(-1)).tolist()
        ids = best.indices.tolist()
        faults = [
            f"token {i} is {token_ids[i]}, not {ids[i]}, which is likelier by {gap:.2g} standard deviations"
            for i, gap in enumerate(gaps)
            if not gap <= TOLERANCE  # a NaN is wrong too
        ]
        ties = sum(found != expected for found, expected in zip(token_ids, ids, strict=True)) - len(faults)
        return Verdict(len(token_ids), max(0, ties), faults)

    def check(self, request: Request, token_ids: Sequence[int]) -> Verdict:
        """Check the tokens of any request, from its first token on; there may be more to come."""
        if not token_ids:
            return Verdict()
        verdict = Verdict(len(token_ids))
        replay = _Replay(request)
        for i, logits in enumerate(self.logits(request.prompt_ids, token_ids).double().cpu()):
            gap = replay.gap(logits, token_ids, i)
            verdict.ties += 0 < gap <= 1
            if not gap <= 1:
                verdict.faults.append(f"token {i} of {len(token_ids)} is {token_ids[i]}, {gap:.2g} times too far")
                break  # those after it may follow from it
        return verdict


class _Replay:
    """A request's sampling, token by token."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._random = request.random_numbers()
        factory: Callable[[], TokenMask] | None = request.mask
        self._mask = None if factory is None else factory()

    def gap(self, logits: torch.Tensor, token_ids: Sequence[int], at: int) -> float:
        """Return how far the token at an index lies from the expected one: 0 is equal, up to 1 a tie, above it wrong.

        Args:
            logits: Its logits, of shape `(vocab,)` in float64.
            token_ids: All tokens of the answer.
            at: The index.
        """
        options, token_id = self._request.options, token_ids[at]
        tolerance = TOLERANCE * float(logits.std())
        scores = self._scores(logits, token_ids[:at])
        if self._mask is not None:
            self._mask.accept(token_id)
        if scores[token_id] == -math.inf:
            return math.inf
        if options.do_sample:
            return self._sampled_gap(scores / options.temperature, token_id, tolerance / options.temperature)
        difference = float(scores.max() - scores[token_id])
        return difference / (tolerance * max(1.0, options.repetition_penalty)) if difference else 0.0

    def _scores(self, logits: torch.Tensor, before: Sequence[int]) -> torch.Tensor:
        """Apply what changes the scores before temperature."""
        request, options = self._request, self._request.options
        scores = logits.clone()
        for i in {*request.prompt_ids, *before} if options.repetition_penalty != 1.0 else ():
            penalty = options.repetition_penalty
            scores[i] = scores[i] * penalty if scores[i] < 0 else scores[i] / penalty
        if request.end_token_ids and (options.ignore_eos or len(before) < request.min_new_tokens):
            scores[list(request.end_token_ids)] = -math.inf
        if self._mask is not None:
            bits = torch.full((1, -(-len(scores) // 32)), -1, dtype=torch.int32)
            if self._mask.fill(bits):
                words = bits[0].tolist()
                allowed = [bool(words[i // 32] >> i % 32 & 1) for i in range(len(scores))]
                scores[~torch.tensor(allowed)] = -math.inf
        return scores

    def _sampled_gap(self, scores: torch.Tensor, token_id: int, tolerance: float) -> float:
        """Return 0 if the uniform number falls on the token, 1 if it does so within the tolerance, infinity if not."""
        uniform = self._random.random()
        slack = 2 * tolerance + 1e-6
        for shift in (0.0, tolerance, -tolerance):
            kept = self._kept(scores, shift)
            if not kept[token_id]:
                continue
            probs = scores.masked_fill(~kept, -math.inf).softmax(-1)
            end = float(probs[: token_id + 1].sum())
            start = end - float(probs[token_id])
            if not shift and start <= uniform < end:
                return 0.0
            if start - slack <= uniform <= end + slack:
                return 1.0
        return math.inf

    def _kept(self, scores: torch.Tensor, shift: float) -> torch.Tensor:
        """Find the tokens that top_k, top_p and min_p keep, more of them with a positive shift of their borders."""
        options = self._request.options
        least = -math.inf
        ordered = scores.sort(descending=True).values
        if 0 < options.top_k < len(scores):
            least = float(ordered[options.top_k - 1])
        if options.top_p < 1:
            probs = ordered.masked_fill(ordered < least - shift, -math.inf).softmax(-1)
            above = probs.cumsum(-1) - probs
            least = max(least, float(ordered[max(0, int((above < options.top_p + shift).sum()) - 1)]))
        if options.min_p > 0:
            least = max(least, float(ordered[0]) + math.log(options.min_p))
        return (scores >= least - shift) & (scores > -math.inf)
