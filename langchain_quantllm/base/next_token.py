"""The log probabilities of named tokens right after prompts: one prefill and one step for each prompt.

Owns the options and requests of such a call. Knows no text: prompts are token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from langchain_quantllm.base.model import PreparedCall, QuantizedModel
from langchain_quantllm.engine.request import ModelLimits, plan_requests
from langchain_quantllm.engine.result import Answers, usage_metadata
from langchain_quantllm.loading.inputs import require_parts
from langchain_quantllm.options import GenerationOptions


def next_token_options(model: QuantizedModel) -> GenerationOptions:
    """Return the options of a call for one token: the model's adapter, priority, salt and timeout, nothing else.

    Log probabilities are those before temperature and the like, so the options of the model's texts change none.
    """
    own = model._options(None, {})
    return GenerationOptions(
        max_new_tokens=1,
        asked_new_tokens=True,
        logprobs=0,
        timeout=own.timeout,
        priority=own.priority,
        cache_salt=own.cache_salt,
        adapter=own.adapter,
    )


def most_prompt_tokens(limits: ModelLimits) -> int | None:
    """Return how many tokens a prompt may have so that one token can follow it; None for any number."""
    bounds = [n - 1 for n in (limits.context_tokens, limits.cache_tokens) if n is not None]
    return min(bounds, default=None)


def plan_next_tokens(model: QuantizedModel, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> PreparedCall:
    """Plan a call that reports the log probabilities of named tokens after each prompt.

    Args:
        model: The model, loaded if it is not.
        prompts: Token ids of the prompts; those that begin alike are computed once up to where they differ.
        token_ids: The tokens to report.

    Raises:
        PromptTooLongError: If a prompt leaves no room for a token.
    """
    options = next_token_options(model)
    engine = model._engine(options)
    requests = [
        dataclasses.replace(request, reported_ids=tuple(token_ids))
        for prompt in prompts
        for request in plan_requests(
            prompt,
            options,
            engine.limits,
            max_rows=model.batch_size,
            owner=id(model),
            shares_prefix=model.prefix_caching,
        )
    ]
    return PreparedCall(
        options=options,
        engine=engine,
        tokenizer=require_parts(model._loaded()).tokenizer,
        requests=requests,
        max_waiting=model.max_waiting,
    )


def reported_logprobs(answers: Answers) -> list[tuple[float, ...]]:
    """Return the log probabilities of the named tokens, in their order, for each prompt."""
    return [tuple(logprob for _, logprob in answer.logprobs[0].top) for answer in answers.rows]


def summed_usage(answers: Answers) -> dict[str, object]:
    """Return the token counts of all prompts as LangChain's `UsageMetadata`, with those found in the KV cache."""
    usages = [answer.usage for answer in answers.rows if answer.usage is not None]
    if not usages:
        return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_token_details": {"cache_read": 0}}
    total = dataclasses.replace(
        usages[0],
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )
    return usage_metadata(total)
