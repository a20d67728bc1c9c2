"""Draft models: whether one has the vocabulary of the model that it proposes to, found before any weight is read."""

from __future__ import annotations

from typing import Any

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.checkpoint import find_checkpoint, find_source
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error, reason_of
from langchain_quantllm.loading.pipeline import load_tokenizer
from langchain_quantllm.loading.spec import LoadSpec


def tokenizer_of(spec: LoadSpec) -> Any:
    """Load the tokenizer of a checkpoint, and no weights.

    Raises:
        ModelNotFoundError: If there is no such model.
        CheckpointError: If it has no tokenizer that can be read.
    """
    with as_checkpoint_error(lambda error: f"{spec.model_id} cannot be loaded: {reason_of(error)}"):
        return load_tokenizer(spec, find_checkpoint(spec, find_source(spec)))


def check_vocabulary(model_id: str, tokenizer: Any, draft_id: str, draft_tokenizer: Any) -> None:
    """Check that two models have the same vocabulary, apart from tokens that were added to either tokenizer.

    Raises:
        InvalidOptionError: If not; it names a token.
    """
    vocab, drafted = _vocabulary(tokenizer), _vocabulary(draft_tokenizer)
    if vocab == drafted:
        return
    added = {*tokenizer.added_tokens_decoder, *draft_tokenizer.added_tokens_decoder}
    differing = sorted(i for i in {*vocab, *drafted} - added if vocab.get(i) != drafted.get(i))
    if differing:
        first = differing[0]
        msg = (
            f"draft_model={draft_id!r} has another vocabulary than {model_id}: {len(differing)} of {len(vocab)} tokens "
            f"differ, the first one {first}, which is {vocab.get(first)!r} here and {drafted.get(first)!r} there; give "
            "a smaller model of the same family, or use speculation='ngram'."
        )
        raise InvalidOptionError(msg)


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}
