"""The options that transformers' pipelines store, checked on real pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from langchain_quantllm.compat.transformers_pipelines import flat_options, options_of, with_options
from tests.support.checkpoints import make_tokenizer
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def pipeline_of(tokenizer: Any, **options: Any) -> Any:
    model = tiny_model(len(tokenizer))
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", **options)


def test_a_pipeline_s_defaults_are_none_of_its_options(tokenizer: Any) -> None:
    found = options_of(pipeline_of(tokenizer))
    assert not {"do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length"} & set(found)


def test_a_checkpoint_s_sampling_options_alone_do_not_mean_sampling(tokenizer: Any) -> None:
    model = tiny_model(len(tokenizer))
    model.generation_config.update(top_k=7, do_sample=False)
    found = options_of(transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu"))
    assert not found.get("do_sample")


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 7},
        {"do_sample": True, "temperature": 0.3},
        {"top_k": 3, "do_sample": True, "repetition_penalty": 1.5},
    ],
)
def test_options_that_a_pipeline_was_made_with(tokenizer: Any, given: dict[str, Any]) -> None:
    found = options_of(pipeline_of(tokenizer, **given))
    assert {name: found.get(name) for name in given} == given


def test_a_config_counts_by_its_fields(tokenizer: Any) -> None:
    config = transformers.GenerationConfig(max_new_tokens=5, num_beams=2)
    try:
        pipeline = pipeline_of(tokenizer, generation_config=config)
    except TypeError:
        pytest.skip("pipelines of this transformers take no config")
    found = options_of(pipeline)
    assert (found["max_new_tokens"], found["num_beams"]) == (5, 2)
    assert "generation_config" not in found


def test_a_copy_has_further_options(tokenizer: Any) -> None:
    pipeline = pipeline_of(tokenizer, do_sample=False)
    before = options_of(pipeline)
    twin = with_options(pipeline, {"max_new_tokens": 3, "return_full_text": False})
    assert twin.model is pipeline.model
    assert options_of(pipeline) == before
    assert options_of(twin)["max_new_tokens"] == 3
    [answer] = with_options(pipeline, {"max_new_tokens": 3})("the lazy dog", return_tensors=True)
    assert len(answer["generated_token_ids"]) == len(tokenizer("the lazy dog")["input_ids"]) + 3


def test_options_in_a_dictionary_of_their_own(tokenizer: Any) -> None:
    given = {"padding": True, "generate_kwargs": {"max_new_tokens": 4}}
    assert flat_options(pipeline_of(tokenizer), given) == {"padding": True, "max_new_tokens": 4}
