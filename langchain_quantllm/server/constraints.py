"""The form of an answer that a request asks for, as a constraint and as the masks of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from langchain_quantllm.base import QuantizedModel
from langchain_quantllm.chat.options import ChatOptions
from langchain_quantllm.engine.external.spec import ExternalEngineRun
from langchain_quantllm.engine.request import Engine, ModelLimits, OutputForm, TokenMask
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


def form_of(model: QuantizedModel, constraint: Constraint | None, engine: Engine) -> OutputForm | None:
    """Write the constraint of a text as the form that an engine of others knows; None where there is none.

    Raises:
        QuantLLMError: If that engine cannot hold a text to it.
    """
    if constraint is None or model._external() is None:
        return None
    return output_form(constraint, cast("ExternalEngineRun", engine).forms)


def mask_of(
    model: QuantizedModel, constraint: Constraint | None, options: GenerationOptions, limits: ModelLimits
) -> Callable[[], TokenMask] | None:
    """Compile the constraint of a text; None without one, and for an engine of others, which takes a form."""
    if constraint is None or model._external() is not None:
        return None
    compiler: Compiler = model._loaded().remember(
        ("grammars",),
        lambda: Compiler(require_parts(model._loaded()).tokenizer, limits.vocab_size, limits.eos_token_ids),
    )
    most = options.max_new_tokens or limits.context_tokens or 2**31
    return compiler.mask_factory(constraint, most, options.eos_token_id)
