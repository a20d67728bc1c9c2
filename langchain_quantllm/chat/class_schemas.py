"""JSON schemas of Python types, narrowed to the values that the type accepts.

pydantic's own schema of a class allows more than the class: a union without its tag, any text for a decimal, lengths of
bytes that are counted in characters. Owns the narrower one, and the refusal of types for which there is none. The
validators that a class adds with code of its own are not covered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured.decimal_ranges import decimal_schema
from langchain_quantllm.structured.scalar_schemas import FORMATS, XGRAMMAR_FORMATS

_MOST_INLINED = 2_000
_OTHER_FORMATS = {
    **dict.fromkeys(("ipv4network", "ipv4interface", "ipvanyaddress", "ipvanyinterface", "ipvanynetwork"), "ipv4"),
    **dict.fromkeys(("ipv6network", "ipv6interface"), "ipv6"),
    "name-email": "email",
}
_ANY_TEXT = ("binary", "password", "path")
_WITHOUT_LENGTH = ("date", "time", "datetime", "timedelta", "uuid", "bytes", "enum", "literal", "definition-ref")
_FORMATS_WITHOUT_LENGTH = ("date", "naive", "time", "duration", "uuid", "uri")
"""Types, and beginnings of formats, of texts to which a class's lengths of texts do not apply."""
_UNHASHABLE = ("list", "dict", "set", "model", "typed-dict", "dataclass", "definition-ref", "deque", "any")
_TEXT_KEYS = ("str", "date", "datetime", "time", "timedelta", "uuid", "enum", "literal", "url", "definition-ref", "any")


