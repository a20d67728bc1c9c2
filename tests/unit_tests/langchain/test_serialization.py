"""Pickle, copies and LangChain's dump and load carry the settings, not the weights, and never the token."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.prompts import PromptTemplate
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

from langchain_quantllm import NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import QuantLLMError
from langchain_quantllm.loading.spec import LoadSpec
from tests.support.checkpoints import FakeHub, make_checkpoint, quicken

PROMPT = "The capital of France"
SECRET = "hf_verySecretToken"  # not a real token


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_llm(folder: Path | str, **kwargs: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(**{"model_id": str(folder), "progress": False, "max_new_tokens": 8, **kwargs})


def revive(dumped: Any, **kwargs: Any) -> Any:
    options = {"allowed_objects": [QuantizedHuggingFaceLLM], "valid_namespaces": ["langchain_quantllm"], **kwargs}
    return loads(dumped, **options) if isinstance(dumped, str) else load(dumped, **options)


def by_pickle(llm: QuantizedHuggingFaceLLM) -> Any:
    return pickle.loads(pickle.dumps(llm))


def by_dumpd(llm: QuantizedHuggingFaceLLM) -> Any:
    return revive(json.loads(json.dumps(dumpd(llm))))


def by_dumps(llm: QuantizedHuggingFaceLLM) -> Any:
    return revive(dumps(llm))


WAYS = [by_pickle, copy.copy, copy.deepcopy, by_dumpd, by_dumps]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"quantization": "nf4-double"},
    {"quantization": NF4(compute_dtype=torch.float16, skip_modules=["lm_head", "q_proj"])},
    {"quantization": Int8(threshold=3.5)},
    {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)},
    {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)},
    {"dtype": torch.float16, "device": -1, "attn_implementation": "eager", "revision": "v2", "cache_dir": "/x"},
    {"model_kwargs": {"torch_dtype": torch.bfloat16, "output_attentions": False}},
    {"device_map": {"": "cpu"}, "local_files_only": True, "use_safetensors": False, "batch_size": 3},
    {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "n": 2, "stop": ["a", "b"]},
    {"max_length": 50, "min_new_tokens": 2, "repetition_penalty": 1.2, "do_sample": True, "logprobs": 2},
    {"no_repeat_ngram_size": 2, "bad_words_ids": [[3], [4, 5]], "eos_token_id": [1, 2]},
    {"truncation": "left", "return_full_text": True, "ignore_eos": True, "timeout": 9.5},
    {"tags": ["t"], "metadata": {"k": "v"}, "cache": False, "verbose": True},
]


def settings(llm: QuantizedHuggingFaceLLM) -> dict[str, Any]:
    """All fields in a comparable form."""
    fields = {name: getattr(llm, name) for name in type(llm).model_fields if name != "pipeline"}
    config = fields["quantization_config"]
    if config is not None and not isinstance(config, dict):
        fields["quantization_config"] = config.to_dict()
    return fields


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: ",".join(given) or "defaults")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_settings_come_back(tiny: Path, way: Any, given: dict[str, Any]) -> None:
    llm = make_llm(tiny, **given)
    twin = way(llm)
    assert type(twin) is QuantizedHuggingFaceLLM
    assert twin is not llm
    ours, theirs = settings(llm), settings(twin)
    if way in (by_dumpd, by_dumps):  # LangChain leaves out the fields about runs
        for name in ("tags", "metadata", "cache", "verbose"):
            ours.pop(name), theirs.pop(name)
    assert theirs == ours
    assert twin.scheme == llm.scheme
    assert twin._identifying_params == llm._identifying_params


def test_device_numbers_in_max_memory_stay_numbers(tiny: Path) -> None:
    """JSON knows text keys only, and accelerate does not take "0" for GPU 0."""
    llm = make_llm(tiny, max_memory={0: "10GiB", "cpu": "30GiB"})
    for way in WAYS:
        assert way(llm).max_memory == {0: "10GiB", "cpu": "30GiB"}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("quantization", [None, "nf4", NF4(compute_dtype="float32")], ids=str)
def test_a_loaded_instance_carries_no_weights(tiny: Path, way: Any, quantization: Any) -> None:
    llm = make_llm(tiny, quantization=quantization, dtype="float32")
    text = llm.invoke(PROMPT)
    twin = way(llm)
    assert settings(twin) == {**settings(llm), "metadata": twin.metadata}
    assert twin.invoke(PROMPT) == text
    assert id(twin.pipeline.model) == id(llm.pipeline.model)  # found through the registry, not copied
    assert llm.is_loaded


@pytest.mark.parametrize("loaded", [False, True])
def test_a_pickle_has_no_weights(tiny: Path, loaded: bool) -> None:
    llm = make_llm(tiny, quantization="nf4")
    if loaded:
        llm.invoke(PROMPT)
    assert len(pickle.dumps(llm)) < 5_000  # the weights are some 250 kB
    assert len(dumps(llm)) < 5_000
    twin = by_pickle(llm)
    assert not twin.is_loaded
    assert not twin.is_loaded


def _child(data: bytes, folder: str) -> None:
    text = pickle.loads(data).invoke(PROMPT)
    (Path(folder) / "said").write_text(text)


def test_pickle_into_another_process(tiny: Path, tmp_path: Path) -> None:
    llm = make_llm(tiny, quantization="nf4")
    text = llm.invoke(PROMPT)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(pickle.dumps(llm), str(tmp_path)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert (tmp_path / "said").read_text() == text


def test_a_copy_is_its_own(tiny: Path) -> None:
    llm = make_llm(tiny, stop=["a"], generation_kwargs={"no_repeat_ngram_size": 2})
    twin = copy.deepcopy(llm)
    twin.stop.append("b")  # type: ignore[union-attr]
    twin.generation_kwargs["no_repeat_ngram_size"] = 3
    assert llm.stop == ["a"]
    assert llm.generation_kwargs == {"no_repeat_ngram_size": 2}
    one, two = make_llm(tiny).load(), make_llm(tiny)
    shallow = copy.copy(one)
    shallow.unload()
    assert not shallow.is_loaded
    assert one.invoke(PROMPT) == two.invoke(PROMPT)


def test_a_chain_is_dumped_and_loaded(tiny: Path) -> None:
    chain = PromptTemplate.from_template("The capital of {x}") | make_llm(tiny, quantization="int8")
    text = chain.invoke({"x": "France"})
    from langchain_core.runnables import RunnableSequence

    again = revive(dumps(chain), allowed_objects=[QuantizedHuggingFaceLLM, PromptTemplate, RunnableSequence])
    assert again.invoke({"x": "France"}) == text


def test_load_needs_the_class_allowed(tiny: Path) -> None:
    dumped = dumpd(make_llm(tiny))
    assert dumped["type"] == "constructor"
    assert dumped["id"] == ["langchain_quantllm", "llms", "QuantizedHuggingFaceLLM"]
    with pytest.raises(ValueError, match="langchain_quantllm"):
        load(dumped, allowed_objects="core")


# A pipeline of the user's own.


@pytest.fixture
def own(tiny: Path) -> QuantizedHuggingFaceLLM:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    return QuantizedHuggingFaceLLM(
        pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer), max_new_tokens=3
    )


@pytest.mark.parametrize("used", [False, True])
def test_an_own_pipeline_is_not_serialized(own: QuantizedHuggingFaceLLM, used: bool) -> None:
    if used:
        own.invoke(PROMPT)
    with pytest.raises(TypeError, match=r"your own pipeline= cannot be pickled") as caught:
        pickle.dumps(own)
    assert "model_id=" in str(caught.value)
    dumped = dumpd(own)
    assert dumped["type"] == "not_implemented"
    with pytest.raises(NotImplementedError):
        revive(dumped)
    assert len(json.dumps(dumped)) < 5_000


def test_a_copy_of_an_own_pipeline_shares_it(own: QuantizedHuggingFaceLLM) -> None:
    own.invoke(PROMPT)
    for twin in (copy.copy(own), own.model_copy()):
        assert twin.pipeline is own.pipeline
        assert twin.invoke(PROMPT) == own.invoke(PROMPT)
    with pytest.raises(TypeError, match="your own"):
        copy.deepcopy(own)


# The token.


def spilled(*values: Any) -> list[str]:
    """The texts that hold the secret."""
    texts = [value if isinstance(value, str) else repr(value) for value in values]
    return [text for text in texts if SECRET in text or SECRET[:12] in text or SECRET[-8:] in text]


def test_the_token_is_nowhere(tiny: Path) -> None:
    llm = make_llm(tiny, token=SECRET).load()
    assert llm.token is not None
    assert llm.token.get_secret_value() == SECRET
    assert not spilled(
        llm,
        str(llm),
        llm.dict(),
        llm.asdict(),
        llm.model_dump(),
        llm.model_dump_json(exclude={"pipeline"}),
        dumpd(llm),
        dumps(llm),
        dumps(llm, pretty=True),
        llm._identifying_params,
        llm._get_ls_params(),
        llm.lc_attributes,
        llm.lc_secrets,
        llm.to_json(),
        repr(llm._spec()),
        str(llm._spec()),
        llm._spec().key(),
        repr(llm | PromptTemplate.from_template("{x}")),
    )


def test_the_token_is_in_no_trace(tiny: Path) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    seen: list[Any] = []

    class Handler(BaseCallbackHandler):
        def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))

        def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))

    make_llm(tiny, token=SECRET).invoke(PROMPT, config={"callbacks": [Handler()]})
    assert len(seen) == 2
    assert not spilled(*seen)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_newtokens": 3},
        {"quantization": "nf5"},
        {"dtype": "float61"},
        {"device": "cpu", "device_map": "auto"},
        {"model_kwargs": {"token": "another_token_of_mine"}},
        {"temperature": -1},
        {"batch_size": 0},
        {"batch_size": "many"},
        {"model_id": None},
        {"pipeline": 3},
        {"trust_remote_code": "perhaps"},
        {"model_id": ["a"]},
    ],
    ids=str,
)
def test_the_token_is_in_no_error_of_a_wrong_field(tiny: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        QuantizedHuggingFaceLLM(**{"token": SECRET, "model_id": str(tiny), **wrong})
    assert not spilled(str(caught.value), repr(caught.value))
    assert "another_token_of_mine" not in str(caught.value)


def test_a_short_constructor_call_does_not_show_the_token() -> None:
    """Pydantic cuts long inputs short in its errors, but shows short ones whole."""
    with pytest.raises(ValueError, match=".") as caught:
        QuantizedHuggingFaceLLM(token=SECRET, modl="x")
    assert not spilled(str(caught.value), repr(caught.value))
    for cause in (caught.value.__cause__, caught.value.__context__):
        assert not spilled(str(cause), repr(cause))


@pytest.mark.enable_socket
def test_the_token_is_in_no_error_of_loading(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeHub({"acme/gated": tiny}, gated=("acme/gated",)) as server:
        FakeHub.point_to(server.url, monkeypatch)
        for model_id in ("acme/gated", "acme/unknown"):
            with pytest.raises(QuantLLMError) as caught:
                make_llm(model_id, token=SECRET, cache_dir=str(tmp_path)).load()
            error: BaseException | None = caught.value
            while error is not None:
                assert not spilled(str(error), repr(error))
                error = error.__cause__
        assert f"Bearer {SECRET}" in server.tokens
    assert not spilled(*caplog.messages)


def test_the_token_is_loaded_from_a_secret(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumped = dumpd(make_llm(tiny, token=SECRET))
    assert dumped["kwargs"]["token"] == {"lc": 1, "type": "secret", "id": ["HF_TOKEN"]}
    assert revive(dumped, secrets_map={"HF_TOKEN": "hf_other"}).token.get_secret_value() == "hf_other"
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert revive(dumped, secrets_from_env=True).token.get_secret_value() == "hf_env"


def test_the_token_survives_copies(tiny: Path) -> None:
    llm = make_llm(tiny, token=SECRET)
    for way in (copy.copy, copy.deepcopy):
        twin = way(llm)
        assert twin.token.get_secret_value() == SECRET
        assert not spilled(twin)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_token_is_in_no_pickle(tiny: Path, protocol: int) -> None:
    for given in ({"token": SECRET}, {"model_kwargs": {"token": SECRET}}, {"model_kwargs": {"use_auth_token": SECRET}}):
        llm = make_llm(tiny, **given)
        for pickled in (llm, llm.bind(stop=["x"]), {"chain": PromptTemplate.from_template("{x}") | llm}):
            data = pickle.dumps(pickled, protocol)
            assert SECRET.encode() not in data
        twin = pickle.loads(pickle.dumps(llm, protocol))
        assert twin.token is None
        assert "token" not in twin.model_fields_set
        assert twin == make_llm(tiny)
        assert llm.token is not None
        assert llm.token.get_secret_value() == SECRET  # pickling changed nothing


@pytest.mark.enable_socket
def test_what_was_pickled_reads_the_token_from_the_environment(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub({"acme/gated": tiny}, gated=("acme/gated",)) as server:
        FakeHub.point_to(server.url, monkeypatch)
        twin = by_pickle(make_llm("acme/gated", token=server.TOKEN, cache_dir=str(tmp_path)))
        with pytest.raises(QuantLLMError, match="is gated"):
            twin.load()
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
        assert twin.load().is_loaded


def test_load_spec_shows_no_token() -> None:
    spec = LoadSpec(model_id="acme/tiny", token=SECRET)
    assert not spilled(spec, str(spec), spec.key())
    assert dataclasses.replace(spec, token=None) != spec
