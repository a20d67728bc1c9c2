"""The arguments of langchain-huggingface's HuggingFaceEmbeddings mean the same here, or are refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langchain_quantllm import QuantizedHuggingFaceEmbeddings
from langchain_quantllm.encoders.arguments import translate_arguments
from langchain_quantllm.errors import InvalidOptionError
from tests.support.encoder_models import minilm, tiny_embedder


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"model_kwargs": {"device": "cpu"}}, {"device": "cpu"}),
        ({"model_kwargs": {"device": "cpu", "trust_remote_code": True}}, {"trust_remote_code": True}),
        ({"model_kwargs": {"model_kwargs": {"torch_dtype": "float16"}}}, {"dtype": "float16"}),
        ({"model_kwargs": {"model_kwargs": {"attn_implementation": "eager"}}}, {"attn_implementation": "eager"}),
        ({"model_kwargs": {"truncate_dim": 8}}, {"truncate_dim": 8}),
        ({"encode_kwargs": {"normalize_embeddings": True}}, {"normalize": True}),
        ({"encode_kwargs": {"normalize_embeddings": False}}, {"normalize": False}),
        ({"encode_kwargs": {"batch_size": 8}}, {"batch_size": 8}),
        ({"encode_kwargs": {"precision": "ubinary"}}, {"output_precision": "ubinary"}),
        ({"encode_kwargs": {"prompt": "x"}}, {"query_prompt": "x", "document_prompt": "x"}),
        ({"encode_kwargs": {"convert_to_tensor": True, "show_progress_bar": True}}, {"show_progress": True}),
        ({"query_encode_kwargs": {"prompt_name": "query"}}, {"query_prompt_name": "query"}),
        ({"show_progress": True, "cache_folder": "models"}, {"show_progress": True, "cache_dir": "models"}),
        ({"multi_process": False}, {"device": None}),
        ({"model_kwargs": {"backend": "torch"}}, {"model_kwargs": {}}),
        (
            {"model_kwargs": {"low_cpu_mem_usage": True, "experts_implementation": "eager"}},
            {"model_kwargs": {"experts_implementation": "eager"}},
        ),
    ],
)
def test_arguments_become_fields(given: dict[str, Any], fields: dict[str, Any]) -> None:
    made = QuantizedHuggingFaceEmbeddings(model_name="some/model", **given)
    assert made.model_id == "some/model"
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model_kwargs": {"backend": "onnx"}}, "ONNX"),
        ({"model_kwargs": {"tokenizer_kwargs": {"model_max_length": 8}}}, "max_length="),
        ({"model_kwargs": {"prompts": {"classification": "x"}}}, "query_prompt="),
        ({"model_kwargs": {"device": "cpu"}, "device": "cuda"}, "say two things"),
        ({"encode_kwargs": {"output_value": "token_embeddings"}}, "one vector"),
        ({"encode_kwargs": {"pool": object()}}, "device="),
        ({"encode_kwargs": {"normalise": True}}, "no counterpart"),
        ({"encode_kwargs": {"batch_size": 4}, "query_encode_kwargs": {"batch_size": 8}}, "say two things"),
        ({"encode_kwargs": [1]}, "is not a dict"),
    ],
)
def test_arguments_without_a_counterpart_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        QuantizedHuggingFaceEmbeddings(model_name="some/model", **given)
    assert words in str(caught.value)


def test_translating_changes_no_argument_and_changes_nothing_the_second_time() -> None:
    given = {
        "model_kwargs": {"device": "cpu", "model_kwargs": {"dtype": "float16"}},
        "encode_kwargs": {"batch_size": 2},
    }
    once = translate_arguments(given)
    assert given["encode_kwargs"] == {"batch_size": 2}
    assert translate_arguments(once) == once


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_kwargs": {"device": "cpu"}},
        {"model_kwargs": {"device": "cpu"}, "encode_kwargs": {"normalize_embeddings": True, "batch_size": 4}},
        {"model_kwargs": {"device": "cpu", "truncate_dim": 64}, "encode_kwargs": {"normalize_embeddings": True}},
        {"model_kwargs": {"device": "cpu"}, "encode_kwargs": {"prompt": "query: "}},
    ],
)
def test_the_vectors_are_those_of_huggingface_embeddings(arguments: dict[str, Any]) -> None:
    try:
        from langchain_huggingface import HuggingFaceEmbeddings
    except ImportError:
        pytest.skip("needs langchain-huggingface")
    texts = ["Paris is the capital of France.", "Bananas", "some words " * 50]
    theirs = HuggingFaceEmbeddings(model_name=str(minilm()), **arguments)
    ours = QuantizedHuggingFaceEmbeddings(model_name=str(minilm()), **arguments)
    for got, expected in (
        (ours.embed_documents(texts), theirs.embed_documents(texts)),
        (ours.embed_query(texts[0]), theirs.embed_query(texts[0])),
    ):
        assert np.abs(np.array(got) - np.array(expected)).max() < 1e-6


def test_paths_and_torchs_dtypes_are_taken(tmp_path: Path) -> None:
    import torch

    folder = tiny_embedder(tmp_path / "model")
    made = QuantizedHuggingFaceEmbeddings(model_id=folder, dtype=torch.bfloat16, device="cpu", progress=False)
    assert made.dtype == "bfloat16"
    assert len(made.embed_query("abc")) == 32
