"""Constrained decoding: the constraints of a text, and the masks that enforce them token by token.

JSON is written in the order of the schema's properties, with at most one blank between its parts. Characters are
written as themselves, never as the escapes of their code points. Schemas are closed: an object that names properties
has no others. `UNENFORCED` lists the keywords of a schema that have no effect.
"""

from __future__ import annotations

from langchain_quantllm.structured.compiler import Compiler
from langchain_quantllm.structured.constraints import (
    Choice,
    Constraint,
    Either,
    Grammar,
    JSONObject,
    JSONSchema,
    Regex,
    ToolCalls,
)
from langchain_quantllm.structured.forms import output_form
from langchain_quantllm.structured.json_schema import UNENFORCED, checked_schema
from langchain_quantllm.structured.mask import GrammarMask

__all__ = [
    "UNENFORCED",
    "Choice",
    "Compiler",
    "Constraint",
    "Either",
    "Grammar",
    "GrammarMask",
    "JSONObject",
    "JSONSchema",
    "Regex",
    "ToolCalls",
    "checked_schema",
    "output_form",
]
