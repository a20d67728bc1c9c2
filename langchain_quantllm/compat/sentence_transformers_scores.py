"""sentence-transformers' cross-encoders and late-interaction models: lengths of their inputs, and their scores.

A cross-encoder cuts the longer of two texts by itself, which may be the query; here the document alone is cut.
Source: sentence_transformers/cross_encoder/model.py and multi_vector_encoder/model.py of 6.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Pair = tuple[str, str]
"""A query and a document."""


def label_count(model: Any) -> int:
    """Return the number of scores that a cross-encoder gives a pair."""
    return int(model.num_labels)


def keep_scores_in_float32(model: Any) -> None:
    """Let a cross-encoder's last layer give its scores in float32, whatever the dtype of its weights.

    In 16 bits, scores near 8 lie 0.03 apart, and many documents of a ranking are equal.
    """
    import torch

    scorers = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module.out_features == model.num_labels
    ]
    if scorers and model.keep_in_fp32_modules is not None:
        model.set_keep_in_fp32_modules([*dict.fromkeys([*model.keep_in_fp32_modules, scorers[-1]])])


def is_probability(model: Any) -> bool:
    """Say whether a cross-encoder's scores lie between 0 and 1, by the activation behind its head."""
    return type(model.activation_fn).__name__ == "Sigmoid"


def pair_lengths(model: Any, pairs: Sequence[Pair], prompt: str | None) -> list[int]:
    """Count the tokens of pairs, special tokens included.

    Args:
        model: A cross-encoder.
        pairs: Queries with documents.
        prompt: Put before each query; None is the model's own.
    """
    if not _renders(model):
        prompt = model._resolve_prompt(prompt, None) or ""
        queries, documents = [prompt + query for query, _ in pairs], [document for _, document in pairs]
        encoded = model.tokenizer(queries, documents, truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]
    features = model.preprocess(
        list(pairs), prompt=model._resolve_prompt(prompt, None), processing_kwargs={"text": {"truncation": False}}
    )
    return [int(n) for n in features["attention_mask"].sum(1)]


def pair_scores(model: Any, pairs: Sequence[Pair], prompt: str | None, max_length: int | None) -> list[float]:
    """Score pairs in one batch.

    Args:
        model: A cross-encoder with one label.
        pairs: Queries with documents.
        prompt: Put before each query; None is the model's own.
        max_length: Tokens from which on a document's end is cut; None is the model's own limit.
    """
    # A template of the model's own writes the document last, and keeps its end.
    text: dict[str, Any] = {"truncation": "longest_first" if _renders(model) else "only_second"}
    if max_length is not None:
        text["max_length"] = max_length
    scores = model.predict(
        list(pairs),
        prompt=prompt,
        batch_size=len(pairs),
        show_progress_bar=False,
        processing_kwargs={"text": text},
    )
    return [float(score) for score in scores]


def _renders(model: Any) -> bool:
    """Say whether a model writes its inputs by a chat template."""
    return "message" in model.modalities


def document_lengths(model: Any, documents: Sequence[str]) -> list[int]:
    """Count the tokens of documents, special tokens included."""
    prompt = (model.prompts or {}).get("document") or ""
    texts = [prompt + document for document in documents]
    return [len(ids) for ids in model.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]]


def query_lengths(model: Any, queries: Sequence[str]) -> list[int]:
    """Count the tokens of queries, special tokens included; models that fill them up have a least length."""
    prompt = (model.prompts or {}).get("query") or ""
    encoded = model.tokenizer([prompt + query for query in queries], truncation=False, padding=False, verbose=False)
    expansion = getattr(model[0], "query_expansion", None)
    least = int(expansion["length"]) if expansion else 0
    return [max(least, len(ids)) for ids in encoded["input_ids"]]


def most_query_tokens(model: Any) -> int | None:
    """Return the number of tokens from which on a late-interaction model cuts queries; None if it does not say."""
    expansion = getattr(model[0], "query_expansion", None)
    fixed = int(expansion["length"]) if expansion and expansion["strategy"] == "fixed" else None
    return _least(fixed, getattr(model[0], "query_length", None), model.max_seq_length)


def most_document_tokens(model: Any) -> int | None:
    """Return the number of tokens from which on a late-interaction model cuts documents; None if it does not say."""
    return _least(getattr(model[0], "document_length", None), model.max_seq_length)


def _least(*bounds: int | None) -> int | None:
    # Tokenizers without a limit have a number of 31 digits.
    return min((bound for bound in bounds if bound is not None and bound < 10**9), default=None)


def query_vectors(model: Any, queries: Sequence[str]) -> list[Any]:
    """Compute the vectors of queries in one batch.

    Returns:
        An array of shape `(tokens, size)`, float32, for each query.
    """
    vectors = model.encode_query(list(queries), batch_size=len(queries), show_progress_bar=False)
    return [vector.float().cpu().numpy() for vector in vectors]


def document_scores(
    model: Any, queries: Sequence[Any], documents: Sequence[str], max_length: int | None
) -> list[float]:
    """Score documents in one batch, each by the vectors of its query.

    Args:
        model: A late-interaction model.
        queries: Arrays of `query_vectors`, one for each document.
        documents: The documents.
        max_length: Tokens from which on a document's end is cut; None is the model's own limit.
    """
    import torch

    options = {} if max_length is None else {"processing_kwargs": {"text": {"max_length": max_length}}}
    vectors = model.encode_document(list(documents), batch_size=len(documents), show_progress_bar=False, **options)
    vectors = [vector.float() for vector in vectors]
    asked = [torch.from_numpy(query).to(vector.device) for query, vector in zip(queries, vectors, strict=True)]
    return [float(score) for score in model.similarity_pairwise(asked, vectors)]
