"""Small random rerankers in the files of real ones, and the scores that other code gives the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

QUERY = "what is the capital of france?"
DOCUMENTS = [
    "paris is the capital of france.",
    "bananas are yellow.",
    "berlin",
    "the capital of france lies on the river seine. " * 4,
]
_TEXT = "what is the capital of france paris bananas are yellow berlin lies on river seine yes no a word with many"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def word_piece_tokenizer(folder: Path, *, most_tokens: int = 64) -> Any:
    """Make BERT's kind of tokenizer: some words, and letters for all others."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *".,?!:-", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    vocabulary += [word for word in _TEXT.split() if word not in vocabulary]
    vocabulary += [f"[unused{i}]" for i in range(128 - len(vocabulary))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=most_tokens)


def bert_config(**options: Any) -> Any:
    """Make the config of a small BERT, whose sizes bitsandbytes' kernels for CPUs take."""
    return transformers.BertConfig(
        vocab_size=128,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=64,
        initializer_range=0.2,
        **options,
    )


def save_cross_encoder(folder: Path, *, labels: int = 1, activation: str | None = None) -> Path:
    """Save a random cross-encoder as a checkpoint of transformers, as those on the Hub are."""
    config = bert_config(num_labels=labels)
    if activation is not None:
        config.sentence_transformers = {"activation_fn": activation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    word_piece_tokenizer(folder).save_pretrained(folder)
    return folder


def save_late_interaction(folder: Path, scratch: Path) -> Path:
    """Save a random late-interaction model of sentence-transformers: ColBERT's modules."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformers.BertModel(bert_config()).save_pretrained(scratch)
        word_piece_tokenizer(scratch).save_pretrained(scratch)
        names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        modules = [
            Transformer(str(scratch), document_length=32),
            Dense(128, 64, bias=False, activation_function=torch.nn.Identity(), **names),
            Normalize("token_embeddings"),
            MultiVectorMask(skiplist_words=["."]),
        ]
        prompts = {"query": "yes : ", "document": "no : "}
        MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts).save_pretrained(str(folder))
    return folder


def save_embedding_model(folder: Path) -> Path:
    """Save a random embedding model of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformers.BertModel(bert_config()).save_pretrained(folder / "bert")
    word_piece_tokenizer(folder / "bert").save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(128, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def yes_no_scores(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Score prompts as the model card of Qwen3-Reranker does, by the model's own forward, one by one."""
    yes, no = tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")
    scores = []
    for ids in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([list(ids)], device=model.device)).logits[0, -1].float()
        scores.append(float(torch.stack([logits[no], logits[yes]]).log_softmax(0)[1].exp()))
    return scores
