"""Encoders in every scheme: their vectors, their memory, and one of each in memory for all."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from sentence_transformers import SentenceTransformer

from benchmarks.rag_corpus import passages
from langchain_quantllm.compat.bitsandbytes import shape_of
from langchain_quantllm.encoders.embedding import Embed
from langchain_quantllm.encoders.registry import LoadedEncoder, get_or_load
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    NotEnoughMemoryError,
    UnsupportedError,
)
from langchain_quantllm.schemes import NF4, scheme_from
from tests.support.encoder_models import minilm, mpnet, plain_bert, plain_gpt2, tiny_embedder, tiny_qwen3_embedder

TEXTS = [
    "The capital of France is Paris.",
    "Bananas are yellow, and grow in warm countries.",
    "How do I reset my password?",
    "A quantized model holds its weights in few bits.",
    "short",
    "Das Wetter ist heute schön.",
    "import numpy as np; print(np.arange(10).reshape(2, 5))",
    "It was the best of times, it was the worst of times, it was the age of wisdom, " * 6,
]


def load(folder: Path | str, quantization: Any = None, **options: Any) -> LoadedEncoder:
    spec = EncoderSpec(model_id=str(folder), scheme=scheme_from(quantization), device="cpu", progress=False, **options)
    return get_or_load(spec)


def vectors_of(encoder: LoadedEncoder, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    rows = encoder.submit(Embed(**options), texts, sizes=[len(text) for text in texts]).result()
    return np.stack(rows)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    model = SentenceTransformer(str(minilm()), device="cpu", local_files_only=True)
    return np.asarray(model.encode(TEXTS))


@pytest.mark.parametrize(
    ("quantization", "dtype", "least_cosine", "most_mb"),
    [
        (None, "float32", 0.999999, 91.0),
        ("none", "bfloat16", 0.9995, 45.5),
        ("none", "float16", 0.9999, 45.5),
        ("int8", "auto", 0.99, 35.0),
        ("nf4", "auto", 0.96, 32.6),
        ("nf4-double", "auto", 0.96, 32.2),
        ("fp4", "auto", 0.90, 32.6),
    ],
)
def test_minilm_keeps_its_vectors_and_takes_less_memory(
    reference: np.ndarray, quantization: str | None, dtype: str, least_cosine: float, most_mb: float
) -> None:
    encoder = load(minilm(), quantization, dtype=dtype)
    vectors = vectors_of(encoder)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6  # 0.004 where pooled in bfloat16
    assert (vectors * reference).sum(axis=1).min() >= least_cosine
    report = encoder.memory_report("minilm")
    assert report.weights.total_bytes / 1e6 <= most_mb
    assert report.bytes_16bit is not None
    assert abs(report.bytes_16bit / 1e6 - 45.4) < 0.1


@pytest.mark.slow
def test_minilm_in_nf4_keeps_the_vectors_of_a_book() -> None:
    book = [passage.text for passage in passages() if passage.source == "alice.txt"][::6]
    exact = vectors_of(load(minilm(), dtype="float32"), book)
    assert len(exact) > 30
    for scheme in ("nf4", "nf4-double"):
        assert (vectors_of(load(minilm(), scheme), book) * exact).sum(axis=1).min() >= 0.95


def test_a_narrow_encoder_in_4_bits_keeps_values_and_outputs_of_attention_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    def kept(hidden: int, scheme: Any) -> set[str]:
        folder = tiny_embedder(tmp_path / f"width-{hidden}", hidden=hidden)
        encoder = load(folder, scheme)
        plain = [name for name, module in encoder.model.named_modules() if type(module) is torch.nn.Linear]
        return {name.partition("layer.0.")[2] for name in plain if "layer.0." in name}

    sensitive = {"attention.self.value", "attention.output.dense"}
    assert kept(64, "nf4") == kept(64, "fp4") == sensitive
    assert kept(64, "int8") == set()
    assert kept(512, "nf4") == set()
    assert kept(64, NF4(skip_modules=("pooler",))) == set()
    assert kept(64, NF4(skip_modules=("self.key",))) == {"attention.self.key"}


def test_matrices_of_gpt2_keep_their_direction_in_4_bits(tmp_path: Path) -> None:
    """Also a square one, whose shape does not tell how it lies."""
    source = plain_gpt2(tmp_path / "gpt2")
    exact = transformers.GPT2Model.from_pretrained(source, dtype=torch.float32)
    encoder = load(source, "nf4", pooling="mean")
    quantized = {name.partition("h.")[2]: m for name, m in encoder.model.named_modules() if shape_of(m) is not None}
    assert {"0.attn.c_attn", "0.attn.c_proj", "0.mlp.c_fc"} <= quantized.keys()
    for name, module in quantized.items():
        expected = exact.h.get_submodule(name).weight.T
        found = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        assert (found - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "least_cosine"), [("none", 0.9995), ("int8", 0.99), ("nf4", 0.95)])
def test_mpnet_keeps_its_vectors_and_takes_less_memory(quantization: str, least_cosine: float) -> None:
    exact = vectors_of(load(mpnet(), dtype="float32"))
    encoder = load(mpnet(), quantization, dtype="bfloat16")
    assert (vectors_of(encoder) * exact).sum(axis=1).min() >= least_cosine
    report = encoder.memory_report("mpnet")
    assert report.saving is not None
    assert report.saving >= {"none": -0.01, "int8": 0.35, "nf4": 0.5}[quantization]


def test_vectors_are_the_same_whatever_the_batch() -> None:
    encoder = load(minilm(), dtype="float32")
    together = vectors_of(encoder)
    alone = np.concatenate([vectors_of(encoder, [text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-6  # sums of float32 in another order; numbers are up to 0.2


@pytest.mark.parametrize(("quantization", "most"), [(None, 1e-6), ("nf4", 0.02), ("int8", 0.02)])
def test_a_decoder_gives_the_last_tokens_vector_alone_and_padded_on_the_left(
    tmp_path: Path, quantization: str | None, most: float
) -> None:
    dtype = "float32" if quantization is None else "auto"  # bfloat16 rounds to 2 or 3 digits
    encoder = load(tiny_qwen3_embedder(tmp_path / "qwen3"), quantization, dtype=dtype)
    texts = ["abc", "abc def ghi jkl mno", "x y z " * 8]
    together = vectors_of(encoder, texts)
    alone = np.concatenate([vectors_of(encoder, [text]) for text in texts])
    assert np.abs(together - alone).max() < most
    assert (together * alone).sum(axis=1).min() > 0.999
    tokens = encoder.model.tokenizer(texts, padding=True)
    assert tokens["attention_mask"][0][0] == 0
    assert len({tuple(row.round(2)) for row in together}) == 3


def test_16_bit_weights_of_the_checkpoint_stay_what_they_are(tmp_path: Path) -> None:
    encoder = load(tiny_qwen3_embedder(tmp_path / "qwen3"))
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    assert vectors_of(encoder, ["abc"]).dtype == np.float32


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("hidden", [30, 34, 62])
def test_sizes_that_are_no_multiples_of_a_block_are_quantized_too(
    tmp_path: Path, hidden: int, quantization: str
) -> None:
    folder = tiny_embedder(tmp_path / "odd", hidden=hidden)
    exact, rounded = (vectors_of(load(folder, scheme), ["abc def"]) for scheme in (None, quantization))
    assert (exact * rounded).sum() > 0.95


def test_a_classifier_keeps_its_head_unquantized(tmp_path: Path) -> None:
    folder = plain_bert(tmp_path / "cross", architecture="BertForSequenceClassification", hidden=64)
    encoder = load(folder, "nf4", kind="cross_encoder")
    kinds = {name: type(module).__name__ for name, module in encoder.model.named_modules()}
    assert [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert not [
        name for name, kind in kinds.items() if kind == "Linear4bit" and ("classifier" in name or "pooler" in name)
    ]


def test_threads_that_ask_at_once_get_one_encoder_which_dies_with_its_last_holder(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path / "shared")
    barrier = threading.Barrier(8)

    def ask(_: int) -> LoadedEncoder:
        barrier.wait()
        return load(folder, "nf4")

    with ThreadPoolExecutor(8) as threads:
        encoders = list(threads.map(ask, range(8)))
    assert len(set(map(id, encoders))) == 1
    assert load(folder, "nf4") is encoders[0]
    assert load(folder) is not encoders[0]
    reference = weakref.ref(encoders[0].model)
    del encoders
    gc.collect()
    assert reference() is None


def test_a_released_encoder_is_loaded_again(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path / "again")
    first = load(folder)
    before = vectors_of(first, ["abc"])
    first.close()
    assert first.closed
    second = load(folder)
    assert second is not first
    assert np.array_equal(vectors_of(second, ["abc"]), before)


def test_specs_that_load_the_same_have_one_key(tmp_path: Path) -> None:
    spec = EncoderSpec(model_id=str(tmp_path))
    assert (
        spec.key() == EncoderSpec(model_id=f"{tmp_path}/", scheme=scheme_from("none"), token="x", progress=False).key()
    )
    for change in ({"dtype": "float32"}, {"scheme": scheme_from("nf4")}, {"pooling": "cls"}, {"kind": "cross_encoder"}):
        assert dataclasses.replace(spec, **change).key() != spec.key()


def test_calibrated_schemes_and_missing_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="'int8', 'nf4'"):
        EncoderSpec(model_id=str(tmp_path), scheme=scheme_from("gptq"))
    folder = tiny_embedder(tmp_path / "model")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="cuda"):
            get_or_load(EncoderSpec(model_id=str(folder), device="cuda:0"))
        with pytest.raises(UnsupportedError, match="flash_attention_2"):
            load(folder, attn_implementation="flash_attention_2")


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_embedder(tmp_path / "large")
    monkeypatch.setattr("langchain_quantllm.encoders.load.available_memory", lambda device: 20_000)
    with pytest.raises(NotEnoughMemoryError, match=r"are free on cpu; use a scheme of fewer bits"):
        load(folder)
    assert load(folder, "nf4").scheme.name == "nf4"


def test_a_model_with_routes_for_queries_and_documents_takes_each_and_pools_in_float32(tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    source = str(plain_bert(tmp_path / "plain"))
    route = Router.for_query_document(
        query_modules=[Transformer(source), Pooling(32, "mean"), Dense(32, 16), Normalize()],
        document_modules=[Transformer(source), Pooling(32, "cls"), Dense(32, 16), Normalize()],
    )
    made = SentenceTransformer(modules=[route], device="cpu")
    made.save(str(tmp_path / "routes"), create_model_card=False)
    encoder = load(tmp_path / "routes", dtype="bfloat16")
    for task, encode in (("query", made.encode_query), ("document", made.encode_document)):
        vectors = vectors_of(encoder, ["abc", "def"], task=task)
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
        assert (vectors * np.asarray(encode(["abc", "def"]))).sum(axis=1).min() > 0.999


def test_a_damaged_weight_file_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(("found", "words"), [(None, "langchain-quantllm[rag]"), ("5.1.0", "5.1.0 is too old")])
def test_a_missing_or_old_sentence_transformers_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, words: str
) -> None:
    folder = tiny_embedder(tmp_path / "model")
    if found is None:
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    with pytest.raises(MissingPackageError) as caught:
        load(folder)
    assert words in str(caught.value)
    assert "pip install" in str(caught.value)
