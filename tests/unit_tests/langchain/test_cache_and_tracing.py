"""LangChain's cache, callbacks, tracing, chains and configuration around the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableParallel

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from tests.support.models import fail_at, forwards, llm_of, pipeline_of, tiny_model

PROMPT = "The sea is"


@pytest.fixture
def cached() -> Iterator[InMemoryCache]:
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


class TestCache:
    @pytest.mark.usefixtures("cached")
    async def test_a_repeated_call_runs_no_forward(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        first = tiny_llm.invoke(PROMPT, max_new_tokens=4)
        with forwards(tiny_llm) as seen:
            assert tiny_llm.invoke(PROMPT, max_new_tokens=4) == first
            assert tiny_llm.batch([PROMPT, PROMPT], max_new_tokens=4) == [first] * 2
            assert await tiny_llm.ainvoke(PROMPT, max_new_tokens=4) == first
            assert await tiny_llm.abatch([PROMPT], max_new_tokens=4) == [first]
            assert tiny_llm.batch([PROMPT, PROMPT], return_exceptions=True, max_new_tokens=4) == [first] * 2
            assert seen.count == 0

    async def test_a_cache_of_the_instance_answers_a_repeated_call(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, max_new_tokens=4, cache=InMemoryCache())
        first = await llm.ainvoke(PROMPT)
        with forwards(llm) as seen:
            assert await llm.ainvoke(PROMPT) == llm.invoke(PROMPT) == first
            assert seen.count == 0

    @pytest.mark.usefixtures("cached")
    @pytest.mark.parametrize(
        "options",
        [
            {"max_new_tokens": 5},
            {"max_tokens": 5},
            {"max_length": 8},
            {"temperature": 1.7, "seed": 2},
            {"repetition_penalty": 9.0},
            {"return_full_text": True},
            {"skip_prompt": False},
            {"no_repeat_ngram_size": 1},
            {"suppress_tokens": [5]},
            {"pipeline_kwargs": {"max_new_tokens": 5}},
            {"logprobs": True},
            {"stop": ["a"]},
            {"stop_sequence": "a"},
            {"eos_token_id": 5},
            {"n": 2},
        ],
        ids=str,
    )
    async def test_an_option_of_the_call_is_part_of_the_key(
        self, tiny_llm: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        """In both orders, sync and async: the cached text of one call does not answer the other."""
        plain = tiny_llm.generate([PROMPT])
        with forwards(tiny_llm) as seen:
            given = tiny_llm.generate([PROMPT], **options)
            assert seen.count > 0
        with forwards(tiny_llm) as seen:
            again = tiny_llm.generate([PROMPT], **options)
            asynchronous = await tiny_llm.agenerate([PROMPT], **options)
            assert [g.text for g in again.generations[0]] == [g.text for g in given.generations[0]]
            assert [g.text for g in asynchronous.generations[0]] == [g.text for g in given.generations[0]]
            assert (await tiny_llm.agenerate([PROMPT])).generations[0][0].text == plain.generations[0][0].text
            assert seen.count == 0

    @pytest.mark.usefixtures("cached")
    def test_the_options_of_one_call_do_not_stay_for_the_next(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        before = tiny_llm.asdict()
        tiny_llm.invoke(PROMPT, max_new_tokens=2, temperature=0)
        with pytest.raises(InvalidOptionError):
            tiny_llm.invoke(PROMPT, max_new_tokens=-1)
        assert tiny_llm.asdict() == before

    @pytest.mark.usefixtures("cached")
    @pytest.mark.parametrize(
        "fields",
        [
            {"max_new_tokens": 3},
            {"temperature": 1.0, "seed": 1},
            {"seed": 2, "do_sample": True},
            {"stop": ["x"]},
            {"repetition_penalty": 9.0},
            {"no_repeat_ngram_size": 1},
            {"return_full_text": True},
            {"add_special_tokens": False},
            {"truncation": True},
        ],
        ids=str,
    )
    def test_fields_are_part_of_the_key(self, tiny_llm: QuantizedHuggingFaceLLM, fields: dict[str, Any]) -> None:
        tiny_llm.invoke(PROMPT)
        other = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, **{"max_new_tokens": 12, **fields})
        with forwards(other) as seen:
            other.invoke(PROMPT)
            assert seen.count > 0

    @pytest.mark.usefixtures("cached")
    def test_two_pipelines_of_models_without_a_name_do_not_share_answers(self, tokenizer: Any) -> None:
        one = llm_of(tiny_model(len(tokenizer), seed=11), tokenizer, max_new_tokens=4)
        two = llm_of(tiny_model(len(tokenizer), seed=12), tokenizer, max_new_tokens=4)
        with forwards(two) as seen:
            assert one.invoke(PROMPT) != two.invoke(PROMPT)
            assert seen.count > 0

    def test_what_loads_the_model_is_part_of_the_key(self) -> None:
        from transformers import BitsAndBytesConfig

        base: dict[str, Any] = {"model_id": "some/model"}
        variants: list[dict[str, Any]] = [
            {},
            {"model_id": "other/model"},
            {"quantization": "nf4"},
            {"quantization": "int8"},
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)},
            {"dtype": "float16"},
            {"revision": "v2"},
            {"attn_implementation": "eager"},
            {"trust_remote_code": True},
            {"model_kwargs": {"subfolder": "x"}},
        ]
        keys = [str(sorted(QuantizedHuggingFaceLLM(**{**base, **v}).asdict().items())) for v in variants]
        assert len(set(keys)) == len(variants)

    def test_the_token_is_in_no_key(self) -> None:
        llm = QuantizedHuggingFaceLLM(model_id="some/model", token="hf_secret")
        assert "hf_secret" not in str(llm.asdict())

    @pytest.mark.usefixtures("cached")
    def test_errors_are_not_cached(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, fail_at(1, ValueError("once"))), pytest.raises(GenerationError):
            tiny_llm.invoke("not cached", max_new_tokens=2)
        with forwards(tiny_llm) as seen:
            tiny_llm.invoke("not cached", max_new_tokens=2)
            assert seen.count == 2


class Recorder(BaseCallbackHandler):
    """Records the callbacks."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.chunks: list[Any] = []
        self.starts: list[dict[str, Any]] = []
        self.ends: list[LLMResult] = []
        self.errors: list[BaseException] = []

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], **kwargs: Any) -> None:
        self.starts.append({"prompts": prompts, **kwargs})

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)
        self.chunks.append(kwargs.get("chunk"))

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


