"""Chat templates as transformers compiles them, with bounds on time, memory and recursion.

Takes transformers' own sandbox, its filters, globals and tags, from its private function, and adds a meter to Jinja's
private ways to run a template: each turn of a loop, call, filter, operator and text that is put together is counted
before it takes long. Owns no bound: `jinja_bounds` does.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from langchain_quantllm.compat.jinja_bounds import (
    DEPTH,
    NESTED_LOOPS,
    SOURCE_CHARS,
    SOURCE_TOKENS,
    Meter,
    TemplateBoundError,
)

_METER: ContextVar[Meter] = ContextVar("quantllm_template_meter")

_STEP, _MADE, _JOINED = "(step)", "(made)", "(joined)"  # filters that no source can name
_WIDE_DATE = re.compile(r"[0-9]{3}")
_UNSAFE_METHODS = frozenset({"encode", "translate", "maketrans", "striptags", "unescape", "to_bytes", "from_bytes"})
"""Methods of texts and numbers that no chat template needs, and whose results are hard to bound."""


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = _METER.get()
        meter.spec(format_spec)
        meter.weight(value)
        return meter.made(super().format_field(value, format_spec))


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' sandbox, metered."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def concat(self, parts: Iterable[str]) -> str:
        meter, found, size = _METER.get(), [], 0
        for part in parts:
            size += len(part)
            meter.size(size)
            found.append(part)
        return str(meter.made("".join(found)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.step()
        if operator == "*":
            _check_product(meter, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            meter.formatting(left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        _METER.get().step()
        if isinstance(obj, str) and attribute in ("format", "format_map"):
            return self._formatter(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _METER.get().step()
        if isinstance(obj, str) and argument in ("format", "format_map"):
            return self._formatter(obj, argument)
        return super().getitem(obj, argument)

    def _formatter(self, text: str, method: str) -> Callable[..., str]:
        def write(*args: Any, **kwargs: Any) -> str:
            if method == "format_map":
                args, kwargs = (), dict(*args)
            return str(_Formatter(self).vformat(text, args, kwargs))

        return write

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, bytes) or (isinstance(obj, str | int | float) and attr in _UNSAFE_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = _METER.get()
        meter.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name in ("format", "format_map"):
                __obj = __self._formatter(owner, name)
            else:
                args = _check_method(meter, owner, name, args)
        meter.depth += 1
        try:
            if meter.depth > DEPTH:
                msg = f"its macros call each other, deeper than {DEPTH}"
                raise TemplateBoundError(msg)
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        finally:
            meter.depth -= 1


def _check_product(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        meter.bits(left.bit_length() + right.bit_length())
        return
    for values, count in ((left, right), (right, left)):
        if isinstance(values, str | list | tuple) and isinstance(count, int):
            meter.size(meter.weight(values) * max(count, 0))


def _check_method(meter: Meter, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check a call of a text's method; returns its arguments, iterators among them read."""
    if name in ("center", "ljust", "rjust", "zfill"):
        meter.width(*args[:1])
    elif name == "expandtabs":
        meter.width(*args[:1])
        meter.size(len(text) * max([8, *(arg for arg in args[:1] if isinstance(arg, int))]))
    elif name == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
        meter.replacing(text, args[0], args[1])
    elif name == "join" and len(args) == 1:
        args = (meter.taken(args[0]),)
        meter.joining(args[0], text)
    return args


# Filters.


