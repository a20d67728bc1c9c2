"""The token counts of an answer."""

from __future__ import annotations

from typing import Any

from langchain_quantllm.engine.stream import Chunk, Usage


class UsageCount:
    """The tokens of the sequences of one request, `n` for each prompt."""

    def __init__(self, n: int) -> None:
        """Begin at zero."""
        self._n = n
        self._usages: dict[int, Usage] = {}

    def add(self, chunk: Chunk) -> None:
        """Add a chunk; the last one of a sequence has its counts."""
        if chunk.usage is not None:
            self._usages[chunk.row] = chunk.usage

    def total(self) -> dict[str, Any]:
        """Write the counts as OpenAI's API does: each prompt counts once."""
        firsts = [usage for row, usage in self._usages.items() if row % self._n == 0]
        prompt_tokens = sum(usage.prompt_tokens for usage in firsts)
        completion_tokens = sum(usage.completion_tokens for usage in self._usages.values())
        proposed = sum(usage.proposed_tokens for usage in self._usages.values())
        accepted = sum(usage.accepted_tokens for usage in self._usages.values())
        predicted = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": proposed - accepted}
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
            **({"completion_tokens_details": predicted} if proposed else {}),
        }