class AsyncRecorder(AsyncCallbackHandler):
    """Records the callbacks of async calls."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ends: list[LLMResult] = []

    async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)

    async def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ends.append(response)


class TestCallbacks:
    @pytest.mark.parametrize("options", [{}, {"return_full_text": True}, {"logprobs": 1}], ids=str)
    async def test_tokens_reach_callbacks_as_they_are_streamed(
        self, tiny_llm: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        sync, asynchronous = Recorder(), AsyncRecorder()
        pieces = list(tiny_llm.stream(PROMPT, {"callbacks": [sync]}, **options))
        apieces = [p async for p in tiny_llm.astream(PROMPT, {"callbacks": [asynchronous]}, **options)]
        assert sync.tokens == pieces
        assert asynchronous.tokens == apieces
        assert "".join(pieces) == "".join(apieces) == tiny_llm.invoke(PROMPT, **options)

    async def test_the_end_of_a_stream_carries_what_generate_gives(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        sync, asynchronous = Recorder(), AsyncRecorder()
        list(tiny_llm.stream(PROMPT, {"callbacks": [sync]}, logprobs=2))
        _ = [p async for p in tiny_llm.astream(PROMPT, {"callbacks": [asynchronous]}, logprobs=2)]
        expected = tiny_llm.generate([PROMPT], logprobs=2).generations[0][0]
        assert expected.generation_info is not None
        for recorder in (sync, asynchronous):
            (end,) = recorder.ends
            (generation,) = end.generations[0]
            assert generation.text == expected.text
            assert generation.generation_info is not None
            for name in ("finish_reason", "model_name", "usage_metadata", "logprobs"):
                assert generation.generation_info[name] == expected.generation_info[name]

    def test_errors_reach_callbacks(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        for call in (tiny_llm.invoke, lambda p, c: list(tiny_llm.stream(p, c))):
            recorder = Recorder()
            with forwards(tiny_llm, fail_at(3, ValueError("cosmic ray"))), pytest.raises(GenerationError):
                call(PROMPT, {"callbacks": [recorder]})
            assert [type(error) for error in recorder.errors] == [GenerationError]
            assert recorder.ends == []

    def test_a_batch_starts_and_ends_a_run_for_each_prompt(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        for return_exceptions in (False, True):
            recorder = Recorder()
            tiny_llm.batch(
                ["a", "b", "c"], {"callbacks": [recorder]}, return_exceptions=return_exceptions, max_new_tokens=2
            )
            assert sorted(start["prompts"][0] for start in recorder.starts) == ["a", "b", "c"]
            assert len(recorder.ends) == 3

    def test_names_tags_and_metadata_are_langchain_s_not_options(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        recorder = Recorder()
        config: Any = {"callbacks": [recorder], "tags": ["t"], "metadata": {"k": "v"}, "run_name": "named"}
        text = tiny_llm.invoke(PROMPT, config, max_new_tokens=2)
        assert text == tiny_llm.invoke(PROMPT, max_new_tokens=2)
        (start,) = recorder.starts
        assert "t" in start["tags"]
        assert start["metadata"]["k"] == "v"
        assert start["name"] == "named"


class TestTracing:
    def test_traces_have_the_standard_parameters(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, temperature=0.5, max_new_tokens=3, stop=["x"])
        params = llm._get_ls_params()
        assert params == {
            "ls_provider": "quantllm",
            "ls_model_name": llm.model_id,
            "ls_model_type": "llm",
            "ls_temperature": 0.5,
            "ls_max_tokens": 3,
            "ls_stop": ["x"],
        }

    @pytest.mark.parametrize(
        ("options", "name", "value"),
        [
            ({"temperature": 0.9}, "ls_temperature", 0.9),
            ({"temperature": 0}, "ls_temperature", 0),
            ({"max_tokens": 7}, "ls_max_tokens", 7),
            ({"max_new_tokens": 7}, "ls_max_tokens", 7),
            ({"pipeline_kwargs": {"max_new_tokens": 7}}, "ls_max_tokens", 7),
            ({"stop": ["z"]}, "ls_stop", ["z"]),
            ({"stop_sequence": "z"}, "ls_stop", ["z"]),
        ],
        ids=str,
    )
    def test_options_of_the_call_are_in_the_run_s_metadata(
        self, tiny_llm: QuantizedHuggingFaceLLM, options: dict[str, Any], name: str, value: Any
    ) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, temperature=0.5, max_new_tokens=3, stop=["x"])
        for call in (llm.invoke, lambda p, c, **k: list(llm.stream(p, c, **k))):
            recorder = Recorder()
            call(PROMPT, {"callbacks": [recorder]}, seed=1, **options)
            (start,) = recorder.starts
            assert start["metadata"][name] == value
            assert start["metadata"]["ls_provider"] == "quantllm"

    def test_options_of_the_call_are_in_the_invocation_params(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        for call in (tiny_llm.invoke, lambda p, c, **k: list(tiny_llm.stream(p, c, **k))):
            recorder = Recorder()
            call(PROMPT, {"callbacks": [recorder]}, repetition_penalty=1.5, stop=["q"])
            (start,) = recorder.starts
            params = start["invocation_params"]
            assert (params["repetition_penalty"], params["stop"]) == (1.5, ["q"])
            assert params["model_id"] == tiny_llm.model_id
            assert params["_type"] == "quantized_huggingface"


class TestChains:
    async def test_a_chain_of_prompt_llm_and_parser_gives_the_text_in_every_way(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        chain = PromptTemplate.from_template("The {x} is") | tiny_llm | StrOutputParser()
        expected = tiny_llm.invoke(PROMPT)
        assert chain.invoke({"x": "sea"}) == expected
        pieces = list(chain.stream({"x": "sea"}))
        assert "".join(pieces) == expected
        assert len(pieces) > 3
        assert chain.batch([{"x": "sea"}] * 2) == [expected] * 2
        assert await chain.ainvoke({"x": "sea"}) == expected
        assert "".join([p async for p in chain.astream({"x": "sea"})]) == expected
        assert await chain.abatch([{"x": "sea"}] * 2) == [expected] * 2

    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    async def test_a_chain_s_batch_runs_as_one(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, max_new_tokens=12, engine=engine)
        assert llm.engine_info.name == engine
        chain = PromptTemplate.from_template("The {x} is") | llm | StrOutputParser()
        with forwards(llm) as seen:
            chain.batch([{"x": x} for x in ("sea", "sky", "sun")])
        if engine == "pipeline":
            assert seen.rows == [3] * 12
        else:  # the fast engine packs the prompts into one row
            assert seen.shapes == [(1, 3 * 3), *[(1, 3)] * 11]

    async def test_events_stream_the_text(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        chain = PromptTemplate.from_template("The {x} is") | tiny_llm
        text = ""
        async for event in chain.astream_events({"x": "sea"}, version="v2"):
            if event["event"] == "on_llm_stream":
                text += event["data"]["chunk"].text
        assert text == tiny_llm.invoke(PROMPT)

    def test_chat_prompts_become_text(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        chain = ChatPromptTemplate.from_messages([("human", "The sea is")]) | tiny_llm
        assert chain.invoke({}) == tiny_llm.invoke("Human: The sea is")

    def test_parallel_branches_keep_their_own_options(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        both = RunnableParallel(a=tiny_llm.bind(max_new_tokens=3), b=tiny_llm.bind(max_new_tokens=5))
        assert both.invoke(PROMPT) == {
            "a": tiny_llm.invoke(PROMPT, max_new_tokens=3),
            "b": tiny_llm.invoke(PROMPT, max_new_tokens=5),
        }

    def test_configurable_fields_of_a_user_s_pipeline(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        llm = tiny_llm.configurable_fields(
            max_new_tokens=ConfigurableField(id="tokens"), temperature=ConfigurableField(id="temperature")
        )
        config: Any = {"configurable": {"tokens": 3, "temperature": 0}}
        assert llm.invoke(PROMPT, config) == tiny_llm.invoke(PROMPT, max_new_tokens=3)
        assert "".join(llm.stream(PROMPT, config)) == tiny_llm.invoke(PROMPT, max_new_tokens=3)
        assert llm.batch([PROMPT] * 2, config) == [tiny_llm.invoke(PROMPT, max_new_tokens=3)] * 2
        assert llm.with_config(config).invoke(PROMPT) == tiny_llm.invoke(PROMPT, max_new_tokens=3)
        assert llm.invoke(PROMPT) == tiny_llm.invoke(PROMPT)

    def test_configurable_fields_of_a_loaded_model_share_its_weights(self, llm: QuantizedHuggingFaceLLM) -> None:
        """Every use makes a new instance from all fields; `llm` is loaded, with a dtype of its own."""
        configurable = llm.configurable_fields(max_new_tokens=ConfigurableField(id="tokens"))
        assert llm.engine_info.name == "fast"  # its check of the model is done by now
        with forwards(llm) as seen:
            text = configurable.invoke(PROMPT, {"configurable": {"tokens": 2}})
            assert seen.count == 2
        assert text == llm.invoke(PROMPT, max_new_tokens=2)

    def test_configurable_alternatives_choose_the_llm(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        short = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, max_new_tokens=2)
        llm = tiny_llm.configurable_alternatives(ConfigurableField(id="which"), default_key="long", short=short)
        assert llm.invoke(PROMPT, {"configurable": {"which": "short"}}) == short.invoke(PROMPT)

    def test_fallbacks_and_retries_see_its_errors(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, fail_at(1, ValueError("once"))):
            retrying = tiny_llm.with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
            assert retrying.invoke(PROMPT) == tiny_llm.invoke(PROMPT)
        with forwards(tiny_llm, fail_at(1, ValueError("once"))):
            assert tiny_llm.with_fallbacks([tiny_llm]).invoke(PROMPT) == tiny_llm.invoke(PROMPT)


class TestOwnPipelines:
    @pytest.mark.usefixtures("cached")
    def test_options_of_a_pipeline_are_part_of_the_key(self, tokenizer: Any) -> None:
        model = tiny_model(len(tokenizer))
        texts = []
        for length in (3, 6):
            pipe = pipeline_of(model, tokenizer)
            pipe.model.generation_config.max_new_tokens = length
            texts.append(QuantizedHuggingFaceLLM(pipeline=pipe, model_id="same").invoke(PROMPT))
        assert texts[1] != texts[0]
        assert texts[1].startswith(texts[0])

    @pytest.mark.usefixtures("cached")
    def test_one_pipeline_keeps_its_answers(self, tokenizer: Any) -> None:
        pipe = pipeline_of(tiny_model(len(tokenizer)), tokenizer)
        first = QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=3)
        text = first.invoke(PROMPT)
        second = QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=3)
        with forwards(second) as seen:
            assert second.invoke(PROMPT) == text
        assert seen.count == 0
