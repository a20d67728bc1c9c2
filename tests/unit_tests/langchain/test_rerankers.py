"""Cross-encoders and late-interaction models: scores, lengths, batches and faults."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document
from langchain_core.load import dumpd, load

from langchain_quantllm import (
    ChatQuantizedHuggingFace,
    LateInteractionReranker,
    QuantizedCrossEncoder,
    QuantizedReranker,
)
from langchain_quantllm.errors import (
    EncodingError,
    InvalidOptionError,
    ModelNotFoundError,
    PromptTooLongError,
    UnsupportedError,
)
from tests.support.encoder_models import late_minilm
from tests.support.rerankers import (
    DOCUMENTS,
    QUERY,
    save_cross_encoder,
    save_embedding_model,
    save_late_interaction,
)
from tests.support.selection import slow_but

pytest.importorskip("sentence_transformers")

PAIRS = [(QUERY, document) for document in DOCUMENTS]
SCHEMES = ["none", "int8", "nf4", "fp4"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("rerankers") / "classifier")


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rerankers")
    return save_late_interaction(folder / "late", folder / "bert")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedding_model(tmp_path_factory.mktemp("rerankers"))


@pytest.fixture
def encoder(classifier: Path) -> QuantizedCrossEncoder:
    return QuantizedCrossEncoder(model_id=str(classifier), device="cpu", progress=False)


@pytest.fixture(params=["classifier", "late"])
def reranker(request: pytest.FixtureRequest, classifier: Path, late: Path) -> QuantizedReranker | Any:
    if request.param == "late":
        return LateInteractionReranker(model_id=str(late), device="cpu", progress=False, top_n=None)
    return QuantizedReranker(model_id=str(classifier), device="cpu", progress=False, top_n=None)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_progress_bar_counts_documents_where_it_is_asked_for(
    reranker: Any, is_async: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def rank(model: Any) -> Any:
        given = [Document(text) for text in DOCUMENTS]
        return (
            asyncio.run(model.acompress_documents(given, QUERY)) if is_async else model.compress_documents(given, QUERY)
        )

    quiet = reranker.model_copy(update={"progress": True}).load()
    capfd.readouterr()
    expected = rank(quiet)  # ends before a bar would appear by itself
    assert capfd.readouterr().err == ""
    assert rank(quiet.model_copy(update={"show_progress": True})) == expected
    assert f"{len(DOCUMENTS)}/{len(DOCUMENTS)}" in capfd.readouterr().err
    rank(quiet.model_copy(update={"show_progress": False}))
    assert capfd.readouterr().err == ""


def test_a_cross_encoder_shows_the_progress_of_pairs(
    encoder: QuantizedCrossEncoder, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = encoder.score(PAIRS)
    capfd.readouterr()
    shown = encoder.model_copy(update={"show_progress": True})
    assert shown.score(PAIRS) == expected
    assert f"{len(PAIRS)}/{len(PAIRS)}" in capfd.readouterr().err


def transformer_of(reranker: Any) -> Any:
    """Return the module of a loaded reranker that runs its transformer."""
    reranker.load()
    holder = reranker._get_scorer().model if isinstance(reranker, QuantizedReranker) else reranker
    return holder._loaded().model[0]


class Batches:
    """The batches of a model, with a failure for those that hold too many rows."""

    def __init__(self, model: Any, most_rows: int | None = None, before: Callable[[], None] = lambda: None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._most_rows = most_rows
        self._before = before
        self._handle = model.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: Any) -> None:
        self._before()
        self.shapes.append(tuple(args[0]["input_ids"].shape))
        if self._most_rows is not None and self.shapes[-1][0] > self._most_rows:
            raise torch.OutOfMemoryError

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()


class TestCrossEncoder:
    def test_scores_are_those_of_sentence_transformers(self, classifier: Path, encoder: QuantizedCrossEncoder) -> None:
        from sentence_transformers import CrossEncoder

        expected = CrossEncoder(str(classifier), device="cpu", local_files_only=True).predict(PAIRS)
        assert encoder.score(PAIRS) == pytest.approx(expected.tolist(), abs=1e-6)
        assert isinstance(encoder, BaseCrossEncoder)
        assert {type(score) for score in encoder.score(PAIRS)} == {float}

    def test_the_activation_is_the_model_s_own(self, tmp_path: Path, encoder: QuantizedCrossEncoder) -> None:
        name = "torch.nn.modules.linear.Identity"
        raw = QuantizedCrossEncoder(model_id=str(save_cross_encoder(tmp_path / "raw", activation=name)), progress=False)
        logits = raw.score(PAIRS)
        assert min(logits) < 0
        assert [1 / (1 + math.exp(-x)) for x in logits] == pytest.approx(encoder.score(PAIRS), abs=1e-6)

    @pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
    def test_the_head_stays_unquantized_and_the_scores_near(
        self, classifier: Path, encoder: QuantizedCrossEncoder, scheme: str
    ) -> None:
        quantized = QuantizedCrossEncoder(model_id=str(classifier), quantization=scheme, device="cpu", progress=False)
        model = quantized._loaded().model[0].model
        assert type(model.bert.encoder.layer[0].output.dense).__module__.startswith("bitsandbytes")
        assert isinstance(model.classifier, torch.nn.Linear)
        assert model.classifier.weight.dtype == torch.bfloat16
        assert not type(model.bert.pooler.dense).__module__.startswith("bitsandbytes")
        # Random weights are wide, so that 4 bits move these scores by far more than those of a trained model.
        bound = {"int8": 0.06, "nf4": 0.25, "fp4": 0.35}[scheme]
        assert quantized.score(PAIRS) == pytest.approx(encoder.score(PAIRS), abs=bound)

    def test_scores_in_16_bits_are_not_rounded_to_16_bits(self, classifier: Path) -> None:
        encoder = QuantizedCrossEncoder(model_id=str(classifier), quantization="int8", device="cpu", progress=False)
        model = encoder._loaded().model
        seen: list[Any] = []
        handle = model[0].model.classifier.register_forward_hook(
            lambda module, args, out: seen.append((args[0].detach(), out.detach()))
        )
        encoder.score(PAIRS)
        handle.remove()
        (hidden, logits), head = seen[0], model[0].model.classifier
        assert logits.dtype == torch.float32
        expected = (hidden.float() @ head.weight.float().T + head.bias.float()).detach()
        assert logits[:, 0].tolist() == pytest.approx(expected[:, 0].tolist(), abs=1e-6)

    @pytest.mark.parametrize("labels", [2, 3])
    def test_several_labels_are_refused_before_weights_are_read(self, tmp_path: Path, labels: int) -> None:
        folder = save_cross_encoder(tmp_path / "labels", labels=labels)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(b"no weights")
        encoder = QuantizedCrossEncoder(model_id=str(folder), progress=False)
        with pytest.raises(UnsupportedError, match=f"gives a pair {labels} labels"):
            encoder.score(PAIRS)

    def test_concurrent_calls_meet_in_a_batch_and_get_their_own_scores(self, encoder: QuantizedCrossEncoder) -> None:
        expected = encoder.score(PAIRS)

        async def ask() -> list[list[float]]:
            return await asyncio.gather(*(encoder.ascore([pair]) for pair in PAIRS * 4))

        with Batches(transformer_of(encoder)) as batches:
            found = asyncio.run(ask())
        assert [score for (score,) in found] == pytest.approx(expected * 4, abs=1e-5)
        assert len(batches.shapes) < len(found)

    @pytest.mark.parametrize(
        ("pairs", "words"),
        [
            ([("a",)], r"text_pairs\[0\] is no pair of texts"),
            ([("a", "b"), "cd"], r"text_pairs\[1\] is no pair of texts"),
            ([("a", None)], r"text_pairs\[0\] is no pair of texts"),
            ([(" ", "b")], "the query is ' '"),
        ],
    )
    def test_wrong_pairs_are_refused(self, encoder: QuantizedCrossEncoder, pairs: Any, words: str) -> None:
        with pytest.raises(InvalidOptionError, match=words):
            encoder.score(pairs)

    def test_no_pairs_have_no_scores(self, encoder: QuantizedCrossEncoder) -> None:
        assert encoder.score([]) == []

    def test_langchain_s_own_reranker_takes_it(self, encoder: QuantizedCrossEncoder) -> None:
        compressors = pytest.importorskip("langchain_classic.retrievers.document_compressors")
        documents = [Document(text) for text in DOCUMENTS]
        found = compressors.CrossEncoderReranker(model=encoder, top_n=2).compress_documents(documents, QUERY)
        scores = encoder.score(PAIRS)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:2]
        assert [d.page_content for d in found] == [DOCUMENTS[i] for i in best]

    def test_a_prompt_stands_before_the_query(self, classifier: Path, encoder: QuantizedCrossEncoder) -> None:
        prompted = encoder.model_copy(update={"prompt": "a word: "})
        expected = encoder.score([("a word: " + QUERY, document) for document in DOCUMENTS])
        assert prompted.score(PAIRS) == pytest.approx(expected, abs=1e-6)
        asked = QuantizedReranker(model=encoder, instruction="a word: ")
        assert asked.score(QUERY, DOCUMENTS).scores == pytest.approx(expected, abs=1e-6)


class TestLateInteraction:
    def test_scores_are_the_maxsim_of_sentence_transformers(self, late: Path) -> None:
        from sentence_transformers import MultiVectorEncoder

        model = MultiVectorEncoder(str(late), device="cpu", local_files_only=True)
        expected = model.similarity(model.encode_query([QUERY]), model.encode_document(DOCUMENTS))[0]
        reranker = LateInteractionReranker(model_id=str(late), device="cpu", progress=False)
        assert reranker.score(QUERY, DOCUMENTS).scores == pytest.approx(expected.tolist(), abs=1e-4)

    @pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.03), ("nf4", 0.2)])
    def test_quantized_scores_are_near(self, late: Path, scheme: str, bound: float) -> None:
        plain = LateInteractionReranker(model_id=str(late), device="cpu", progress=False).score(QUERY, DOCUMENTS)
        reranker = LateInteractionReranker(model_id=str(late), quantization=scheme, device="cpu", progress=False)
        found = reranker.score(QUERY, DOCUMENTS)
        assert reranker.memory_report().weights.quantized_bytes > 0
        assert found.scores == pytest.approx(plain.scores, rel=bound)  # random weights are wide

    def test_vectors_of_16_bits_are_normalized_in_float32(self, late: Path) -> None:
        reranker = LateInteractionReranker(model_id=str(late), quantization="int8", device="cpu", progress=False)
        (vectors,) = reranker._submit_query(QUERY).result()
        assert (vectors**2).sum(1) == pytest.approx([1.0] * len(vectors), abs=1e-5)

    def test_a_query_that_the_model_would_cut_is_an_error(self, late: Path) -> None:
        reranker = LateInteractionReranker(model_id=str(late), device="cpu", progress=False)
        with pytest.raises(PromptTooLongError, match="has 8[0-9] tokens, and 64 are possible; shorten it"):
            reranker.score("word " * 80, ["a"])


ANSWERS = {
    "How many people live in Berlin?": "Berlin had a population of 3,520,031 registered inhabitants in 2019.",
    "Who wrote To Kill a Mockingbird?": "Harper Lee published her only famous book in 1960.",
    "What does a whale eat?": "Blue whales feed almost exclusively on krill, which they filter out of the sea.",
    "When did the first man walk on the moon?": "Neil Armstrong stepped onto the lunar surface on July 20, 1969.",
    "How is glass made?": "Sand is melted together with soda ash and limestone at about 1700 degrees.",
    "Why is the sky blue?": "Air molecules scatter short wavelengths of sunlight more strongly than long ones.",
    "What is a black hole?": "A region of spacetime whose gravity is so strong that not even light escapes from it.",
    "How do vaccines work?": "They train the immune system to recognize a pathogen by showing it a part of it.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci worked on the portrait in Florence from 1503 on.",
    "What causes earthquakes?": "Tectonic plates stick at their edges, until the stress overcomes the friction.",
}


@pytest.mark.parametrize("scheme", slow_but(["nf4"], SCHEMES))
def test_a_real_model_finds_each_question_s_answer_in_every_scheme(scheme: str) -> None:
    """all-MiniLM's vectors of tokens, which were not even trained for MaxSim."""
    reranker = LateInteractionReranker(
        model_id=late_minilm(), quantization=scheme, device="cpu", top_n=1, progress=False
    )
    documents = [Document(text) for text in ANSWERS.values()]
    for question, answer in ANSWERS.items():
        assert [d.page_content for d in reranker.compress_documents(documents, question)] == [answer]
    assert reranker.memory_report().weights.total_bytes < (100e6 if scheme == "none" else 36e6)


