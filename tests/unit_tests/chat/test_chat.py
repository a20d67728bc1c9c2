"""The chat model: calls, streams, tools and structured output, on SmolLM2 and Qwen2.5-Coder on the CPU."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Optional

import jsonschema  # type: ignore[import-untyped]
import pytest
import transformers
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import StructuredTool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import InvalidOptionError, ModelNotFoundError, UnsupportedError
from langchain_quantllm.structured import Choice, Regex
from tests.support.chat_messages import folded

pytest.importorskip("xgrammar")


def weather(city: str, days: int = 1) -> str:
    """Get the weather of a city.

    Args:
        city: The city.
        days: How many days.
    """
    return f"rain in {city}"


class Person(BaseModel):
    """A person."""

    name: str = Field(description="The name")
    age: int = Field(ge=0, le=150)
    mood: Literal["glad", "sad"]
    town: Optional[str] = None  # noqa: UP045


def chat_on(folder: Path) -> Iterator[ChatQuantizedHuggingFace]:
    chat = ChatQuantizedHuggingFace(model=str(folder), dtype="float32", device="cpu", max_tokens=16, progress=False)
    yield chat
    chat.unload()


@pytest.fixture(scope="module")
def chat(short_smollm2: Path) -> Iterator[ChatQuantizedHuggingFace]:
    yield from chat_on(short_smollm2)


@pytest.fixture(scope="module")
def any_chat(any_smollm2: Path) -> Iterator[ChatQuantizedHuggingFace]:
    """The whole model, too; LangChain's own tests have it for all that is tested here on two layers of it."""
    yield from chat_on(any_smollm2)


@pytest.fixture(scope="module")
def coder(qwen_coder: Path) -> Iterator[ChatQuantizedHuggingFace]:
    chat = ChatQuantizedHuggingFace(
        model=str(qwen_coder), quantization="nf4", device="cpu", max_tokens=100, temperature=0, progress=False
    )
    yield chat
    chat.unload()


# --- calls ---


@pytest.mark.compat
def test_the_prompt_is_the_templates_and_all_ways_of_calling_agree(any_chat: Any, any_smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(any_smollm2)
    messages = [("system", "You are terse."), ("human", "Name a colour.")]
    answer = any_chat.invoke(messages)
    plain = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Name a colour."}]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = any_chat.pipeline.model.generate(ids, max_new_tokens=16, do_sample=False)
    assert answer.content == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.usage_metadata["input_tokens"] == ids.shape[1]
    assert any_chat.get_num_tokens_from_messages(any_chat._convert_input(messages).to_messages()) == ids.shape[1]
    full = folded(any_chat.stream(messages))
    assert full.content == answer.content
    assert full.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert full.response_metadata["finish_reason"] == answer.response_metadata["finish_reason"]
    assert any_chat.batch([messages] * 3)[2].content == answer.content

    async def run() -> None:
        assert (await any_chat.ainvoke(messages)).content == answer.content
        chunks = [chunk async for chunk in any_chat.astream(messages)]
        assert folded(chunks).content == answer.content
        assert len(chunks) > 3
        assert [a.content for a in await any_chat.abatch([messages] * 2)] == [answer.content] * 2

    asyncio.run(run())


def test_metadata_comes_with_an_answer(chat: Any) -> None:
    usage = UsageMetadataCallbackHandler()
    answer = chat.invoke("Hi.", {"callbacks": [usage]}, temperature=1.0, seed=3, logprobs=2, max_tokens=4)
    assert answer.response_metadata["model_name"] == chat.model_id
    assert answer.response_metadata["seed"] == 3
    assert answer.response_metadata["finish_reason"] == "length"
    assert len(answer.response_metadata["logprobs"]["content"]) == 4
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert usage.usage_metadata[chat.model_id]["output_tokens"] == 4
    streamed = folded(chat.stream("Hi.", temperature=1.0, seed=3, logprobs=2, max_tokens=4))
    assert streamed.content == answer.content
    assert len(streamed.response_metadata["logprobs"]["content"]) == 4


def test_options_of_a_call_hold_and_wrong_ones_are_refused(chat: Any) -> None:
    full = chat.invoke("Count from one to ten.").content
    assert chat.invoke("Count from one to ten.", stop=[full[5:8]]).content == full[: full.index(full[5:8])]
    result = chat.generate([[HumanMessage("Hi.")]], n=3, temperature=1.0, seed=1)
    assert len(result.generations[0]) == 3
    assert (
        result.llm_output["token_usage"]["prompt_tokens"]
        == result.generations[0][0].message.usage_metadata["input_tokens"]
    )
    with pytest.raises(InvalidOptionError, match="unknown option 'temprature'.*temperature"):
        chat.invoke("Hi.", temprature=1)
    with pytest.raises(InvalidOptionError, match="is not this model"):
        chat.invoke("Hi.", model="another")
    with pytest.raises(InvalidOptionError, match="cannot share one stream"):
        list(chat.stream("Hi.", n=2))
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 9000)


