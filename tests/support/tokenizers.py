"""Small tokenizers built in code, of the kinds that decode in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wordpiece_tokenizer() -> Any:
    """Make a tokenizer like BERT's: `##` for the rest of a word, and clean-up of the spaces before punctuation."""
    words = ["[UNK]", "[CLS]", "the", "cat", "##s", "##ing", ".", ",", "'", "n't", "do", "go", "##t", "a", "猫"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]")


def suffix_tokenizer() -> Any:
    """Make a tokenizer like that of the first GPT: `</w>` ends a word, and is a space where another follows."""
    words = ["<unk>", "the</w>", "cat</w>", "c", "at</w>", ".</w>", "th", "e</w>"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.decoder = decoders.BPEDecoder()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def unigram_tokenizer(*, byte_fallback: bool = True) -> Any:
    """Make a tokenizer like SentencePiece's: tokens of spaces, and tokens of U+FFFD and of a zero-width joiner."""
    words = ["▁", "▁▁", "▁▁▁", "the", "▁cat", "\ufffd", "猫", "\u200d"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(word, -float(i)) for i, word in enumerate([*words, *_BYTES], 2)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if byte_fallback:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


MADE: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece_tokenizer,
    "suffix": suffix_tokenizer,
    "unigram": unigram_tokenizer,
    "unigram without bytes": lambda: unigram_tokenizer(byte_fallback=False),
}