class _ClassSchema(GenerateJsonSchema):
    """pydantic's generator, for what it leaves too wide. A method is called for each core schema of its type."""

    _settings: tuple[Mapping[str, Any], ...] = ({},)

    def refuse(self, what: str) -> InvalidOptionError:
        return InvalidOptionError(
            f"{what} cannot be guaranteed in an answer; use another type, or give a JSON schema and check the answer."
        )

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        function = schema.get("function", {}) if schema["type"].startswith("function-") else {}
        name = getattr(function.get("function") if isinstance(function, dict) else None, "__qualname__", "")
        if name == "import_string":
            raise self.refuse("the name of something to import")
        if name.startswith(("PathType.validate", "EncodedBytes.", "EncodedStr.")):
            raise self.refuse("an existing path, or an encoded text,")
        if name == "ByteSize._validate":
            return {"type": "integer", "minimum": 0}
        result = super().generate_inner(schema)
        most = self._settings[-1].get("str_max_length")
        has_length = result.get("type") == "string" and schema["type"] not in _WITHOUT_LENGTH
        if most is not None and has_length and not str(result.get("format")).startswith(_FORMATS_WITHOUT_LENGTH):
            result.setdefault("maxLength", most)  # of addresses and the like, too, which are read from texts
        return result

    def _within(self, schema: Any, generate: Any) -> JsonSchemaValue:
        """Generate a class's schema under its settings."""
        before = self._settings
        self._settings = (*before, schema.get("config") or {})
        try:
            result: JsonSchemaValue = generate(schema)
        finally:
            self._settings = before
        config = schema.get("config") or {}
        if config.get("validate_by_name") and result.get("additionalProperties"):
            result["additionalProperties"] = False  # one may be the name of a field beside its alias
        return result

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        return self._within(schema, super().model_schema)

    def typed_dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._within(schema, super().typed_dict_schema)

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        return self._within(schema, super().dataclass_schema)

    def dataclass_args_schema(self, schema: Any) -> JsonSchemaValue:
        fields = [field for field in schema["fields"] if field.get("init") is not False]
        given: Any = {**schema, "fields": fields}
        return super().dataclass_args_schema(given)

    # Fields.

    def model_field_schema(self, schema: Any) -> JsonSchemaValue:
        self._check_alias(schema)
        return super().model_field_schema(schema)

    def typed_dict_field_schema(self, schema: Any) -> JsonSchemaValue:
        self._check_alias(schema)
        return super().typed_dict_field_schema(schema)

    def dataclass_field_schema(self, schema: Any) -> JsonSchemaValue:
        self._check_alias(schema)
        return super().dataclass_field_schema(schema)

    def _check_alias(self, field: Mapping[str, Any]) -> None:
        alias = field.get("validation_alias")
        if alias is not None and self._settings[-1].get("validate_by_alias") is False:
            raise self.refuse("an alias beside validate_by_alias=False")
        if isinstance(alias, list):
            paths = alias if isinstance(alias[0], list) else [alias]
            if not any(len(path) == 1 for path in paths):
                raise self.refuse(f"a field at the path {paths[0]!r}")

    # Texts, bytes and times.

    def str_schema(self, schema: Any) -> JsonSchemaValue:
        config = self._settings[-1]
        result = super().str_schema(schema)
        least = schema.get("min_length", config.get("str_min_length", 0))
        most = schema.get("max_length", config.get("str_max_length"))
        result |= {k: v for k, v in (("minLength", least), ("maxLength", most)) if v}
        pattern = schema.get("pattern")
        if isinstance(pattern, re.Pattern) and pattern.flags & ~re.UNICODE:
            raise self.refuse(f"the pattern {pattern.pattern!r} with flags")
        if schema.get("strip_whitespace", config.get("str_strip_whitespace")) and (least or pattern is not None):
            if pattern is not None:
                raise self.refuse("a pattern beside strip_whitespace")
            result["pattern"] = r"^\S(.*\S)?$"  # blanks at the ends do not count
        return result

    def bytes_schema(self, schema: Any) -> JsonSchemaValue:
        if self._settings[-1].get("val_json_bytes", "utf8") != "utf8":
            raise self.refuse(f"val_json_bytes={self._settings[-1]['val_json_bytes']!r}")
        result = super().bytes_schema(schema)
        if {"minLength", "maxLength"} & result.keys():
            result = {**result, "pattern": "^[ -~]*$"}  # they count bytes
        return result

    def date_schema(self, schema: Any) -> JsonSchemaValue:
        return self._time(schema, super().date_schema(schema))

    def time_schema(self, schema: Any) -> JsonSchemaValue:
        return self._time(schema, super().time_schema(schema))

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        return self._time(schema, super().datetime_schema(schema))

    def timedelta_schema(self, schema: Any) -> JsonSchemaValue:
        return self._time(schema, super().timedelta_schema(schema))

    def _time(self, schema: Mapping[str, Any], result: JsonSchemaValue) -> JsonSchemaValue:
        if found := [key for key in ("gt", "ge", "lt", "le", "now_op") if schema.get(key) is not None]:
            raise self.refuse(f"a {schema['type']} with the bound {found[0]!r}")
        zone = schema.get("tz_constraint")
        if isinstance(zone, int):
            raise self.refuse("a time of one offset")
        return {**result, "format": f"naive-{result['format']}"} if zone == "naive" else result

    def url_schema(self, schema: Any) -> JsonSchemaValue:
        return self._url(schema, super().url_schema(schema))

    def multi_host_url_schema(self, schema: Any) -> JsonSchemaValue:
        return self._url(schema, super().multi_host_url_schema(schema))

    def _url(self, schema: Mapping[str, Any], result: JsonSchemaValue) -> JsonSchemaValue:
        schemes = schema.get("allowed_schemes")
        if not schemes or {"http", "https"} <= set(schemes):
            return {**result, "format": "uri"}
        host = "" if schemes[0] == "file" else "[a-z]{1,20}([.-][a-z]{1,20})?"
        pattern = rf"^{re.escape(schemes[0])}://{host}/[A-Za-z0-9._-]{{1,40}}$"
        return {**{k: v for k, v in result.items() if k != "format"}, "pattern": pattern}

    # Numbers.

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        try:
            return decimal_schema(schema)
        except ValueError as error:
            raise self.refuse(str(error)) from error

    def fraction_schema(self, schema: Any) -> JsonSchemaValue:
        branches = super().fraction_schema(schema).get("anyOf", [{}])
        return next((branch for branch in branches if branch.get("type") == "number"), {"type": "integer"})

    def complex_schema(self, schema: Any) -> JsonSchemaValue:
        raise self.refuse("a complex number")

    # Choices.

    def literal_schema(self, schema: Any) -> JsonSchemaValue:
        if any(isinstance(value, Enum) and not isinstance(value, str | int) for value in schema["expected"]):
            raise self.refuse("a Literal of a member of an Enum")  # pydantic takes the member alone
        return self._choice(schema["expected"], super().literal_schema(schema))

    def enum_schema(self, schema: Any) -> JsonSchemaValue:
        return self._choice([member.value for member in schema["members"]], super().enum_schema(schema))

    def _choice(self, values: list[Any], result: JsonSchemaValue) -> JsonSchemaValue:
        plain = [getattr(value, "value", value) for value in values]
        plain = [value for value in plain if value is None or isinstance(value, str | int | float)]
        if not plain:
            raise self.refuse(f"a choice of {values!r}")
        return {**{k: v for k, v in result.items() if k not in ("enum", "const")}, "enum": plain}

    def tagged_union_schema(self, schema: Any) -> JsonSchemaValue:
        result = super().tagged_union_schema(schema)
        if callable(schema["discriminator"]) or "propertyName" not in result.get("discriminator", {}):
            raise self.refuse("a union whose tag is computed")
        return result

    # Containers.

    def tuple_schema(self, schema: Any) -> JsonSchemaValue:
        if schema.get("variadic_item_index") not in (None, len(schema["items_schema"]) - 1):
            raise self.refuse("a tuple with items after those of any number")
        return super().tuple_schema(schema)

    def set_schema(self, schema: Any) -> JsonSchemaValue:
        return self._set(schema, super().set_schema(schema))

    def frozenset_schema(self, schema: Any) -> JsonSchemaValue:
        return self._set(schema, super().frozenset_schema(schema))

    def _set(self, schema: Mapping[str, Any], result: JsonSchemaValue) -> JsonSchemaValue:
        if (schema.get("min_length") or 0) > 1:
            raise self.refuse(f"a set of at least {schema['min_length']} different items")
        if schema.get("items_schema", {"type": "any"})["type"] in _UNHASHABLE:
            raise self.refuse("a set of items other than texts, numbers and the like")
        return result

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._mapping(schema)

    def frozendict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._mapping(schema)

    def ordered_dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._mapping(schema)

    def counter_schema(self, schema: Any) -> JsonSchemaValue:
        return self._mapping(schema)

    def _mapping(self, schema: Mapping[str, Any]) -> JsonSchemaValue:
        """Write the keys' type as a schema of names, which pydantic leaves out where it is no text's."""
        if (schema.get("min_length") or 0) > 1:
            raise self.refuse(f"a dict of at least {schema['min_length']} different keys")
        names = self._key(schema.get("keys_schema", {"type": "any"}))
        values = {"type": "integer"} if schema["type"] == "counter" else True
        if "values_schema" in schema:
            values = self.generate_inner(schema["values_schema"]) or True
        result: JsonSchemaValue = {"type": "object", "additionalProperties": values}
        if names:
            result["propertyNames"] = names
        self.update_with_validations(result, schema, self.ValidationsMapping.object)
        return result

    def _key(self, schema: Any) -> JsonSchemaValue:
        kind = schema["type"]
        if kind in ("int", "float", "decimal", "bool") and schema.keys() <= {
            "type",
            "metadata",
            "strict",
            "ref",
            "allow_inf_nan",
        }:
            if kind == "bool":
                return {"enum": ["true", "false"]}
            return {"pattern": "^-?(0|[1-9][0-9]{0,8})" + ("$" if kind == "int" else r"(\.[0-9]{1,6})?$")}
        if kind not in _TEXT_KEYS:
            raise self.refuse(f"a dict with keys of the type {kind!r}")
        names = self.generate_inner(schema)
        if "enum" in names and not any(isinstance(value, str) for value in names["enum"]):
            raise self.refuse("a dict with keys that are a choice of other values than texts")
        return {k: v for k, v in names.items() if k not in ("type", "title", "description")}

    # Types without JSON of their own.

    def json_schema(self, schema: Any) -> JsonSchemaValue:
        raise self.refuse("a text that is JSON itself")

    def is_subclass_schema(self, schema: Any) -> JsonSchemaValue:
        raise self.refuse("a class")


