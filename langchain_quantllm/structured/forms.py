"""Constraints as forms that an engine of others enforces, by an automaton of its own.

Only the layout is ours: schemas are closed and calls written as in `compiler`. That a text is closed before its tokens
run out is the work of `mask`, which no other engine has.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.compat.xgrammar_gbnf import to_gbnf
from langchain_quantllm.engine.request import OutputForm
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, UnsupportedError, pip_install
from langchain_quantllm.structured.call_layout import after_reasoning, has_trigger
from langchain_quantllm.structured.compiler import lay_out
from langchain_quantllm.structured.constraints import (
    Choice,
    Constraint,
    Grammar,
    JSONObject,
    JSONSchema,
    Regex,
    ToolCalls,
)
from langchain_quantllm.structured.schema_limits import Budget, shortened

TAG = "structural_tag"


def output_form(constraint: Constraint, kinds: Collection[str]) -> OutputForm | None:
    """Write a constraint as a form that an engine knows.

    Args:
        constraint: The constraint.
        kinds: The kinds of form that the engine knows.

    Returns:
        The form; None if nothing can be enforced, as with optional calls in a format that has no opening mark.

    Raises:
        InvalidOptionError: If the schema, expression or grammar cannot be enforced.
        MissingPackageError: If xgrammar is needed to write it as a grammar, and not installed.
        UnsupportedError: If the engine knows no kind that can say it.
    """
    is_auto = isinstance(constraint, ToolCalls) and constraint.mode == "auto"
    if isinstance(constraint, ToolCalls) and is_auto and not has_trigger(constraint.format):
        return None
    try:
        layout = lay_out(constraint, Budget()).format
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        msg = f"{shortened(repr(constraint), 300)} cannot be enforced: {str(error).rstrip('.')}."
        raise InvalidOptionError(msg) from error
    plain = None if constraint.reasoning is not None else _plain_form(constraint, layout)
    if plain is not None and plain.kind in kinds:
        return plain
    if constraint.reasoning is not None:
        layout = after_reasoning(layout, constraint.reasoning, may_end_open=is_auto)
    tag = json.dumps({"type": TAG, "format": layout}, ensure_ascii=False)
    if TAG in kinds:
        return OutputForm(kind=TAG, value=tag)
    if "grammar" in kinds:
        return OutputForm(kind="grammar", value=_grammar_of(tag))
    if "gbnf" in kinds:
        try:
            return OutputForm(kind="gbnf", value=to_gbnf(_grammar_of(tag)))
        except ValueError as error:
            msg = f"the engine cannot hold a text to {type(constraint).__name__}: {error}; use engine='auto'."
            raise UnsupportedError(msg) from error
    needed = f"grammar or {TAG}" if plain is None else f"{plain.kind} or {TAG}"
    known = f"it knows {', '.join(sorted(kinds))}" if kinds else "it knows none"
    msg = (
        f"the engine cannot hold a text to {type(constraint).__name__}, which takes a form of the kind {needed}, and "
        f"{known}; leave it out, or use engine='auto'."
    )
    raise UnsupportedError(msg)


def _grammar_of(tag: str) -> str:
    """Write a structural tag as a grammar in EBNF.

    Raises:
        MissingPackageError: If xgrammar, which writes it, is not installed.
    """
    if not is_installed("xgrammar"):
        msg = (
            "the engine knows no structural tags, and xgrammar would write a grammar for it: "
            f"{pip_install('langchain-quantllm[structured]')}."
        )
        raise MissingPackageError(msg)
    import xgrammar

    return str(xgrammar.Grammar.from_structural_tag(tag))


def _plain_form(constraint: Constraint, layout: dict[str, Any]) -> OutputForm | None:
    """Write a constraint as a form that says it alone; None if only a structural tag does."""
    if isinstance(constraint, JSONSchema | JSONObject):
        return OutputForm(kind="json", value=json.dumps(layout["json_schema"], ensure_ascii=False))
    if isinstance(constraint, Regex):
        return OutputForm(kind="regex", value=layout["pattern"])
    if isinstance(constraint, Choice):
        return OutputForm(kind="choice", value=constraint.options)
    if isinstance(constraint, Grammar):
        return OutputForm(kind="grammar", value=layout["grammar"])
    return None
