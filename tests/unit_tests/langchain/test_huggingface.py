"""Migrating from langchain-huggingface and back: the same weights, the same completions."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from langchain_quantllm import Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import MissingPackageError
from tests.support.checkpoints import make_checkpoint, quicken

langchain_huggingface = pytest.importorskip("langchain_huggingface")
HuggingFacePipeline = langchain_huggingface.HuggingFacePipeline

PROMPT = "The capital of France"
GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def both(folder: Path, **kwargs: Any) -> tuple[Any, QuantizedHuggingFaceLLM]:
    """Make the same call of both classes, as after a change of the import."""
    arguments = {"model_id": str(folder), "task": "text-generation", **kwargs}
    return HuggingFacePipeline.from_model_id(**arguments), QuantizedHuggingFaceLLM.from_model_id(**arguments)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pipeline_kwargs": GREEDY},
        {"pipeline_kwargs": {**GREEDY, "repetition_penalty": 1.3}, "batch_size": 2},
        {"pipeline_kwargs": {**GREEDY, "no_repeat_ngram_size": 2}, "device": -1},
        {"pipeline_kwargs": {**GREEDY, "num_beams": 2}},
        {"pipeline_kwargs": GREEDY, "model_kwargs": {"dtype": torch.float32}},
        {"pipeline_kwargs": GREEDY, "model_kwargs": {"torch_dtype": torch.float32, "low_cpu_mem_usage": True}},
        {"pipeline_kwargs": GREEDY, "device_map": "cpu", "model_kwargs": {"attn_implementation": "eager"}},
        {"pipeline_kwargs": GREEDY, "model_kwargs": {"use_cache": False}},
        {"pipeline_kwargs": GREEDY, "model_kwargs": {"revision": "main", "trust_remote_code": False}},
        {
            "pipeline_kwargs": GREEDY,
            "device_map": "cpu",
            "model_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        },
        {
            "pipeline_kwargs": GREEDY,
            "device_map": "cpu",
            "model_kwargs": {
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
                )
            },
        },
    ],
    ids=[
        "greedy", "penalty", "ngrams", "beams", "dtype", "torch_dtype", "device_map", "use_cache", "revision", "int8",
        "nf4-double",
    ],
)  # fmt: skip
@pytest.mark.compat
def test_the_same_arguments_give_the_same_completion(tiny: Path, kwargs: dict[str, Any]) -> None:
    theirs, ours = both(tiny, **kwargs)
    expected = theirs.invoke(PROMPT, skip_prompt=True)
    assert expected
    assert ours.invoke(PROMPT) == expected
    assert ours.invoke(PROMPT, skip_prompt=True) == expected
    assert ours.invoke(PROMPT, skip_prompt=False) == PROMPT + expected == theirs.invoke(PROMPT)
    assert "".join(ours.stream(PROMPT)) == expected


def test_call_options_inside_pipeline_kwargs(tiny: Path) -> None:
    theirs, ours = both(tiny, pipeline_kwargs=GREEDY)
    call = {"pipeline_kwargs": {"max_new_tokens": 4}}
    assert ours.invoke(PROMPT, **call) == theirs.invoke(PROMPT, skip_prompt=True, **call)
    assert ours.bind(**call).invoke(PROMPT) == ours.invoke(PROMPT, **call)


def test_every_argument_of_from_model_id_is_known(tiny: Path) -> None:
    theirs = inspect.signature(HuggingFacePipeline.from_model_id).parameters
    ours = inspect.signature(QuantizedHuggingFaceLLM.from_model_id).parameters
    assert list(theirs) == list(ours)  # in the same order: some give them without names
    llm = QuantizedHuggingFaceLLM.from_model_id(
        str(tiny), "text-generation", "default", -1, None, {}, {"max_new_tokens": 3}, 2
    )
    assert llm.max_new_tokens == 3
    assert llm.batch_size == 2


@pytest.mark.parametrize("model_kwargs", [None, {}])
@pytest.mark.parametrize("pipeline_kwargs", [None, {}])
def test_empty_arguments(tiny: Path, model_kwargs: Any, pipeline_kwargs: Any) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id(
        str(tiny), "text-generation", model_kwargs=model_kwargs, pipeline_kwargs=pipeline_kwargs
    )
    assert llm.model_kwargs == {}
    assert llm.max_new_tokens is None


@pytest.mark.parametrize("backend", ["default", "ipex"])
def test_backends_that_are_pytorch(tiny: Path, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = both(tiny, backend=backend, pipeline_kwargs=GREEDY)
    assert ours.invoke(PROMPT) == theirs.invoke(PROMPT, skip_prompt=True)


# Taking over and giving back.


def test_take_over(tiny: Path) -> None:
    theirs = HuggingFacePipeline.from_model_id(
        str(tiny), "text-generation", pipeline_kwargs=GREEDY, batch_size=3, model_kwargs={"dtype": torch.float32}
    )
    ours = QuantizedHuggingFaceLLM.from_huggingface_pipeline(theirs)
    assert ours.pipeline is theirs.pipeline
    assert (ours.model_id, ours.batch_size, ours.max_new_tokens) == (str(tiny), 3, 10)
    expected = theirs.invoke(PROMPT, skip_prompt=True)
    assert ours.invoke(PROMPT) == expected
    assert theirs.invoke(PROMPT, skip_prompt=True) == expected  # it stays usable
    ours.unload()
    assert theirs.invoke(PROMPT, skip_prompt=True) == expected


def test_take_over_with_other_fields(tiny: Path) -> None:
    theirs = HuggingFacePipeline.from_model_id(str(tiny), "text-generation", pipeline_kwargs=GREEDY)
    ours = QuantizedHuggingFaceLLM.from_huggingface_pipeline(theirs, max_new_tokens=4, stop=["zzz"], batch_size=5)
    assert (ours.max_new_tokens, ours.stop, ours.batch_size) == (4, ["zzz"], 5)


def test_take_over_a_pipeline_made_by_hand(tiny: Path) -> None:
    from transformers import pipeline

    theirs = HuggingFacePipeline(pipeline=pipeline("text-generation", model=str(tiny), **GREEDY))
    ours = QuantizedHuggingFaceLLM.from_huggingface_pipeline(theirs)
    assert ours.pipeline is theirs.pipeline
    assert ours.invoke(PROMPT) == theirs.invoke(PROMPT, skip_prompt=True)


def test_take_over_quantized(tiny: Path) -> None:
    theirs = HuggingFacePipeline.from_model_id(
        str(tiny),
        "text-generation",
        device_map="cpu",
        pipeline_kwargs=GREEDY,
        model_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    )
    ours = QuantizedHuggingFaceLLM.from_huggingface_pipeline(theirs).load()
    assert isinstance(ours.scheme, Int8)
    assert ours.invoke(PROMPT) == theirs.invoke(PROMPT, skip_prompt=True)


def test_take_over_refuses_others(tiny: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="HuggingFacePipeline|pipeline"):
        QuantizedHuggingFaceLLM.from_huggingface_pipeline("gpt2")
    with pytest.raises(ValueError, match="already loaded"):
        QuantizedHuggingFaceLLM.from_huggingface_pipeline(
            HuggingFacePipeline.from_model_id(str(tiny), "text-generation"), quantization="nf4"
        )


def test_give_back(tiny: Path) -> None:
    ours = QuantizedHuggingFaceLLM(model_id=str(tiny), quantization="int8", progress=False, batch_size=3, **GREEDY)
    theirs = ours.to_huggingface_pipeline()
    assert isinstance(theirs, HuggingFacePipeline)
    assert theirs.pipeline.model is ours.pipeline.model
    assert theirs.pipeline.model is ours.pipeline.model
    assert (theirs.model_id, theirs.batch_size) == (str(tiny), 3)
    assert theirs.invoke(PROMPT, skip_prompt=True, pipeline_kwargs=GREEDY) == ours.invoke(PROMPT)


def test_give_back_keeps_the_options(tiny: Path) -> None:
    """The returned pipeline writes the same text, without its options being repeated."""
    ours = QuantizedHuggingFaceLLM(model_id=str(tiny), progress=False, **GREEDY)
    assert ours.to_huggingface_pipeline().invoke(PROMPT, skip_prompt=True) == ours.invoke(PROMPT)


def test_there_and_back(tiny: Path) -> None:
    theirs = HuggingFacePipeline.from_model_id(str(tiny), "text-generation", pipeline_kwargs=GREEDY)
    back = QuantizedHuggingFaceLLM.from_huggingface_pipeline(theirs).to_huggingface_pipeline()
    assert back.pipeline.model is theirs.pipeline.model
    assert back.model_id == theirs.model_id
    assert back.invoke(PROMPT, skip_prompt=True) == theirs.invoke(PROMPT, skip_prompt=True)
    ours = QuantizedHuggingFaceLLM(model_id=str(tiny), progress=False, **GREEDY)
    again = QuantizedHuggingFaceLLM.from_huggingface_pipeline(ours.to_huggingface_pipeline(), **GREEDY)
    assert again.pipeline.model is ours.pipeline.model
    assert again.invoke(PROMPT) == ours.invoke(PROMPT)


def test_give_back_without_the_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain_huggingface", None)
    ours = QuantizedHuggingFaceLLM(model_id=str(tiny), progress=False)
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[huggingface\]"'):
        ours.to_huggingface_pipeline()
    assert not ours.is_loaded  # the error comes before the weights
