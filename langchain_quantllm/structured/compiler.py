"""The compiler of constraints: xgrammar's grammars, compiled once for a model and cached.

Owns the layout of each constraint for xgrammar, and the cache. Of the engine it knows the hook, `TokenMask`.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.engine.request import TokenMask
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, UnsupportedError, pip_install
from langchain_quantllm.structured.automaton import compile_cost
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
from langchain_quantllm.structured.grammar_limits import checked_grammar
from langchain_quantllm.structured.json_schema import StrictSchema, longest, required_length
from langchain_quantllm.structured.mask import CompiledConstraint, GrammarMask, Vocabulary
from langchain_quantllm.structured.patterns import expression, read
from langchain_quantllm.structured.schema_limits import PATTERN_COST, Budget, read_json, shortened

_CACHED = 32
_CACHE_BYTES = 256 << 20


class _Layout(NamedTuple):
    """A constraint in xgrammar's terms, and the most tokens needed to close it: at first, and for each open object.

    The last is 0 where that number does not grow with nesting.
    """

    format: dict[str, Any]
    reserve: int
    object_reserve: int


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
        self._lock = threading.Lock()  # of the cache; nothing is compiled under it
        self._start_lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, Future[CompiledConstraint]] = OrderedDict()
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
        if isinstance(constraint, ToolCalls) and constraint.mode == "auto" and not has_trigger(constraint.format):
            return None
        compiled = self._get_or_compile(constraint)
        own = self._eos if eos_token_ids is None else tuple(i for i in eos_token_ids if i < self._vocab_size)
        stops = self._vocabulary.bits(own) if own else None
        override = list(own) if own and own != self._eos else None

        def make() -> TokenMask:
            import xgrammar

            matcher = xgrammar.GrammarMatcher(compiled.grammar, override_stop_tokens=override)
            return GrammarMask(compiled, self._vocabulary, matcher, max_new_tokens, stops)

        return make

    def _get_or_compile(self, constraint: Constraint) -> CompiledConstraint:
        """Return a compiled constraint; of the threads that ask for one at once, the first compiles it.

        Other constraints are compiled, or taken from the cache, meanwhile: xgrammar works without the GIL.
        """
        with self._lock:
            compiled = self._compiled.pop(constraint, None)
            is_first = compiled is None
            compiled = compiled or Future()
            self._compiled[constraint] = compiled
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        if is_first:
            try:
                compiled.set_result(self._compile(constraint))
            except BaseException as error:
                with self._lock:
                    self._compiled.pop(constraint, None)
                compiled.set_exception(error)
                raise
        try:
            return compiled.result()
        except InvalidOptionError as error:  # of another thread: with a traceback of its own
            raise InvalidOptionError(*error.args) from error

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
        special = {i for i in special if i < self._vocab_size}
        self._vocabulary = Vocabulary(tokens, special, self._eos, self._encode)
        self._compiler = xgrammar.GrammarCompiler(read, max_threads=4, cache_limit_bytes=_CACHE_BYTES)

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        is_auto = isinstance(constraint, ToolCalls) and constraint.mode == "auto"
        try:
            layout, reserve, object_reserve = lay_out(constraint, Budget())
            marks = _marks(constraint)
            if constraint.reasoning is not None:
                layout = after_reasoning(layout, constraint.reasoning, may_end_open=is_auto)
            with self._start_lock:
                if self._compiler is None:
                    self._start()
            grammar = self._compiler.compile_structural_tag({"type": "structural_tag", "format": layout})
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
            if isinstance(error, UnsupportedError):
                raise
            msg = f"{shortened(repr(constraint), 300)} cannot be enforced: {_reason(error)}"
            raise InvalidOptionError(msg) from error
        words = self._vocabulary
        return CompiledConstraint(
            grammar=grammar,
            reserve=reserve,
            object_reserve=object_reserve,
            style=marks.style,
            endings=tuple(e.encode() for e in marks.endings),
            value_ends=tuple(e.encode() for e in marks.value_ends),
            is_auto=is_auto,
            allowed_outside=~words.bits(
                i for i in words.special if words.tokens[i].decode(errors="replace") not in marks.written
            ),
            reasoning=constraint.reasoning,
        )


class _Marks(NamedTuple):
    """What a constraint's texts are marked with.

    Args:
        style: The notation of its values; empty where it has none.
        endings: The ends of its calls.
        value_ends: The ends of a value in XML.
        written: All marks that it may write.
    """

    style: str
    endings: tuple[str, ...]
    value_ends: tuple[str, ...]
    written: str


def _marks(constraint: Constraint) -> _Marks:
    parts = constraint.options if isinstance(constraint, Either) else (constraint,)
    style = "json" if any(isinstance(part, JSONSchema | JSONObject) for part in parts) else ""
    written = "" if constraint.reasoning is None else "\n".join(constraint.reasoning[:2])
    calls = next((part for part in parts if isinstance(part, ToolCalls)), None)
    if calls is None:
        return _Marks(style, (), (), written)
    tools = writable(calls.format)
    endings = (tools.call_end + tools.closing, tools.closing)
    written = "\n".join((written, tools.opening, tools.call, *endings))
    return _Marks(tools.style, endings, value_ends(tools), written)


def _reason(error: Exception) -> str:
    """Return an error's message without xgrammar's time and source line."""
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip() or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _json(schema: Any, budget: Budget, style: str = "json") -> _Layout:
    """Lay out a schema for xgrammar."""
    strict = StrictSchema(schema, budget)
    result = strict.result()
    layout = {"type": "json_schema", "json_schema": result, "style": style, "max_whitespace_cnt": 1}
    object_reserve = required_length(result) // 2 + 2 if strict.is_recursive else 0
    return _Layout(layout, longest(result, result.get("$defs", {})) // 2 + 12, object_reserve)


def lay_out(constraint: Constraint, budget: Budget) -> _Layout:
    """Lay out a constraint for xgrammar, without its reasoning.

    Args:
        constraint: The constraint.
        budget: What its patterns and literals may cost together.

    Raises:
        ValueError: If it cannot be enforced; also TypeError, LookupError and the others that `Compiler` turns into an
            `InvalidOptionError`.
    """
    if isinstance(constraint, JSONSchema):
        return _json(read_json(str(constraint.schema)), budget)
    if isinstance(constraint, JSONObject):
        return _json({"type": "object"}, budget)
    if isinstance(constraint, Choice):
        for option in constraint.options:
            budget.add_literal(option)
        options = [{"type": "const_string", "value": o} for o in constraint.options]
        return _Layout({"type": "or", "elements": options}, max(map(len, constraint.options)), 0)
    if isinstance(constraint, Regex):
        tree = read(constraint.pattern).whole
        pattern = expression(tree, in_json=False)
        budget.add_pattern(pattern, compile_cost(tree, PATTERN_COST))
        return _Layout({"type": "regex", "pattern": pattern}, 16, 1)
    if isinstance(constraint, Grammar):
        return _Layout({"type": "grammar", "grammar": checked_grammar(constraint.ebnf)}, 16, 1)
    if isinstance(constraint, Either):
        layouts, reserves, growing = zip(*(lay_out(option, budget) for option in constraint.options), strict=True)
        return _Layout({"type": "or", "elements": list(layouts)}, max(reserves), max(growing))
    if isinstance(constraint, ToolCalls):
        return _Layout(*calls_layout(constraint, lambda schema, style: _json(schema, budget, style)))
    msg = f"{type(constraint).__name__} is not a known constraint"
    raise TypeError(msg)
