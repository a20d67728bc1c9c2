"""Errors in one sentence, before a weight is read: the place of a checkpoint, its kind, and the scheme asked for.

The weights of `unreadable` are garbage, so that reading them would raise another error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from langchain_quantllm import GPTQ, Int8
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    QuantLLMError,
    UnsupportedError,
)
from tests.support.checkpoints import FakeHub, edit_json
from tests.support.loading import load, sentence

# The place of the checkpoint.


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


def test_config_that_is_no_json(unreadable: Path) -> None:
    (unreadable / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config") as caught:
        load(unreadable)
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
def test_refusals_of_the_hub_have_a_reason(
    hub: FakeHub, tmp_path: Path, kwargs: dict[str, Any], words: list[str]
) -> None:
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
    """The constant is the effect of HF_HUB_OFFLINE=1 at the import of huggingface_hub; sockets are off here."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError) as caught:
        load("acme/tiny", cache_dir=str(tmp_path))
    assert "on this machine, and the Hub may not be asked (HF_HUB_OFFLINE)" in sentence(caught.value)


def test_local_files_only_asks_nobody(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load("acme/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert "on this machine, and the Hub may not be asked (local_files_only=True)" in sentence(caught.value)


# The kind of the model.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, ["'t5' model", "decoder-only"]),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, ["'vit' model", "decoder-only"]),
    ],
)
def test_models_of_another_kind(unreadable: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_json(unreadable / "config.json", **changes)
    with pytest.raises(UnsupportedError) as caught:
        load(unreadable)
    for word in words:
        assert word in sentence(caught.value)


def test_unknown_architecture(unreadable: Path) -> None:
    edit_json(unreadable / "config.json", model_type="frobnicator")
    with pytest.raises(CheckpointError, match="does not know the architecture") as caught:
        load(unreadable)
    assert "pip install --upgrade transformers" in sentence(caught.value)


def test_config_without_a_model_type(unreadable: Path) -> None:
    edit_json(unreadable / "config.json", model_type=None, architectures=None)
    with pytest.raises(CheckpointError, match="model_type") as caught:
        load(unreadable)
    sentence(caught.value)


@pytest.fixture
def no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        pytest.fail("the terminal was asked for input")

    monkeypatch.setattr("builtins.input", ask)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.mark.usefixtures("no_prompt")
def test_code_in_a_checkpoint_does_not_run(unreadable: Path) -> None:
    (unreadable / "code.py").write_text(EVIL)
    edit_json(
        unreadable / "config.json",
        model_type="frobnicator",
        auto_map={"AutoConfig": "code.FrobConfig", "AutoModelForCausalLM": "code.FrobModel"},
    )
    with pytest.raises(CheckpointError, match="trust_remote_code=True") as caught:
        load(unreadable)
    sentence(caught.value)
    assert not list(unreadable.glob("**/ran"))


@pytest.mark.usefixtures("no_prompt")
def test_code_for_a_tokenizer_does_not_run(unreadable: Path) -> None:
    (unreadable / "code.py").write_text(EVIL)
    edit_json(
        unreadable / "tokenizer_config.json",
        tokenizer_class="FrobTokenizer",
        auto_map={"AutoTokenizer": ["code.F", None]},
    )
    with pytest.raises(CheckpointError, match="trust_remote_code=True") as caught:
        load(unreadable)
    sentence(caught.value)
    assert not list(unreadable.glob("**/ran"))


def test_no_tokenizer(unreadable: Path) -> None:
    for file in unreadable.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        load(unreadable)
    sentence(caught.value)


# The options of loading.


@pytest.mark.parametrize("quantization", ["gptq", GPTQ(bits=4)])
def test_gptq_of_an_unquantized_checkpoint(unreadable: Path, quantization: Any) -> None:
    with pytest.raises(CheckpointError, match="calibration data") as caught:
        load(unreadable, quantization=quantization)
    assert "'nf4'" in sentence(caught.value)


def test_gptq_config_of_an_unquantized_checkpoint(unreadable: Path) -> None:
    with pytest.raises(CheckpointError, match="calibration data"):
        load(unreadable, quantization_config={"quant_method": "gptq", "bits": 4})


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
    unreadable: Path, stored: dict[str, Any], asked: dict[str, Any], words: list[str]
) -> None:
    edit_json(unreadable / "config.json", quantization_config=stored)
    with pytest.raises(CheckpointError) as caught:
        load(unreadable, **asked)
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
    unreadable: Path, asked: dict[str, Any]
) -> None:
    edit_json(unreadable / "config.json", quantization_config={**INT8_CONFIG, "llm_int8_threshold": 6.0})
    with pytest.raises(CheckpointError, match="threshold|skip_modules"):
        load(unreadable, **asked)


