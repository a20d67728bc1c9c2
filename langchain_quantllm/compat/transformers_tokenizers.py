"""When a tokenizer of transformers may be used by several threads at once."""

from __future__ import annotations

from typing import Any


def encodes_without_change(tokenizer: Any) -> bool:
    """Whether encoding a text without padding and truncation changes no setting of a tokenizer.

    A call switches off the padding and truncation that the tokenizer has, which fails while another thread encodes.
    Source: `TokenizersBackend._encode_plus` in transformers/tokenization_utils_tokenizers.py.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        isinstance(backend, Tokenizer)
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == getattr(tokenizer, "split_special_tokens", None)
    )
