"""Names of other libraries: errors say what to write here, and every name in that advice exists."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import model_validator

from langchain_quantllm import FP4, GPTQ, NF4, ChatQuantizedHuggingFace, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.data.counterparts import _ROWS, COUNTERPARTS, HARMLESS, advice, names_advised, written
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.options import OPTION_NAMES, normalize
from langchain_quantllm.quantization.calibration import Calibration
from langchain_quantllm.schemes import scheme_from
from langchain_quantllm.structured import Choice, Constraint, Grammar, JSONSchema, Regex
from tests.support.checkpoints import make_checkpoint

CLASSES = [QuantizedHuggingFaceLLM, ChatQuantizedHuggingFace]
MANY = 400
"""Letters of an error that is longer than two sentences."""


def refusal(make: Any) -> str:
    with pytest.raises(InvalidOptionError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < MANY
    assert text.count(",") < 12
    return text


def taken_by(cls: type) -> set[str]:
    """Return all names that a class takes with `=`: fields, options of a call, and arguments of `from_model_id`."""
    place = cls._place(at_call=True)  # type: ignore[attr-defined]
    maker = getattr(cls, "from_model_id", None)
    return {*place.fields, *place.calls, *(inspect.signature(maker).parameters if maker else ())}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", sorted(COUNTERPARTS))
def test_what_an_advice_names_is_there(name: str, cls: Any) -> None:
    told = advice(name, cls._kind)
    assert told
    if name in cls._names():
        return
    assert set(names_advised(told)) <= taken_by(cls)
    for method in ("bind_tools", "with_structured_output", "stream", "bind", "invoke", "unload", "pipeline"):
        if f".{method}" in told:
            assert hasattr(cls, method)
    if "ChatQuantizedHuggingFace" in told:
        assert cls is QuantizedHuggingFaceLLM


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", sorted(COUNTERPARTS))
def test_a_counterpart_is_told_for_fields_and_calls_alike(name: str, cls: Any) -> None:
    told = advice(name, cls._kind)
    assert told is not None
    if name not in cls._names() and (cls, name) != (ChatQuantizedHuggingFace, "api_key"):  # an alias of token there
        text = refusal(lambda: cls(model_id="acme/tiny", **{name: "x"}))
        assert told in text
        assert name in text
    if name not in cls._call_options:
        assert told in refusal(lambda: normalize({name: "x"}, place=cls._place(at_call=True)))


def test_no_name_stands_in_two_rows() -> None:
    assert sum(len(names.split()) for names in _ROWS) == len(COUNTERPARTS)
    assert HARMLESS.keys() <= COUNTERPARTS.keys()


@pytest.mark.parametrize("name", sorted(COUNTERPARTS))
def test_no_name_of_ours_is_a_foreign_one_too(name: str) -> None:
    assert name not in OPTION_NAMES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"load_in_4bit": True}, ["quantization='nf4'"]),
        ({"load_in_8bit": True}, ["quantization='int8'"]),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, ["NF4(compute_dtype="]),
        ({"presence_penalty": 0.5}, ["another formula", "1.0 changes nothing", "leave it out"]),
        ({"frequency_penalty": 0.5}, ["another formula", "1.0 changes nothing", "leave it out"]),
        ({"num_ctx": 2048}, ["max_length=", "kv_cache_memory="]),
        ({"num_predict": 9}, ["max_new_tokens="]),
        ({"base_url": "http://x"}, ["engine=Server("]),
        ({"openai_api_key": "x"}, ["engine=Server(...)"]),
        ({"n_gpu_layers": -1}, ["device=-1", "device_map='auto'"]),
        ({"logit_bias": {5: 1.0}}, ["sequence_bias="]),
        ({"keep_alive": "5m"}, [".unload()"]),
        ({"tensor_parallel_size": 2}, ["device_map='auto'"]),
        ({"gpu_memory_utilization": 0.9}, ["kv_cache_memory=0.5"]),
        ({"stop_sequences": ["a"]}, ["stop="]),
        ({"stop_token_ids": [1]}, ["eos_token_id="]),
        ({"repeat_penalty": 1.1}, ["repetition_penalty="]),
        ({"tfs_z": 0.9}, ["min_p="]),
        ({"model_path": "x.gguf"}, ["model_id="]),
        ({"torch_dtype": "float16"}, ["dtype="]),
        ({"n_gpu_layer": 1}, ["'n_gpu_layers'", "device=-1"]),
        ({"Temperature": 1.0}, ["did you mean 'temperature'?"]),
        ({"max-new-tokens": 1}, ["did you mean 'max_new_tokens'?"]),
        ({"zzzz": 1}, ["max_new_tokens", "help("]),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_names_that_new_users_bring_are_told_what_to_write(cls: Any, given: dict[str, Any], words: list[str]) -> None:
    for make in (
        lambda: cls(model_id="acme/tiny", **given),
        lambda: cls(model_id="acme/tiny", model_kwargs={}, generation_kwargs=given),
        lambda: normalize(given, place=cls._place(at_call=True)),
    ):
        text = refusal(make)
        for word in words:
            assert word in text


def test_tools_are_answered_by_the_class_that_is_asked() -> None:
    text = refusal(lambda: QuantizedHuggingFaceLLM(model_id="acme/tiny", tools=[]))
    assert "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace" in text
    text = refusal(lambda: ChatQuantizedHuggingFace(model_id="acme/tiny", tools=[]))
    assert ".bind_tools(tools)" in text
    assert "LLM" not in text
    for name in ("tool_choice", "response_format", "constraint", "strict", "functions"):
        assert "ChatQuantizedHuggingFace" in refusal(lambda name=name: normalize({name: "x"}))  # type: ignore[misc]


def test_a_field_at_a_call_is_told_where_it_belongs(tmp_path: Any) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(make_checkpoint(tmp_path)), progress=False)
    text = refusal(lambda: llm.invoke("hello", quantization="nf4"))
    assert "set when the model is made, not at a call: QuantizedHuggingFaceLLM(..., quantization='nf4')" in text
    assert refusal(lambda: llm.invoke("hello", num_ctx=5)).endswith("when the model is made.")
    assert not refusal(lambda: llm.invoke("hello", num_predict=5)).endswith("when the model is made.")
    assert not llm.is_loaded


@pytest.mark.parametrize(
    "name", ["api_key", "openai_api_key", "hf_token", "huggingfacehub_api_token", "use_auth_token"]
)
def test_no_error_repeats_a_secret(name: str) -> None:
    text = refusal(lambda: QuantizedHuggingFaceLLM(model_id="acme/tiny", **{name: "hf_secret"}))
    assert "hf_secret" not in text
    assert "token=" in text
    assert "hf_secret" not in refusal(lambda: QuantizedHuggingFaceLLM(model_id="acme/tiny", token=["hf_secret"]))


@pytest.mark.parametrize(
    "name",
    [
        *("default_headers", "extra_headers", "headers", "client_kwargs", "base_url", "openai_proxy", "endpoint_url"),
        *("http_client", "proxies"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_may_hold_a_secret_is_not_repeated(cls: Any, name: str) -> None:
    for value in ({"Authorization": "Bearer hf_secret"}, "http://me:hf_secret@host"):
        text = refusal(lambda value=value: cls(model_id="acme/tiny", **{name: value}))  # type: ignore[misc]
        assert f"{name}=..." in text
        assert "hf_secret" not in text
        assert "hf_secret" not in refusal(lambda value=value: normalize({name: value}))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["proxy", "password", "key", "secret", "hf_key", "client_secret", "API_KEY"])
def test_names_of_secrets_are_written_without_them(name: str) -> None:
    assert written(name, "hf_secret") == f"{name}=..."


def test_an_error_about_all_fields_repeats_none() -> None:
    class Odd(QuantizedHuggingFaceLLM):
        @model_validator(mode="before")
        @classmethod
        def _refuse(cls, values: Any) -> Any:
            raise ValueError("they do not go together")

    text = refusal(lambda: Odd(model_id="acme/tiny", token="hf_secret"))
    assert "they do not go together" in text
    assert "hf_secret" not in text


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_names_are_told_though_their_value_is_none(cls: Any) -> None:
    for given, meant in (({"quantisation": None}, "did you mean 'quantization'?"), ({"zzzz": None}, "most used are")):
        assert meant in refusal(lambda given=given: cls(model_id="acme/tiny", **given))  # type: ignore[misc]
    for name in ("num_ctx", "max_length", "do_sample", "pipeline", "model", "quantization", "num_beams"):
        assert cls(model_id="acme/tiny", **{name: None}).model_id == "acme/tiny"


def test_the_nearest_name_is_near() -> None:
    text = refusal(lambda: normalize({"handle_long_generation": "x"}))
    assert "must be 'hole'" in text
    assert "did you mean" not in text
    for name in ("leaders", "readers"):
        assert "threads" not in refusal(lambda name=name: normalize({name: 1}))  # type: ignore[misc]
    text = refusal(lambda: normalize({"batch_size": 8}))
    assert text.endswith("write batch_size=8, when the model is made.")


@pytest.mark.parametrize("name", ["force_download", "subfolder"])
def test_no_advice_is_an_option_that_transformers_drops(name: str) -> None:
    assert "model_kwargs" not in (advice(name, "llm") or "model_kwargs")


@pytest.mark.parametrize(
    "given", [{"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"mirostat": 0}, {"tfs_z": 1.0}, {"best_of": 1}]
)
def test_values_that_ask_for_nothing_are_taken(given: dict[str, Any]) -> None:
    assert QuantizedHuggingFaceLLM(model_id="acme/tiny", **given).generation_kwargs == {}
    assert normalize(given) == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapters": ["x"]}, ["adapters=['x']", "dictionary"]),
        ({"batch_size": 0}, ["batch_size=0", "greater than or equal to 1"]),
        ({"trust_remote_code": "maybe"}, ["trust_remote_code='maybe'", "boolean"]),
        ({"model_id": 5}, ["model_id=5", "string"]),
        ({"model_kwargs": [1]}, ["model_kwargs=[1]", "not a dict"]),
        ({"generation_kwargs": "x"}, ["generation_kwargs='x'", "not a dict"]),
        ({"max_memory": "10GB"}, ["max_memory='10GB'", "'cpu': '30GiB'"]),
        ({"quantization_config": "nf4"}, ["quantization_config='nf4'", "quantization="]),
        ({"quantization_config": NF4()}, ["quantization="]),
        ({"quantization_config": {}}, ["load_in_4bit", "'nf4'"]),
        ({"quantization_config": {"load_in_4bits": True}}, ["did you mean 'load_in_4bit'?"]),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}}, ["'bnb_4bit_quant_type'"]),
        ({"quantization_config": {"bnb_4bit_quant_type": "nf4"}}, ["asks for no scheme"]),
        ({"model_kwargs": {"bnb_4bit_quant_type": "nf4"}}, ["quantization='nf4'"]),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_field_s_wrong_value_is_one_sentence(cls: Any, given: dict[str, Any], words: list[str]) -> None:
    text = refusal(lambda: cls(**{"model_id": "acme/tiny", **given}))
    for word in words:
        assert word in text


def test_model_kwargs_of_bitsandbytes_mean_what_older_transformers_took_them_for() -> None:
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "use_cache": True}
    llm = QuantizedHuggingFaceLLM(model_id="acme/tiny", model_kwargs=given)
    assert llm.scheme == NF4(double_quantization=True)
    assert llm.model_kwargs == {"use_cache": True}
    given = {"load_in_8bit": True, "llm_int8_threshold": 4.0}
    assert QuantizedHuggingFaceLLM(model_id="acme/tiny", model_kwargs=given).scheme == Int8(threshold=4.0)
    assert QuantizedHuggingFaceLLM(model_id="acme/tiny", model_kwargs={"load_in_8bit": False}).quantization is None


@pytest.mark.parametrize(
    ("quantization", "given"),
    [
        ("int8", {"load_in_8bit": True}),
        ({"name": "int8"}, {"load_in_8bit": True}),
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (NF4(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ],
)
def test_the_same_scheme_may_be_said_twice(quantization: Any, given: dict[str, Any]) -> None:
    for fields in (
        {"quantization": quantization, "model_kwargs": given},
        {"model_kwargs": {"quantization": quantization, **given}},
    ):
        llm = QuantizedHuggingFaceLLM(model_id="acme/tiny", **fields)
        assert llm.quantization == scheme_from(quantization).name  # type: ignore[union-attr]
    text = refusal(lambda: QuantizedHuggingFaceLLM(model_id="a/b", model_kwargs={"quantization": "fp4", **given}))
    assert "'fp4'" in text
    assert "give one" in text
    text = refusal(lambda: QuantizedHuggingFaceLLM(model_id="a/b", quantization="fp4", model_kwargs=given))
    assert "give it once" in text


@pytest.mark.parametrize(
    ("cls", "wrong", "meant"),
    [
        (Int8, "treshold", "did you mean 'threshold'?"),
        (Int8, "llm_int8_threshold", "write threshold="),
        (NF4, "double_quant", "did you mean 'double_quantization'?"),
        (NF4, "bnb_4bit_use_double_quant", "write double_quantization="),
        (FP4, "bnb_4bit_compute_dtype", "write compute_dtype="),
        (GPTQ, "wbits", "write bits="),
        (GPTQ, "groupsize", "did you mean 'group_size'?"),
        (GPTQ, "double_quantization", "allowed are bits, desc_act"),
        (Calibration, "sample", "did you mean 'samples'?"),
        (Regex, "regex", "write pattern="),
        (Choice, "choices", "write options="),
        (JSONSchema, "scheme", "did you mean 'schema'?"),
        (Grammar, "gbnf", "write ebnf="),
        (Constraint, "x", "allowed are reasoning"),
    ],
)
def test_value_classes_name_the_nearest_option(cls: Any, wrong: str, meant: str) -> None:
    text = refusal(lambda: cls(**{wrong: 5}))
    assert f"{cls.__name__}({wrong}=5)" in text
    assert meant in text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Choice("abc"), "a list of texts"),  # type: ignore[arg-type]
        (lambda: Choice(5), "a list of texts"),  # type: ignore[arg-type]
        (lambda: Regex(5), "Regex(pattern=5)"),  # type: ignore[arg-type]
        (lambda: Grammar(None), "Grammar(ebnf=None)"),  # type: ignore[arg-type]
        (lambda: JSONSchema(5), "model_json_schema"),  # type: ignore[arg-type]
    ],
)
def test_constraints_of_another_type_are_refused_when_they_are_made(make: Any, words: str) -> None:
    assert words in refusal(make)
