"""sentence-transformers' cross-encoders and late-interaction models, checked on sentence-transformers itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm.compat.sentence_transformers_scores import (
    document_lengths,
    document_scores,
    is_probability,
    keep_scores_in_float32,
    label_count,
    most_document_tokens,
    most_query_tokens,
    pair_lengths,
    pair_scores,
    query_lengths,
    query_vectors,
)
from tests.support.rerankers import DOCUMENTS, QUERY, save_cross_encoder, save_late_interaction

sentence_transformers = pytest.importorskip("sentence_transformers")

TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}yes"
PAIRS = [(QUERY, document) for document in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture
def classifier(folder: Path) -> Any:
    return sentence_transformers.CrossEncoder(str(folder), device="cpu", local_files_only=True)


@pytest.fixture
def rendering(folder: Path, tmp_path: Path) -> Any:
    """A classifier that writes its inputs by a chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    shutil.copytree(folder, tmp_path / "rendering")
    tokenizer.save_pretrained(tmp_path / "rendering")
    model = sentence_transformers.CrossEncoder(str(tmp_path / "rendering"), device="cpu", local_files_only=True)
    assert "message" in model.modalities
    return model


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("models")
    saved = str(save_late_interaction(scratch / "late", scratch / "bert"))
    return sentence_transformers.MultiVectorEncoder(saved, device="cpu", local_files_only=True)


class TestPairs:
    def test_labels_and_activation_are_read_off_the_model(self, classifier: Any, tmp_path: Path) -> None:
        assert label_count(classifier) == 1
        assert is_probability(classifier)
        raw = save_cross_encoder(tmp_path / "raw", labels=2, activation="torch.nn.modules.linear.Identity")
        other = sentence_transformers.CrossEncoder(str(raw), device="cpu", local_files_only=True)
        assert label_count(other) == 2
        assert not is_probability(other)

    def test_lengths_are_those_of_the_model_s_inputs(self, classifier: Any) -> None:
        features = classifier.preprocess(PAIRS)
        assert pair_lengths(classifier, PAIRS, None) == features["attention_mask"].sum(1).tolist()
        features = classifier.preprocess(PAIRS, prompt="a word: ")
        assert pair_lengths(classifier, PAIRS, "a word: ") == features["attention_mask"].sum(1).tolist()

    def test_only_the_document_is_cut(self, classifier: Any) -> None:
        pair = ("word " * 20, "paris " * 30)
        (found,) = pair_scores(classifier, [pair], None, 30)
        # two separators and the first token leave seven for the document
        assert found == pytest.approx(pair_scores(classifier, [(pair[0], "paris " * 7)], None, None)[0], abs=1e-6)
        own = float(classifier.predict([pair], processing_kwargs={"text": {"max_length": 30}})[0])
        assert own != pytest.approx(found, abs=1e-6)  # else only_second is not needed any more

    def test_a_classifier_with_a_template_keeps_the_template_s_end(self, rendering: Any) -> None:
        seen: list[Any] = []
        handle = rendering[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]["input_ids"]))
        pair_scores(rendering, [("what", "paris " * 50)], None, 40)
        handle.remove()
        text = rendering.tokenizer.decode(seen[0][0], skip_special_tokens=True)
        assert seen[0].shape[1] == 40
        assert "what" in text
        assert text.endswith("yes")
        assert pair_lengths(rendering, [("what", "paris " * 50)], None)[0] > 50

    def test_the_last_layer_of_16_bits_gives_scores_of_32(self, classifier: Any) -> None:
        classifier.bfloat16()
        keep_scores_in_float32(classifier)
        outputs = classifier(classifier.preprocess(PAIRS))
        assert outputs["scores"].dtype == torch.float32
        assert classifier[0].model.classifier.weight.dtype == torch.bfloat16


class TestVectors:
    def test_lengths_are_those_of_the_model_s_inputs(self, late: Any) -> None:
        prompts = late.prompts
        queries = late.preprocess([QUERY], prompt=prompts["query"], task="query")["attention_mask"]
        assert query_lengths(late, [QUERY]) == queries.sum(1).tolist()
        short = [document for document in DOCUMENTS if len(document) < 40]
        documents = late.preprocess(short, prompt=prompts["document"], task="document")["attention_mask"]
        assert document_lengths(late, short) == documents.sum(1).tolist()

    def test_limits_are_the_model_s_own(self, late: Any) -> None:
        assert most_document_tokens(late) == 32
        assert most_query_tokens(late) == 64
        longest = late.preprocess(["word " * 90], prompt=late.prompts["document"], task="document")["input_ids"]
        assert longest.shape[1] == 32

    def test_queries_that_the_model_fills_up_have_its_length(self, late: Any, tmp_path: Path) -> None:
        late.save_pretrained(str(tmp_path / "filled"))
        filled = sentence_transformers.MultiVectorEncoder(str(tmp_path / "filled"), device="cpu", local_files_only=True)
        filled[0].query_expansion = {"strategy": "fixed", "length": 24}
        assert query_lengths(filled, [QUERY]) == [24]
        assert most_query_tokens(filled) == 24
        (vectors,) = query_vectors(filled, [QUERY])
        assert vectors.shape == (24, 64)

    def test_each_document_gets_the_score_of_its_own_query(self, late: Any) -> None:
        queries = [QUERY, "what are bananas?", "a river", "berlin"]
        vectors = query_vectors(late, queries)
        expected = late.similarity(late.encode_query(queries), late.encode_document(DOCUMENTS)).diagonal()
        assert document_scores(late, vectors, DOCUMENTS, None) == pytest.approx(expected.tolist(), abs=1e-4)

    def test_more_tokens_can_be_read_than_the_model_s_own_limit(self, late: Any) -> None:
        vectors = query_vectors(late, [QUERY])
        (own,) = document_scores(late, vectors, ["paris berlin " * 30], None)
        (more,) = document_scores(late, vectors, ["paris berlin " * 30], 50)
        assert own != pytest.approx(more, abs=1e-6)