def test_unknown_quantization_method_is_no_plain_model(fresh: Path) -> None:
    """transformers ignores an unknown method, and reads the packed weights as plain ones."""
    edit_json(fresh / "config.json", quantization_config={"quant_method": "frobq", "bits": 4})
    with pytest.raises(QuantLLMError, match="frobq") as caught:
        load(fresh)
    sentence(caught.value)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_flash_attention_without_a_gpu(unreadable: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match="CUDA GPUs only") as caught:
        load(unreadable, attn_implementation=name)
    assert "'sdpa'" in sentence(caught.value)


def test_flash_attention_without_its_package(unreadable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(MissingPackageError) as caught:
        load(unreadable, attn_implementation="flash_attention_2")
    assert "pip install flash-attn" in sentence(caught.value)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_that_runs_here(tiny: Path, name: str) -> None:
    llm = load(tiny, attn_implementation=name)
    assert llm.pipeline.model.config._attn_implementation == name


@pytest.mark.parametrize("device", [0, 3, "cuda", "cuda:1"])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_device_that_is_not_there(unreadable: Path, device: int | str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load(unreadable, device=device)
    sentence(caught.value)


def test_unknown_devices_are_refused(unreadable: Path) -> None:
    for given in ({"device": "cdua"}, {"device_map": "cdua"}):
        with pytest.raises((InvalidOptionError, ValueError), match="cdua"):
            load(unreadable, **given)
    with pytest.raises(ValueError, match="give one of them"):
        load(unreadable, device=-1, device_map="auto")


def test_max_memory_too_small(unreadable: Path) -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        load(unreadable, max_memory={"cpu": "10KB"})
    text = sentence(caught.value)
    assert "10.0 kB" in text
    assert re.search(r"needs \d+ kB", text)


def test_max_memory_names_a_scheme_that_would_fit(unreadable: Path) -> None:
    for file in unreadable.glob("*.safetensors"):
        file.unlink()
    edit_json(unreadable / "config.json", hidden_size=2048, intermediate_size=8192, num_attention_heads=16)
    with pytest.raises(NotEnoughMemoryError, match="'nf4'") as caught:
        load(unreadable, max_memory={"cpu": "100MB"})
    sentence(caught.value)


def test_more_than_the_machine_has(unreadable: Path) -> None:
    edit_json(unreadable / "config.json", hidden_size=16384, intermediate_size=65536, num_hidden_layers=400)
    with pytest.raises(NotEnoughMemoryError) as caught:
        load(unreadable)
    sentence(caught.value)


def test_max_memory_that_is_no_size(unreadable: Path) -> None:
    with pytest.raises(InvalidOptionError, match="max_memory='lots'"):
        load(unreadable, max_memory={"cpu": "lots"})


@pytest.mark.parametrize("kwargs", [{"nonsense": 1}, {"temprature": 0.5}, {"atn_implementation": "eager"}])
def test_unknown_model_kwargs(unreadable: Path, kwargs: dict[str, Any]) -> None:
    name = next(iter(kwargs))
    with pytest.raises((QuantLLMError, ValueError), match=name):
        load(unreadable, model_kwargs=kwargs)


def test_a_generation_option_in_model_kwargs_is_honoured_or_refused(fresh: Path) -> None:
    """Tutorials of HuggingFacePipeline pass model_kwargs={"temperature": 0, "max_length": 64}."""
    try:
        llm = load(fresh, model_kwargs={"temperature": 0, "max_new_tokens": 3})
    except (QuantLLMError, ValueError) as error:
        assert "temperature" in str(error)  # noqa: PT017
    else:
        assert llm.generate(["hello"]).llm_output["token_usage"]["completion_tokens"] == 3
