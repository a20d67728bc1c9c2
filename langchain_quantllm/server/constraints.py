"""The form of an answer that a request asks for, as a constraint and in the engine's terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from langchain_quantllm.base import QuantizedModel
from langchain_quantllm.chat.options import ChatOptions
from langchain_quantllm.engine.request import Engine
from langchain_quantllm.loading.inputs import require_parts
from langchain_quantllm.options import GenerationOptions
from langchain_quantllm.server.errors import invalid
from langchain_quantllm.server.fields import GenerationBody, StructuredOutputs
from langchain_quantllm.structured import (
    Choice,
    Compiler,
    Constraint,
    Grammar,
    JSONObject,
    JSONSchema,
    Regex,
    output_form,
)

if TYPE_CHECKING:
    from langchain_quantllm.engine.external.spec import ExternalEngineRun

_KINDS: dict[str, Callable[[Any], Constraint]] = {
    "json_": JSONSchema,
    "regex": Regex,
    "choice": lambda options: Choice(tuple(options)),
    "grammar": Grammar,
    "json_object": lambda _: JSONObject(),
}


def constraint_of(body: GenerationBody) -> Constraint | None:
    """Read the form of the answer from a request; None for any text.

    Raises:
        APIError: If there are two.
        InvalidOptionError: If it cannot be understood.
    """
    form = None if body.structured_outputs is None else _structured(body.structured_outputs)
    wanted = ChatOptions.of({"response_format": body.response_format}).constraint
    if form is not None and wanted is not None:
        msg = "structured_outputs and response_format both give the form of the answer; give one of them."
        raise invalid("structured_outputs", msg)
    return form or wanted


def _structured(form: StructuredOutputs) -> Constraint:
    given = {name: value for name in _KINDS if (value := getattr(form, name)) not in (None, False)}
    if len(given) != 1:
        names = ", ".join(name.rstrip("_") for name in _KINDS)
        msg = f"structured_outputs has {len(given)} forms; give exactly one of {names}."
        raise invalid("structured_outputs", msg)
    [(name, value)] = given.items()
    return _KINDS[name](value)


def enforce(
    constraint: Constraint | None, model: QuantizedModel, options: GenerationOptions, engine: Engine
) -> dict[str, Any]:
    """Write the constraint of a text in the engine's terms, as arguments of its requests.

    Args:
        constraint: The constraint; None without one.
        model: The model.
        options: The options of the call.
        engine: Its engine; one of others has an automaton of its own.

    Raises:
        QuantLLMError: If the engine cannot hold a text to it.
    """
    if constraint is None:
        return {}
    loaded = model._loaded()
    if loaded.external is not None:
        return {"form": output_form(constraint, cast("ExternalEngineRun", engine).forms)}
    limits = engine.limits
    compiler: Compiler = loaded.remember(
        ("grammars",), lambda: Compiler(require_parts(loaded).tokenizer, limits.vocab_size, limits.eos_token_ids)
    )
    most = options.max_new_tokens or limits.context_tokens or 2**31
    return {"mask": compiler.mask_factory(constraint, most, options.eos_token_id)}
