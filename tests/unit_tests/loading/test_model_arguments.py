"""Arguments of HuggingFacePipeline and names of the model, and the fields that they become."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import BitsAndBytesConfig

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.loading import PROMPT, count_tokens, make_llm


def test_from_model_id_with_everything(tiny: Path) -> None:
    model_kwargs = {
        "torch_dtype": torch.float32,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "low_cpu_mem_usage": True,
        "attn_implementation": "eager",
    }
    pipeline_kwargs = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False, "repetition_penalty": 1.1}
    given = copy.deepcopy((model_kwargs, pipeline_kwargs))
    llm = QuantizedHuggingFaceLLM.from_model_id(
        model_id=str(tiny),
        task="text-generation",
        backend="default",
        device=-1,
        model_kwargs=model_kwargs,
        pipeline_kwargs=pipeline_kwargs,
        batch_size=2,
        verbose=False,
        tags=["mine"],
    )
    assert (llm.max_new_tokens, llm.batch_size, llm.dtype, llm.tags) == (10, 2, "float32", ["mine"])
    model = llm.load().pipeline.model
    assert type(model.model.layers[0].self_attn.q_proj) is bnb.nn.Linear8bitLt
    assert model.lm_head.weight.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert count_tokens(llm) == 10
    assert model_kwargs.keys() == given[0].keys()
    assert model_kwargs["quantization_config"].to_dict() == given[0]["quantization_config"].to_dict()
    assert model_kwargs["torch_dtype"] is torch.float32
    assert pipeline_kwargs == given[1]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.float16, "float16", "torch.float16"])
def test_dtype_in_model_kwargs(tiny: Path, name: str, value: Any) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id(str(tiny), "text-generation", model_kwargs={name: value})
    assert llm.dtype == "float16"
    assert llm.model_kwargs == {}


def test_dtype_in_model_kwargs_is_loaded(tiny: Path) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id(str(tiny), "text-generation", model_kwargs={"torch_dtype": "float16"})
    assert llm.load().pipeline.model.lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("model_kwargs", "field", "value"),
    [
        ({"load_in_8bit": True}, "quantization", "int8"),
        ({"load_in_4bit": True}, "quantization", "fp4"),
        ({"load_in_8bit": False}, "quantization", None),
        ({"trust_remote_code": True}, "trust_remote_code", True),
        ({"revision": "v2"}, "revision", "v2"),
        ({"cache_dir": Path("/some/where")}, "cache_dir", "/some/where"),
        ({"device_map": "auto"}, "device_map", "auto"),
        ({"max_memory": {0: "1GB"}}, "max_memory", {0: "1GB"}),
        ({"use_safetensors": False}, "use_safetensors", False),
        ({"local_files_only": True}, "local_files_only", True),
    ],
    ids=str,
)
def test_model_kwargs_become_fields(model_kwargs: dict[str, Any], field: str, value: Any) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", model_kwargs=model_kwargs)
    assert getattr(llm, field) == value
    assert llm.model_kwargs == {}


def test_the_token_in_model_kwargs_becomes_the_field() -> None:
    for name in ("token", "use_auth_token"):
        llm = QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", model_kwargs={name: "hf_secret"})
        assert llm.token is not None
        assert llm.token.get_secret_value() == "hf_secret"
        assert "hf_secret" not in repr(llm)


def test_other_model_kwargs_reach_from_pretrained(tiny: Path) -> None:
    """Also fields of the config, as in `from_pretrained(folder, use_cache=False)`."""
    llm = make_llm(tiny, model_kwargs={"use_cache": False, "max_position_embeddings": 128})
    config = llm.load().pipeline.model.config
    assert config.use_cache is False
    assert config.max_position_embeddings == 128
    assert llm.invoke(PROMPT)


@pytest.mark.parametrize("task", ["text2text-generation", "summarization", "translation", "text_generation"])
def test_from_model_id_with_another_task(task: str) -> None:
    with pytest.raises(ValueError, match=f"task='{task}'") as caught:
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", task)
    assert "text-generation" in str(caught.value)


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_from_model_id_with_another_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}'"):
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", backend)


def test_from_model_id_with_device_and_device_map() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", device=-1, device_map="auto")
    with pytest.raises(ValueError, match=r"give (it once|one of them)"):
        QuantizedHuggingFaceLLM.from_model_id(
            "acme/tiny", "text-generation", device_map="cpu", model_kwargs={"device_map": "auto"}
        )


def test_unknown_pipeline_kwargs() -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", pipeline_kwargs={"max_new_token": 1})


@pytest.mark.parametrize("alias", ["model_id", "model", "model_name"])
def test_aliases_of_the_model(tiny: Path, alias: str) -> None:
    for given in (str(tiny), tiny):
        llm = QuantizedHuggingFaceLLM(**{alias: given}, max_tokens=3, progress=False)
        assert llm.model_id == str(tiny)
        assert llm.max_new_tokens == 3
    assert count_tokens(llm) == 3


def test_two_names_for_the_model_must_agree(tiny: Path) -> None:
    assert QuantizedHuggingFaceLLM(model=str(tiny), model_id=str(tiny)).model_id == str(tiny)
    with pytest.raises(ValueError, match="model"):
        QuantizedHuggingFaceLLM(model="acme/one", model_id="acme/two")


def test_folders_by_any_path(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("HOME", str(tiny.parent))
    expected = make_llm(tiny).invoke(PROMPT)
    for path in (tiny.name, f"./{tiny.name}", f"~/{tiny.name}", f"{tiny}/"):
        assert make_llm(path).invoke(PROMPT) == expected