def class_schema(kind: Any) -> dict[str, Any]:
    """Describe the JSON values that a type accepts, as pydantic reads them.

    Args:
        kind: A pydantic class, a dataclass, a `TypedDict`, or any other type that pydantic knows.

    Returns:
        A JSON schema; without references where it does not refer to itself and is small.

    Raises:
        InvalidOptionError: If values of the type cannot be guaranteed, or have no JSON.
    """
    try:
        schema = TypeAdapter(kind).json_schema(schema_generator=_ClassSchema)
    except InvalidOptionError as error:
        raise InvalidOptionError(f"{name_of(kind)}: {error}") from error
    except (PydanticUserError, TypeError, ValueError, NameError, RecursionError) as error:
        msg = f"{name_of(kind)} has no JSON schema: {str(error).splitlines()[0]}; use types that JSON can write."
        raise InvalidOptionError(msg) from error
    definitions = schema.get("$defs", {})
    for part in list(schemas_in(schema)):
        if "discriminator" in part:
            _require_tag(part, part["discriminator"]["propertyName"], definitions)
        _check_format(part, kind)
    return tidied(schema)


def name_of(kind: Any) -> str:
    """Return a type's name for an error or an answer."""
    return str(getattr(kind, "__name__", None) or kind)[:60]


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Go through the schemas in a schema."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in ("properties", "patternProperties", "$defs"):
                    waiting += value.values()
                elif key not in ("default", "examples", "enum", "const", "discriminator"):
                    waiting += value if isinstance(value, list) else [value]


