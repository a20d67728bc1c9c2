"""LoRA adapters as fields and options of a model, and the errors of adapters that cannot be used."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps, loads
from langchain_core.runnables import ConfigurableField
from transformers import AutoModelForCausalLM, pipeline

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
)
from langchain_quantllm.loading.adapter_names import AdapterChoice
from tests.support.adapters import (
    NAMES,
    PROMPT,
    Reference,
    Texts,
    active_adapters,
    expected_texts,
    make,
    make_adapter,
    make_adapter_folders,
)
from tests.support.checkpoints import FakeHub, make_checkpoint, make_tokenizer
from tests.support.models import tiny_model

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter_folders(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def llm(root: Path) -> QuantizedHuggingFaceLLM:
    return make(root).load()


@pytest.fixture(scope="module")
def expected(root: Path) -> Texts:
    return expected_texts(root, Reference(root / "tiny"))


class TestFields:
    def test_the_default_is_active_in_the_pipeline(self, root: Path, expected: Texts) -> None:
        llm = make(root, adapter="chat", dtype="float32", cache_dir="of its own")  # a model of its own
        model = llm.pipeline.model
        assert type(model).__name__ == "LlamaForCausalLM"
        assert active_adapters(model) == ["chat"]
        assert llm.invoke(PROMPT) == expected["chat", PROMPT]
        assert (
            llm.pipeline(PROMPT, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
            == (expected["chat", PROMPT])
        )

    def test_one_by_its_folder(self, root: Path, expected: Texts) -> None:
        llm = make(root, adapters={}, adapter=root / "sql")
        assert llm.invoke(PROMPT) == expected["sql", PROMPT]
        assert llm.invoke(PROMPT, adapter="sql") == expected["sql", PROMPT]
        assert llm.invoke(PROMPT, adapter="base") == expected["base", PROMPT]

    def test_fields_that_are_set_later(self, root: Path, expected: Texts) -> None:
        llm = make(root, adapter="sql")
        assert llm.invoke(PROMPT) == expected["sql", PROMPT]
        before = llm.pipeline
        for name in ("chat", "base", None, "sql"):
            llm.adapter = name
            assert llm.invoke(PROMPT) == expected[name or "base", PROMPT]
        assert llm.pipeline is before
        twin = llm.model_copy(update={"adapter": "chat"})
        assert twin.invoke(PROMPT) == expected["chat", PROMPT]
        assert twin.pipeline is before
        llm.adapters, llm.adapter = {"other": str(root / "chat")}, "other"
        assert llm.invoke(PROMPT) == expected["chat", PROMPT]
        assert llm.pipeline is not before
        with pytest.raises(InvalidOptionError):
            llm.invoke(PROMPT, adapter="sql")

    def test_configurable(self, root: Path, expected: Texts) -> None:
        chosen = make(root).configurable_fields(adapter=ConfigurableField(id="adapter"))
        for name in NAMES:
            assert chosen.invoke(PROMPT, {"configurable": {"adapter": name}}) == expected[name, PROMPT]

    def test_other_adapters_are_another_model(self, llm: QuantizedHuggingFaceLLM, root: Path) -> None:
        assert make(root, adapter="chat").pipeline is llm.pipeline
        assert make(root, adapters={"sql": str(root / "sql")}).pipeline is not llm.pipeline
        keys = {make(root, **fields)._spec().key() for fields in ({}, {"adapter": "sql"}, {"adapters": {}})}
        assert len(keys) == 2

    def test_the_key_of_the_cache(self, root: Path, expected: Texts) -> None:
        cache = InMemoryCache()
        for field in (*NAMES, None):
            llm = make(root, adapter=field, cache=cache)
            for call in (*NAMES, None):
                options = {} if call is None else {"adapter": call}
                assert llm.invoke(PROMPT, **options) == expected[call or field or "base", PROMPT]
        chat = [
            ChatQuantizedHuggingFace(model=str(root / "tiny"), adapter=name, adapters={"sql": "a", "chat": "b"})
            for name in NAMES
        ]
        assert len({model._get_llm_string() for model in chat}) == 3
        assert chat[0]._get_llm_string(adapter="chat") != chat[0]._get_llm_string()

    def test_they_come_back(self, root: Path) -> None:
        llm = make(root, adapter="chat")
        options: Any = {"allowed_objects": [QuantizedHuggingFaceLLM], "valid_namespaces": ["langchain_quantllm"]}
        for twin in (loads(dumps(llm), **options), copy.deepcopy(llm)):
            assert (twin.adapters, twin.adapter) == (llm.adapters, "chat")
            assert twin._spec().key() == llm._spec().key()
        assert (llm.asdict()["adapters"], llm.asdict()["adapter"]) == (llm.adapters, "chat")

    def test_among_the_options_of_a_pipeline(self, root: Path) -> None:
        assert make(root, pipeline_kwargs={"adapter": "sql"}).adapter == "sql"
        assert make(root, model_kwargs={"adapter": "sql"}).adapter == "sql"

    def test_a_chat_model_takes_them_over(self, llm: QuantizedHuggingFaceLLM) -> None:
        chat = ChatQuantizedHuggingFace(llm=llm, adapter="sql")
        assert (chat.adapters, chat.adapter) == (llm.adapters, "sql")

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"adapters": {"base": "x"}}, ["'base'", "choose another"]),
            ({"adapters": {"a.b": "x"}}, ["'a.b'", "letters, digits"]),
            ({"adapters": {"a": ""}}, ["adapters['a']=''"]),
            ({"adapter": "sqll"}, ["adapter='sqll'", "did you mean 'sql'"]),
            ({"adapters": {}, "adapter": "sql"}, ["adapter='sql'", "neither a folder"]),
            ({"adapter": "owner/sql"}, ["would be called 'sql'", "adapters={'name': 'owner/sql'}"]),
        ],
        ids=str,
    )
    def test_wrong_ones(self, root: Path, fields: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(InvalidOptionError) as caught:
            make(root, **fields)
        assert all(word in str(caught.value) for word in words)

    def test_names(self) -> None:
        choice = AdapterChoice.of({"sql": "a"}, "owner/chat-v1.5")
        assert choice == AdapterChoice(sources={"sql": "a", "chat-v1_5": "owner/chat-v1.5"}, default="chat-v1_5")
        assert choice.choose(None) == "chat-v1_5"
        assert choice.choose("base") == "base"
        assert AdapterChoice.of({}, None).choose("base") is None

    @pytest.mark.parametrize("name", ["sqll", "x", "Base"])
    def test_unknown_in_a_call(self, root: Path, name: str) -> None:
        llm = make(root, cache_dir="of its own")
        with pytest.raises(InvalidOptionError) as caught:
            llm.invoke(PROMPT, adapter=name)
        assert all(known in str(caught.value) for known in NAMES)
        assert repr(name) in str(caught.value)
        assert not llm.is_loaded  # it was said before anything was read

    def test_a_pipeline_of_ones_own(self, root: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(root / "tiny")
        own = pipeline("text-generation", model=model, tokenizer=make_tokenizer())
        for fields in ({"adapters": {"sql": "x"}}, {"adapter": str(root / "sql")}):
            with pytest.raises(InvalidOptionError, match="load_adapter"):
                QuantizedHuggingFaceLLM(pipeline=own, **fields)  # type: ignore[arg-type]
        llm = QuantizedHuggingFaceLLM(pipeline=own, max_new_tokens=2)
        with pytest.raises(InvalidOptionError, match="given none"):
            llm.invoke(PROMPT, adapter="sql")
        assert llm.invoke(PROMPT, adapter="base") == llm.invoke(PROMPT)
        model.load_adapter(str(root / "sql"), adapter_name="sql")
        with pytest.raises(InvalidOptionError, match="by hand"):
            llm.invoke(PROMPT, adapter="base")


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    """An adapter to break."""
    return Path(shutil.copytree(root / "sql", tmp_path / "broken"))


def refusal(root: Path, folder: Path | str, kind: type[Exception] = CheckpointError, **fields: Any) -> str:
    """Load a model whose weights are not there, so that only what is said before they are read is raised."""
    weightless = root / "weightless"
    if not weightless.exists():
        shutil.copytree(root / "tiny", weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(kind) as caught:
        make(root, **{"model_id": str(weightless), "adapters": {"mine": str(folder)}, **fields}).load()
    assert "mine" in str(caught.value) or kind is MissingPackageError
    return str(caught.value)


class TestErrors:
    def test_no_folder(self, root: Path) -> None:
        assert "there is no folder" in refusal(root, root / "nowhere", ModelNotFoundError)
        assert "no adapter_config.json" in refusal(root, root, ModelNotFoundError)

    @pytest.mark.parametrize("content", ["{", "[]", "{}"])
    def test_a_damaged_config(self, root: Path, broken: Path, content: str) -> None:
        (broken / "adapter_config.json").write_text(content)
        assert "cannot be read" in refusal(root, broken)

    @pytest.mark.parametrize(
        ("fields", "words"), [({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"), ({"bias": "all"}, "bias='all'")]
    )
    def test_kinds_that_do_not_go_into_a_model(
        self, root: Path, broken: Path, fields: dict[str, Any], words: str
    ) -> None:
        config = broken / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
        assert words in refusal(root, broken)

    def test_no_weights(self, root: Path, broken: Path) -> None:
        (broken / "adapter_model.safetensors").unlink()
        assert "no weights" in refusal(root, broken)

    def test_damaged_weights(self, root: Path, broken: Path) -> None:
        (broken / "adapter_model.safetensors").write_bytes(b"nothing")
        assert "damaged" in refusal(root, broken)

    def test_a_pickle(self, root: Path, broken: Path, expected: Texts) -> None:
        from safetensors.torch import load_file

        weights = broken / "adapter_model.safetensors"
        torch.save(load_file(weights), broken / "adapter_model.bin")
        weights.unlink()
        assert "use_safetensors=False" in refusal(root, broken)
        llm = make(root, adapters={"mine": str(broken)}, use_safetensors=False)
        assert llm.invoke(PROMPT, adapter="mine") == expected["sql", PROMPT]
        llm.unload()

    def test_another_architecture(self, root: Path, tmp_path: Path) -> None:
        tiny_model(512, "gpt_neox", context_tokens=256).save_pretrained(tmp_path / "neox")
        folder = make_adapter(tmp_path / "neox", tmp_path / "other", seed=1, target_modules=["query_key_value"])
        assert "another architecture" in refusal(root, folder)

    @pytest.mark.parametrize(
        ("sizes", "words"),
        [({"hidden_size": 128}, "takes 128"), ({"num_hidden_layers": 3}, "layers.2"), ({"num_hidden_layers": 1}, "")],
        ids=str,
    )
    def test_another_size(self, root: Path, tmp_path: Path, sizes: dict[str, int], words: str) -> None:
        base = make_checkpoint(tmp_path / "sized", **sizes)
        folder = make_adapter(base, tmp_path / "other", seed=1)
        if words:
            assert words in refusal(root, folder)
        else:  # which only loading can tell
            with pytest.raises(CheckpointError, match="no weights for"):
                make(root, adapters={"mine": str(folder)}).load()

    @pytest.mark.parametrize("name", ["keys", "weight"])
    def test_names_that_pytorch_has(self, root: Path, name: str) -> None:
        with pytest.raises(InvalidOptionError, match=f"'{name}' cannot be the name"):
            make(root, adapters={name: str(root / "sql")}).load()

    def test_without_peft(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        said = refusal(root, root / "sql", MissingPackageError)
        assert 'pip install "langchain-quantllm[adapters]"' in said

    def test_offline(self, root: Path, tmp_path: Path) -> None:
        said = refusal(root, "acme/sql", ModelNotFoundError, local_files_only=True, cache_dir=str(tmp_path))
        assert "may not be asked" in said

    @pytest.mark.enable_socket
    def test_the_hub(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Texts) -> None:
        repos = {"acme/sql": root / "sql", "acme/gated": root / "chat", "acme/tiny": root / "tiny"}
        with FakeHub(repos, gated=("acme/gated",)) as server:
            FakeHub.point_to(server.url, monkeypatch)
            cache = {"cache_dir": str(tmp_path / "cache")}
            assert "is gated" in refusal(root, "acme/gated", ModelNotFoundError, **cache)
            assert "neither a folder" in refusal(root, "acme/nothing", ModelNotFoundError, **cache)
            assert "no adapter_config.json" in refusal(root, "acme/tiny", ModelNotFoundError, **cache)
            llm = make(root, adapters={}, adapter="acme/sql", **cache)
            assert llm.invoke(PROMPT) == expected["sql", PROMPT]
            llm.unload()
        assert llm.invoke(PROMPT, adapter="sql") == expected["sql", PROMPT]  # from the cache, as nobody answers
        llm.unload()
