"""What an engine checks of requests before it queues them."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_quantllm.engine.request import ModelLimits, Request
from langchain_quantllm.errors import InvalidOptionError, PromptTooLongError, QueueFullError
from langchain_quantllm.options import BASE_ADAPTER, needs_generate


def check_queue(waiting: int, most: int | None) -> None:
    """Check that an engine's queue takes one more submission.

    Args:
        waiting: Requests that wait for a place.
        most: Most of them; None for any number.

    Raises:
        QueueFullError: If so many wait already.
    """
    if most is not None and waiting >= most:
        msg = f"{waiting} requests wait for the model already, and max_waiting={most}; call again later, or raise it."
        raise QueueFullError(msg)


def check_request(request: Request, limits: ModelLimits, *, logits_size: int, adapters: Sequence[str] | None) -> None:
    """Check a request for the continuous engine: an id outside of its tables would fail the whole batch.

    Args:
        request: The request.
        limits: The limits of the engine's model.
        logits_size: Width of the model's logits.
        adapters: Names of the model's adapters; None if requests cannot choose one.

    Raises:
        InvalidOptionError: If it holds ids outside of the vocabulary, an unknown adapter, or options of `generate`.
        PromptTooLongError: If it is longer than the context or the KV cache.
    """
    ids = request.prompt_ids
    if not ids or min(ids) < 0 or max(ids) >= limits.vocab_size:
        msg = f"prompt_ids must be token ids from 0 to {limits.vocab_size - 1}, and at least one."
        raise InvalidOptionError(msg)
    if any(not 0 <= i < logits_size for i in request.end_token_ids):
        msg = f"the tokens that end a text must lie below {logits_size}."
        raise InvalidOptionError(msg)
    if any(not 0 <= i < logits_size for i in request.reported_ids):
        msg = f"the tokens whose log probabilities are reported must lie below {logits_size}."
        raise InvalidOptionError(msg)
    adapter = request.options.adapter
    if adapters is not None and adapter not in (None, BASE_ADAPTER, *adapters):
        msg = f"adapter={adapter!r} is none of the model's: {', '.join((*adapters, BASE_ADAPTER))}."
        raise InvalidOptionError(msg)
    if (option := needs_generate(request.options)) is not None:
        msg = f"{option} is carried out by the pipeline engine only; use engine='auto' or 'pipeline'."
        raise InvalidOptionError(msg)
    tokens = len(ids) + request.max_new_tokens
    most = min(n for n in (limits.context_tokens, limits.cache_tokens) if n is not None)
    if tokens > most:
        msg = f"prompt and completion may have {most} tokens together, not {tokens}; see kv_cache_memory."
        raise PromptTooLongError(msg)
