"""What this package takes from sentence-transformers beyond its promises."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from langchain_quantllm.compat import sentence_transformers as compat
from tests.support.encoder_models import tiny_clip, tiny_embedder

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compat")
    return tiny_embedder(root / "model", prompts={"query": "query : ", "passage": "passage : "}, dense=16)


def model_of(folder: Path, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    return compat.make_model(
        "embedding", str(folder), {"model_kwargs": {"dtype": dtype, "device_map": {"": "cpu"}, **kwargs}}
    )


def vectors_of(model: Any, texts: list[str], **options: Any) -> torch.Tensor:
    features = compat.features_of(model, texts, **{"prompt": None, "task": None, "max_length": None, **options})
    with torch.inference_mode():
        return model(features)["sentence_embedding"]  # type: ignore[no-any-return]


def test_16_bit_models_pool_and_normalize_in_float32_after_the_casts_and_not_before(folder: Path) -> None:
    model = model_of(folder)
    assert vectors_of(model, ["abc"]).dtype == torch.bfloat16
    compat.keep_heads_in_float32(model)
    vectors = vectors_of(model, ["abc", "abc def"])
    assert vectors.dtype == torch.float32
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    model.encode(["abc"])  # which aligns the dtypes of a model with a device map
    assert vectors_of(model, ["abc"]).dtype == torch.float32
    assert model[0].auto_model.dtype == torch.bfloat16


def test_a_model_with_the_casts_can_be_pickled(folder: Path) -> None:
    model = model_of(folder)
    compat.keep_heads_in_float32(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(vectors_of(again, ["abc"]), vectors_of(model, ["abc"]))


def test_features_and_forward_give_the_vectors_of_encode(folder: Path) -> None:
    texts = ["abc", "abc def ghi", "x"]
    model = model_of(folder, torch.float32)
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    for name, prompt in (("query", "query : "), ("passage", "passage : ")):
        expected = torch.from_numpy(theirs.encode(texts, prompt_name=name))
        assert torch.allclose(vectors_of(model, texts, prompt=prompt), expected, atol=1e-6)


def test_max_length_of_a_call_cuts_as_the_models_own_length_does(folder: Path) -> None:
    model, theirs = (model_of(folder, torch.float32) for _ in range(2))
    theirs.max_seq_length = 6
    text = "abc def ghi jkl mno"
    assert torch.allclose(vectors_of(model, [text], max_length=6), vectors_of(theirs, [text]), atol=1e-6)
    assert not torch.allclose(vectors_of(model, [text]), vectors_of(theirs, [text]), atol=1e-3)
    assert compat.longest_input(theirs) == 6


def test_prompts_modalities_sizes_and_normalization_are_read(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder)
    assert compat.prompts_of(model) == {"query": "query : ", "passage": "passage : "}
    assert compat.normalizes(model)
    assert compat.vector_size(model) == 16
    assert compat.longest_input(model) == 64
    assert "text" in compat.modalities_of(model)
    clip = model_of(tiny_clip(tmp_path / "clip"))
    assert {"text", "image"} <= set(compat.modalities_of(clip))
    assert not compat.normalizes(clip)


def test_a_pooling_of_the_callers_stands_behind_a_plain_transformer(folder: Path) -> None:
    plain = folder.parent / "model-plain"
    options = {"model_kwargs": {"dtype": torch.float32, "device_map": {"": "cpu"}}}
    model = compat.make_model("embedding", str(plain), options, "cls")
    features = compat.features_of(model, ["abc"], prompt=None, task=None, max_length=None)
    with torch.inference_mode():
        first = model[0](dict(features))["token_embeddings"][:, 0]
    assert torch.equal(vectors_of(model, ["abc"]), first)


def test_vectors_are_quantized_in_the_ranges_that_are_given() -> None:
    import numpy as np

    vectors = np.array([[-1.0, 0.0, 0.5, 0.999] * 2], dtype=np.float32)
    ranges = np.array([[-1.0] * 8, [1.0] * 8], dtype=np.float32)
    assert compat.quantize_vectors(vectors, "uint8", ranges)[0, :4].tolist() == [0, 127, 191, 254]
    assert compat.quantize_vectors(vectors, "ubinary").tolist() == [[0b00110011]]