def _require_tag(union: Mapping[str, Any], tag: str, definitions: Mapping[str, Any]) -> None:
    """Require the tag of a union in its branches, also where the class has a default for it."""
    for branch in union.get("oneOf", ()):
        target = definitions.get(branch.get("$ref", "").rpartition("/")[2], branch)
        if "oneOf" in target and target is not union:
            _require_tag(target, tag, definitions)
        elif tag in target.get("properties", {}) and tag not in target.get("required", ()):
            target["required"] = [tag, *target.get("required", ())]


def _check_format(part: dict[str, Any], kind: Any) -> None:
    given = part.get("format")
    if not isinstance(given, str) or given in FORMATS or given in XGRAMMAR_FORMATS:
        return
    if given not in _OTHER_FORMATS and given not in _ANY_TEXT:
        msg = f"{name_of(kind)}: a text of the format {given!r} cannot be guaranteed in an answer; use another type."
        raise InvalidOptionError(msg)
    part["format"] = _OTHER_FORMATS.get(given, given)


def tidied(schema: dict[str, Any]) -> dict[str, Any]:
    """Leave out titles and write definitions in place of references, unless it refers to itself or becomes large."""
    definitions = schema.get("$defs", {})
    room = [_MOST_INLINED]

    def inlined(node: Any, within: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            return [inlined(one, within) for one in node]
        if not isinstance(node, dict):
            return node
        room[0] -= 1
        if room[0] < 0:
            raise OverflowError
        name = node.get("$ref", "").rpartition("/")[2] if isinstance(node.get("$ref"), str) else ""
        if name in definitions:
            if name in within:
                raise OverflowError
            rest = {k: v for k, v in node.items() if k != "$ref"}
            return inlined({**definitions[name], **rest}, (*within, name))
        return {k: inlined_value(k, v, within) for k, v in node.items() if k != "title" or not isinstance(v, str)}

    def inlined_value(key: str, value: Any, within: tuple[str, ...]) -> Any:
        if key in ("properties", "patternProperties", "$defs") and isinstance(value, dict):
            return {name: inlined(one, within) for name, one in value.items()}
        return value if key in ("default", "examples", "enum", "const", "discriminator") else inlined(value, within)

    try:
        whole = inlined({k: v for k, v in schema.items() if k != "$defs"}, ())
        for part in schemas_in(whole):
            part.pop("discriminator", None)  # its mapping is to definitions
        return dict(whole)
    except OverflowError:
        return schema
