"""The checks of requests before they are handed to an engine of others.

What such an engine does not carry out is refused here by its name: some ignore what they do not know.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from langchain_quantllm.engine.external.spec import ExternalEngine
from langchain_quantllm.engine.request import ModelLimits, Request
from langchain_quantllm.errors import InvalidOptionError, PromptTooLongError, UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "priority": 0,
    "cache_salt": None,
}
"""Options that not every engine has, each with the value under which it changes nothing."""


def check_requests(
    requests: Sequence[Request],
    engine: ExternalEngine,
    limits: ModelLimits,
    *,
    adapters: Collection[str] = (),
    forms: Collection[str] = (),
    lacking: Collection[str] = (),
    most_logprobs: int | None = None,
    most_reported: int = 0,
) -> None:
    """Check the requests of a submission.

    Args:
        requests: The requests.
        engine: The engine, for its name and its own checks.
        limits: The limits of its model's requests.
        adapters: Names of the adapters that it has.
        forms: The kinds of `OutputForm` that it holds texts to.
        lacking: Options of `NEUTRAL` that it does not have.
        most_logprobs: Most alternatives that it reports for a token; None for any number.
        most_reported: Most tokens of a request whose log probabilities it reports by name.

    Raises:
        InvalidOptionError: If ids lie outside of the vocabulary, or an option is not carried out.
        PromptTooLongError: If prompt and completion are longer than the context.
        UnsupportedError: If a text is to be held to a form that the engine does not know.
    """
    kind = f"engine={type(engine).__name__}(...)"
    for request in requests:
        ids, options = request.prompt_ids, request.options
        if not ids or min(ids) < 0 or max(ids) >= limits.vocab_size:
            msg = f"prompt_ids must be token ids from 0 to {limits.vocab_size - 1}, and at least one."
            raise InvalidOptionError(msg)
        tokens = len(ids) + request.max_new_tokens
        if limits.context_tokens is not None and tokens > limits.context_tokens:
            msg = f"prompt and completion may have {limits.context_tokens} tokens together, not {tokens}."
            raise PromptTooLongError(msg)
        engine.check_options(options)
        if request.media is not None:
            msg = f"{kind} takes no images and sounds yet; use engine='auto'."
            raise InvalidOptionError(msg)
        if request.mask is not None:
            msg = f"{kind} takes no masks of this process: a text is held to a form by its own automaton."
            raise InvalidOptionError(msg)
        if len(request.reported_ids) > most_reported:
            at_most = f" more than {most_reported}" if most_reported else ""
            msg = f"{kind} does not report the log probabilities of{at_most} named tokens; use engine='auto'."
            raise InvalidOptionError(msg)
        for name in lacking:
            value = getattr(request if name == "min_new_tokens" else options, name)
            if value != NEUTRAL[name] and (options.do_sample or name not in ("top_k", "min_p")):
                msg = f"{name}={value!r} is not carried out by this server; leave it out, or use engine='auto'."
                raise InvalidOptionError(msg)
        if not request.shares_prefix and "cache_salt" in lacking:
            msg = "prefix_caching=False is not carried out by this server; leave it out, or use engine='auto'."
            raise InvalidOptionError(msg)
        if most_logprobs is not None and (options.logprobs or 0) > most_logprobs:
            msg = f"logprobs={options.logprobs} is more than the {most_logprobs} that {kind} reports; ask for fewer."
            raise InvalidOptionError(msg)
        if options.adapter not in (None, BASE_ADAPTER, *adapters):
            msg = f"adapter={options.adapter!r} is none of the engine's: {', '.join((*adapters, BASE_ADAPTER))}."
            raise InvalidOptionError(msg)
        if request.form is not None and request.form.kind not in forms:
            msg = f"{kind} does not hold texts to a form of the kind {request.form.kind!r}; use engine='auto'."
            raise UnsupportedError(msg)