class TestLengths:
    def test_only_the_document_is_cut(self, classifier: Path, encoder: QuantizedCrossEncoder) -> None:
        short = QuantizedReranker(model=encoder, max_length=20)
        query = "what is the capital of france"
        found = short.score(query, ["paris " * 40, "paris " * 30]).scores
        assert found == pytest.approx(encoder.score([(query, "paris " * 11)]) * 2, abs=1e-6)  # with three special ones
        assert found[0] != pytest.approx(encoder.score([(query, "paris " * 10)])[0], abs=1e-6)

    def test_a_document_s_limit_is_the_late_interaction_model_s_own(self, late: Path) -> None:
        reranker = LateInteractionReranker(model_id=str(late), device="cpu", progress=False)
        longer = reranker.model_copy(update={"max_length": 40})
        text = "paris berlin " * 30
        (own,), (more,) = (model.score(QUERY, [text]).scores for model in (reranker, longer))
        assert own == pytest.approx(reranker.score(QUERY, ["paris berlin " * 20]).scores[0], abs=1e-5)
        assert own != pytest.approx(more, abs=1e-5)

    def test_ten_megabytes_cost_no_more_than_their_beginning(self, reranker: Any) -> None:
        reranker.score(QUERY, ["a"])
        began = time.monotonic()
        (huge,) = reranker.score(QUERY, ["paris is a word " * 700_000]).scores
        assert time.monotonic() - began < 2
        assert huge == pytest.approx(reranker.score(QUERY, ["paris is a word " * 100]).scores[0], abs=1e-5)

    def test_one_word_and_thousands_of_words_get_the_scores_that_they_get_alone(self, reranker: Any) -> None:
        texts = ["a", "word " * 5000, "berlin", "paris is yellow " * 2000, "", "the river", "."]
        together = reranker.score(QUERY, texts).scores
        assert together == pytest.approx([reranker.score(QUERY, [text]).scores[0] for text in texts], abs=1e-4)

    def test_a_long_document_is_an_error_if_it_may_not_be_cut(self, reranker: Any) -> None:
        strict = reranker.model_copy(update={"on_too_long": "error"})
        assert strict.score(QUERY, ["berlin"]).scores == reranker.score(QUERY, ["berlin"]).scores
        with pytest.raises(PromptTooLongError, match="split it, or pass on_too_long='truncate'"):
            strict.score(QUERY, ["berlin", "word " * 80])

    def test_more_tokens_than_the_model_reads_are_refused(self, reranker: Any) -> None:
        with pytest.raises(InvalidOptionError, match="max_length=65 is more than the 64 tokens"):
            reranker.model_copy(update={"max_length": 65}).score(QUERY, ["a"])

    def test_a_query_that_leaves_no_room_is_an_error(self, reranker: Any) -> None:
        with pytest.raises(PromptTooLongError, match="tokens, and 6[0-9] are possible; shorten it"):
            reranker.score("word " * 70, ["a"])


