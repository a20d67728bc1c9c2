"""`draft_model=` as users have it: its fields, its loading, its sharing, its memory."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import transformers
from langchain_core.load import dumpd, dumps, load, loads

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.base.draft import draft_spec
from langchain_quantllm.errors import InvalidOptionError, ModelNotFoundError
from langchain_quantllm.loading import pipeline as loading_pipeline
from langchain_quantllm.loading import registry
from tests.support.models import byte_fallback_tokenizer, llm_of, tiny_model
from tests.support.speculation import running

REVIVES: dict[str, Any] = {
    "allowed_objects": [QuantizedHuggingFaceLLM, ChatQuantizedHuggingFace],
    "valid_namespaces": ["langchain_quantllm"],
}
PROMPT = "The capital of France is"


@pytest.fixture
def drafting(short_smollm2: Path) -> Any:
    llm = QuantizedHuggingFaceLLM(
        model_id=str(short_smollm2), draft_model=short_smollm2, draft_quantization="nf4", max_new_tokens=24
    )
    yield llm
    llm.unload()


def test_a_draft_model_is_loaded_beside_and_its_tokens_are_counted(drafting: Any, short_smollm2: Path) -> None:
    assert not drafting.is_loaded
    info = drafting.load().engine_info
    assert info.draft_models == (str(short_smollm2),)
    assert info.no_draft_reason is None
    plain = drafting.invoke(PROMPT, speculation="off")
    with running(drafting):
        generation = drafting.generate([PROMPT]).generations[0][0]
    assert generation.text == plain
    details = generation.generation_info["usage_metadata"]["output_token_details"]
    assert 0 < details["accepted"] <= details["proposed"]


def test_the_report_has_its_memory_and_unloading_frees_it(drafting: Any) -> None:
    drafting.load()
    report = drafting.memory_report()
    [draft] = drafting._engine(drafting._options(None, {})).drafts
    assert report.draft_weights_bytes == draft.weights_bytes > 1_000_000
    assert report.draft_kv_pool_bytes == draft.kv_cache_bytes > 0
    assert "Draft model, beside these" in repr(report)
    assert json.dumps(report.to_dict())
    model = weakref.ref(draft._source.pipeline.model)
    del draft
    drafting.unload()
    gc.collect()
    assert model() is None
    assert drafting.load().engine_info.draft_models  # and it comes back


def test_a_model_in_memory_is_its_own_draft_model_without_a_copy(short_smollm2: Path) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), draft_model=str(short_smollm2), max_new_tokens=12)
    llm.load()
    [draft] = llm._engine(llm._options(None, {})).drafts
    assert draft._source is None
    other = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), max_new_tokens=12)
    with running(llm):
        assert llm.invoke(PROMPT) == other.invoke(PROMPT)
    assert other.pipeline is llm.pipeline
    llm.unload()
    assert draft.is_closed


def test_objects_share_a_draft_model_and_the_engine(drafting: Any, short_smollm2: Path) -> None:
    drafting.load()
    chat = ChatQuantizedHuggingFace(llm=drafting)
    bare = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), max_new_tokens=24)
    engines = [one._engine(one._options(None, {})) for one in (drafting, chat, bare)]
    assert engines[0] is engines[1] is engines[2]
    assert len(engines[0].drafts) == 1
    assert [one._options(None, {}).speculation for one in (drafting, chat, bare)] == ["draft", "draft", "forced"]
    with running(drafting):
        assert chat.invoke("Hello").content == chat.bind(speculation="off").invoke("Hello").content


class TestVocabulary:
    def test_another_one_is_refused_before_weights_are_read(
        self, short_smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "draft"
        tiny_model(300).save_pretrained(folder)
        byte_fallback_tokenizer().save_pretrained(folder)
        monkeypatch.setattr(registry, "load_pipeline", None)
        llm = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), draft_model=str(folder))
        with pytest.raises(InvalidOptionError, match="has another vocabulary than .*tokens differ, the first one"):
            llm.load()
        assert not llm.is_loaded

    def test_it_is_checked_for_a_model_in_memory_too(self, tiny_llm: Any) -> None:
        draft = llm_of(tiny_model(300), byte_fallback_tokenizer())
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, draft_model=draft)
        with pytest.raises(InvalidOptionError, match="another vocabulary"):
            llm.invoke(PROMPT)

    def test_added_tokens_may_differ(self, short_smollm2: Path, tmp_path: Path) -> None:
        folder = tmp_path / "draft"
        shutil.copytree(short_smollm2, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<tool>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
        llm = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), draft_model=str(folder), max_new_tokens=8)
        assert llm.load().engine_info.draft_models == (str(folder),)
        llm.unload()

    def test_a_missing_draft_model_is_told_before_weights_are_read(
        self, short_smollm2: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading_pipeline, "model_build_lock", None)
        llm = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), draft_model="./nowhere")
        with pytest.raises(ModelNotFoundError, match="nowhere"):
            llm.invoke(PROMPT)


class TestFields:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"draft_quantization": "nf4"}, "no effect without draft_model="),
            ({"speculation": "draft"}, "needs draft_model="),
            ({"draft_model": "a/b", "engine": "pipeline"}, "engine='pipeline' cannot carry out draft_model="),
            ({"draft_model": "a/b", "draft_quantization": "nf5"}, "nf5"),
            ({"draft_model": 5}, "draft_model=5 is not allowed; give a folder"),
            ({"draft_model": "a/b", "engine": {"name": "server", "url": "http://localhost:8000/v1"}}, "draft_model="),
            ({"assistant_model": "a/b"}, "is draft_model="),
            ({"num_assistant_tokens": 5}, "follows from what is measured"),
        ],
    )
    def test_what_cannot_be_is_told_at_once(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidOptionError, match=words):
            QuantizedHuggingFaceLLM(model_id="owner/name", **fields)

    def test_an_object_cannot_have_what_has_no_effect(self) -> None:
        draft = QuantizedHuggingFaceLLM(model_id="owner/small")
        with pytest.raises(InvalidOptionError, match="set its quantization="):
            QuantizedHuggingFaceLLM(model_id="owner/name", draft_model=draft, draft_quantization="nf4")
        drafting = QuantizedHuggingFaceLLM(model_id="owner/name", draft_model=draft)
        for wrong in (drafting, QuantizedHuggingFaceLLM(model_id="owner/small", adapter="./lora")):
            with pytest.raises(InvalidOptionError, match="must have no draft model, adapters"):
                QuantizedHuggingFaceLLM(model_id="owner/large", draft_model=wrong)

    @pytest.mark.parametrize(
        ("place", "expected"),
        [("cpu", "cpu"), ({"": "cpu"}, {"": "cpu"}), (0, 0), ("auto", None), ({"a": 0, "b": 1}, None), (None, None)],
    )
    def test_a_model_on_one_device_has_its_draft_model_there(self, place: Any, expected: Any) -> None:
        spec = draft_spec(QuantizedHuggingFaceLLM(model_id="a/b", draft_model="a/small", device_map=place))
        assert spec is not None
        assert spec.device_map == expected

    def test_it_is_serialized_as_name_and_as_object(self, short_smollm2: Path) -> None:
        by_name = QuantizedHuggingFaceLLM(model_id="a/b", draft_model=short_smollm2, draft_quantization="nf4")
        small = QuantizedHuggingFaceLLM(model_id="a/small", quantization="int8")
        by_object = ChatQuantizedHuggingFace(model_id="a/b", draft_model=small)
        for llm in (by_name, by_object):
            for loaded in (
                load(dumpd(llm), **REVIVES),
                loads(dumps(llm), **REVIVES),
                pickle.loads(pickle.dumps(llm)),
                copy.deepcopy(llm),
            ):
                assert type(loaded) is type(llm)
                assert loaded.draft_model == llm.draft_model
                assert loaded.draft_quantization == llm.draft_quantization

    def test_no_cached_answer_depends_on_it(self, short_smollm2: Path) -> None:
        plain = QuantizedHuggingFaceLLM(model_id="a/b")
        drafting = QuantizedHuggingFaceLLM(model_id="a/b", draft_model="a/small")
        assert drafting._identifying_params == plain._identifying_params
