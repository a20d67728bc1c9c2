"""The compiler of constraints: xgrammar's grammars, compiled once for a model and cached.

Owns the layout of each constraint for xgrammar, and the cache. Of the engine it knows the hook, `TokenMask`.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.engine.request import TokenMask
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, UnsupportedError, pip_install
from langchain_quantllm.structured.call_layout import after_reasoning, calls_layout, has_trigger, value_ends, writable
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
from langchain_quantllm.structured.json_schema import StrictSchema, check_pattern, longest
from langchain_quantllm.structured.mask import CompiledConstraint, GrammarMask, Vocabulary

_CACHED = 32
_CACHE_BYTES = 256 << 20


class _Layout(NamedTuple):
    """A constraint in xgrammar's terms, the most tokens needed to close it, and whether that grows with nesting."""

    format: dict[str, Any]
    reserve: int
    grows: bool


class Compiler:
    """Makes masks for one model, for any number of threads.

    Args:
        tokenizer: The tokenizer of transformers.
        vocab_size: Width of the model's logits, which may be more than the tokenizer's tokens.
        eos_token_ids: Tokens that end a text. Without any, a complete text is followed by blanks.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, CompiledConstraint] = OrderedDict()
        self._compiler: Any = None
        self._vocabulary: Vocabulary

    def mask_factory(
        self, constraint: Constraint, max_new_tokens: int, eos_token_ids: Sequence[int] | None = None
    ) -> Callable[[], TokenMask] | None:
        """Compile a constraint, or take it from the cache.

        Args:
            constraint: The constraint of the text.
            max_new_tokens: Tokens that the text may take; it is closed before they run out.
            eos_token_ids: The request's own end tokens; None for the model's.

        Returns:
            A function that makes the mask of a row; None if nothing can be enforced, as with optional calls in a format
            that has no opening mark.

        Raises:
            InvalidOptionError: If the schema, expression or grammar cannot be enforced.
            MissingPackageError: If xgrammar is not installed.
            UnsupportedError: If xgrammar cannot read the tokenizer.
        """
        if not is_installed("xgrammar"):
            msg = f"constrained decoding needs xgrammar: {pip_install('langchain-quantllm[structured]')}."
            raise MissingPackageError(msg)
        import xgrammar

        if isinstance(constraint, ToolCalls) and constraint.mode == "auto" and not has_trigger(constraint.format):
            return None
        with self._lock:
            if self._compiler is None:
                self._start()
            compiled = self._compiled.pop(constraint, None) or self._compile(constraint)
            self._compiled[constraint] = compiled
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        own = self._eos if eos_token_ids is None else tuple(i for i in eos_token_ids if i < self._vocab_size)
        stops = self._vocabulary.bits(own) if own else None
        override = list(own) if own and own != self._eos else None

        def make() -> TokenMask:
            matcher = xgrammar.GrammarMatcher(compiled.grammar, override_stop_tokens=override)
            return GrammarMask(compiled, self._vocabulary, matcher, max_new_tokens, stops)

        return make

    def _start(self) -> None:
        import xgrammar

        tokenizer = self._tokenizer
        try:
            read = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=self._vocab_size, stop_token_ids=list(self._eos) or [0]
            )
        except (ValueError, RuntimeError) as error:
            msg = f"xgrammar cannot read the tokenizer {type(tokenizer).__name__}: {_reason(error)}"
            raise UnsupportedError(msg) from error
        tokens = read.decoded_vocab
        if not self._eos:  # from_huggingface takes the tokenizer's own, at which the engine does not stop
            read = xgrammar.TokenizerInfo(tokens, vocab_size=self._vocab_size, stop_token_ids=[])
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self._vocabulary = Vocabulary(tokens, (i for i in special if i < self._vocab_size), self._eos)
        self._compiler = xgrammar.GrammarCompiler(read, max_threads=4, cache_limit_bytes=_CACHE_BYTES)

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        is_auto = isinstance(constraint, ToolCalls) and constraint.mode == "auto"
        try:
            layout, reserve, grows = _layout(constraint)
            style = marks = ""
            ends: tuple[str, ...] = ()
            endings: tuple[str, ...] = ()
            parts = constraint.options if isinstance(constraint, Either) else (constraint,)
            calls = next((part for part in parts if isinstance(part, ToolCalls)), None)
            if any(isinstance(part, JSONSchema | JSONObject) for part in parts):
                style = "json"
            if calls is not None:
                written = writable(calls.format)
                ends = value_ends(written)
                style, endings = written.style, (written.call_end + written.closing, written.closing)
                marks = "\n".join((written.opening, written.call, *endings))
            if constraint.reasoning is not None:
                layout = after_reasoning(layout, constraint.reasoning, may_end_open=is_auto)
                marks += "\n".join(constraint.reasoning[:2])
            grammar = self._compiler.compile_structural_tag({"type": "structural_tag", "format": layout})
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            msg = f"{constraint!r} cannot be enforced: {_reason(error)}"
            raise InvalidOptionError(msg) from error
        words = self._vocabulary
        return CompiledConstraint(
            grammar=grammar,
            reserve=reserve,
            grows=grows,
            style=style,
            endings=tuple(e.encode() for e in endings),
            value_ends=tuple(e.encode() for e in ends),
            is_auto=is_auto,
            allowed_outside=~words.bits(
                i for i in words.special if words.tokens[i].decode(errors="replace") not in marks
            ),
            reasoning=constraint.reasoning,
        )


def _reason(error: Exception) -> str:
    """Return an error's message without xgrammar's time and source line."""
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip() or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _json(schema: Any, style: str = "json") -> _Layout:
    """Lay out a schema for xgrammar."""
    strict = StrictSchema(schema)
    result = strict.result()
    layout = {"type": "json_schema", "json_schema": result, "style": style, "max_whitespace_cnt": 1}
    return _Layout(layout, longest(result, result.get("$defs", {})) // 2 + 12, strict.is_recursive)


def _layout(constraint: Constraint) -> _Layout:
    """Lay out a constraint for xgrammar, without its reasoning."""
    if isinstance(constraint, JSONSchema):
        return _json(json.loads(str(constraint.schema)))
    if isinstance(constraint, JSONObject):
        return _json({"type": "object"})
    if isinstance(constraint, Choice):
        options = [{"type": "const_string", "value": o} for o in constraint.options]
        return _Layout({"type": "or", "elements": options}, max(map(len, constraint.options)), False)
    if isinstance(constraint, Regex):
        check_pattern(constraint.pattern)
        return _Layout({"type": "regex", "pattern": constraint.pattern}, 16, True)
    if isinstance(constraint, Grammar):
        return _Layout({"type": "grammar", "grammar": constraint.ebnf}, 16, True)
    if isinstance(constraint, Either):
        layouts, reserves, growing = zip(*map(_layout, constraint.options), strict=True)
        return _Layout({"type": "or", "elements": list(layouts)}, max(reserves), any(growing))
    if isinstance(constraint, ToolCalls):
        return _Layout(*calls_layout(constraint, _json))
    msg = f"{type(constraint).__name__} is not a known constraint"
    raise TypeError(msg)
