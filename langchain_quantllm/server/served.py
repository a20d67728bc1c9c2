"""The model that a server runs: its names, its state, and the plans of calls.

Owns the way from a request's body to a `PreparedCall` of the package's classes. Knows nothing of HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from langchain_quantllm.base import PreparedCall, QuantizedModel
from langchain_quantllm.chat_models import ChatQuantizedHuggingFace
from langchain_quantllm.engine.request import Engine, EngineLoad, Request
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.inputs import require_parts, token_ids
from langchain_quantllm.server.constraints import constraint_of, enforce
from langchain_quantllm.server.errors import APIError, invalid, unavailable
from langchain_quantllm.server.fields import (
    MOST_SEQUENCES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    is_ids,
)
from langchain_quantllm.server.messages import messages_of
from langchain_quantllm.server.names import name_of

_log = logging.getLogger(__name__)

_SHARED = (
    "n",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "cache_salt",
    "speculation",
)
"""Fields of requests that are generation options of the same name."""

_COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say, as at OpenAI."""

Plan = TypeVar("Plan", bound=PreparedCall)


class ServedModel:
    """A model behind the names that requests call it by.

    Attributes:
        name: The model's own name.
        chat: The model as a chat model.
        closing: Whether no more requests are taken.
        failure: The error of loading, if that failed.
    """

    def __init__(
        self,
        model: QuantizedModel,
        *,
        name: str | None = None,
        max_waiting: int | None = None,
        media_domains: Sequence[str] = (),
    ) -> None:
        """Take a model, loaded or not.

        Args:
            model: A `QuantizedHuggingFaceLLM` or a `ChatQuantizedHuggingFace`; it is not changed.
            name: The name in requests; None is the repository's, or the last part of a folder's path.
            max_waiting: Refuse requests while so many wait; None takes the model's own setting.
            media_domains: The only hosts that images and sounds of messages are fetched from; empty for none.

        Raises:
            InvalidOptionError: If an adapter has the model's name, or a domain is no name of a host.
        """
        changes: dict[str, Any] = {} if max_waiting is None else {"max_waiting": max_waiting}
        self.model = model.model_copy(update=changes)
        as_chat = model if isinstance(model, ChatQuantizedHuggingFace) else ChatQuantizedHuggingFace(llm=model)  # type: ignore[call-arg]
        # A stranger's message must make this machine fetch nothing.
        fetching = {"allowed_domains": list(media_domains), "allow_private_urls": False}
        self.chat = as_chat.model_copy(update={**changes, **fetching})
        self.chat._fetch_rules()
        self.name = name or name_of(model.model_id)
        self.created_s = int(time.time())
        self.closing = False
        self.failure: BaseException | None = None
        self._is_ready = model.is_loaded
        if self.name in model.adapters:
            msg = f"the model and one of its adapters are both named {self.name!r}; give name= another value."
            raise InvalidOptionError(msg)

    # State.

    def load(self) -> None:
        """Load the weights and make the engine; an error is kept in `failure`, and raised."""
        try:
            self.model.load()
            self.chat.load()
            self.engine  # noqa: B018  (makes it)
        except BaseException as error:
            self.failure = error
            raise
        self._is_ready = True

    @property
    def state(self) -> str:
        """`"ok"`, or why there are no answers: `"loading"`, `"failed"`, `"closing"`."""
        if self.closing:
            return "closing"
        return "failed" if self.failure is not None else "ok" if self._is_ready else "loading"

    def check_ready(self) -> None:
        """Check that requests are taken.

        Raises:
            APIError: If not.
        """
        reasons = {
            "closing": "the server is closing; send the request to another one.",
            "failed": "the model could not be loaded; the server's log has the reason.",
            "loading": "the model is being loaded; send the request again later.",
        }
        if (state := self.state) != "ok":
            raise unavailable(reasons[state])

    @property
    def engine(self) -> Engine:
        """The engine of ordinary calls."""
        return self.model._engine(None)

    @property
    def load_now(self) -> EngineLoad | None:
        """The sequences of the engine at this moment; None before there is one."""
        return self.engine.load if self.state in ("ok", "closing") and self._is_ready else None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return require_parts(self.model._loaded()).tokenizer

    # Names.

    @property
    def names(self) -> list[str]:
        """The names that requests may call: the model's, then its adapters'."""
        return [self.name, *self.model.adapters]

    def _adapter(self, name: str | None) -> dict[str, str]:
        """Return the option that chooses what a request calls.

        Raises:
            APIError: If there is nothing of the name.
        """
        if name in (None, self.name):
            return {}
        if name in self.model.adapters:
            return {"adapter": str(name)}
        msg = f"there is no model {str(name)[:200]!r} here; the models are {', '.join(self.names)}."
        raise APIError(404, msg, param="model", code="model_not_found")

    def called(self, body: GenerationBody) -> str:
        """The name of the model that a request calls."""
        return body.model or self.name

    def card(self, name: str) -> dict[str, Any]:
        """Describe a model as `/v1/models` does.

        Raises:
            APIError: If there is none of the name.
        """
        self._adapter(name)
        limits = self.engine.limits
        bounds = [n for n in (limits.context_tokens, limits.cache_tokens) if n is not None]
        return {
            "id": name,
            "object": "model",
            "created": self.created_s,
            "owned_by": "langchain-quantllm",
            "root": self.name,
            "parent": None if name == self.name else self.name,
            "max_model_len": min(bounds, default=None),
        }

    # Calls.

    def plan_completion(self, body: CompletionBody) -> PreparedCall:
        """Plan the call of a completion: `n` requests for each of its prompts, in their order.

        Raises:
            APIError: If the model is unknown, or the request asks for too much.
            QuantLLMError: If an option or a prompt is not possible.
        """
        given = body.prompt
        prompts: list[Any] = [given] if isinstance(given, str) or is_ids(given) else given
        call = self._call(body, max_new_tokens=body.max_tokens or _COMPLETION_TOKENS)
        if body.logprobs is not None:
            call["logprobs"] = body.logprobs
        if body.add_special_tokens is not None:
            call["add_special_tokens"] = body.add_special_tokens
        _check_count(len(prompts), body.n or 1)
        constraint = constraint_of(body)
        options = self.model._options(None, call)
        if constraint is not None:  # a complete text may only end
            options = dataclasses.replace(options, min_new_tokens=0, min_length=0)
        engine = self.model._engine(options)
        rule = enforce(constraint, self.model, options, engine)
        requests = [
            request
            for prompt in prompts
            for request in (
                self.model._requests(prompt, options, engine=engine, **rule)
                if isinstance(prompt, str)
                else self.model._requests_of_ids(prompt, options, engine=engine, **rule)
            )
        ]
        return PreparedCall(
            options=options,
            engine=engine,
            tokenizer=self.tokenizer,
            requests=_with_stops(requests, body.stop_token_ids, engine),
            max_waiting=self.model.max_waiting,
            prompts=prompts,
        )

    def plan_chat(self, body: ChatBody) -> Any:
        """Plan the call of a chat completion: the plan of the chat model.

        Raises:
            APIError: If the model is unknown, or the request asks for too much.
            QuantLLMError: If an option or a message is not possible.
        """
        call = self._call(body)
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            msg = "max_tokens and max_completion_tokens mean the same here; give one of them."
            raise invalid("max_tokens", msg)
        if (most := body.max_completion_tokens or body.max_tokens) is not None:
            call["max_new_tokens"] = most
        elif not (own := self.chat._options(None, {})).asked_new_tokens and own.max_length is None:
            call |= self._whole_context()
        if body.top_logprobs is not None and not body.logprobs:
            msg = "top_logprobs needs logprobs=true."
            raise invalid("top_logprobs", msg)
        if body.logprobs:
            call["logprobs"] = body.top_logprobs or True
        call |= {
            "tools": body.tools or None,
            "tool_choice": body.tool_choice if body.tools or body.tool_choice not in ("auto", "none") else None,
            "parallel_tool_calls": body.parallel_tool_calls,
            "constraint": constraint_of(body),
            "chat_template_kwargs": self._variables(body),
        }
        plan = self.chat._plan(messages_of(body.messages), None, {k: v for k, v in call.items() if v is not None})
        return dataclasses.replace(plan, requests=_with_stops(plan.requests, body.stop_token_ids, plan.engine))

    def _call(self, body: GenerationBody, **more: Any) -> dict[str, Any]:
        """Read the options that all calls share.

        Raises:
            APIError: If there are options of a stream without one, or no model of the name.
        """
        if body.stream_options is not None and not body.stream:
            msg = "stream_options needs stream=true."
            raise invalid("stream_options", msg)
        call = {name: value for name in _SHARED if (value := getattr(body, name)) is not None}
        if body.min_tokens is not None:
            call["min_new_tokens"] = body.min_tokens
        return {**call, **more, **self._adapter(body.model)}

    def _whole_context(self) -> dict[str, int]:
        """Let an answer take what is left of the context; without a bound of it, the default length stays."""
        context = self.engine.limits.context_tokens
        return {} if context is None else {"max_length": context}

    def _variables(self, body: ChatBody | TokenizeBody) -> dict[str, Any] | None:
        """Read the variables of the template.

        Raises:
            APIError: If the template has none for the effort.
        """
        effort = body.reasoning_effort if isinstance(body, ChatBody) else None
        if effort is None:
            return body.chat_template_kwargs
        if not re.search(r"\breasoning_effort\b", self.chat._template().text(tools=False)):
            msg = f"reasoning_effort={effort!r} is not supported: this model's template does not know it; leave it out."
            raise invalid("reasoning_effort", msg, code="unsupported_parameter")
        return {"reasoning_effort": effort, **(body.chat_template_kwargs or {})}

    def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Turn a text or a conversation into token ids.

        Raises:
            APIError: If there are both or neither.
        """
        self._adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            msg = "give prompt, a text, or messages, a conversation; exactly one of them."
            raise invalid("prompt", msg)
        if body.prompt is not None:
            is_special = body.add_special_tokens is not False
            ids = token_ids(self.model._loaded(), body.prompt, add_special_tokens=is_special)
        else:
            call = {"tools": body.tools, "chat_template_kwargs": self._variables(body)}
            ids = self.chat._prompt_ids(messages_of(body.messages or ()), call)
        strings = self.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": self.card(self.name)["max_model_len"],
            "tokens": ids,
            "token_strs": strings,
        }

    def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """Turn token ids into text, special tokens included.

        Raises:
            APIError: If an id is not in the vocabulary.
        """
        self._adapter(body.model)
        size = self.engine.limits.vocab_size
        if outside := [i for i in body.tokens if i >= size]:
            msg = f"token id {outside[0]} is not in the model's vocabulary of {size}."
            raise invalid("tokens", msg)
        text = self.tokenizer.decode(body.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"prompt": str(text)}


def _check_count(prompts: int, n: int) -> None:
    if prompts * n > MOST_SEQUENCES:
        msg = f"{prompts} prompts with n={n} are {prompts * n} sequences; a request may have {MOST_SEQUENCES}."
        raise invalid("prompt", msg)


def _with_stops(requests: Sequence[Request], stops: Sequence[int] | None, engine: Engine) -> list[Request]:
    """Let further tokens end the texts.

    Raises:
        APIError: If one is not in the vocabulary.
    """
    if not stops:
        return list(requests)
    size = engine.limits.vocab_size
    if outside := [i for i in stops if not 0 <= i < size]:
        msg = f"stop_token_ids has {outside[0]}, which is not in the model's vocabulary of {size}."
        raise invalid("stop_token_ids", msg)
    return [dataclasses.replace(r, stop_token_ids=(*r.stop_token_ids, *stops)) for r in requests]