class TestBatches:
    def test_batches_are_packed_by_tokens(self, reranker: Any) -> None:
        packed = reranker.model_copy(update={"max_batch_tokens": 128})
        texts = ["word " * n for n in range(1, 25)]
        expected = reranker.score(QUERY, texts).scores
        with Batches(transformer_of(packed)) as batches:
            assert packed.score(QUERY, texts).scores == pytest.approx(expected, abs=1e-4)
        assert len(batches.shapes) > 4
        assert all(rows * length <= 128 for rows, length in batches.shapes)

    def test_a_batch_that_does_not_fit_is_halved(self, reranker: Any) -> None:
        texts = ["word " * n for n in range(1, 12)]
        expected = reranker.score(QUERY, texts).scores
        with Batches(transformer_of(reranker), most_rows=3) as batches:
            assert reranker.score(QUERY, texts).scores == pytest.approx(expected, abs=1e-4)
        assert any(rows > 3 for rows, _ in batches.shapes)
        reranker.unload()

    async def test_async_results_are_the_same(self, reranker: Any) -> None:
        documents = [Document(text, metadata={"i": i}) for i, text in enumerate(DOCUMENTS)]
        found = await asyncio.gather(*(reranker.acompress_documents(documents, QUERY) for _ in range(5)))
        expected = reranker.compress_documents(documents, QUERY)
        for ranking in found:
            assert [d.metadata["i"] for d in ranking] == [d.metadata["i"] for d in expected]
            assert [d.metadata["relevance_score"] for d in ranking] == pytest.approx(
                [d.metadata["relevance_score"] for d in expected], abs=1e-4
            )

    async def test_a_cancelled_call_computes_no_further_batch(self, reranker: Any) -> None:
        small = reranker.model_copy(update={"max_batch_tokens": 64})
        begun = threading.Event()

        def slow() -> None:
            begun.set()
            time.sleep(0.02)

        with Batches(transformer_of(small), before=slow) as batches:
            task = asyncio.create_task(small.ascore(QUERY, ["word " * 30] * 100))
            await asyncio.to_thread(begun.wait, 10)
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.2)
            count = len(batches.shapes)
            assert count < 60
            await asyncio.sleep(0.2)
            assert len(batches.shapes) == count
        assert small.score(QUERY, ["a"]).scores

    def test_scores_that_are_no_numbers_are_an_error_and_no_order(self, classifier: Path, late: Path) -> None:
        for reranker in (
            QuantizedReranker(model_id=str(classifier), dtype="float32", progress=False),
            LateInteractionReranker(model_id=str(late), dtype="float32", progress=False),
        ):
            model = transformer_of(reranker)
            weight = next(p for name, p in model.named_parameters() if name.endswith("word_embeddings.weight"))
            token = model.tokenizer.convert_tokens_to_ids("bananas")
            with torch.no_grad():
                weight[token] = math.nan
            with pytest.raises(EncodingError, match="score of the document 'bananas are yellow.' is not a number"):
                reranker.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
            assert len(reranker.compress_documents([Document("paris")], QUERY)) == 1
            reranker.unload()


