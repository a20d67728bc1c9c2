"""Model ids that name no checkpoint of a language model: the error says what they name, before torch is imported."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM, estimate_memory, quantize
from langchain_quantllm.errors import (
    ModelNotFoundError,
    QuantLLMError,
    UnsupportedError,
)
from langchain_quantllm.loading.checkpoint import find_source
from langchain_quantllm.loading.sources import check_sources, command_line, folder_of, wrong_files
from langchain_quantllm.loading.spec import LoadSpec
from tests.support.checkpoints import SIZES, FakeHub, run_python

LLAMA = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WEIGHTS = {"model.safetensors": "no weights"}


def make(folder: Path, files: dict[str, Any]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    folder.mkdir(exist_ok=True)
    return str(folder)


def error_for(model_id: str, *, is_encoder: bool = False) -> str:
    """Return the error for a model id, after checking that loading, quantizing and estimating raise the same.

    An encoder can be estimated.
    """
    with pytest.raises(QuantLLMError) as caught:
        check_sources(model_id)
    text = str(caught.value)
    assert "\n" not in text
    assert 20 < len(text) < 500
    for use in (
        lambda: QuantizedHuggingFaceLLM(model_id=model_id, progress=False).load(),
        lambda: quantize(model_id, "nf4", progress=False),
        *(() if is_encoder else (lambda: estimate_memory(model_id),)),
    ):
        with pytest.raises(type(caught.value), match=re.escape(text)):
            use()
    if is_encoder:
        assert estimate_memory(model_id).total_bytes > 0
    return text


ENCODERS = ("bert", "bert for masks", "sentence-transformers", "classifier")
"""Kinds of folders whose memory can be estimated."""


KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "empty": ({}, ["is empty", "config.json, weights and tokenizer"]),
    "gguf": ({"m.gguf": "GGUF"}, ["m.gguf is in llama.cpp's format", "langchain-quantllm convert"]),
    "gguf with a config": (
        {"m.gguf": "GGUF", "config.json": LLAMA},
        ["langchain-quantllm convert"],
    ),
    "bert": (
        {"config.json": {"model_type": "bert", "architectures": ["BertModel"]}, **WEIGHTS},
        ["embedding model", "QuantizedHuggingFaceEmbeddings"],
    ),
    "bert for masks": (
        {"config.json": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}, **WEIGHTS},
        ["BertForMaskedLM", "encoder"],
    ),
    "encoder with code of its own": (
        {"config.json": {"model_type": "nomic_bert", "auto_map": {"AutoModel": "m.M"}}, **WEIGHTS},
        ["embedding model"],
    ),
    "sentence-transformers": (
        {
            "config.json": {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
            "modules.json": [{"type": "sentence_transformers.models.Transformer"}],
            **WEIGHTS,
        },
        ["embedding model", "QuantizedHuggingFaceEmbeddings"],
    ),
    "adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "acme/base"}, "adapter_model.safetensors": ""},
        ["holds an adapter", "model_id='acme/base', adapter='"],
    ),
    "diffusers": ({"model_index.json": {"_class_name": "FluxPipeline"}}, ["diffusion model", "diffusers"]),
    "part of diffusers": ({"config.json": {"_class_name": "UNet2DConditionModel"}, **WEIGHTS}, ["diffusers"]),
    "classifier": (
        {"config.json": {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, **WEIGHTS},
        ["LlamaForSequenceClassification", "classifies texts"],
    ),
    "speech": (
        {"config.json": {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, **WEIGHTS},
        ["'wav2vec2' model", "speech"],
    ),
    "onnx": ({"config.json": LLAMA, "model.onnx": ""}, ["ONNX"]),
    "onnx without a config": ({"model.onnx": ""}, ["another runtime"]),
    "mlx": (
        {"config.json": {**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, **WEIGHTS},
        ["MLX", "quantization='nf4'"],
    ),
    "weights alone": (dict(WEIGHTS), ["has weights but no config.json", "tokenizer"]),
    "a folder too high": ({"inner/config.json": LLAMA}, ["the folder inner in it has", "inner'"]),
    "the Hub's cache": (
        {"snapshots/abc/config.json": LLAMA, "refs/main": "abc"},
        ["belongs to the Hub's cache", "snapshots"],
    ),
    "format of the maker": ({"params.json": {}, "consolidated.00.pth": ""}, ["format of the model's maker"]),
    "something else": ({"notes.txt": "x"}, ["has no config.json"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_says_what_a_folder_holds(tmp_path: Path, kind: str) -> None:
    files, words = KINDS[kind]
    text = error_for(make(tmp_path / "model", files), is_encoder=kind in ENCODERS)
    for word in words:
        assert word in text


def test_a_whisper_is_sent_to_the_class_for_speech(tmp_path: Path) -> None:
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    folder = make(tmp_path / "model", {"config.json": config, **WEIGHTS})
    check_sources(folder, task="speech")
    for use in (
        lambda: check_sources(folder),
        lambda: QuantizedHuggingFaceLLM(model_id=folder, progress=False).load(),
        lambda: quantize(folder, "nf4", progress=False),
    ):
        with pytest.raises(UnsupportedError, match="'whisper' model, which turns speech.*use QuantizedWhisperParser"):
            use()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "m.gguf",
            ["llama.cpp's format", "langchain-quantllm convert", "langchain-quantllm[demo]"],
        ),
        ("m.zip", ["is an archive", "unpack it"]),
        ("m.tar.gz", ["is an archive"]),
        ("m.onnx", ["ONNX"]),
        ("model.safetensors", ["file of weights alone", "config.json"]),
        ("pytorch_model.bin", ["file of weights alone"]),
        ("m.pt", ["file of weights alone"]),
        ("README.md", ["is a file; give a folder"]),
    ],
)
def test_the_error_says_what_kind_of_file_it_is(tmp_path: Path, name: str, words: list[str]) -> None:
    (tmp_path / name).write_text("x")
    text = error_for(str(tmp_path / name))
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_a_checkpoint_names_its_folder(tmp_path: Path, name: str) -> None:
    make(tmp_path, {"config.json": LLAMA, "tokenizer.json": {}, **WEIGHTS})
    assert f"model_id={str(tmp_path)!r}" in error_for(str(tmp_path / name))


def test_wrong_names_get_a_hint(tmp_path: Path) -> None:
    (tmp_path / "llama-7b").mkdir()
    assert f"did you mean {tmp_path / 'llama-7b'}?" in error_for(str(tmp_path / "llama-7B-"))
    assert "there is no folder /no/such/model; check the path" in error_for("/no/such/model")
    assert "is an Ollama model name" in error_for("llama3:8b")
    assert "there is no file nothing.gguf" in error_for("nothing.gguf")
    assert "model_id='Qwen/Qwen3-8B'" in error_for("https://huggingface.co/Qwen/Qwen3-8B/tree/main")
    assert "model_id='Qwen/Qwen3-8B'" in error_for("hf.co/Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "architectures": None},
        {**LLAMA, "architectures": ["LlamaModel"]},  # tied, its embeddings are its head
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
        {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
        {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": {"AutoModelForCausalLM": "m.M"}},
        {"model_type": "new-of-tomorrow", "architectures": ["TomorrowModel"]},
    ],
)
def test_language_models_pass(tmp_path: Path, config: dict[str, Any]) -> None:
    check_sources(make(tmp_path, {"config.json": config, **WEIGHTS}))
    check_sources("acme/tiny")


def test_the_error_says_what_a_repository_holds(tmp_path: Path) -> None:
    error = wrong_files("acme/tiny-GGUF", ["README.md", "tiny.Q4_K_M.gguf"], lambda _: {}, is_local=False)
    assert str(error).startswith("acme/tiny-GGUF holds tiny.Q4_K_M.gguf, which is in llama.cpp's format")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    error = wrong_files("acme/lora", files, lambda _: {"base_model_name_or_path": "acme/base"}, is_local=False)
    assert str(error) == "acme/lora holds an adapter, not a model; write model_id='acme/base', adapter='acme/lora'."
    error = wrong_files("acme/lora", files, lambda _: {}, is_local=False)
    assert str(error) == (
        "acme/lora holds an adapter, not a model; pass the base model as model_id= and adapter='acme/lora'."
    )


def test_the_error_for_a_gguf_repository_names_the_model_file() -> None:
    files = ["config.json", "mmproj-tiny.gguf", "tiny.Q4_K_M.gguf"]
    for given in (files, files[1:]):
        error = wrong_files("acme/tiny-GGUF", given, lambda _: {}, is_local=False)
        assert "holds tiny.Q4_K_M.gguf" in str(error)
    assert "holds mmproj-tiny.gguf" in str(wrong_files("acme/t", files[1:2], lambda _: {}, is_local=False))


def test_commands_are_quoted_for_the_shell() -> None:
    words = ["python", r"C:\my models\tiny.gguf"]
    assert command_line(words, is_windows=True) == r'python "C:\my models\tiny.gguf"'
    assert command_line(words, is_windows=False) == r"python 'C:\my models\tiny.gguf'"


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user-here/model", "/tmp/" + "y" * 5000])
def test_names_that_no_folder_can_have(name: str) -> None:
    text = error_for(name)
    assert "cannot be a folder" in text
    assert "check the path" in text
    assert folder_of(name) is None
    with pytest.raises(ModelNotFoundError, match="of adapter 'sql' cannot be a folder"):
        check_sources("acme/tiny", {"sql": name})


CODE = """
import sys
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import QuantLLMError
gguf = sys.argv[1]
given = [("/no/such/model", {}), (gguf, {}), ("acme/tiny", {"sql": "/no/such/adapter"}), ("acme/tiny", {})]
for model_id, adapters in given:
    try:
        QuantizedHuggingFaceLLM(model_id=model_id, adapters=adapters).load()
    except QuantLLMError as error:
        print(error)