def _check_filter(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Check a filter's work before it begins; returns its input, an iterator read where that is needed."""
    given = [*args, *kwargs.values()]
    if name in ("center", "round", "batch", "slice"):
        meter.width(*(arg for arg in given if isinstance(arg, int)))
    elif name == "indent":
        meter.width(*(arg for arg in given if not isinstance(arg, bool)))
        wide = max([4, *(len(a) if isinstance(a, str) else a for a in given if isinstance(a, int | str))])
        meter.size(len(str(value)) + (str(value).count("\n") + 1) * wide)
    elif name == "tojson":
        _check_json(meter, value, given)
    elif name == "replace" and len(given) > 1:
        meter.replacing(str(value), str(given[0]), str(given[1]))
    elif name == "join":
        value = meter.taken(value)
        meter.joining(value, str(given[0]) if given else "")
    elif name == "format":
        meter.formatting(str(value), dict(kwargs) or args)
    elif name == "sum" and not all(isinstance(arg, str | int | float) for arg in given):
        msg = "it adds up lists"  # by making each sum anew
        raise TemplateBoundError(msg)
    elif name in ("pprint", "striptags", "urlize", "wordwrap", "xmlattr"):
        meter.slow(value)
    return value


def _check_json(meter: Meter, value: Any, given: list[Any]) -> None:
    widths = [arg for arg in given if isinstance(arg, int | str) and not isinstance(arg, bool)]
    if widths:
        meter.width(*widths)
        wide = max(len(width) if isinstance(width, str) else width for width in widths)
        meter.size(_lines(value, 1) * wide + meter.weight(value))
    for arg in given:
        if isinstance(arg, tuple | list):
            meter.width(*arg)
            meter.size(meter.weight(value) * (1 + sum(map(meter.weight, arg))))


def _lines(value: Any, depth: int) -> int:
    """Count the levels by which the lines of indented JSON are moved, all together."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return depth
    return depth + sum(_lines(entry, depth + 1) for entry in value)


def _metered(name: str, function: Callable[..., Any], *, is_filter: bool) -> Callable[..., Any]:
    """Wrap a filter or a test of Jinja; its marks, which say what it wants to be passed first, are kept."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.step()
        if not is_filter:
            return function(*args, **kwargs)
        if len(args) > at:
            value = _check_filter(meter, name, args[at], args[at + 1 :], kwargs)
            args = (*args[:at], value, *args[at + 1 :])
        result = function(*args, **kwargs)
        return meter.stepping(result) if isinstance(result, GeneratorType) else meter.made(result)

    return run


def _step(value: Any) -> Any:
    _METER.get().step()
    return value


def _made(value: Any) -> Any:
    meter = _METER.get()
    meter.step()
    return meter.made(value)


def _joined(values: list[Any]) -> str:
    meter = _METER.get()
    meter.step()
    meter.joining(values, "")
    return str(meter.made("".join(map(str, values))))


def _written(value: Any) -> Any:
    """Check a value before it is written into the prompt."""
    _METER.get().weight(value)
    return value


# The tree of a template.


class _Metering(NodeTransformer):
    """Adds calls of the meter where Jinja's compiler asks nobody."""

    _loops = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._loops += 1
        if self._loops > NESTED_LOOPS:
            msg = f"it has loops inside each other, deeper than {NESTED_LOOPS}"
            raise TemplateBoundError(msg)
        self.generic_visit(node)
        self._loops -= 1
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None, lineno=node.lineno), _STEP), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(
                _filtered(nodes.Const(True, lineno=node.lineno), _STEP), node.test, lineno=node.lineno
            )
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _STEP)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def _visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        is_constant = all(isinstance(entry, nodes.Const) for entry in node.items)
        return node if is_target or is_constant else _filtered(node, _MADE)

    visit_List = visit_Tuple = visit_Dict = _visit_literal  # noqa: N815


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Make the environment from transformers' own."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    own = _compile_jinja_template("").environment
    made = _Environment(
        trim_blocks=own.trim_blocks,
        lstrip_blocks=own.lstrip_blocks,
        extensions=[type(extension) for extension in own.extensions.values()],
        optimized=False,
        finalize=_written,
    )
    made.filters = {name: _metered(name, function, is_filter=True) for name, function in own.filters.items()}
    made.filters |= {_STEP: _step, _MADE: _made, _JOINED: _joined}
    made.tests = {name: _metered(name, function, is_filter=False) for name, function in own.tests.items()}
    made.globals = {**made.globals, **own.globals, "strftime_now": _date(own.globals["strftime_now"])}
    made.globals["namespace"] = type("namespace", (own.globals["namespace"],), {"__repr__": lambda _: "<namespace>"})
    del made.globals["lipsum"]
    return made


def _date(write: Callable[[str], str]) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if len(form) > 200 or _WIDE_DATE.search(form):
            msg = f"it asks for the date in the format {form[:50]!r}"
            raise TemplateBoundError(msg)
        return write(form)

    return strftime_now


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    environment = _environment()
    tokens = sum(1 for _ in itertools.islice(environment.lex(source), SOURCE_TOKENS + 1))
    if tokens > SOURCE_TOKENS:  # compiling takes time for each
        msg = f"it has more than {SOURCE_TOKENS} words"
        raise TemplateBoundError(msg)
    tree = _Metering().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.from_string(tree)


def render_chat_template(source: str, variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    Args:
        source: The Jinja template.
        variables: Its variables, made of plain data.

    Returns:
        The text, as transformers renders it.

    Raises:
        TemplateBoundError: If it needs more time or memory than a conversation does.
        Exception: Jinja's and Python's errors in the template.
    """
    if len(source) > SOURCE_CHARS:
        msg = f"it has {len(source)} characters; {SOURCE_CHARS} are allowed"
        raise TemplateBoundError(msg)
    meter = Meter(variables, turns=len(variables.get("messages", ())))
    token = _METER.set(meter)
    try:
        template = _compiled(source)
        meter.start()
        return str(template.render(variables))
    except RecursionError as error:
        msg = "its parts stand inside each other too deeply"
        raise TemplateBoundError(msg) from error
    except MemoryError as error:
        msg = "it needs too much memory"
        raise TemplateBoundError(msg) from error
    finally:
        _METER.reset(token)
