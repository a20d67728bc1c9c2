"""JSON schemas made stricter, so that every text that xgrammar accepts for them is valid.

Owns the rewriting, and the estimate of a value's length. Makes no grammar.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured.automaton import compile_cost
from langchain_quantllm.structured.constraints import frozen_text
from langchain_quantllm.structured.pattern_lengths import lengths, within
from langchain_quantllm.structured.patterns import expression, read
from langchain_quantllm.structured.scalar_schemas import FORMATS, XGRAMMAR_FORMATS, number, text
from langchain_quantllm.structured.schema_limits import PATTERN_COST, Budget, check_json, checked, shortened
from langchain_quantllm.structured.schema_merge import NothingValidError, fits, matches, merged

UNENFORCED = (
    "not",
    "if",
    "then",
    "else",
    "contains",
    "uniqueItems",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentEncoding",
    "patterns beside a format",
    "patternProperties where several match a name",
    "minProperties where a name is repeated",
    "what an enum or const says of objects and arrays beside other keywords of theirs",
    "oneOf where several branches match",
    "formats other than date, date-time, naive-date-time, time, naive-time, duration, email, uri, uuid, uuid1 to "
    "uuid8, ipv4, ipv6, hostname, json-pointer and relative-json-pointer",
)
"""Keywords of JSON schema that the masks do not enforce; the reader of the answer must check them."""


_KINDS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_KEYWORDS = {
    *(k for keywords in _KINDS.values() for k in keywords),
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "propertyNames", "maxProperties"),
}
_LONGEST = 10**6  # of the estimates of a value's characters


class StrictSchema:
    """Rewrites a schema so that every text that xgrammar accepts for it is valid; all references in one table.

    Args:
        root: The schema, as `schema_limits.check_json` allows it.
        budget: The work that it may take, which several schemas of one grammar share.
    """

    def __init__(self, root: Any, budget: Budget | None = None) -> None:
        self._root = root
        self._budget = budget or Budget()
        self._names: dict[str, str] = {}
        self._numbers = itertools.count()
        self._defs: dict[str, Any] = {}
        self.is_recursive = False

    def result(self) -> Any:
        """Return the schema with its definitions.

        Raises:
            ValueError: If it cannot be enforced, is not a schema, or is too large.
        """
        schema = self._node(self._root)
        if self._defs:
            check_ends(schema, self._defs)
            return {"anyOf": [schema], "$defs": self._defs}
        return schema

    def _target(self, ref: str) -> Any:
        if not ref.startswith("#"):
            msg = f"$ref {shortened(ref)!r} leads out of the schema"
            raise ValueError(msg)
        target = self._root
        for part in ref[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (LookupError, TypeError, ValueError):
                msg = f"$ref {shortened(ref)!r} leads nowhere"
                raise ValueError(msg) from None
        return target

    def _reference(self, ref: str) -> dict[str, Any]:
        if ref not in self._names:
            self._names[ref] = name = f"r{next(self._numbers)}"
            try:
                self._defs[name] = self._node(self._target(ref))
            except NothingValidError:
                del self._names[ref]  # the next use of the reference raises, too
                raise
        elif self._names[ref] not in self._defs:  # a caller is writing it
            self.is_recursive = True
        return {"$ref": f"#/$defs/{self._names[ref]}"}

    def _read(self, given: Any) -> dict[str, Any]:
        """Return the keywords of a schema that are enforced, checked."""
        if not isinstance(given, bool | dict):
            msg = f"{shortened(given)!r} is not a schema"
            raise ValueError(msg)
        self._budget.add_schema()
        schema = {} if given is True or given is False else {k: v for k, v in given.items() if k in _KEYWORDS}
        if isinstance(items := schema.get("items"), list):  # the form of drafts before 2020-12
            rest = given.get("additionalItems", True) if isinstance(given, dict) else True
            schema = {**schema, "prefixItems": items, "items": rest}
        return checked(schema)

    def _open(self, given: Any) -> dict[str, Any]:
        """Follow a reference, so that the schema can be merged with another."""
        if given is False:
            return {"enum": []}  # xgrammar refuses false here
        schema = self._read(given)
        if "oneOf" in schema and "anyOf" not in schema:
            schema["anyOf"] = schema.pop("oneOf")
        ref = schema.pop("$ref", None)
        if ref is None:
            return schema
        with self._budget.deeper():
            return merged(self._open(self._target(ref)), schema)

    def _node(self, given: Any) -> Any:
        """Rewrite a schema."""
        if given is False:
            return False
        schema = self._read(given)
        ref = schema.get("$ref")
        with self._budget.deeper():
            if ref is not None and len(schema) == 1:
                return self._reference(ref)
            parts = schema.pop("allOf", [])
            for part in parts:
                schema = merged(self._open(schema), self._open(part))
            return self._node(self._open(schema)) if parts or ref is not None else self._plain(schema)

    def _plain(self, schema: dict[str, Any]) -> Any:
        """Rewrite a schema without references and allOf."""
        if branches := schema.pop("anyOf", None) or schema.pop("oneOf", None):
            return self._any([{"allOf": [schema, b]} if schema else b for b in branches if b is not False])
        if "enum" in schema or "const" in schema:
            return self._values(schema)
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._any([{**schema, "type": k} for k in kind])
        kind = kind or next((k for k, keywords in _KINDS.items() if any(w in schema for w in keywords)), None)
        schema = {} if kind is None else {**schema, "type": kind}
        self.is_recursive |= not schema  # any value holds any values
        if kind in ("integer", "number"):
            return number(schema, self._budget)
        if kind == "string":
            return text(schema, self._budget)
        write = {"object": self._object, "array": self._array}
        return write[kind](schema) if kind in write else schema

    def _values(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Rewrite a choice of values."""
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        rest = {k: v for k, v in schema.items() if k != "enum"}
        if found := [value for value in values if fits(value, rest)]:
            for value in found:
                self._budget.add_literal(frozen_text(value))
            return {"enum": found}
        msg = f"of {shortened(frozen_text(values))} nothing is valid beside {shortened(frozen_text(schema), 200)}"
        raise NothingValidError(msg)

    def _any(self, branches: list[Any]) -> dict[str, Any]:
        """Rewrite branches, without those under which nothing is valid."""
        nodes, failure = [], NothingValidError("of no branches one is to be valid")
        for branch in branches:
            try:
                nodes.append(self._node(branch))
            except NothingValidError as error:
                failure = error
        if not nodes:
            raise failure
        return {"anyOf": nodes}

    def _object(self, schema: dict[str, Any]) -> dict[str, Any]:
        required = schema.get("required", [])
        extra = schema.get("additionalProperties", not ({"properties", "patternProperties"} & set(schema)))
        declared = schema.get("properties", {})
        # xgrammar forgets properties that are required but not declared.
        given = {**declared, **{k: extra or {} for k in required if k not in declared}}
        # Nor does it apply the patterns of names to declared properties, or forbid undeclared ones that match them.
        patterns = schema.get("patternProperties", {})
        names = self._open(schema.pop("propertyNames", True))
        self._budget.add_matches(len(given) * len(patterns))
        for name in given:
            self._budget.add_literal(name)
            if found := [s for pattern, s in patterns.items() if matches(pattern, name)]:
                given[name] = {"allOf": [given[name], *found]}
            if not fits(name, names):
                given[name] = False
        wanted = set(required)
        schema["properties"] = {k: v for k, p in given.items() if (v := self._property(p, k in wanted)) is not False}
        schema["additionalProperties"] = False if patterns or (names and given) else self._node(extra)
        if names and not patterns and not given and extra is not False:
            schema["propertyNames"] = self._names_of(names)
        if patterns:
            schema["patternProperties"] = {self._pattern(k): self._node(v) for k, v in patterns.items()}
        return schema

    def _pattern(self, pattern: str, least: int = 0, most: int | None = None) -> str:
        """Rewrite a pattern of names, which matches whole ones."""
        tree = within(read(pattern).whole, least, most)
        if tree is None or lengths(tree) == (0, 0):
            msg = f"of the names of the pattern {pattern!r} none is found with {least} to {most} characters"
            raise NothingValidError(msg)
        written = expression(tree, in_json=True)
        self._budget.add_pattern(written, compile_cost(tree, PATTERN_COST))
        return f"^({written})$"

    def _names_of(self, names: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the schema of an object's names."""
        if "enum" in names or "const" in names:
            values = self._values({**names, "type": "string"})
            return {"enum": values["enum"]}
        kind = names.get("format")
        if kind in XGRAMMAR_FORMATS:
            return {"format": kind}
        pattern = FORMATS.get(str(kind), names.get("pattern", ".*"))
        return {"pattern": self._pattern(pattern, names.get("minLength", 0), names.get("maxLength"))}

    def _property(self, schema: Any, is_required: bool) -> Any:
        """Rewrite a property; False to leave it out, as nothing is valid for it."""
        try:
            node = self._node(schema)
        except NothingValidError:
            node = False
            if is_required:
                raise
        if node is False and is_required:
            msg = f"a property is required for which {schema!r} allows no value"
            raise NothingValidError(msg)
        return node

    def _array(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "prefixItems" in schema:
            schema["prefixItems"] = [self._node(v) for v in schema["prefixItems"]]
        if "items" in schema or "prefixItems" not in schema:
            schema["items"] = self._node(schema.get("items", True))
        return schema


def checked_schema(schema: Mapping[str, Any]) -> None:
    """Check that a schema can be enforced, before a model is asked.

    Raises:
        InvalidOptionError: If not.
    """
    try:
        check_json(schema)
        StrictSchema(schema).result()
    except (ValueError, RecursionError) as error:
        msg = f"the schema {shortened(frozen_text(schema.get('title', '')))} cannot be enforced: {error}."
        raise InvalidOptionError(msg) from error


def check_ends(schema: Any, defs: Mapping[str, Any]) -> None:
    """Check that values of a schema can come to an end.

    Raises:
        ValueError: If a definition is nothing but itself, or each of its values holds another one.
    """
    ending: set[str] = set()
    while found := {name for name, node in defs.items() if name not in ending and _can_end(node, ending)}:
        ending |= found
    if len(ending) < len(defs) or not _can_end(schema, ending):
        msg = "a $ref leads back to itself without an end: each value would hold another one"
        raise ValueError(msg)
    for name in defs:
        waiting, seen = [defs[name]], set()
        while waiting:
            node = waiting.pop()
            if not isinstance(node, dict):
                continue
            waiting += node.get("anyOf", ())
            if "$ref" in node:
                inner = node["$ref"].rpartition("/")[2]
                if inner == name:
                    msg = "a $ref leads back to itself: a schema is one of its own alternatives"
                    raise ValueError(msg)
                if inner not in seen:
                    seen.add(inner)
                    waiting.append(defs[inner])


def _can_end(node: Any, ending: set[str]) -> bool:
    """Whether a rewritten schema has a value that holds only definitions of a set."""
    if not isinstance(node, dict):
        return True
    if "$ref" in node:
        return node["$ref"].rpartition("/")[2] in ending
    if "anyOf" in node:
        return any(_can_end(branch, ending) for branch in node["anyOf"])
    if node.get("type") == "object":
        properties = node.get("properties", {})
        return all(_can_end(properties[name], ending) for name in node.get("required", ()) if name in properties)
    if node.get("type") == "array" and (least := node.get("minItems", 0)):
        items = node.get("prefixItems", [])
        return all(
            _can_end(item, ending) for item in [*items[:least], *([node.get("items")] if len(items) < least else [])]
        )
    return True


def required_length(schema: Any) -> int:
    """Estimate the most characters that the required properties of an object in a schema need, without values."""
    if isinstance(schema, list):
        return max(map(required_length, schema), default=0)
    if not isinstance(schema, dict):
        return 0
    own = sum(len(str(key).encode()) + 8 for key in schema.get("required", ()) if isinstance(key, str))
    return max([own, *map(required_length, schema.values())])


def longest(schema: Any, defs: Mapping[str, Any], known: dict[str, int] | None = None) -> int:
    """Estimate the characters of a value with every property and one element in each array.

    Args:
        schema: A rewritten schema.
        defs: Its definitions.
        known: The estimates of definitions so far; 4 for those in which this one stands.
    """
    known = {} if known is None else known
    if not isinstance(schema, dict):
        return 4
    if (ref := schema.get("$ref")) is not None:
        name = str(ref).rpartition("/")[2]
        if name not in known:
            known[name] = 4
            known[name] = longest(defs[name], defs, known)
        return known[name]
    if "anyOf" in schema:
        return max([4, *(longest(s, defs, known) for s in schema["anyOf"])])
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return max(len(frozen_text(v).encode()) + 2 for v in [0, *values])
    if schema.get("type") == "object":
        parts = [len(k.encode()) + 8 + longest(v, defs, known) for k, v in schema.get("properties", {}).items()]
        return min(_LONGEST, 4 + sum(parts))
    if schema.get("type") == "array":
        first = schema.get("prefixItems", ())
        count = max(1, int(schema.get("minItems", 0)) - len(first))
        rest = count * (2 + longest(schema.get("items"), defs, known))
        return min(_LONGEST, 4 + rest + sum(2 + longest(s, defs, known) for s in first))
    # A pattern seldom asks for more than a date with its time.
    return 30 if "pattern" in schema or "format" in schema else 8 + int(schema.get("minLength", 0))
