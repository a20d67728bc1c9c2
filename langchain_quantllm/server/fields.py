"""The bodies of requests: which fields there are, which values they take, and what happens with all others.

A field falls into one of four kinds. Those of the models here are carried out. `IGNORED` change no text. `NEUTRAL`
would change it and are not supported: they may have the values that change nothing. Any other name is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from langchain_quantllm.errors import nearest
from langchain_quantllm.server.errors import APIError, invalid
from langchain_quantllm.structured.schema_limits import shortened

MOST_LOGPROBS = 20
"""Alternatives that are listed for a token."""

MOST_SAMPLES = 128
MOST_SEQUENCES = 1024
"""Sequences of one request: its prompts times `n`."""

MOST_MESSAGES = 16384
MOST_TOOLS = 1024
# Every list is bounded, or checked up to its first fault: pydantic collects all of them.

IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that change no text: they are about accounts, storage and speed."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not supported, with the values that change nothing; None is one for each of them."""


class _Fields(BaseModel):
    """An object of JSON: types are not converted, as OpenAI does not either, and None means not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class _Body(_Fields):
    """A body."""

    model: str | None = None


class StreamOptions(_Fields):
    """What a stream reports beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against observers of encrypted traffic; none is sent, as none is promised."""
    continuous_usage_stats: Literal[False] | None = None


class StructuredOutputs(_Fields):
    """The form of the text: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, max_length=4096)
    grammar: str | None = None
    json_object: bool | None = None


class GenerationBody(_Body):
    """The fields that completions and chat completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=128)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    speculation: Literal["draft", "ngram", "forced", "off"] | None = None
    """As a call takes it; no text depends on it."""

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def is_ids(value: Any) -> bool:
    """Whether a value is a list of whole numbers that may be token ids, at least one."""
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _check_prompt(value: Any) -> Any:
    is_list = isinstance(value, list) and bool(value)
    is_right = isinstance(value, str) or is_ids(value)
    if is_right or (is_list and (all(isinstance(v, str) for v in value) or all(map(is_ids, value)))):
        return value
    msg = "a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"
    raise ValueError(msg)


def _check_ids(value: Any) -> Any:
    if value == [] or is_ids(value):
        return value
    msg = "a list of token ids"
    raise ValueError(msg)


class CompletionBody(GenerationBody):
    """The body of `/v1/completions`."""

    prompt: Annotated[Any, AfterValidator(_check_prompt)]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool | None = None


class ChatBody(GenerationBody):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class TokenizeBody(_Body):
    """The body of `/tokenize`: a text, or a conversation."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """The body of `/detokenize`."""

    tokens: Annotated[Any, AfterValidator(_check_ids)]


Body = TypeVar("Body", bound=_Body)


def read_body(content: bytes, kind: type[Body]) -> Body:
    """Read the body of a request.

    Raises:
        APIError: If it is no JSON object, or a field is unknown or has a value that is not allowed.
    """
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        msg = f"the body cannot be read as JSON: {type(error).__name__}."
        raise invalid(None, msg) from error
    if not isinstance(given, dict):
        msg = 'the body is no JSON object; send one, such as {"model": ..., ...}.'
        raise invalid(None, msg)
    try:
        return kind.model_validate(_supported(given, kind))
    except ValidationError as error:
        raise _of_pydantic(error, given) from None


def _supported(given: Mapping[str, Any], kind: type[_Body]) -> dict[str, Any]:
    """Leave out what changes nothing.

    Raises:
        APIError: If another field is unknown, or not supported with its value.
    """
    fields = kind.model_fields
    found = {}
    for name, value in given.items():
        if name in fields:
            found[name] = value
        elif name in NEUTRAL and value is not None and not any(_same(value, v) for v in NEUTRAL[name]):
            allowed = [json.dumps(v) for v in NEUTRAL[name]]
            msg = f"{name}={shortened(repr(value))} is not supported; leave it out{_or_give(allowed)}."
            raise invalid(name, msg, code="unsupported_parameter")
        elif name not in IGNORED and name not in NEUTRAL:
            msg = f"unknown field {shortened(repr(name))}{nearest(name[:100], fields)}"
            raise invalid(name[:100], msg, code="unknown_parameter")
    return found


def _same(value: Any, neutral: Any) -> bool:
    is_bool = isinstance(value, bool), isinstance(neutral, bool)
    return is_bool[0] == is_bool[1] and bool(value == neutral)


def _or_give(allowed: Sequence[str]) -> str:
    return f", or give {' or '.join(allowed)}" if allowed else ""


def _of_pydantic(error: ValidationError, given: Mapping[str, Any]) -> APIError:
    """Turn pydantic's first error into a sentence that names the field."""
    found = error.errors(include_url=False)[0]
    first, *rest = found["loc"] or ("",)
    # Between the fields stand the names of the types that a value might have had.
    path = [
        first,
        *(part for part in rest if isinstance(part, int) or (re.fullmatch(r"[a-z_]+", part) and part != "str")),
    ]
    name = str(first) or None
    if found["type"] == "missing":
        return invalid(name, f"{name} is missing; give it.", code="missing_required_parameter")
    if found["type"] == "extra_forbidden":
        return invalid(name, f"{'.'.join(map(str, path))} is an unknown field; leave it out.", code="unknown_parameter")
    value = found["input"] if len(path) > 1 else given.get(name or "")
    where = ".".join(map(str, path))
    same = [e["msg"] for e in error.errors(include_url=False) if e["loc"][:1] == found["loc"][:1]]
    needs = " or ".join(dict.fromkeys(re.sub("^(Input should be|Value error,) ", "", m) for m in same[:4]))
    return invalid(name, f"{where}={shortened(repr(value))} is not allowed; it must be {needs}.")
