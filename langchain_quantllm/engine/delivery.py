"""From a forward to text: the masks and the sampling of the next tokens, and their way to the streams."""

from __future__ import annotations

import time
from collections import abc

import torch

from langchain_quantllm.engine.build import EngineParts
from langchain_quantllm.engine.failures import request_failure
from langchain_quantllm.engine.generate import NAN_LOGITS
from langchain_quantllm.engine.kv_cache import spoiled_blocks
from langchain_quantllm.engine.sampler import NOTHING_ALLOWED, PendingTokens
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.engine.speculation.speculator import Speculator
from langchain_quantllm.engine.speculation.verified_rows import VerifiedRow, verified_rows
from langchain_quantllm.engine.speculation.verify_steps import PendingVerification
from langchain_quantllm.engine.staging import PendingForward
from langchain_quantllm.engine.stream import token_logprob
from langchain_quantllm.errors import GenerationError

Forward = PendingForward | PendingVerification
"""A forward in flight."""

_Logprob = tuple[float, list[int], list[float]]


class TokenDelivery:
    """Samples tokens, and appends them to their sequences and texts; ends those that are complete or have failed.

    Attributes:
        filling_s: Time that masks have taken so far.
    """

    def __init__(self, parts: EngineParts, scheduler: Scheduler, speculator: Speculator) -> None:
        """Deliver the tokens of the sequences of a scheduler."""
        self._parts = parts
        self._runner = parts.runner
        self.scheduler = scheduler
        self._speculator = speculator
        self.filling_s = 0.0

    # Sampling.

    def sample(self, forwards: abc.Sequence[Forward]) -> list[PendingTokens]:
        """Enqueue the sampling of the next tokens after forwards."""
        return [self._sample_after(forward) for forward in forwards if forward.sequences]

    def _sample_after(self, forward: Forward) -> PendingTokens:
        sequences = forward.sequences
        wanted = [n for s in sequences if (n := s.request.options.logprobs) is not None]
        alternatives = max(wanted, default=None)
        has_masks = any(s.mask is not None for s in sequences)
        rows = verified_rows(forward) if isinstance(forward, PendingVerification) else None
        mask, began_s = None, time.perf_counter()
        if has_masks:
            mask = self._fill_masks(sequences) if rows is None else self._fill_verified(rows)
            self.filling_s += time.perf_counter() - began_s
        if isinstance(forward, PendingVerification):
            assert rows is not None
            return self._runner.sample_verified(forward, rows, mask=mask, alternatives=alternatives)
        return self._runner.sample(forward, mask=mask, alternatives=alternatives)

    def _fill_masks(self, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
        bits = self._runner.blank_masks(len(sequences))
        for i, sequence in enumerate(sequences):
            self._fill_mask(sequence, bits[i : i + 1])
        return bits

    def _fill_verified(self, rows: abc.Sequence[VerifiedRow]) -> torch.Tensor:
        bits = self._runner.blank_masks(rows[-1].draws.stop)
        for row in rows:
            own = bits[row.first : row.draws.stop]
            if self._fill_mask(row.sequence, own[:1]):
                row.fill_ahead(own)
        return bits

    def _fill_mask(self, sequence: Sequence, bits: torch.Tensor) -> bool:
        """Fill the mask of a sequence's next token; false if it has none, or has ended."""
        if sequence.mask is None or sequence.has_ended:
            return False
        try:
            if not sequence.mask.fill(bits):
                bits.fill_(-1)
            if sequence.mask.ended:
                self._finish(sequence)
        except BaseException as error:  # of the request's own mask
            bits.fill_(-1)
            self.fail(sequence, error)
        return not sequence.has_ended

    def _finish(self, sequence: Sequence) -> None:
        """End a text that its mask says is complete."""
        sequence.completion.stream.put(sequence.completion.finish("stop"))
        self.drop(sequence)

    # Tokens.

    def deliver(self, pending: abc.Sequence[PendingTokens]) -> None:
        """Wait for the tokens of a step and append them to their sequences."""
        for tokens in pending:
            ids, logprobs = tokens.wait()
            reports: abc.Sequence[_Logprob | None] = [None] * len(ids) if logprobs is None else logprobs
            for row in tokens.verified:
                if not row.sequence.has_ended:
                    self._push_verified(row, ids, reports)
            if not tokens.verified:
                for i, sequence in enumerate(tokens.sequences):
                    if not sequence.has_ended:
                        self._push(sequence, ids[i], reports[i])

    def _push_verified(self, row: VerifiedRow, ids: abc.Sequence[int], reports: abc.Sequence[_Logprob | None]) -> None:
        """Append the draws of a verify step that are right."""
        sequence, accepted = row.sequence, row.accepted(ids)
        self.scheduler.resolve(sequence, len(row.fed), accepted)
        proposed = sum(token >= 0 for token in row.fed)
        self._speculator.note(sequence, row.proposal, proposed, accepted)
        sequence.completion.proposed_tokens += proposed
        for i, at in enumerate(row.draws[: accepted + 1]):
            if i:
                sequence.completion.accepted_tokens += 1
                if row.masks:
                    sequence.mask = row.masks[i]
                    if sequence.mask.ended:
                        self._finish(sequence)
                        return
            self._push(sequence, ids[at], reports[at])
            if sequence.has_ended:
                return

    def _push(self, sequence: Sequence, token_id: int, logprob: _Logprob | None) -> None:
        if token_id == NOTHING_ALLOWED:
            self.fail(sequence, GenerationError("the request's mask allows no token."))
            return
        if token_id < 0:
            blocks = [*sequence.given_back, *sequence.blocks[len(sequence.given_back) :]]
            self.fail(sequence, GenerationError(NAN_LOGITS))
            spoiled = blocks if self._parts.states else spoiled_blocks(self._parts.pools, blocks)
            self.scheduler.blocks.discard(spoiled)  # or its prompt could never run again
            return
        self.scheduler.push(sequence, token_id)
        completion = sequence.completion
        try:
            if sequence.mask is not None:
                sequence.mask.accept(token_id)
            request = sequence.request
            report = token_logprob(token_id, logprob, request.options.logprobs, request.reported_ids)
            chunk = completion.push(token_id, report)
        except BaseException as error:  # of the request's own mask, or of its tokenizer
            self.fail(sequence, error)
            return
        if chunk is not None:
            completion.stream.put(chunk)
        if completion.finish_reason is not None:
            self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """End a sequence, and free its blocks."""
        sequence.has_ended = True
        self.scheduler.remove(sequence)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence with an error of its request."""
        sequence.completion.stream.fail(request_failure(error))
        self.drop(sequence)