print(sorted({"torch", "transformers", "bitsandbytes", "peft", "accelerate"} & set(sys.modules)))
"""


def test_a_wrong_name_is_reported_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("x")
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    *errors, imported = run_python(CODE, tmp_path / "m.gguf", env=env).stdout.splitlines()
    assert len(errors) == 4
    assert imported == "[]"


# The Hub.


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of all pauses while waiting for a Hub that is not there."""
    FakeHub.point_to("http://127.0.0.1:9", monkeypatch)
    waited: list[float] = []
    clock = SimpleNamespace(sleep=waited.append, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("langchain_quantllm.loading.hub.time", clock)
    return waited


@pytest.mark.enable_socket
@pytest.mark.parametrize("cached", [False, True])
def test_an_unreachable_hub_is_reported_within_seconds(tmp_path: Path, slept: list[float], cached: bool) -> None:
    if cached:  # an interrupted download: huggingface_hub would use its files, and wait for the rest
        make(
            tmp_path / "hub/models--acme--tiny",
            {"refs/main": "a" * 40, f"snapshots/{'a' * 40}/config.json": LLAMA},
        )
    for use in (
        lambda: QuantizedHuggingFaceLLM(model_id="acme/tiny", cache_dir=str(tmp_path / "hub"), progress=False).load(),
        lambda: quantize("acme/tiny", "nf4", output=tmp_path / "out", cache_dir=str(tmp_path / "hub"), progress=False),
    ):
        slept.clear()
        with pytest.raises(ModelNotFoundError, match="the Hub could not be asked") as caught:
            use()
        assert "check the connection, or give a local folder" in str(caught.value)
        assert sum(slept) <= 2


@pytest.mark.enable_socket
def test_an_adapter_on_an_unreachable_hub_is_reported_within_seconds(tmp_path: Path, slept: list[float]) -> None:
    from langchain_quantllm.loading.adapters import _fetch
    from langchain_quantllm.loading.spec import LoadSpec

    with pytest.raises(ModelNotFoundError, match="the Hub could not be asked"):
        _fetch("sql", "acme/lora", LoadSpec(model_id="acme/tiny", cache_dir=str(tmp_path)))
    assert sum(slept) <= 2


@pytest.mark.enable_socket
def test_an_estimate_from_an_unreachable_hub_is_reported_within_seconds(slept: list[float]) -> None:
    with pytest.raises(ModelNotFoundError, match="acme/tiny-nowhere"):
        estimate_memory("acme/tiny-nowhere")
    assert sum(slept) <= 2


def cached(cache: Path, repository: str, files: dict[str, Any]) -> None:
    folder = cache / f"models--{repository.replace('/', '--')}"
    make(folder / "refs", {"main": "a" * 40})
    make(folder / "snapshots" / ("a" * 40), files)


def test_the_error_says_what_a_cached_repository_holds(tmp_path: Path) -> None:
    files, words = KINDS["sentence-transformers"]
    cached(tmp_path, "acme/embeds", {**files, "tokenizer.json": {}})
    with pytest.raises(UnsupportedError, match=f"^acme/embeds .*{words[0]}"):
        QuantizedHuggingFaceLLM(model_id="acme/embeds", cache_dir=str(tmp_path), progress=False).load()
    cached(tmp_path, "acme/tiny", {"config.json": LLAMA, "tokenizer.json": {}, **WEIGHTS})
    assert find_source(LoadSpec(model_id="acme/tiny", cache_dir=str(tmp_path))).endswith("a" * 40)


@pytest.mark.enable_socket
def test_an_estimate_needs_no_hub_where_the_config_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    cached(tmp_path, "acme/tiny", {"config.json": LLAMA})
    FakeHub.point_to("https://hub.invalid", monkeypatch)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub({}) as proxy:  # refuses all connections
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        close_session()
        try:
            assert estimate_memory("acme/tiny", cache_dir=str(tmp_path)).total_bytes > 0
            with pytest.raises(ModelNotFoundError, match="acme/other"):
                estimate_memory("acme/other", cache_dir=str(tmp_path))
        finally:
            close_session()


@pytest.mark.parametrize("name", ["my model!", "a--b"])
def test_an_estimate_refuses_impossible_names(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=name):
        estimate_memory(name)


@pytest.mark.enable_socket
def test_a_repository_is_found_without_the_list_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "repo", {"config.json": LLAMA, "tokenizer.json": {}, **WEIGHTS})
    with FakeHub({"acme/tiny": tmp_path / "repo"}) as hub:
        FakeHub.point_to(hub.url, monkeypatch)
        answer = hub._answer

        def hang_up(request: Any, *, body: bool) -> None:
            if request.path.startswith("/api/"):
                hub.asked.append("the list")
                request.close_connection = True
            else:
                answer(request, body=body)

        monkeypatch.setattr(hub, "_answer", hang_up)
        assert find_source(LoadSpec(model_id="acme/tiny", cache_dir=str(tmp_path / "cache"))) == "acme/tiny"
        assert "the list" in hub.asked