class TestKinds:
    @pytest.mark.parametrize("kind", [QuantizedReranker, QuantizedCrossEncoder, LateInteractionReranker])
    def test_an_embedding_model_is_refused_by_its_name(self, kind: Any, embedding: Path) -> None:
        with pytest.raises(UnsupportedError, match="is an embedding model; use QuantizedHuggingFaceEmbeddings"):
            kind(model_id=str(embedding), progress=False).load()

    def test_models_of_each_other_s_kind_are_refused(self, classifier: Path, late: Path) -> None:
        with pytest.raises(UnsupportedError, match="is a cross-encoder"):
            LateInteractionReranker(model_id=str(classifier), progress=False).load()
        with pytest.raises(UnsupportedError, match="use LateInteractionReranker"):
            QuantizedReranker(model_id=str(late), progress=False).load()

    def test_a_reranker_is_refused_by_the_chat_model(self, classifier: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="it classifies texts"):
            ChatQuantizedHuggingFace(model=str(classifier), progress=False).load()
        from sentence_transformers import CrossEncoder

        CrossEncoder(str(classifier), device="cpu", local_files_only=True).save_pretrained(str(tmp_path / "saved"))
        with pytest.raises(UnsupportedError, match="it classifies texts"):
            ChatQuantizedHuggingFace(model=str(tmp_path / "saved"), progress=False).load()
        saved = QuantizedReranker(model_id=str(tmp_path / "saved"), progress=False)
        expected = QuantizedReranker(model_id=str(classifier), progress=False).score(QUERY, DOCUMENTS).scores
        assert saved.score(QUERY, DOCUMENTS).scores == expected

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="there is no folder"):
            QuantizedReranker(model_id=str(tmp_path / "none"), progress=False).load()

    def test_a_cross_encoder_s_weights_are_shared(self, encoder: QuantizedCrossEncoder) -> None:
        reranker = QuantizedReranker(model=encoder, top_n=1, min_score=0.0)
        assert reranker.score(QUERY, DOCUMENTS).scores == pytest.approx(encoder.score(PAIRS), abs=1e-6)
        assert reranker._get_scorer().model is encoder
        assert reranker.memory_report().weights == encoder.memory_report().weights

    def test_the_range_of_min_score_is_that_of_the_model_s_activation(self, tmp_path: Path, classifier: Path) -> None:
        name = "torch.nn.modules.linear.Identity"
        raw = save_cross_encoder(tmp_path / "raw", activation=name)
        assert len(QuantizedReranker(model_id=str(raw), min_score=-50, progress=False).score(QUERY, ["a"]).scores) == 1
        with pytest.raises(InvalidOptionError, match="must be a number from 0 to 1"):
            QuantizedReranker(model_id=str(classifier), min_score=-50, progress=False).score(QUERY, ["a"])

    def test_pickled_and_serialized_rerankers_score_alike(self, reranker: Any) -> None:
        scores = reranker.score(QUERY, DOCUMENTS).scores
        again = load(dumpd(reranker), valid_namespaces=["langchain_quantllm"], allowed_objects=[type(reranker)])
        for other in (pickle.loads(pickle.dumps(reranker)), again):
            assert other.score(QUERY, DOCUMENTS).scores == scores
            assert other.top_n is None

    @pytest.mark.parametrize("query", ["", " \n"])
    def test_an_empty_query_is_an_error(self, reranker: Any, query: str) -> None:
        with pytest.raises(InvalidOptionError, match="by which no document can be ranked"):
            reranker.compress_documents([Document("a")], query)

    def test_no_documents_are_none_ranked(self, reranker: Any) -> None:
        assert reranker.compress_documents([], QUERY) == []

    def test_unloading_frees_the_weights_and_the_next_call_loads_again(self, reranker: Any) -> None:
        scores = reranker.score(QUERY, DOCUMENTS).scores
        assert reranker.is_loaded
        reranker.unload()
        assert not reranker.is_loaded
        assert reranker.score(QUERY, DOCUMENTS).scores == scores
