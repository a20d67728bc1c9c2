"""The results of a submission: texts joined from chunks, and the facts reported with each.

Knows requests and chunks; no LangChain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.stream import Chunk, TokenLogprob, Usage


@dataclass
class Answer:
    """The joined chunks of one request."""

    request: Request
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None


class Answers:
    """The requests of a submission, with their chunks joined."""

    def __init__(self, requests: Sequence[Request]) -> None:
        """Begin without chunks."""
        self.rows = [Answer(request=request) for request in requests]

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk of any request."""
        answer = self.rows[chunk.row]
        answer.text += chunk.text
        answer.logprobs += chunk.logprobs
        answer.finish_reason, answer.usage = chunk.finish_reason, chunk.usage


def usage_metadata(usage: Usage) -> dict[str, Any]:
    """Convert the token counts to LangChain's `UsageMetadata`; those of proposed tokens only if there were any."""
    metadata: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_token_details": {"cache_read": usage.cached_tokens},
    }
    if usage.proposed_tokens:
        metadata["output_token_details"] = {"proposed": usage.proposed_tokens, "accepted": usage.accepted_tokens}
    return metadata


def completion_info(of: Answer | Chunk, request: Request, tokenizer: Any, model_name: str) -> dict[str, Any]:
    """Collect the facts of a completion, or of one chunk of it.

    Args:
        of: The answer, or a chunk of it.
        request: The request.
        tokenizer: Decodes tokens.
        model_name: The model's name.

    Returns:
        `logprobs` if asked for; and for an answer, or its last chunk, `finish_reason`, `model_name`, `seed` if it was
        sampled, `usage_metadata`, and `timing` in seconds.
    """
    info: dict[str, Any] = {}
    if of.logprobs:
        info["logprobs"] = {"content": [_logprob_info(logprob, tokenizer) for logprob in of.logprobs]}
    usage = of.usage
    if of.finish_reason is not None and usage is not None:
        decoding_s = usage.total_s - usage.first_token_s
        info |= {
            "finish_reason": of.finish_reason,
            "model_name": model_name,
            **({"seed": request.seed} if request.options.do_sample else {}),
            "usage_metadata": usage_metadata(usage),
            "timing": {
                "queued_s": usage.queued_s,
                "first_token_s": usage.first_token_s,
                "total_s": usage.total_s,
                "rate_tok_s": (usage.completion_tokens - 1) / decoding_s if decoding_s > 0 else None,
            },
        }
    return info


def _logprob_info(logprob: TokenLogprob, tokenizer: Any) -> dict[str, Any]:
    def entry(token_id: int, value: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token_id]), "token_id": token_id, "logprob": value}

    top = [entry(token_id, value) for token_id, value in logprob.top]
    return {**entry(logprob.token_id, logprob.logprob), "top_logprobs": top}