@pytest.mark.compat
def test_the_beginning_of_a_conversation_is_found_again(chat: Any) -> None:
    messages: list[Any] = [("system", "You are a patient teacher of geography. " * 6), ("human", "Where is Oslo?")]
    first = chat.invoke(messages)
    second = chat.invoke([*messages, first, ("human", "And Bergen?")])
    found = second.usage_metadata["input_token_details"]["cache_read"]
    assert found >= first.usage_metadata["input_tokens"] // 16 * 16 - 16


def test_a_loaded_llm_is_taken_over(short_smollm2: Path, chat: Any) -> None:
    llm = QuantizedHuggingFaceLLM(
        model_id=str(short_smollm2), dtype="float32", device="cpu", max_new_tokens=7, progress=False
    )
    over = ChatQuantizedHuggingFace(llm=llm)
    assert over.max_new_tokens == 7
    assert over.invoke("Hi.").usage_metadata["output_tokens"] <= 7
    assert llm.pipeline.model is over.pipeline.model is chat.load().pipeline.model
    with pytest.raises(InvalidOptionError, match="cannot be taken over"):
        ChatQuantizedHuggingFace(llm=3)


def test_names_of_other_providers_are_taken_and_wrong_ones_refused() -> None:
    chat = ChatQuantizedHuggingFace(
        model="x/y", max_tokens=5, api_key="hf_secret", max_retries=2, temperature=0, stop=["a"]
    )
    assert chat.max_new_tokens == 5
    assert "hf_secret" not in repr(chat)
    assert chat.token.get_secret_value() == "hf_secret"
    with pytest.raises(InvalidOptionError, match="tool_format='hermess'"):
        ChatQuantizedHuggingFace(model="x/y", tool_format="hermess")
    with pytest.raises(InvalidOptionError, match="return_full_text"):
        ChatQuantizedHuggingFace(model="x/y", return_full_text=True)


def test_loading_profile_configurable_fields_and_cache_of_langchain(chat: Any, short_smollm2: Path) -> None:
    path = ("langchain_quantllm", "chat_models", "ChatQuantizedHuggingFace")
    options = {"valid_namespaces": ["langchain_quantllm"], "additional_import_mappings": {path: path}}
    twin = load(dumpd(chat), allowed_objects=[ChatQuantizedHuggingFace], **options)
    assert isinstance(twin, ChatQuantizedHuggingFace)
    assert twin.invoke("Hi.").content == chat.invoke("Hi.").content
    assert chat.profile["max_input_tokens"] == 8192
    assert chat.profile["tool_calling"]
    assert not chat.profile["image_inputs"]
    configurable = chat.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
    short = configurable.with_config(configurable={"length": 2}).invoke("Hi.")
    assert short.usage_metadata["output_tokens"] == 2
    cached = ChatQuantizedHuggingFace(
        model=str(short_smollm2), dtype="float32", device="cpu", max_tokens=8, progress=False, cache=InMemoryCache()
    )
    first = cached.invoke("Hi.", temperature=1.0)
    assert cached.invoke("Hi.", temperature=1.0).content == first.content
    assert len(cached.cache._cache) == 1
    cached.invoke("Hi.", temperature=1.1)
    assert len(cached.cache._cache) == 2


def test_a_model_without_a_template_takes_one(short_smollm2: Path, chat: Any) -> None:
    import copy

    pipe = copy.copy(chat.load().pipeline)
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.chat_template = None
    bare = ChatQuantizedHuggingFace(pipeline=pipe, max_tokens=4)
    with pytest.raises(UnsupportedError, match="no chat template"):
        bare.invoke("Hi.")
    given = ChatQuantizedHuggingFace(pipeline=pipe, max_tokens=4, chat_template="{{ messages[0].content }}")
    assert given.invoke("The capital of France is").content


