"""The prompt by which a decoder judges a document: is it relevant to the query, yes or no?

Owns the format of Qwen3-Reranker, its rendering by other models' chat templates, the tokens of the two answers, and
cutting documents that are too long. Knows tokenizers; no LangChain, and it runs no model.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.chat.special_tokens import ControlTokens, MarkedTexts
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.errors import PromptTooLongError, UnsupportedError
from langchain_quantllm.loading.pieces import piece_ids

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The instruction that Qwen3-Reranker was mostly trained with. Source: its model card."""

_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_USER = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: "
_CHATML = (
    f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
"""What stands before and after the question. Source: the model card of Qwen/Qwen3-Reranker-0.6B."""

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
_ANSWERS = ("yes", "no")
_FIRST_CHARS, _UNSURE_TOKENS = 8, 64
"""Characters a token of room that are encoded first of a long document, and tokens at its cut that may change."""

Encode = Callable[[Sequence[str]], list[int]]
"""Encodes the pieces of a text, of which none shares a token with the next."""


@dataclass(frozen=True, kw_only=True)
class PairPrompt:
    """The prompt of one pair of query and document.

    Args:
        ids: Its token ids.
        is_cut: Whether the document's end was left out.
    """

    ids: list[int]
    is_cut: bool


class YesNoFormat:
    """The format of one tokenizer's prompts; made once for a loaded model.

    Attributes:
        answer_ids: The tokens of "yes" and of "no".
    """

    def __init__(self, tokenizer: Any, processor: Any, model_id: str) -> None:
        """Find the format and the tokens of the answers.

        Args:
            tokenizer: A tokenizer of transformers.
            processor: The processor of a model that reads images; None for others.
            model_id: The model's name, for errors.

        Raises:
            UnsupportedError: If the model has no chat format, or an answer is no single token.
        """
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        if all(token in vocabulary for token in _CHATML_TOKENS):
            self._before, self._after = _CHATML
        else:
            self._before, self._after = _rendered(tokenizer, processor, model_id)
        self._control = ControlTokens.of(
            tokenizer, processor, chat_prompt=self._before + self._after, tool_prompt="", tags=()
        )
        begin = tokenizer.bos_token
        self.adds_begin = processor is not None and not (begin and self._before.startswith(begin))
        """Whether the tokenizer is to add its begin token."""
        self._end_ids = _inner_ids(tokenizer, self._after)
        ids = {word: _inner_ids(tokenizer, word) for word in _ANSWERS}
        for word, found in ids.items():
            if len(found) != 1:
                msg = (
                    f"{model_id} cannot rerank: its tokenizer writes {word!r} in {len(found)} tokens, and the score is "
                    "read off one; use a reranker, such as Qwen/Qwen3-Reranker-0.6B."
                )
                raise UnsupportedError(msg)
        self.answer_ids = tuple(ids[word][0] for word in _ANSWERS)

    def for_query(self, query: str, instruction: str | None, encode: Encode) -> QueryPrompts:
        """Return the prompts of a query.

        Args:
            query: The query.
            instruction: What makes a document relevant; None is `DEFAULT_INSTRUCTION`.
            encode: Encodes pieces of a text with the begin token that the format needs.
        """
        marked = MarkedTexts(self._control)
        question = _USER.format(
            instruction=marked.in_texts(instruction or DEFAULT_INSTRUCTION), query=marked.in_texts(query)
        )
        return QueryPrompts(self._before + question, self._end_ids, marked, encode)


class QueryPrompts:
    """The prompts of one query: the same beginning for every document."""

    def __init__(self, beginning: str, end_ids: Sequence[int], marked: MarkedTexts, encode: Encode) -> None:
        """Encode the beginning.

        Args:
            beginning: All before the document, with marks.
            end_ids: Tokens of all behind it.
            marked: The marks of special tokens.
            encode: Encodes pieces of a text.
        """
        self._beginning = beginning
        self._end_ids = list(end_ids)
        self._marked = marked
        self._encode = encode
        self.shared_tokens = len(encode(marked.pieces(beginning)))
        """Tokens before the document."""

    def prompt(self, document: str, most_tokens: int | None) -> PairPrompt:
        """Write the prompt of a document, whose end is cut if it is too long.

        Args:
            document: The text.
            most_tokens: Most tokens of the prompt; None for any number.

        Raises:
            PromptTooLongError: If the query leaves no room for a document.
        """
        if most_tokens is None:
            return PairPrompt(ids=self._ids(document) + self._end_ids, is_cut=False)
        room = most_tokens - len(self._end_ids)
        if room <= self.shared_tokens:
            tokens = self.shared_tokens + len(self._end_ids)
            msg = (
                f"query and instruction take {tokens} tokens of a prompt that may have {most_tokens}, and leave no "
                "room for a document; shorten the query, or raise max_length if the model takes more."
            )
            raise PromptTooLongError(msg)
        chars = _FIRST_CHARS * (room - self.shared_tokens + _UNSURE_TOKENS)
        while chars < len(document):  # encoding all of a very long text takes seconds
            ids = self._ids(document[:chars])
            if len(ids) - _UNSURE_TOKENS >= room:
                return PairPrompt(ids=ids[:room] + self._end_ids, is_cut=True)
            chars *= 4
        ids = self._ids(document)
        return PairPrompt(ids=ids[:room] + self._end_ids, is_cut=len(ids) > room)

    def _ids(self, document: str) -> list[int]:
        return self._encode(self._marked.pieces(self._beginning + self._marked.in_texts(document)))


def _rendered(tokenizer: Any, processor: Any, model_id: str) -> tuple[str, str]:
    """Render what stands before and after the question by the model's chat template."""
    question = f"Qz{secrets.token_hex(8)}e"
    template = ChatTemplate(tokenizer, None, processor)
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    try:
        text, _ = template.render(messages, variables={"enable_thinking": False})
    except UnsupportedError as error:
        msg = (
            f"{model_id} cannot rerank: it has no chat template to be asked by; use a reranker, such as "
            "Qwen/Qwen3-Reranker-0.6B, or an instruct model."
        )
        raise UnsupportedError(msg) from error
    before, _, after = text.partition(question)
    return before, after


def _inner_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode a text as it stands behind another."""
    whole = piece_ids(tokenizer, ["\n", text], add_special_tokens=False)
    return whole[len(piece_ids(tokenizer, ["\n"], add_special_tokens=False)) :]
