"""What goes wrong while loading is said in one sentence, and before a weight is read where that can be.

Where an error must come before weights are read, the weights are garbage, so that reading them
gives another error.
"""

from __future__ import annotations

import importlib.machinery
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_quantllm import GPTQ, NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    QuantLLMError,
    UnsupportedError,
)
from tests.support.checkpoints import FakeHub, edit_json, make_checkpoint, quicken, spoil_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def unread(copy: Path) -> Path:
    """A checkpoint whose weights nobody can read."""
    return spoil_weights(copy)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes packages as missing as if they were not installed."""

    def hide(*packages: str) -> None:
        class Hiding:
            def __init__(self, finder: Any) -> None:
                self.finder = finder

            def find_spec(self, name: str, *args: Any, **kwargs: Any) -> importlib.machinery.ModuleSpec | None:
                return None if name.partition(".")[0] in packages else self.finder.find_spec(name, *args, **kwargs)

            def find_distributions(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
                return getattr(self.finder, "find_distributions", lambda *a, **k: iter(()))(*args, **kwargs)

            def invalidate_caches(self) -> None:
                pass

        monkeypatch.setattr(sys, "meta_path", [Hiding(finder) for finder in sys.meta_path])
        for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)

    return hide


def load(model_id: Path | str, **kwargs: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(model_id=str(model_id), progress=False, **kwargs).load()


def sentence(error: BaseException) -> str:
    """The error's text, which must be one short sentence of a program's author, not a dump."""
    text = str(error)
    assert isinstance(error, QuantLLMError)
    assert "\n" not in text.strip()
    assert 20 < len(text) < 400
    return text


# Where the checkpoint should be.


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./no/such/folder", "~/no/such/folder", "no/such/folder"])
def test_missing_folder(model_id: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load(model_id)
    assert f"no folder {model_id}" in sentence(caught.value)


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json") as caught:
        load(tmp_path)
    assert str(tmp_path) in sentence(caught.value)


def test_folder_with_gguf_only(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError) as caught:
        load(tmp_path)
    assert "model.Q4_K_M.gguf" in sentence(caught.value)
    assert "llama.cpp" in str(caught.value)


def test_a_file_is_no_folder(tiny: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load(tiny / "config.json")
    sentence(caught.value)


def test_id_that_is_neither_folder_nor_repository() -> None:
    with pytest.raises(ModelNotFoundError, match="owner/name") as caught:
        load("no model: this")
    sentence(caught.value)


def test_config_that_is_no_json(unread: Path) -> None:
    (unread / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config") as caught:
        load(unread)
    sentence(caught.value)


# The Hub.


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "empty").mkdir()
    repos = {"acme/tiny": tiny, "acme/gated": tiny, "acme/empty": tmp_path / "empty"}
    with FakeHub(repos, gated=("acme/gated",)) as server:
        FakeHub.point_to(server.url, monkeypatch)
        yield server


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"model_id": "acme/tyni"}, ["acme/tyni is neither a folder here nor a repository on the Hub", "token="]),
        ({"model_id": "acme/gated"}, ["acme/gated is gated", "token="]),
        ({"model_id": "acme/gated", "token": "hf_wrong"}, ["acme/gated is gated"]),
        ({"model_id": "acme/tiny", "revision": "v3"}, ["acme/tiny has no revision 'v3'"]),
        ({"model_id": "acme/empty"}, ["acme/empty has no config.json"]),
    ],
)
def test_what_the_hub_refuses(hub: FakeHub, tmp_path: Path, kwargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load(**kwargs, cache_dir=str(tmp_path / "cache"))
    for word in words:
        assert word in sentence(caught.value)
    assert hub.asked
    assert not [path for path in hub.asked if "safetensors" in path]
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.enable_socket
def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub.point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("langchain_quantllm.loading.hub.time", SimpleNamespace(sleep=lambda _: None))
    with pytest.raises(ModelNotFoundError) as caught:
        load("acme/tiny", cache_dir=str(tmp_path))
    assert "acme/tiny is not, or not wholly, on this machine" in sentence(caught.value)


def test_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 sets when huggingface_hub is imported; sockets are off here."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError) as caught:
        load("acme/tiny", cache_dir=str(tmp_path))
    assert "on this machine, and the Hub may not be asked (HF_HUB_OFFLINE)" in sentence(caught.value)


def test_local_files_only_asks_nobody(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load("acme/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert "on this machine, and the Hub may not be asked (local_files_only=True)" in sentence(caught.value)


# What the model is.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, ["'t5' model", "decoder-only"]),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, ["'vit' model", "decoder-only"]),
    ],
)
def test_models_of_another_kind(unread: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_json(unread / "config.json", **changes)
    with pytest.raises(UnsupportedError) as caught:
        load(unread)
    for word in words:
        assert word in sentence(caught.value)


def test_unknown_architecture(unread: Path) -> None:
    edit_json(unread / "config.json", model_type="frobnicator")
    with pytest.raises(CheckpointError, match="does not know the architecture") as caught:
        load(unread)
    assert "pip install --upgrade transformers" in sentence(caught.value)


def test_config_without_a_model_type(unread: Path) -> None:
    edit_json(unread / "config.json", model_type=None, architectures=None)
    with pytest.raises(CheckpointError, match="model_type") as caught:
        load(unread)
    sentence(caught.value)


@pytest.fixture
def no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        pytest.fail("somebody was asked at the terminal")

    monkeypatch.setattr("builtins.input", ask)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.mark.usefixtures("no_prompt")
def test_code_in_a_checkpoint_does_not_run(unread: Path) -> None:
    (unread / "code.py").write_text(EVIL)
    edit_json(
        unread / "config.json",
        model_type="frobnicator",
        auto_map={"AutoConfig": "code.FrobConfig", "AutoModelForCausalLM": "code.FrobModel"},
    )
    with pytest.raises(CheckpointError, match="trust_remote_code=True") as caught:
        load(unread)
    sentence(caught.value)
    assert not list(unread.glob("**/ran"))


@pytest.mark.usefixtures("no_prompt")
def test_code_for_a_tokenizer_does_not_run(unread: Path) -> None:
    (unread / "code.py").write_text(EVIL)
    edit_json(
        unread / "tokenizer_config.json", tokenizer_class="FrobTokenizer", auto_map={"AutoTokenizer": ["code.F", None]}
    )
    with pytest.raises(CheckpointError, match="trust_remote_code=True") as caught:
        load(unread)
    sentence(caught.value)
    assert not list(unread.glob("**/ran"))


def test_no_tokenizer(unread: Path) -> None:
    for file in unread.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        load(unread)
    sentence(caught.value)


# What was asked for.


@pytest.mark.parametrize("quantization", ["gptq", GPTQ(bits=4)])
def test_gptq_of_an_unquantized_checkpoint(unread: Path, quantization: Any) -> None:
    with pytest.raises(CheckpointError, match="calibration data") as caught:
        load(unread, quantization=quantization)
    assert "'nf4'" in sentence(caught.value)


def test_gptq_config_of_an_unquantized_checkpoint(unread: Path) -> None:
    with pytest.raises(CheckpointError, match="calibration data"):
        load(unread, quantization_config={"quant_method": "gptq", "bits": 4})


INT8_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
NF4_DOUBLE_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
NF4_CONFIG = {**NF4_DOUBLE_CONFIG, "bnb_4bit_use_double_quant": False}


@pytest.mark.parametrize(
    ("stored", "asked", "words"),
    [
        (INT8_CONFIG, {"quantization": "nf4"}, ["already quantized (int8)", "as nf4"]),
        (INT8_CONFIG, {"quantization": "none"}, ["already quantized (int8)", "as none"]),
        (INT8_CONFIG, {"quantization": "gptq"}, ["already quantized (int8)", "as gptq"]),
        (NF4_DOUBLE_CONFIG, {"quantization": "int8"}, ["already quantized (nf4)", "as int8"]),
        (NF4_DOUBLE_CONFIG, {"quantization": "fp4"}, ["already quantized (nf4)", "as fp4"]),
        (NF4_CONFIG, {"quantization": "nf4-double"}, ["double_quantization=False"]),
        (NF4_DOUBLE_CONFIG, {"quantization_config": {"load_in_8bit": True}}, ["already quantized (nf4)", "as int8"]),
        (NF4_DOUBLE_CONFIG, {"model_kwargs": {"load_in_8bit": True}}, ["already quantized (nf4)", "as int8"]),
        ({"quant_method": "gptq", "bits": 4}, {"quantization": GPTQ(bits=8)}, ["bits=4", "not 8"]),
        ({"quant_method": "gptq", "bits": 4}, {"quantization": "nf4"}, ["already quantized (gptq)", "as nf4"]),
        ({"quant_method": "awq", "bits": 4}, {"quantization": "gptq"}, ["already quantized (awq)", "as gptq"]),
    ],
)
def test_another_scheme_than_the_stored_one(
    unread: Path, stored: dict[str, Any], asked: dict[str, Any], words: list[str]
) -> None:
    edit_json(unread / "config.json", quantization_config=stored)
    with pytest.raises(CheckpointError) as caught:
        load(unread, **asked)
    for word in words:
        assert word in sentence(caught.value)


@pytest.mark.parametrize(
    "asked",
    [
        {"quantization": Int8(threshold=1.0)},
        {"quantization": Int8(skip_modules=["q_proj"])},
    ],
)
def test_options_that_a_stored_scheme_cannot_take_are_not_dropped_in_silence(
    unread: Path, asked: dict[str, Any]
) -> None:
    edit_json(unread / "config.json", quantization_config={**INT8_CONFIG, "llm_int8_threshold": 6.0})
    with pytest.raises(CheckpointError, match="threshold|skip_modules"):
        load(unread, **asked)


def test_unknown_quantization_method_is_no_plain_model(copy: Path) -> None:
    """Transformers ignores a method that it does not know, and reads what is there as plain weights."""
    edit_json(copy / "config.json", quantization_config={"quant_method": "frobq", "bits": 4})
    with pytest.raises(QuantLLMError, match="frobq") as caught:
        load(copy)
    sentence(caught.value)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_flash_attention_without_a_gpu(unread: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match="CUDA GPUs only") as caught:
        load(unread, attn_implementation=name)
    assert "'sdpa'" in sentence(caught.value)


def test_flash_attention_without_its_package(unread: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(MissingPackageError) as caught:
        load(unread, attn_implementation="flash_attention_2")
    assert "pip install flash-attn" in sentence(caught.value)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_that_runs_here(tiny: Path, name: str) -> None:
    llm = load(tiny, attn_implementation=name)
    assert llm.pipeline.model.config._attn_implementation == name


@pytest.mark.parametrize("device", [0, 3, "cuda", "cuda:1"])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_device_that_is_not_there(unread: Path, device: int | str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load(unread, device=device)
    sentence(caught.value)


def test_device_that_is_none(unread: Path) -> None:
    for given in ({"device": "cdua"}, {"device_map": "cdua"}):
        with pytest.raises((InvalidOptionError, ValueError), match="cdua"):
            load(unread, **given)
    with pytest.raises(ValueError, match="give one of them"):
        load(unread, device=-1, device_map="auto")


def test_max_memory_too_small(unread: Path) -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        load(unread, max_memory={"cpu": "10KB"})
    text = sentence(caught.value)
    assert "10.0 kB" in text
    assert re.search(r"needs \d+ kB", text)


def test_max_memory_names_a_scheme_that_would_fit(unread: Path) -> None:
    for file in unread.glob("*.safetensors"):
        file.unlink()
    edit_json(unread / "config.json", hidden_size=2048, intermediate_size=8192, num_attention_heads=16)
    with pytest.raises(NotEnoughMemoryError, match="'nf4'") as caught:
        load(unread, max_memory={"cpu": "100MB"})
    sentence(caught.value)


def test_more_than_the_machine_has(unread: Path) -> None:
    edit_json(unread / "config.json", hidden_size=16384, intermediate_size=65536, num_hidden_layers=400)
    with pytest.raises(NotEnoughMemoryError) as caught:
        load(unread)
    sentence(caught.value)


def test_max_memory_that_is_no_size(unread: Path) -> None:
    with pytest.raises(InvalidOptionError, match="max_memory='lots'"):
        load(unread, max_memory={"cpu": "lots"})


@pytest.mark.parametrize("kwargs", [{"nonsense": 1}, {"temprature": 0.5}, {"atn_implementation": "eager"}])
def test_unknown_model_kwargs(unread: Path, kwargs: dict[str, Any]) -> None:
    name = next(iter(kwargs))
    with pytest.raises((QuantLLMError, ValueError), match=name):
        load(unread, model_kwargs=kwargs)


def test_a_generation_option_in_model_kwargs_is_honoured_or_refused(copy: Path) -> None:
    """Many a HuggingFacePipeline tutorial says model_kwargs={"temperature": 0, "max_length": 64}."""
    try:
        llm = load(copy, model_kwargs={"temperature": 0, "max_new_tokens": 3})
    except (QuantLLMError, ValueError) as error:
        assert "temperature" in str(error)  # noqa: PT017
    else:
        assert llm.generate(["hello"]).llm_output["token_usage"]["completion_tokens"] == 3


# Weights.


def test_pickled_weights_are_refused(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load(copy)
    assert "use_safetensors=False" in sentence(caught.value)
    for quantization in (None, "nf4"):
        llm = load(copy, use_safetensors=False, quantization=quantization, max_new_tokens=3)
        assert torch.equal(llm.pipeline.model.lm_head.weight, state["lm_head.weight"])
        assert llm.invoke("hello")


def test_pickled_weights_are_refused_before_they_are_opened(unread: Path) -> None:
    (unread / "model.safetensors").rename(unread / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="use_safetensors=False"):
        load(unread)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    sentence(caught.value)


def test_missing_shard_is_named(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00002.safetensors")}
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002") as caught:
        load(copy)
    sentence(caught.value)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_missing_tensors_are_no_random_weights(copy: Path, quantization: str | None) -> None:
    file = copy / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight") as caught:
        load(copy, quantization=quantization)
    assert "3 tensors" in sentence(caught.value)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_tensors_of_another_shape_are_no_random_weights(copy: Path, quantization: str | None) -> None:
    file = copy / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name][:64].clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"other shapes|{re.escape(name)}") as caught:
        load(copy, quantization=quantization)
    sentence(caught.value)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_damaged_weights(copy: Path, damage: str) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"garbage": b"\xff" * 100, "truncated": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=re.escape(str(copy))) as caught:
        load(copy)
    sentence(caught.value)


def test_after_an_error_the_same_model_loads(copy: Path) -> None:
    """A failed load leaves nothing in the registry, and no lock held."""
    file = copy / "model.safetensors"
    content = file.read_bytes()
    llm = QuantizedHuggingFaceLLM(model_id=str(copy), progress=False, max_new_tokens=3)
    file.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError):
            llm.invoke("hello")
        assert not llm.is_loaded
    file.write_bytes(content)
    assert llm.invoke("hello")


# Packages.


@pytest.mark.parametrize(
    ("hidden", "kwargs", "words"),
    [
        ("bitsandbytes", {"quantization": "int8"}, ["'int8' needs bitsandbytes", "pip install bitsandbytes"]),
        ("bitsandbytes", {"quantization": NF4()}, ["'nf4' needs bitsandbytes", "pip install bitsandbytes"]),
        ("accelerate", {"quantization": "fp4"}, ["'fp4' needs accelerate", "pip install accelerate"]),
        ("gptqmodel", {"quantization": "gptq"}, ["'gptq' needs gptqmodel", 'pip install "langchain-quantllm[gptq]"']),
        ("optimum", {"quantization": "gptq"}, ["'gptq' needs optimum", 'pip install "langchain-quantllm[gptq]"']),
        (
            "bitsandbytes",
            {"quantization_config": {"load_in_8bit": True}},
            ["'int8' needs bitsandbytes", "pip install bitsandbytes"],
        ),
    ],
)
def test_missing_package_of_a_scheme(
    unread: Path, missing: Any, hidden: str, kwargs: dict[str, Any], words: list[str]
) -> None:
    missing(hidden)
    with pytest.raises(MissingPackageError) as caught:
        load(unread, **kwargs)
    for word in words:
        assert word in sentence(caught.value)


@pytest.mark.parametrize(
    ("hidden", "stored", "command"),
    [
        ("bitsandbytes", INT8_CONFIG, "pip install bitsandbytes"),
        ("gptqmodel", {"quant_method": "gptq", "bits": 4}, 'pip install "langchain-quantllm[gptq]"'),
        (
            "gptqmodel",
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
            'pip install "langchain-quantllm[gptq]"',
        ),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}, "pip install torchao"),
        (
            "compressed_tensors",
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
            "pip install compressed-tensors",
        ),
    ],
)
def test_missing_package_of_a_checkpoint(
    unread: Path, missing: Any, hidden: str, stored: dict[str, Any], command: str
) -> None:
    edit_json(unread / "config.json", quantization_config=stored)
    missing(hidden)
    with pytest.raises(MissingPackageError) as caught:
        load(unread)
    assert command in sentence(caught.value)


# Fields.


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dtype": "float61"}, ["dtype='float61'", "did you mean 'float16'?"]),
        ({"dtype": "int8"}, ["dtype='int8'"]),
        ({"attn_implementation": "sdp"}, ["attn_implementation='sdp'", "did you mean 'sdpa'?"]),
        ({"attn_implementation": "flash_attention"}, ["did you mean 'flash_attention_"]),
        ({"quantisation": "int8"}, ["'quantisation'", "did you mean 'quantization'?"]),
        ({"torch_dtype": "float16"}, ["torch_dtype", "dtype="]),
        ({"load_in_8bit": True}, ["load_in_8bit", "quantization='int8'"]),
        ({"load_in_4bit": True}, ["load_in_4bit", "quantization='nf4'"]),
        ({"max_memry": {}}, ["'max_memry'", "did you mean 'max_memory'?"]),
        ({"pipeline": 3}, ["pipeline=int", "text-generation"]),
        ({"model": "/other"}, ["model"]),
        ({"batch_size": 0}, ["batch_size"]),
    ],
)
def test_wrong_fields_are_refused_when_the_llm_is_made(unread: Path, kwargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        QuantizedHuggingFaceLLM(model_id=str(unread), **kwargs)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_field_is_one_of_the_package_s_errors(unread: Path) -> None:
    """Whoever writes `except QuantLLMError` gets them all, without pydantic's four lines around them."""
    with pytest.raises(InvalidOptionError) as caught:
        QuantizedHuggingFaceLLM(model_id=str(unread), dtype="float61")
    sentence(caught.value)


def test_no_model_at_all() -> None:
    for kwargs in ({}, {"model_id": ""}, {"model_id": None}):
        with pytest.raises(ValueError, match="model_id"):
            QuantizedHuggingFaceLLM(**kwargs)
