"""A pipeline that the user has loaded: it is used and not changed, and its options count."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, pipeline

from langchain_quantllm import NF4, Int8, QuantizedHuggingFaceLLM, Unquantized
from tests.support.loading import PROMPT, count_tokens, make_llm, make_pipeline

NF4_CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def test_own_pipeline_is_used_as_it_is(tiny: Path) -> None:
    pipe = make_pipeline(tiny, max_new_tokens=5)

    def state() -> Any:
        return copy.deepcopy(
            (
                pipe._preprocess_params,
                pipe._forward_params,
                pipe._postprocess_params,
                pipe._generate_kwargs,
                pipe._generation_defaults,
                pipe.model.generation_config.to_dict(),
                pipe.model.config.to_dict(),
                pipe.tokenizer.init_kwargs,
                (pipe.tokenizer.padding_side, pipe.tokenizer.truncation_side, pipe.tokenizer.pad_token),
            )
        )

    before = state()
    llm = QuantizedHuggingFaceLLM(pipeline=pipe)
    assert llm.pipeline is pipe
    assert llm.model_id == str(tiny)
    assert llm.scheme == Unquantized()
    text = llm.invoke(PROMPT)
    assert llm.load().pipeline is pipe
    assert text == make_llm(tiny, max_new_tokens=5).invoke(PROMPT)
    llm.batch([PROMPT, "東京"])
    assert state() == before
    llm.unload()
    assert pipe.model is not None
    assert llm.pipeline is pipe
    assert llm.invoke(PROMPT) == text


def test_own_pipeline_s_options_are_the_checkpoint_s_layer(tiny: Path) -> None:
    pipe = make_pipeline(tiny, max_new_tokens=5)
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe)) == 5
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=7)) == 7
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe), max_new_tokens=3) == 3


def test_own_pipeline_s_generation_config_counts(tiny: Path) -> None:
    pipe = make_pipeline(tiny, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe)) == 4


def test_own_model_s_generation_config_counts(tiny: Path) -> None:
    pipe = make_pipeline(tiny)
    pipe.model.generation_config.max_new_tokens = 6
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe)) == 6


def test_the_pipeline_s_injected_sampling_never_shows(tiny: Path) -> None:
    pipe = make_pipeline(tiny)
    assert pipe._generation_defaults["do_sample"]  # what is injected: if it no longer is, this test has no point
    llm = QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=20)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt")
    greedy = pipe.model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    expected = pipe.tokenizer.decode(greedy, skip_special_tokens=True)
    assert [llm.invoke(PROMPT) for _ in range(2)] == [expected] * 2


def test_end_tokens_given_to_the_pipeline_count(tiny: Path) -> None:
    """The model cards of Llama 3 write pipeline(..., eos_token_id=terminators)."""
    (whole,) = make_llm(tiny).generate([PROMPT], logprobs=True).generations[0]
    assert whole.generation_info is not None
    third = whole.generation_info["logprobs"]["content"][2]["token_id"]
    llm = QuantizedHuggingFaceLLM(pipeline=make_pipeline(tiny, max_new_tokens=8, eos_token_id=[1, third]))
    result = llm.generate([PROMPT]).generations[0][0]
    assert result.generation_info is not None
    assert result.generation_info["finish_reason"] == "stop"
    assert len(result.text) < len(whole.text)


def test_sampling_asked_of_the_pipeline_counts(tiny: Path) -> None:
    pipe = make_pipeline(tiny, max_new_tokens=20, do_sample=True, temperature=3.0)
    llm = QuantizedHuggingFaceLLM(pipeline=pipe)
    assert len({llm.invoke(PROMPT, seed=seed) for seed in range(4)}) == 4
    assert len({llm.invoke(PROMPT, temperature=0) for _ in range(3)}) == 1


def test_own_quantized_model(tiny: Path) -> None:
    pipe = make_pipeline(tiny, NF4_CONFIG, max_new_tokens=5)
    llm = QuantizedHuggingFaceLLM(pipeline=pipe)
    assert isinstance(llm.scheme, NF4)
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization="nf4", max_new_tokens=5).invoke(PROMPT)
    assert isinstance(llm.scheme, NF4)
    assert count_tokens(llm) == 5
    pipe8 = make_pipeline(tiny, BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(QuantizedHuggingFaceLLM(pipeline=pipe8).scheme, Int8)


@pytest.mark.parametrize(
    "field",
    [
        {"quantization": "nf4"},
        {"quantization": "none"},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        {"dtype": "float16"},
        {"device": -1},
        {"device_map": "auto"},
        {"max_memory": {"cpu": "1GB"}},
        {"attn_implementation": "eager"},
        {"revision": "main"},
        {"token": "hf_secret"},
        {"cache_dir": "/tmp/x"},
        {"trust_remote_code": True},
        {"use_safetensors": False},
        {"local_files_only": True},
        {"model_kwargs": {"nonsense": 1}},
        {"model_kwargs": {"torch_dtype": torch.float16}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_loading_fields_are_refused_beside_a_pipeline(tiny: Path, field: dict[str, Any]) -> None:
    pipe = make_pipeline(tiny)
    with pytest.raises(ValueError, match="already loaded") as caught:
        QuantizedHuggingFaceLLM(pipeline=pipe, **field)
    assert "hf_secret" not in str(caught.value)


def test_pipelines_of_other_kinds_are_refused(tiny: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    other = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for given in (other, model, "text-generation"):
        with pytest.raises(ValueError, match=r"transformers\.pipeline\('text-generation'"):
            QuantizedHuggingFaceLLM(pipeline=given)
