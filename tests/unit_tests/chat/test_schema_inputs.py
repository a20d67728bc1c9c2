"""What users give as a schema, as tools and as a choice among them: taken, or refused in one sentence."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Optional

import jsonschema
import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from pydantic import BaseModel, ConfigDict, v1
from typing_extensions import NotRequired, Required, TypedDict

from langchain_quantllm import ChatQuantizedHuggingFace
from langchain_quantllm.chat.options import ChatOptions
from langchain_quantllm.chat.tool_schemas import answer_schema, tool_schema
from langchain_quantllm.chat.typed_parsers import TypedCallParser, TypedJsonParser
from langchain_quantllm.errors import InvalidOptionError
from tests.support.models import pipeline_of, tiny_model

pytest.importorskip("xgrammar")


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(strict=True)
    name: str
    born: date


class Movie(TypedDict):
    """A movie."""

    title: str
    year: NotRequired[int]


class Loose(TypedDict, total=False):
    title: Required[str]
    cast: list[Movie]


@dataclasses.dataclass
class Spot:
    x: int
    y: int = 0


class Old(v1.BaseModel):
    """An old class."""

    name: str


def add(a: int, b: int) -> int:
    return a + b


async def wait(seconds: int) -> int:
    """Wait."""
    return seconds


class Adder:
    """Adds."""

    def __call__(self, a: int, b: int) -> int:
        return a + b


@tool
def greet(name: str) -> str:
    """Greet."""
    return name


PLAIN = {"title": "plain", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
INNER = {k: v for k, v in PLAIN.items() if k != "title"}
OBJECTS: list[tuple[str, Any, Any]] = [
    ("pydantic", Person, Person),
    ("TypedDict", Movie, dict),
    ("TypedDict, total=False", Loose, dict),
    ("dataclass", Spot, Spot),
    ("pydantic 1", Old, Old),
    ("JSON schema", PLAIN, dict),
    ("envelope", {"name": "n", "schema": INNER, "strict": True}, dict),
    ("envelope of an envelope", {"type": "json_schema", "json_schema": {"name": "n", "schema": INNER}}, dict),
    ("flat envelope", {"type": "json_schema", "name": "n", "schema": INNER}, dict),
    ("function's description", {"type": "function", "function": {"name": "n", "parameters": INNER}}, dict),
    ("Anthropic's description", {"name": "n", "description": "d", "input_schema": INNER}, dict),
    ("function without a docstring", add, dict),
    ("async function", wait, dict),
    ("partial", functools.partial(add, 1), dict),
    ("callable object", Adder(), dict),
    ("tool", greet, dict),
]
OTHERS: list[tuple[str, Any, Any]] = [("list", list[int], list), ("union", Optional[Spot], (Spot, type(None)))]  # noqa: UP045
REFUSED: list[tuple[str, Any]] = [
    ("number", 42),
    ("text", "Person"),
    ("list of fields", ["name"]),
    ("instance", Spot(1)),
    ("name alone", {"name": "n", "description": "d"}),
    ("no JSON", {"title": "n", "type": "object", "properties": {"a": {"default": {1}}}}),
    ("NaN", {"title": "n", "type": "object", "properties": {"a": {"minimum": float("nan")}}}),
]


TWO = [tool_schema(add), tool_schema(greet)]


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Iterator[ChatQuantizedHuggingFace]:
    chat = ChatQuantizedHuggingFace(pipeline=pipeline_of(tiny_model(len(tokenizer)), tokenizer), max_new_tokens=120)
    yield chat
    chat.unload()


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize(("schema", "kind"), [(s, k) for _, s, k in OBJECTS], ids=[name for name, _, _ in OBJECTS])
def test_objects_are_taken_by_each_method(chat: Any, schema: Any, kind: Any, method: str) -> None:
    found = chat.with_structured_output(schema, method=method).invoke("An example.", seed=1, temperature=1.0)
    assert isinstance(found, kind)
    if schema is Movie:
        assert "title" in found
    if "envelope" in str(schema) or schema is PLAIN:
        assert isinstance(found["n"], int)


@pytest.mark.parametrize(("schema", "kind"), [(s, k) for _, s, k in OTHERS], ids=[name for name, _, _ in OTHERS])
def test_other_types_are_taken_as_json(chat: Any, schema: Any, kind: Any) -> None:
    assert isinstance(chat.with_structured_output(schema).invoke("An example.", seed=1, temperature=1.0), kind)
    with pytest.raises(InvalidOptionError, match="a function takes an object|arguments of the tool"):
        chat.with_structured_output(list[int], method="function_calling")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [s for _, s in REFUSED], ids=[name for name, _ in REFUSED])
def test_others_are_refused_in_a_sentence(chat: Any, schema: Any, method: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        chat.with_structured_output(schema, method=method)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_requirements_of_typed_dicts() -> None:
    assert answer_schema(Movie)[1]["required"] == ["title"]
    loose = answer_schema(Loose)[1]
    assert loose["required"] == ["title"]
    assert set(loose["properties"]) == {"title", "cast"}


@pytest.mark.parametrize(
    "given",
    [add, wait, functools.partial(add, 1), Adder(), greet, Person, Spot, Old],
    ids=lambda given: getattr(given, "__name__", type(given).__name__),
)
def test_tools_of_each_kind_have_a_name_and_parameters(chat: Any, given: Any) -> None:
    (described,) = chat.bind_tools([given]).kwargs["tools"]
    assert described["function"]["name"]
    assert described["function"]["parameters"]["properties"]


@pytest.mark.parametrize("given", [add, "add", TWO[0], 3], ids=lambda given: type(given).__name__)
def test_tools_are_a_list(chat: Any, given: Any) -> None:
    with pytest.raises(InvalidOptionError, match="is no list"):
        chat.bind_tools(given)


@pytest.mark.parametrize(
    ("choice", "name", "callable_names"),
    [
        ("auto", None, ["add", "greet"]),
        ("any", "any", ["add", "greet"]),
        ("required", "any", ["add", "greet"]),
        (True, "any", ["add", "greet"]),
        (False, None, ["add", "greet"]),
        ("none", None, []),
        ("add", "add", ["add"]),
        ({"type": "auto"}, None, ["add", "greet"]),
        ({"type": "any", "disable_parallel_tool_use": True}, "any", ["add", "greet"]),
        ({"type": "required"}, "any", ["add", "greet"]),
        ({"type": "none"}, None, []),
        ({"type": "tool", "name": "add"}, "add", ["add"]),
        ({"type": "function", "name": "add"}, "add", ["add"]),
        ({"type": "function", "function": {"name": "greet"}}, "greet", ["greet"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}, "any", ["add"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "greet"}}]},
            },
            None,
            ["greet"],
        ),
    ],
    ids=str,
)
def test_choices_are_read_in_each_form(choice: Any, name: str | None, callable_names: list[str]) -> None:
    options = ChatOptions.of({"tools": TWO, "tool_choice": choice})
    assert options.choice == name
    assert [found["function"]["name"] for found in options.callable_tools] == callable_names


@pytest.mark.parametrize(
    "choice",
    [
        *("subtract", 3, ["add"], {}, {"type": "tool"}, {"type": "function", "function": {"name": "subtract"}}),
        *(
            {"type": "allowed_tools"},
            {"type": "allowed_tools", "tools": []},
            {"type": "allowed_tools", "tools": ["add"]},
        ),
        {"type": "allowed_tools", "tools": [{"name": "subtract"}]},
        {"type": "allowed_tools", "mode": "any", "tools": [{"name": "add"}]},
    ],
    ids=str,
)
def test_other_choices_are_refused_in_a_sentence(choice: Any) -> None:
    with pytest.raises(InvalidOptionError, match="tool_choice"):
        ChatOptions.of({"tools": TWO, "tool_choice": choice})


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "name": "n", "schema": INNER},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": INNER}},
        Person,
    ],
    ids=["flat", "envelope", "class"],
)
def test_response_formats_are_read_in_each_form(chat: Any, wanted: Any) -> None:
    text = chat.invoke("An example.", response_format=wanted, seed=1, temperature=1.0).content
    assert ("name" if wanted is Person else "n") in text
    with pytest.raises(InvalidOptionError, match="response_format"):
        ChatOptions.of({"response_format": {"type": "json_schema", "name": "n"}})


def test_parsers_read_json_as_the_class_does_in_strict_mode() -> None:
    person = Person(name="Ada", born=date(1815, 12, 10))
    text = '{"name": "Ada", "born": "1815-12-10"}'
    assert TypedJsonParser(kind=Person).invoke(AIMessage(text)) == person
    assert TypedJsonParser(kind=Person).invoke(AIMessage(f"```json\n{text}\n```")) == person
    call = {"name": "Person", "args": {"name": "Ada", "born": "1815-12-10"}, "id": "1", "type": "tool_call"}
    parser = TypedCallParser(key_name="Person", kind=Person)
    assert parser.invoke(AIMessage("", tool_calls=[call])) == person
    assert parser.invoke(AIMessage("hello")) is None
    with pytest.raises(OutputParserException, match="born"):
        TypedJsonParser(kind=Person).invoke(AIMessage('{"name": "Ada", "born": "yesterday"}'))


def test_a_streamed_answer_ends_with_the_instance(chat: Any) -> None:
    chunks = list(chat.with_structured_output(Spot).stream("A spot.", seed=1, temperature=1.0))
    assert isinstance(chunks[-1], Spot)


def test_arguments_are_described_by_the_docstring(chat: Any) -> None:
    def paint(colour: Annotated[str, "any colour"], spot: Spot, times: int = 1) -> str:
        """Paint a spot.

        Args:
            colour: Not read, as the type says it.
            spot: Where to paint.
            times: How often.
        """
        return f"{colour} {spot} {times}"

    properties = chat.bind_tools([paint]).kwargs["tools"][0]["function"]["parameters"]["properties"]
    assert properties["colour"] == {"type": "string", "description": "any colour"}
    assert properties["times"] == {"type": "integer", "default": 1, "description": "How often."}
    assert properties["spot"]["description"] == "Where to paint."


def test_a_class_that_refers_to_itself_keeps_its_parts(chat: Any) -> None:
    tool = chat.bind_tools([Tree]).kwargs["tools"][0]["function"]["parameters"]
    wanted = chat.with_structured_output(Tree, method="function_calling").steps[0].kwargs["tools"][0]["function"]
    for parameters in (tool, wanted["parameters"]):
        assert parameters["required"] == ["name"]
        validator = jsonschema.Draft202012Validator(parameters)
        assert validator.is_valid({"name": "a", "branches": [{"name": "b"}]})
        assert not validator.is_valid({"name": "a", "branches": [3]})


class Tree(BaseModel):
    """A tree."""

    name: str
    branches: list[Tree] = []
