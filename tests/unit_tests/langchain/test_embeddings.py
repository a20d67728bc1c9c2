"""`QuantizedHuggingFaceEmbeddings`: LangChain's calls, prompts, forms of vectors, copies, and faults."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.load import dumpd, load
from langchain_core.vectorstores import InMemoryVectorStore
from sentence_transformers import SentenceTransformer

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceEmbeddings, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import (
    EncodingError,
    InvalidOptionError,
    PromptTooLongError,
    QuantLLMError,
    UnsupportedError,
)
from tests.support.encoder_models import minilm, picture, plain_bert, tiny_embedder, tiny_qwen3_embedder

SECRET = "hf_verySecretToken"  # not a real token
TEXTS = [f"number {number} " + "and more words " * (number % 17) for number in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "query : ", "passage": "passage : "}
    return tiny_embedder(tmp_path_factory.mktemp("embedder") / "model", prompts=prompts, dense=16)


def make(folder: Path, **fields: Any) -> QuantizedHuggingFaceEmbeddings:
    return QuantizedHuggingFaceEmbeddings(**{"model_id": str(folder), "device": "cpu", "progress": False, **fields})


@pytest.fixture
def embeddings(folder: Path) -> Iterator[QuantizedHuggingFaceEmbeddings]:
    made = make(folder)
    yield made
    made.unload()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def array(vectors: Any) -> np.ndarray:
    return np.asarray(vectors, dtype=np.float64)


def assert_close(vectors: Any, expected: Any) -> None:
    assert np.abs(array(vectors) - array(expected)).max() < 1e-6


# Calls.


def test_queries_and_documents_get_the_vectors_of_sentence_transformers(
    embeddings: QuantizedHuggingFaceEmbeddings, theirs: Any
) -> None:
    assert_close(embeddings.embed_query("abc"), theirs.encode_query("abc"))
    assert_close(embeddings.embed_documents(TEXTS), theirs.encode(TEXTS, prompt_name="passage"))
    assert not np.allclose(embeddings.embed_query("abc"), embeddings.embed_documents(["abc"])[0], atol=1e-3)


def test_line_ends_are_part_of_the_text(folder: Path) -> None:
    source = make(minilm())
    assert_close(source.embed_query("a\nb"), SentenceTransformer(str(minilm()), device="cpu").encode("a\nb"))


async def test_async_calls_give_what_sync_ones_give(embeddings: QuantizedHuggingFaceEmbeddings) -> None:
    assert_close(await embeddings.aembed_documents(TEXTS), embeddings.embed_documents(TEXTS))
    assert_close(await embeddings.aembed_query("abc"), embeddings.embed_query("abc"))


async def test_concurrent_queries_meet_in_few_batches(embeddings: QuantizedHuggingFaceEmbeddings) -> None:
    worker = embeddings.load()._loaded().worker()
    before = worker.batches
    vectors = await asyncio.gather(*(embeddings.aembed_query(text) for text in TEXTS))
    assert worker.batches - before <= 5
    assert_close(vectors, [embeddings.embed_query(text) for text in TEXTS])


async def test_the_event_loop_goes_on_while_texts_are_embedded() -> None:
    source = make(minilm())
    await source.aembed_query("loaded")
    task = asyncio.create_task(source.aembed_documents(["some words " * 100] * 40))
    longest, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(0.002)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert len(await task) == 40
    assert longest < 0.5


async def test_a_cancelled_call_stops_and_the_next_one_runs(embeddings: QuantizedHuggingFaceEmbeddings) -> None:
    source = make(minilm(), max_batch_tokens=256)
    await source.aembed_query("loaded")
    worker = source._loaded().worker()
    task = asyncio.create_task(source.aembed_documents(["some words " * 100] * 400))
    while worker.batches < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    at = worker.batches
    assert len(await source.aembed_query("next")) == 384
    assert worker.batches - at <= 3


def test_threads_get_their_own_vectors(embeddings: QuantizedHuggingFaceEmbeddings) -> None:
    expected = embeddings.embed_documents(TEXTS)
    with ThreadPoolExecutor(12) as threads:
        got = list(threads.map(lambda text: embeddings.embed_documents([text])[0], TEXTS))
    assert_close(got, expected)


def test_no_texts_give_no_vectors_and_an_empty_text_gives_the_models_own(
    embeddings: QuantizedHuggingFaceEmbeddings, theirs: Any
) -> None:
    assert embeddings.embed_documents([]) == []
    assert_close(embeddings.embed_documents(["", " "]), theirs.encode(["", " "], prompt_name="passage"))


def test_a_vector_store_finds_the_nearest_document_in_nf4() -> None:
    source = make(minilm(), quantization="nf4")
    store = InMemoryVectorStore(source)
    store.add_texts(["Paris is the capital of France.", "Bananas are yellow.", "To reset a password, open settings."])
    found = store.similarity_search("I forgot my password", k=1)
    assert "password" in found[0].page_content


# Prompts.


@pytest.mark.parametrize(
    ("fields", "query", "document"),
    [
        ({}, "query : ", "passage : "),
        ({"query_prompt": "q ", "document_prompt": ""}, "q ", ""),
        ({"query_prompt_name": "passage", "document_prompt_name": "query"}, "passage : ", "query : "),
        ({"encode_kwargs": {"prompt": "x "}}, "x ", "x "),
        ({"encode_kwargs": {"prompt": "x "}, "query_encode_kwargs": {"prompt_name": "query"}}, "query : ", "x "),
        ({"model_kwargs": {"prompts": {"query": "a ", "passage": "b "}}}, "a ", "b "),
        ({"model_kwargs": {"default_prompt_name": "passage"}}, "passage : ", "passage : "),
    ],
)
def test_prompts_stand_before_texts(
    folder: Path, theirs: Any, fields: dict[str, Any], query: str, document: str
) -> None:
    source = make(folder, **fields)
    assert_close(source.embed_query("abc"), theirs.encode("abc", prompt=query))
    assert_close(source.embed_documents(["abc"]), theirs.encode(["abc"], prompt=document))


def test_a_prompt_that_the_model_does_not_have_is_named(folder: Path) -> None:
    with pytest.raises(InvalidOptionError, match="did you mean 'query'"):
        make(folder, query_prompt_name="querry").embed_query("abc")
    with pytest.raises(InvalidOptionError, match="twice"):
        make(folder, query_prompt="a", query_prompt_name="query")


# The form of vectors.


def test_shortened_vectors_of_a_model_that_normalizes_have_length_1_again(folder: Path, theirs: Any) -> None:
    short = array(make(folder, truncate_dim=5).embed_documents(TEXTS))
    assert short.shape == (60, 5)
    assert np.abs(np.linalg.norm(short, axis=1) - 1).max() < 1e-6
    whole = array(theirs.encode(TEXTS, prompt_name="passage"))[:, :5]
    assert_close(short, whole / np.linalg.norm(whole, axis=1, keepdims=True))
    assert_close(make(folder, truncate_dim=5, normalize=False).embed_documents(TEXTS), whole)


def test_normalize_gives_the_length_1_to_vectors_of_a_model_that_does_not(tmp_path: Path) -> None:
    plain = tiny_embedder(tmp_path / "plain", normalized=False)
    assert np.linalg.norm(make(plain).embed_query("abc")) > 1.5
    assert abs(np.linalg.norm(make(plain, normalize=True).embed_query("abc")) - 1) < 1e-6
    by_theirs = make(plain, encode_kwargs={"normalize_embeddings": True})
    assert abs(np.linalg.norm(by_theirs.embed_query("abc")) - 1) < 1e-6
    with pytest.raises(InvalidOptionError, match="normalize=True"):
        make(plain, output_precision="int8").embed_query("abc")


@pytest.mark.parametrize(
    ("precision", "size", "lowest", "highest"),
    [("int8", 384, -128, 127), ("uint8", 384, 0, 255), ("binary", 48, -128, 127), ("ubinary", 48, 0, 255)],
)
def test_rounded_vectors_are_whole_numbers_of_their_kind(precision: str, size: int, lowest: int, highest: int) -> None:
    source = make(minilm(), output_precision=precision)
    vectors = source.embed_documents(["Paris is in France.", "Bananas are yellow."])
    assert all(len(vector) == size and all(isinstance(number, int) for number in vector) for vector in vectors)
    assert all(lowest <= number <= highest for vector in vectors for number in vector)
    assert source.vector_size == size
    assert source.embed_documents(["Paris is in France."])[0] == vectors[0]  # whatever else is in the call


def test_int8_vectors_keep_the_cosines() -> None:
    exact = array(make(minilm()).embed_documents(TEXTS[:20]))
    rounded = array(make(minilm(), output_precision="int8").embed_documents(TEXTS[:20])) + 0.5
    rounded /= np.linalg.norm(rounded, axis=1, keepdims=True)
    assert np.abs(exact @ exact.T - rounded @ rounded.T).max() < 0.01


def test_ranges_of_the_users_own_texts_use_all_steps() -> None:
    ranges = make(minilm()).vector_ranges(TEXTS)
    source = make(minilm(), output_precision="int8", output_ranges=ranges)
    vectors = array(source.embed_documents(TEXTS))
    assert vectors.min() == -128
    assert vectors.max() >= 126
    for wrong in ([[0.0]], [[0.0], [0.0, 1.0]]):
        with pytest.raises(InvalidOptionError, match="two lists"):
            make(minilm(), output_precision="int8", output_ranges=wrong)
    with pytest.raises(InvalidOptionError, match="384"):
        make(minilm(), output_precision="int8", output_ranges=[[0.0], [1.0]]).embed_query("abc")


# Lengths.


def test_long_texts_are_cut_or_an_error_as_asked(embeddings: QuantizedHuggingFaceEmbeddings, folder: Path) -> None:
    text = "abc " * 500
    assert_close(embeddings.embed_query(text), embeddings.embed_query("abc " * 100))
    with pytest.raises(PromptTooLongError, match="64 tokens"):
        make(folder, on_too_long="error").embed_documents(["short", text])
    cut = make(folder, max_length=8)
    assert_close(cut.embed_query(text), cut.embed_query("abc " * 30))
    assert not np.allclose(cut.embed_query(text), embeddings.embed_query(text), atol=1e-3)
    with pytest.raises(InvalidOptionError, match="64"):
        make(folder, max_length=1000).embed_query("abc")


def test_instances_with_other_lengths_share_the_weights(folder: Path) -> None:
    short, long = make(folder, max_length=8), make(folder)
    assert short._loaded() is long._loaded()
    assert long._loaded().model.max_seq_length == 64


def test_ten_megabytes_of_text_take_little_longer_than_the_tokens_that_are_read() -> None:
    source = make(minilm()).load()
    text = "some words of a very long book " * 330_000
    began = time.perf_counter()
    assert_close(source.embed_query(text), source.embed_query(text[:20_000]))
    assert time.perf_counter() - began < 5


def test_texts_of_mixed_lengths_in_small_batches_give_the_same(folder: Path) -> None:
    expected = make(folder).embed_documents(TEXTS)
    for fields in ({"max_batch_tokens": 1}, {"max_batch_tokens": 200}, {"batch_size": 3}):
        assert_close(make(folder, **fields).embed_documents(TEXTS), expected)


def test_a_progress_bar_is_shown_where_it_is_asked_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = make(folder, progress=True).load()
    capfd.readouterr()
    loaded.embed_documents(TEXTS)  # ends before a bar would appear by itself
    assert capfd.readouterr().err == ""
    make(folder, show_progress=True).embed_documents(TEXTS)
    assert "60/60" in capfd.readouterr().err


# Memory, copies, serialization.


def test_instances_share_weights_and_unload_ends_them_for_all(folder: Path) -> None:
    first, second = make(folder, quantization="nf4"), make(folder, quantization="nf4", normalize=True)
    first.embed_query("abc")
    assert second.is_loaded
    assert second._loaded() is first._loaded()
    first.unload()
    assert not second.is_loaded
    assert len(second.embed_query("abc")) == 16
    assert make(folder)._loaded() is not second._loaded()


def test_the_memory_report_compares_with_16_bits() -> None:
    report = make(minilm(), quantization="nf4").memory_report()
    assert report.scheme_name == "nf4"
    assert 0.25 < (report.saving or 0) < 0.32  # the sensitive layers of a narrow encoder stay in 16 bits
    assert report.before is not None
    assert "less" in report.headline


@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy", "model_copy", "dumpd"])
def test_copies_carry_the_settings_and_never_the_token(folder: Path, way: str) -> None:
    source = make(folder, quantization="nf4", truncate_dim=8, query_prompt="q ", token=SECRET)
    vector = source.embed_query("abc")
    if way == "pickle":
        dumped = pickle.dumps(source)
        assert SECRET.encode() not in dumped
        twin = pickle.loads(dumped)
    elif way == "dumpd":
        text = json.dumps(dumpd(source))
        assert SECRET not in text
        options = {"allowed_objects": [QuantizedHuggingFaceEmbeddings], "valid_namespaces": ["langchain_quantllm"]}
        twin = load(json.loads(text), secrets_map={"HF_TOKEN": "another"}, **options)
    else:
        twin = {"copy": copy.copy, "deepcopy": copy.deepcopy, "model_copy": lambda s: s.model_copy()}[way](source)
    assert twin.truncate_dim == 8
    assert twin.quantization == "nf4"
    assert SECRET not in repr(source)
    assert twin.embed_query("abc") == vector
    assert twin._loaded() is source._loaded()


def test_a_changed_field_loads_another_model_and_others_do_not(folder: Path) -> None:
    source = make(folder).load()
    encoder = source._loaded()
    source.truncate_dim = 4
    assert source._loaded() is encoder
    source.quantization = "nf4"
    assert not source.is_loaded
    assert source._loaded() is not encoder
    assert source.model_copy(update={"dtype": "bfloat16"})._loaded() is not source._loaded()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_told_that_the_model_did_not_come_along(folder: Path) -> None:
    source = make(folder).load()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            source.embed_query("abc")
            text = "no error"
        except QuantLLMError as error:
            text = str(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert "forked" in os.read(reading, 1000).decode()


@pytest.mark.slow
def test_several_devices_keep_their_processes_until_unload(folder: Path) -> None:
    source = make(folder, device=["cpu", "cpu"], max_batch_tokens=64)
    expected = make(folder).embed_documents(TEXTS)
    try:
        (process,) = source.load()._loaded()._processes
        first = process.process_id
        ran: list[int] = []
        run = process.run
        process.run = lambda *given: (ran.append(len(given[2])), run(*given))[1]  # type: ignore[method-assign]
        for _ in range(3):
            assert_close(source.embed_documents(TEXTS * 5), expected * 5)
        assert sum(ran) > 50
        assert process.process_id == first
    finally:
        source.unload()
    deadline = time.monotonic() + 10
    while process._process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process._process.is_alive()


# Faults.


def test_a_vector_that_is_no_number_is_an_error_that_names_its_place(folder: Path) -> None:
    source = make(folder, dtype="bfloat16")
    model = source._loaded().model
    with torch.no_grad():
        embedding = model[0].auto_model.embeddings.word_embeddings.weight
        embedding[model.tokenizer.convert_tokens_to_ids("z")] = float("nan")
    try:
        with pytest.raises(EncodingError, match=r"number 1, counted from 0.*dtype"):
            source.embed_documents(["abc", "z", "abc"])
        assert len(source.embed_documents(["abc"])) == 1
    finally:
        source.unload()


def test_what_is_no_text_or_no_list_is_refused(embeddings: QuantizedHuggingFaceEmbeddings) -> None:
    with pytest.raises(InvalidOptionError, match="element 1 of the texts is int"):
        embeddings.embed_documents(["abc", 3])  # type: ignore[list-item]
    with pytest.raises(InvalidOptionError, match="embed_query"):
        embeddings.embed_documents("abc")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="NoneType"):
        embeddings.embed_query(None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="reads no pictures"):
        embeddings.embed_images([picture(0)])


def test_a_text_without_a_token_is_named(tmp_path: Path) -> None:
    folder = tiny_qwen3_embedder(tmp_path / "qwen3")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["post_processor"] = None
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(InvalidOptionError, match="has no token"):
        make(folder, document_prompt="").embed_documents(["abc", ""])


def test_a_model_without_pooling_works_with_one_that_is_given(tmp_path: Path) -> None:
    plain = plain_bert(tmp_path / "plain")
    with pytest.raises(InvalidOptionError, match="pooling='mean'"):
        make(plain).embed_query("abc")
    theirs = SentenceTransformer(str(plain), device="cpu", local_files_only=True)  # mean, silently
    assert_close(make(plain, pooling="mean").embed_query("abc"), theirs.encode("abc"))
    assert not np.allclose(make(plain, pooling="cls").embed_query("abc"), theirs.encode("abc"), atol=1e-3)


@pytest.mark.parametrize("kind", [QuantizedHuggingFaceLLM, ChatQuantizedHuggingFace])
def test_an_embedding_model_given_to_a_class_that_writes_is_sent_here(folder: Path, kind: type[Any]) -> None:
    with pytest.raises(UnsupportedError, match="use QuantizedHuggingFaceEmbeddings"):
        kind(model_id=str(folder), progress=False).load()


def test_a_language_model_given_here_is_sent_to_the_class_that_writes(smollm2: Path) -> None:
    with pytest.raises(UnsupportedError, match="ChatQuantizedHuggingFace"):
        make(smollm2).embed_query("abc")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantisation": "nf4"}, "did you mean 'quantization'"),
        ({"quantization": "nf5"}, "nf4"),
        ({"max_length": 0}, "max_length"),
        ({"on_too_long": "cut"}, "'truncate' or 'error'"),
        ({"output_precision": "int4"}, "output_precision"),
        ({"sdpa_kernel": "fast"}, "sdpa_kernel"),
        ({"device": []}, "device"),
        ({"output_ranges": [[0.0], [1.0]]}, "no effect"),
        ({"model": "another"}, "say two things"),
    ],
)
def test_wrong_fields_are_refused_with_the_allowed_values(folder: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        make(folder, **fields)
    assert words in str(caught.value)


def test_the_token_is_in_no_error(folder: Path) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        make(folder, token=SECRET, max_length=-1)
    assert SECRET not in str(caught.value)
    with pytest.raises(InvalidOptionError) as caught:
        make(folder, tokenn=SECRET)
    assert SECRET not in str(caught.value)


def test_an_object_that_was_refused_harms_no_other(folder: Path) -> None:
    with pytest.raises(InvalidOptionError, match="device") as refused:  # whose traceback holds it
        make(folder, device=[])
    made = make(folder, max_length=61)
    assert len(made.embed_query("abc")) > 0
    made.unload()
    del refused


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_a_kernel_of_pytorchs_attention_can_be_chosen(folder: Path, theirs: Any, kernel: str) -> None:
    assert_close(make(folder, sdpa_kernel=kernel).embed_query("abc"), theirs.encode_query("abc"))