def test_closing_a_stream_stops_the_model(chat: Any) -> None:
    stream = chat.stream("Tell me a long story.", max_tokens=500)
    next(stream)
    stream.close()
    assert chat.invoke("Hi.", max_tokens=1)


# --- tools ---


@pytest.mark.parametrize("choice", ["any", "weather", True, {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.compat
def test_forced_calls_match_their_schema(chat: Any, choice: Any) -> None:
    bound = chat.bind_tools([weather], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke("What about Oslo?", max_tokens=80, temperature=1.0, seed=2)
    assert [call["name"] for call in answer.tool_calls] == ["weather"]
    assert isinstance(answer.tool_calls[0]["args"]["city"], str)
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert answer.content == ""
    chunks = list(bound.stream("What about Oslo?", max_tokens=80, temperature=1.0, seed=2))
    full = folded(chunks)
    assert full.tool_calls[0]["args"] == answer.tool_calls[0]["args"]
    ids = {c["id"] for chunk in chunks for c in chunk.tool_call_chunks if c["id"]}
    assert len(ids) == 1
    assert sum(len(chunk.tool_call_chunks) for chunk in chunks) > 2  # the arguments come piece by piece


@pytest.mark.slow
def test_no_call_where_none_is_wanted(coder: Any) -> None:
    answer = coder.bind_tools([weather], tool_choice="none").invoke("What is the weather in Oslo?", max_tokens=20)
    assert not answer.tool_calls
    with pytest.raises(InvalidOptionError, match="'rain'.*weather"):
        coder.bind_tools([weather], tool_choice="rain")
    with pytest.raises(InvalidOptionError, match="needs tools"):
        coder.invoke("Hi.", tool_choice="any")


def test_a_tool_that_cannot_be_enforced_may_be_bound_but_not_forced(chat: Any) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(?=a)a$"}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "odd", "description": "Odd.", "parameters": parameters}}
    assert chat.bind_tools([tool]).invoke("Hi.", max_tokens=3).usage_metadata["output_tokens"] <= 3
    with pytest.raises(InvalidOptionError, match="cannot be enforced"):
        chat.bind_tools([tool], tool_choice="odd").invoke("Hi.", max_tokens=3)


def test_a_call_that_is_cut_off_is_invalid(chat: Any) -> None:
    bound = chat.bind_tools([weather], tool_choice="weather")
    for answer in (bound.invoke("Oslo?", max_tokens=14), folded(bound.stream("Oslo?", max_tokens=14))):
        if answer.response_metadata["finish_reason"] == "length":
            assert not answer.tool_calls
            assert answer.invalid_tool_calls


@pytest.mark.slow
def test_a_model_calls_by_itself_and_reads_the_result(coder: Any) -> None:
    bound = coder.bind_tools([weather])
    question = HumanMessage("What is the weather in Oslo? Use the tool.")
    answer = bound.invoke([question])
    assert answer.tool_calls[0]["name"] == "weather"
    assert answer.tool_calls[0]["args"]["city"] == "Oslo"
    result = ToolMessage("-3 degrees and snow", tool_call_id=answer.tool_calls[0]["id"])
    final = bound.invoke([question, answer, result], max_tokens=20)
    # The prompt, and the call as the model wrote it, are there already.
    assert final.usage_metadata["input_token_details"]["cache_read"] >= answer.usage_metadata["input_tokens"] - 16
    said = coder.invoke([("human", "The weather in Oslo is snow. What is the weather in Oslo?")], max_tokens=20)
    assert "snow" in said.content.lower()


def test_calls_in_threads_share_one_batch_and_answer_as_alone(any_chat: Any) -> None:
    bound = any_chat.bind_tools([weather], tool_choice="weather")
    prompts = [f"What about {city}?" for city in ("Oslo", "Paris", "Rome", "Kyoto", "Lima", "Cairo", "Quito", "Turin")]
    alone = [bound.invoke(p, max_tokens=60, temperature=1.0, seed=5).tool_calls[0]["args"] for p in prompts]
    barrier = threading.Barrier(len(prompts))

    def call(prompt: str) -> Any:
        barrier.wait()
        return bound.invoke(prompt, max_tokens=60, temperature=1.0, seed=5).tool_calls[0]["args"]

    with ThreadPoolExecutor(len(prompts)) as executor:
        assert list(executor.map(call, prompts)) == alone


# --- structured output ---


class Point(TypedDict):
    """A point."""

    x: int
    y: float


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.compat
def test_structured_output_is_of_its_schema(chat: Any, method: Any) -> None:
    structured = chat.with_structured_output(Person, method=method)
    found = structured.invoke("Ada is 36 and glad.", max_tokens=120, temperature=1.0, seed=1)
    assert isinstance(found, Person)
    assert list(structured.stream("Ada is 36 and glad.", max_tokens=120))[-1]
    point = chat.with_structured_output(Point, method=method).invoke("1, 2.5", max_tokens=60)
    assert set(point) == {"x", "y"}
    schema = {"title": "flag", "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    assert isinstance(chat.with_structured_output(schema, method=method).invoke("On!", max_tokens=40)["on"], bool)
    raw = chat.with_structured_output(Person, method=method, include_raw=True, max_tokens=120).invoke("Ada")
    assert isinstance(raw["raw"], AIMessage)
    assert isinstance(raw["parsed"], Person)
    assert raw["parsing_error"] is None


def test_json_mode_gives_an_object(chat: Any) -> None:
    assert isinstance(chat.with_structured_output(method="json_mode").invoke("Give JSON.", max_tokens=60), dict)


def test_regex_and_choice_hold(chat: Any) -> None:
    assert chat.invoke("Is the sky blue?", constraint=Choice(("yes", "no"))).content in ("yes", "no")
    date = chat.invoke("When?", constraint=Regex(r"\d{4}-\d{2}-\d{2}"), temperature=1.0, seed=1).content
    assert len(date) == 10
    assert date[4] == date[7] == "-"
    streamed = "".join(c.content for c in chat.stream("Is it?", constraint=Choice(("yes", "no"))))
    assert streamed in ("yes", "no")


def test_wrong_formats_say_what_is_allowed(chat: Any) -> None:
    with pytest.raises(InvalidOptionError, match="response_format="):
        chat.invoke("Hi.", response_format={"type": "xml"})
    with pytest.raises(InvalidOptionError, match="constraint="):
        chat.invoke("Hi.", constraint="yes|no")
    with pytest.raises(InvalidOptionError, match="method='yaml'"):
        chat.with_structured_output(Person, method="yaml")
    with pytest.raises(InvalidOptionError, match="needs a schema"):
        chat.with_structured_output(method="json_schema")


@pytest.mark.slow
def test_tools_and_a_format_together(coder: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    bound = coder.bind_tools([weather], response_format=wanted)
    answer = bound.invoke("What is the weather in Oslo? Use the tool.")
    if answer.tool_calls:
        assert answer.tool_calls[0]["name"] == "weather"
    else:
        assert Person(**json.loads(answer.content))
    told = bound.invoke("No tool is needed. Ada is 36, glad, and lives in London. Describe her.")
    assert told.tool_calls or Person(**json.loads(told.content))


# --- what LangChain's own ways would lose ---


def test_the_cache_tells_models_and_settings_apart(chat: Any) -> None:
    cache = InMemoryCache()
    pipeline = chat.pipeline
    short, long = (ChatQuantizedHuggingFace(pipeline=pipeline, max_tokens=n, cache=cache) for n in (2, 4))
    assert short.invoke("Name a color.").usage_metadata["output_tokens"] == 2
    assert long.invoke("Name a color.").usage_metadata["output_tokens"] == 4
    other = chat.model_copy(update={"cache": cache})
    other.invoke("Name a color.", ignore_eos=True)
    for fewer in (other.model_copy(update={"max_new_tokens": 3}), other):
        fewer.max_new_tokens = 3
        assert fewer.invoke("Name a color.", ignore_eos=True).usage_metadata["output_tokens"] == 3


def test_a_copy_that_names_another_model_loads_it(chat: Any) -> None:
    with pytest.raises(ModelNotFoundError):
        chat.model_copy(update={"model_id": "/nowhere/at/all"}).invoke("hi")
    assert chat.model_copy(update={"max_new_tokens": 1}).pipeline.model is chat.pipeline.model


def test_what_is_given_beside_an_llm_counts_under_any_name(short_smollm2: Path, chat: Any) -> None:
    fields: dict[str, Any] = {"model_id": str(short_smollm2), "dtype": "float32", "device": "cpu", "progress": False}
    llm = QuantizedHuggingFaceLLM(**fields, max_tokens=16, n=2, return_full_text=True)
    given: Any = {"llm": llm, "max_tokens": 3, "num_return_sequences": 1}
    found = ChatQuantizedHuggingFace(**given)
    assert (found.max_new_tokens, found.n) == (3, 1)
    placed: Any = {"llm": llm, "device_map": {"": "cpu"}}
    assert ChatQuantizedHuggingFace(**placed).device is None


class Node(BaseModel):
    """A node of a tree."""

    value: int
    children: list[Node] = []


def plant(tree: Node) -> str:
    """Plant a tree."""
    return "planted"


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"title": "xs", "type": "array", "items": {"type": "integer"}, "maxItems": 3}, None),
        ({"title": "U", "anyOf": [{"type": "boolean"}, {"type": "null"}]}, None),
        ({"title": "Counts", "type": "object", "additionalProperties": {"type": "integer"}}, None),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, None),
        ({"name": "x", "schema": {"type": "integer"}}, {"type": "integer"}),
        (Node, Node.model_json_schema()),
    ],
)
def test_a_wanted_schema_is_the_one_given(chat: Any, schema: Any, wanted: Any) -> None:
    bound = chat.with_structured_output(schema)
    assert bound.first.kwargs["response_format"]["json_schema"]["schema"] == (wanted or schema)
    found = bound.invoke("Give an example.", temperature=2.0, seed=1, max_tokens=60)
    if isinstance(schema, dict):
        jsonschema.validate(found, wanted or schema)
    else:
        assert isinstance(found, Node)


def test_tools_keep_schemas_that_refer_to_themselves(chat: Any) -> None:
    as_tool = StructuredTool.from_function(plant)
    loose = {"title": "count", "description": "Count.", "additionalProperties": {"type": "integer"}, "type": "object"}
    for given in (plant, as_tool, Node, loose):
        parameters = chat.bind_tools([given]).kwargs["tools"][0]["function"]["parameters"]
        assert "$defs" in parameters or "additionalProperties" in parameters
    (call,) = chat.bind_tools([plant], tool_choice="any").invoke("An oak.", temperature=2.0, max_tokens=80).tool_calls
    assert as_tool.invoke(call["args"]) == "planted"


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ({"type": "web_search"}, "another provider"),
        ({"type": "function"}, "another provider"),
        ("weather", "cannot be described"),
        ({"title": "xs", "description": "Many.", "type": "array", "items": {}}, "must be an object"),
    ],
)
def test_what_is_no_tool_is_refused(chat: Any, tool: Any, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        chat.bind_tools([tool])


def test_the_raw_message_comes_with_the_options_of_the_call(chat: Any) -> None:
    raw = chat.with_structured_output(Person, include_raw=True)
    assert raw.invoke("Ada", max_tokens=3)["raw"].usage_metadata["output_tokens"] == 3
    with pytest.raises(InvalidOptionError, match="max_tokens"):
        raw.invoke("Ada", max_tokes=3)


def test_a_tool_called_in_place_of_an_object_gives_none(chat: Any) -> None:
    options: dict[str, Any] = {"tools": [weather], "tool_choice": "weather"}
    assert chat.with_structured_output(Person, **options).invoke("Oslo?", max_tokens=60) is None
    found = chat.with_structured_output(Person, include_raw=True, **options).invoke("Oslo?", max_tokens=60)
    assert found["raw"].tool_calls[0]["name"] == "weather"


def test_several_answers_where_langchain_streams_inwardly(chat: Any) -> None:
    streaming = chat.model_copy(update={"streaming": True})
    found = streaming.generate([[HumanMessage("hi")]], n=2, temperature=1.0)
    assert len(found.generations[0]) == 2
    with pytest.raises(InvalidOptionError, match="cannot share one stream"):
        list(chat.stream("hi", n=2))


def test_the_event_loop_goes_on_while_the_engine_is_made(short_smollm2: Path) -> None:
    fresh = ChatQuantizedHuggingFace(model=str(short_smollm2), dtype="float32", device="cpu", seed=77, progress=False)
    fresh.load().unload()
    fresh.load()
    threads: list[str] = []
    make = type(fresh)._engine

    class Watched(ChatQuantizedHuggingFace):
        def _engine(self, *args: Any, **kwargs: Any) -> Any:
            if self._loaded().engines is None:
                threads.append(threading.current_thread().name)
            return make(self, *args, **kwargs)

    watched = Watched(pipeline=fresh.pipeline, max_tokens=2)
    asyncio.run(watched.ainvoke("hi"))
    assert threads
    assert threading.main_thread().name not in threads
