"""Speech to Documents: a real whisper-base on the CPU, quantized and not, over short recordings."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import re
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.document_loaders import BaseBlobParser
from langchain_core.documents import Document
from langchain_core.documents.base import Blob
from langchain_core.load import dumps, loads

from langchain_quantllm import NF4, QuantizedHuggingFaceLLM, QuantizedWhisperParser, estimate_memory
from langchain_quantllm.compat import transformers_whisper
from langchain_quantllm.errors import GenerationError, InvalidOptionError, NotEnoughMemoryError, UnsupportedError
from tests.support.checkpoints import make_checkpoint
from tests.support.hearing import wav
from tests.support.sounds import HARBOUR, HARBOUR_WORDS, MORNING, MUSEUM, MUSEUM_WORDS, decoded
from tests.support.speech_models import whisper_model


def words(documents: list[Document]) -> list[str]:
    return re.findall(r"\w+", " ".join(document.page_content for document in documents).lower())


def error_rate(heard: list[str], said: list[str]) -> float:
    """Compute the word error rate: substitutions, insertions and deletions for each word that was said."""
    costs = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, costs[0] = costs[:], i
        for j, other in enumerate(heard, 1):
            costs[j] = min(before[j] + 1, costs[j - 1] + 1, before[j - 1] + (word != other))
    return costs[-1] / len(said)


@pytest.fixture(scope="module")
def folder() -> str:
    return str(whisper_model())


@pytest.fixture(scope="module")
def parser(folder: str) -> Iterator[QuantizedWhisperParser]:
    """Yield a parser in float32, which is fast on every CPU; it holds the weights for the others."""
    made = QuantizedWhisperParser(model=folder, dtype="float32", device="cpu", progress=False, temperature=0.0).load()
    yield made
    made.unload()


@pytest.fixture(scope="module")
def museum(parser: QuantizedWhisperParser) -> list[Document]:
    return parser.parse(Blob.from_path(MUSEUM))


def test_each_sentence_becomes_a_document_with_its_place(museum: list[Document], folder: str) -> None:
    assert error_rate(words(museum), MUSEUM_WORDS.split()) == 0
    assert len(museum) == 3
    for before, after in pairwise(museum):
        assert before.metadata["start_s"] < before.metadata["end_s"] <= after.metadata["start_s"]
    metadata = museum[0].metadata
    assert {k: metadata[k] for k in ("source", "language", "model")} == {
        "source": str(MUSEUM),
        "language": "en",
        "model": folder,
    }
    assert museum[-1].metadata["end_s"] <= metadata["duration_s"] == pytest.approx(8.6, abs=1)
    assert "damaged_at_s" not in metadata


@pytest.mark.parametrize("per", ["piece", "file"])
def test_a_short_file_is_one_document_per_piece_and_per_file(
    parser: QuantizedWhisperParser, museum: list[Document], per: str
) -> None:
    blob = Blob.from_data(MUSEUM.read_bytes(), metadata={"speaker": "guide"})
    (document,) = parser.model_copy(update={"per": per}).parse(blob)
    assert words([document]) == words(museum)
    assert document.metadata["start_s"] == museum[0].metadata["start_s"]
    assert document.metadata["end_s"] == museum[-1].metadata["end_s"]
    assert document.metadata["speaker"] == "guide"
    assert "source" not in document.metadata


def test_the_language_is_detected_and_can_be_translated(parser: QuantizedWhisperParser) -> None:
    german = parser.parse(Blob.from_path(MORNING))
    assert {document.metadata["language"] for document in german} == {"de"}
    assert error_rate(words(german), ["guten", "morgen", "heute", "ist", "montag", "vielen", "dank"]) == 0
    english = parser.model_copy(update={"task": "translate"}).parse(Blob.from_path(MORNING))
    assert "good morning today is monday" in " ".join(words(english))


@pytest.mark.slow
def test_a_language_can_be_given_by_code_and_by_name(
    parser: QuantizedWhisperParser,
) -> None:
    for language in ("de", "German"):
        documents = parser.model_copy(update={"language": language}).parse(Blob.from_path(MORNING))
        assert words(documents)[:2] == ["guten", "morgen"]
        assert documents[0].metadata["language"] == "de"


@pytest.mark.slow
def test_a_prompt_sets_the_style(parser: QuantizedWhisperParser) -> None:
    shouted = parser.model_copy(update={"prompt": "THE CASTLE OPENS AT NOON. DOGS PAY NOTHING. IT IS COLD."})
    text = " ".join(d.page_content for d in shouted.parse(Blob.from_path(MUSEUM)))
    assert text.isupper()
    with pytest.raises(InvalidOptionError, match=r"prompt has \d+ tokens, and Whisper takes 223"):
        parser.model_copy(update={"prompt": "word " * 400}).parse(Blob.from_path(MUSEUM))


@pytest.mark.slow
def test_beams_give_a_text_too(parser: QuantizedWhisperParser) -> None:
    documents = parser.model_copy(update={"num_beams": 3}).parse(Blob.from_path(MUSEUM))
    assert error_rate(words(documents), MUSEUM_WORDS.split()) <= 0.1


@pytest.mark.parametrize("loudness", [0.0, 0.002, 0.03])
def test_silence_and_noise_give_no_text(parser: QuantizedWhisperParser, loudness: float) -> None:
    sound = (loudness * np.random.default_rng(0).standard_normal(16_000 * 6)).astype(np.float32)
    assert parser.parse(Blob.from_data(wav(sound))) == []


def test_silence_takes_no_forward_of_the_model(parser: QuantizedWhisperParser, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(transformers_whisper, "encode", fail)
    assert parser.parse(Blob.from_data(wav(np.zeros(16_000 * 70, np.float32)))) == []


@pytest.mark.slow
def test_speech_after_silence_keeps_its_time(parser: QuantizedWhisperParser, museum: list[Document]) -> None:
    speech = decoded(MUSEUM.read_bytes())
    sound = np.concatenate([np.zeros(16_000 * 33, np.float32), speech, np.zeros(16_000 * 5, np.float32)])
    documents = parser.parse(Blob.from_data(wav(sound)))
    assert error_rate(words(documents), words(museum)) <= 0.1
    assert documents[0].metadata["start_s"] == pytest.approx(33.0, abs=1.0)
    assert documents[-1].metadata["end_s"] <= 33 + len(speech) / 16_000 + 0.01


@pytest.mark.slow
def test_a_long_file_is_heard_piece_by_piece_alone_and_in_batches(
    parser: QuantizedWhisperParser,
) -> None:
    blob = Blob.from_path(HARBOUR)
    alone = parser.parse(blob)
    assert error_rate(words(alone), HARBOUR_WORDS.split()) <= 0.15  # a model this small mishears a synthetic voice
    assert len(parser.model_copy(update={"per": "piece"}).parse(blob)) == 2
    starts = [document.metadata["start_s"] for document in alone]
    assert starts == sorted(starts)
    together = parser.model_copy(update={"batch_size": 3}).parse(blob)
    assert error_rate(words(together), words(alone)) <= 0.03


def test_documents_come_before_the_file_is_decoded(
    parser: QuantizedWhisperParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = []
    monkeypatch.setattr(
        "langchain_quantllm.speech.Transcriber.transcribe",
        lambda self, batch: pieces.append(batch) or [[] for _ in batch[:-1]] + [[Segment()]],
    )

    class Segment:
        start_s, end_s, text = 0.0, 1.0, " a"

    found = parser.lazy_parse(Blob.from_data(wav(np.tile(decoded(MUSEUM.read_bytes()), 20))))
    next(found)
    assert len(pieces) == 1
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "ratio", "most"), [("int8", 0.72, 0.0), ("nf4", 0.58, 0.15), ("fp4", 0.58, 0.25)]
)
def test_quantized_models_take_less_memory_and_hear_the_same(
    folder: str, museum: list[Document], quantization: str, ratio: float, most: float
) -> None:
    small = QuantizedWhisperParser(
        model=folder, quantization=quantization, device="cpu", progress=False, temperature=0.0
    )
    try:
        assert error_rate(words(small.parse(Blob.from_path(MUSEUM))), words(museum)) <= most
        report = small.memory_report().to_dict()
        assert report["weights"]["total_bytes"] <= ratio * report["bytes_16bit"]
        assert small.scheme.name == quantization
    finally:
        small.unload()


def test_the_estimate_of_its_memory_is_what_it_takes(folder: str) -> None:
    for quantization in (None, "int8", "nf4"):
        parser = QuantizedWhisperParser(model=folder, quantization=quantization, device="cpu", progress=False)
        dtype = "bfloat16"  # instead of float16, in which a CPU takes three times as long
        assert parser.pipeline.model.dtype == torch.bfloat16
        estimate = estimate_memory(folder, quantization, dtype=dtype)
        weights = parser.memory_report().weights
        assert estimate.weights.total_bytes == pytest.approx(weights.total_bytes, rel=0.01)
        parser.unload()


def test_what_is_not_quantized_of_a_float32_checkpoint_is_held_in_16_bits(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = WhisperForConditionalGeneration(WhisperConfig(d_model=64, **sizes, **heads))
    model.save_pretrained(tmp_path)
    for part in (AutoTokenizer, AutoFeatureExtractor):
        part.from_pretrained(whisper_model()).save_pretrained(tmp_path)
    small = QuantizedWhisperParser(model=str(tmp_path), quantization="nf4", device="cpu", progress=False)
    embeddings = small.pipeline.model.get_decoder().embed_tokens
    assert embeddings.weight.dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="generation_config.json lacks no_timestamps_token_id"):
        small.parse(Blob.from_path(MUSEUM))


# --- sharing, serialization, unloading ---


def test_instances_and_copies_share_the_weights(parser: QuantizedWhisperParser) -> None:
    for twin in (pickle.loads(pickle.dumps(parser)), copy.deepcopy(parser), parser.model_copy(update={"per": "file"})):
        assert twin.load().pipeline is parser.pipeline


def test_a_pickle_and_a_serialized_parser_hold_no_token(folder: str) -> None:
    parser = QuantizedWhisperParser(model=folder, token="hf_secret", quantization=NF4(double_quantization=True))
    assert b"hf_secret" not in pickle.dumps(parser)
    assert pickle.loads(pickle.dumps(parser)).token is None
    text = dumps(parser)
    assert "hf_secret" not in text
    assert "hf_secret" not in repr(parser)
    again = loads(
        text,
        secrets_map={"HF_TOKEN": "other"},
        valid_namespaces=["langchain_quantllm"],
        allowed_objects=[QuantizedWhisperParser],
    )
    assert again.token.get_secret_value() == "other"
    assert again.model_dump(exclude={"token"}) == parser.model_dump(exclude={"token"})


def test_a_field_that_says_what_to_load_drops_the_weights(parser: QuantizedWhisperParser) -> None:
    twin = copy.deepcopy(parser).load()
    twin.per = "file"
    assert twin.is_loaded
    twin.quantization = "int8"
    assert not twin.is_loaded
    assert twin.scheme.name == "int8"
    assert not parser.model_copy(update={"dtype": "bfloat16"}).is_loaded


@pytest.mark.slow
def test_unloading_frees_the_weights_and_ends_files_in_progress(folder: str) -> None:
    parser = QuantizedWhisperParser(model=folder, dtype="bfloat16", device="cpu", progress=False)
    model = weakref.ref(parser.pipeline.model)
    sound = np.tile(decoded(MUSEUM.read_bytes()), 5)
    found = parser.lazy_parse(Blob.from_data(wav(sound)))
    next(found)
    parser.unload()
    assert not parser.is_loaded
    with pytest.raises(GenerationError, match="unloaded"):
        list(found)
    gc.collect()
    assert model() is None


def test_the_memory_report_names_model_and_scheme(parser: QuantizedWhisperParser, folder: str) -> None:
    report = parser.memory_report()
    assert report.model_id == folder
    assert report.weights.total_bytes == pytest.approx(290e6, rel=0.01)  # 72.6 million weights in float32
    assert report.bytes_16bit == pytest.approx(145e6, rel=0.01)


# --- threads and event loops ---


def test_async_gives_the_same_beside_a_live_event_loop(parser: QuantizedWhisperParser, museum: list[Document]) -> None:
    async def run() -> int:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.01)
                beats += 1

        beating = asyncio.create_task(beat())
        assert await parser.aparse(Blob.from_path(MUSEUM)) == museum  # reads `alazy_parse`
        beating.cancel()
        return beats

    assert asyncio.run(run()) > 10


def test_a_cancelled_task_ends_at_once_and_closes_its_file(
    parser: QuantizedWhisperParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, go_on = transformers_whisper.encode, threading.Event(), threading.Event()

    def held(model: Any, features: Any) -> Any:
        begun.set()
        go_on.wait(30)
        return encode(model, features)

    monkeypatch.setattr(transformers_whisper, "encode", held)
    closed = threading.Event()
    monkeypatch.setattr("langchain_quantllm.speech._Progress.__exit__", lambda *_: closed.set())

    async def run() -> None:
        task = asyncio.create_task(parser.aparse(Blob.from_path(MUSEUM)))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(run())
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(60)


def test_files_parsed_at_once_do_not_mix(parser: QuantizedWhisperParser, museum: list[Document]) -> None:
    results: dict[str, list[Document]] = {}

    def parse(path: Path) -> None:
        results[path.name] = parser.parse(Blob.from_path(path))

    threads = [threading.Thread(target=parse, args=(path,)) for path in (MUSEUM, MORNING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[MUSEUM.name] == museum
    assert {document.metadata["language"] for document in results[MORNING.name]} == {"de"}


def test_settings_of_the_callers_thread_do_not_reach_the_model(
    parser: QuantizedWhisperParser, museum: list[Document]
) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert parser.parse(Blob.from_path(MUSEUM)) == museum


# --- faults ---


@pytest.mark.slow
def test_out_of_memory_halves_the_batch_and_else_says_what_to_do(
    parser: QuantizedWhisperParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = transformers_whisper.encode
    sizes: list[int] = []

    def limited(model: Any, features: Any) -> Any:
        sizes.append(len(features))
        if len(features) > most:
            msg = "no memory"
            raise torch.OutOfMemoryError(msg)
        return encode(model, features)

    monkeypatch.setattr(transformers_whisper, "encode", limited)
    sound = np.concatenate([decoded(MUSEUM.read_bytes()), np.zeros(16_000 * 20, np.float32)])
    blob = Blob.from_data(wav(np.tile(sound, 2)))
    most = 1
    documents = parser.model_copy(update={"batch_size": 2}).parse(blob)
    assert sizes[:3] == [2, 1, 1]
    assert error_rate(words(documents), MUSEUM_WORDS.split() * 2) <= 0.1
    most = 0
    with pytest.raises(NotEnoughMemoryError, match="use a scheme of fewer bits"):
        parser.parse(blob)


@pytest.mark.slow
def test_an_unlikely_text_is_tried_again_at_the_next_temperature(
    parser: QuantizedWhisperParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    listen = transformers_whisper.listen

    def noted(*args: Any) -> Any:
        tried.append(args[-1])
        return listen(*args)

    monkeypatch.setattr(transformers_whisper, "listen", noted)
    strict = parser.model_copy(update={"temperature": (0.0, 0.5), "logprob_threshold": -0.01, "no_speech_threshold": 1})
    assert strict.parse(Blob.from_path(MUSEUM))
    assert tried == [0.0, 0.5]
    tried.clear()
    parser.model_copy(update={"temperature": (0.0, 0.5)}).parse(Blob.from_path(MUSEUM))
    assert tried == [0.0]


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (Blob.from_path("/nowhere/talk.mp3"), "the file /nowhere/talk.mp3 does not exist"),
        (Blob.from_path("/"), "the file / is a folder"),
        (Blob.from_data(b""), "the blob is empty"),
        (Blob.from_data(b"no sound" * 99), "the blob is not sound that can be read"),
        (Blob.from_data("text"), "the blob"),
    ],
)
def test_a_blob_without_sound_says_so_before_the_model_is_loaded(folder: str, blob: Blob, sentence: str) -> None:
    parser = QuantizedWhisperParser(model=folder, dtype="float16")
    with pytest.raises(InvalidOptionError, match=sentence):
        parser.parse(blob)
    assert not parser.is_loaded


def test_a_longer_file_than_allowed_is_refused(folder: str) -> None:
    parser = QuantizedWhisperParser(model=folder, dtype="float16", max_duration_s=5)
    with pytest.raises(InvalidOptionError, match="lasts longer than max_duration_s=5 allows"):
        parser.parse(Blob.from_path(MUSEUM))
    assert not parser.is_loaded


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": ""}, "give model_id="),
        ({"batchsize": 2}, r"has no field 'batchsize' \(batchsize=2\); did you mean 'batch_size'"),
        ({"task": "sing"}, "task='sing' is not allowed"),
        ({"per": "word"}, "per='word' is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"temperature": (0.0, 3.0)}, "temperature=.* give numbers from 0 to 2"),
        ({"temperature": ()}, "temperature=.* give numbers from 0 to 2"),
        ({"max_duration_s": -1.0}, "max_duration_s=-1.0 is not allowed"),
        ({"quantization": "int9"}, "quantization='int9' is not a known scheme"),
        ({"dtype": "float8"}, "dtype='float8' is not known"),
        ({"device": "cpu", "device_map": "auto"}, "say the same thing twice"),
        ({"model": "a/b", "model_id": "c/d"}, "say two things"),
    ],
)
def test_a_wrong_field_says_what_is_allowed(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidOptionError, match=sentence):
        QuantizedWhisperParser(**{"model": "openai/whisper-small", **fields})


@pytest.mark.parametrize(
    ("language", "sentence"),
    [("klingon", "is not one of the model's 99; give a code such as 'en'"), ("Germn", "did you mean 'german'")],
)
def test_a_language_that_the_model_does_not_know_is_refused(
    parser: QuantizedWhisperParser, language: str, sentence: str
) -> None:
    with pytest.raises(InvalidOptionError, match=sentence):
        parser.model_copy(update={"language": language}).parse(Blob.from_path(MUSEUM))


def test_each_class_names_the_other_for_the_others_model(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="turns speech into text; use QuantizedWhisperParser for it"):
        QuantizedHuggingFaceLLM(model=folder).load()
    llama = make_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match="holds a 'llama' model, and this class takes Whisper models"):
        QuantizedWhisperParser(model=str(llama)).load()


def test_it_is_a_parser_of_langchains() -> None:
    assert issubclass(QuantizedWhisperParser, BaseBlobParser)
