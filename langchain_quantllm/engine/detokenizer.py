"""From token ids to text: incremental decoding, and one request's completion as its tokens come.

Knows token ids and text; no tensors and no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.stop_strings import StopMatcher
from langchain_quantllm.engine.stream import Chunk, ChunkStream, TokenLogprob, Usage

Decode = Callable[[list[int]], str]
"""Turns token ids into text, as a tokenizer's `decode` does."""

_UNFINISHED = "\ufffd"  # decoded from the bytes of an incomplete character
_CHARACTER_TOKENS = 4  # UTF-8 writes a character in at most 4 bytes, and a token has at least one
_SEARCHED_TOKENS = 16  # at the end of a text, for a context
_SEARCHED_PROMPT = 64  # for those that are not skipped
_MOST_PENDING, _KEPT_PENDING = 24, 12
_BLOCK_TOKENS = 64  # decoded at once where no text is sent before the end


class IncrementalDecoder:
    """Decodes token ids piece by piece, in whole characters.

    The pieces join to the same text however the ids are grouped: that which decoding all ids at once gives. Each id
    takes a few calls of `decode` with a few ids, however long the text is.

    Decoding a token alone loses the space before it in some tokenizers, so the new ids are decoded after a context: a
    few earlier ids, whose text is cut off again. A text that ends with U+FFFD waits for the rest of its character; but
    only the last three tokens can belong to it, so what is pending stays short. Some tokenizers in Python leave out the
    bytes of an incomplete character, so ids without text wait as well.

    Where bytes are no UTF-8, tokenizers with a token for each byte (SentencePiece's) write U+FFFD for all bytes of the
    run, characters in it too. As these may have been given already, they stay, and only the other bytes are U+FFFD.

    The `DecodeStream` of tokenizers holds all ids back while they decode to nothing or to U+FFFD, and decodes them
    again at each step.
    Source: the method of vllm/transformers_utils/detokenizer_utils.py.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = (), skipped_ids: Collection[int] = ()) -> None:
        """Begin after a prompt.

        Args:
            decode: Turns ids into text.
            prompt_ids: Ids of the prompt, whose end decides how the first token is written.
            skipped_ids: Ids that `decode` leaves out, as special tokens.
        """
        self._decode = decode
        self._skipped_ids = skipped_ids
        self._context: list[int] = []
        self._context_text = ""
        prompt = [i for i in prompt_ids[-_SEARCHED_PROMPT:] if i not in skipped_ids]
        self._set_context(prompt)
        if not self._context and not decode(prompt[-1:]):
            self._context = prompt[-1:]  # a space, of which nothing is seen at the beginning of a text
        self._pending: list[int] = []
        self._text = ""  # of the pending ids
        self._given_chars = 0  # of it

    def push(self, *token_ids: int) -> str:
        """Add ids and return the text that has become certain, possibly none."""
        ids = [i for i in token_ids if i not in self._skipped_ids]
        if len(ids) > 1:
            together = self._pending + ids
            text = self._text_of(together)
            if _UNFINISHED not in text and len(self._text_of(together[:-1])) < len(text):
                self._pending = together
                return self._commit(text)
        return "".join(map(self._push, ids))

    def flush(self) -> str:
        """Return the rest at the end of the text, an incomplete character as the tokenizer writes it."""
        return self._commit(self._text)

    def _push(self, token_id: int) -> str:
        self._pending.append(token_id)
        self._text = text = self._text_of(self._pending)
        piece = ""
        if text.endswith(_UNFINISHED) and len(self._pending) >= _CHARACTER_TOKENS:
            piece = self._cut(is_forced=False)
        if self._text and not self._text.endswith(_UNFINISHED):
            return piece + self._commit(self._text)
        certain = self._text.rstrip(_UNFINISHED)
        piece += certain[self._given_chars :]
        self._given_chars = max(self._given_chars, len(certain))
        return piece + self._shorten() if len(self._pending) > _MOST_PENDING else piece

    def _text_of(self, ids: list[int]) -> str:
        """Decode ids behind the context."""
        text = self._decode(self._context + ids)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(ids)  # with the context's bytes, theirs are a run that is no UTF-8

    def _commit(self, text: str) -> str:
        """Return the rest of the pending ids' text, which is certain as a whole."""
        piece = text[self._given_chars :]
        self._set_context(self._pending)
        self._pending, self._text, self._given_chars = [], "", 0
        return piece

    def _set_context(self, ids: Sequence[int]) -> None:
        """Take the last ids that decode to whole characters as the context, if there are any."""
        for end in range(len(ids), max(0, len(ids) - _SEARCHED_TOKENS), -1):
            for begin in range(end - 1, max(-1, end - 1 - _CHARACTER_TOKENS), -1):
                context = list(ids[begin:end])
                text = self._decode(context)
                if text and _UNFINISHED not in text and (begin == end - 1 or text != self._decode(context[:-1])):
                    self._context, self._context_text = context, text
                    return

    def _cut(self, *, is_forced: bool) -> str:
        """Give all pending text but that of the last three ids, unless that tears a character apart."""
        border = len(self._pending) - _CHARACTER_TOKENS + 1
        head, tail = self._text_of(self._pending[:border]), self._text_of(self._pending[border:])
        if not is_forced and (head + tail).count(_UNFINISHED) > self._text.count(_UNFINISHED):
            return ""
        piece = head[self._given_chars :]
        self._pending, self._text = self._pending[border:], tail
        self._given_chars = max(0, self._given_chars - len(head))
        return piece

    def _shorten(self) -> str:
        """Drop the first of many pending ids, at each of which a character goes on.

        The others decode to the same end: bytes are read alike again after three at most.
        """
        rest = self._text[self._given_chars :]
        text = self._text_of(self._pending[-_KEPT_PENDING:])
        if not text.endswith(rest):
            return self._cut(is_forced=True)
        self._pending, self._text = self._pending[-_KEPT_PENDING:], text
        self._given_chars = len(text) - len(rest)
        return ""


class Completion:
    """The completion of one request: takes its tokens, makes its chunks, and ends it."""

    def __init__(
        self,
        request: Request,
        decode: Decode,
        stream: ChunkStream | None = None,
        *,
        index: int = 0,
        in_pieces: bool = True,
        skipped_ids: Collection[int] = (),
    ) -> None:
        """Begin a completion.

        Args:
            request: The request.
            decode: Turns ids into text.
            stream: The stream of the request's submission; a new one for it alone by default.
            index: Index of the request in its submission.
            in_pieces: Make a chunk whenever text has become certain; if false, the last chunk has all text.
            skipped_ids: Ids that `decode` leaves out.
        """
        self.request = request
        self.stream = ChunkStream(1) if stream is None else stream
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.cached_tokens = 0
        """Tokens of the prompt whose keys and values were in the cache already."""
        self.proposed_tokens = self.accepted_tokens = 0
        """Tokens that were proposed, and those of them that the text has."""
        self._index = index
        self._in_pieces = in_pieces
        # A stop string has to be looked for at every token.
        self._block_tokens = 1 if in_pieces or request.options.stop else _BLOCK_TOKENS
        self._end_ids = () if request.options.ignore_eos else request.end_token_ids
        self._decoder = IncrementalDecoder(decode, request.prompt_ids, skipped_ids)
        self._matcher = StopMatcher(request.options.stop)
        self._undecoded: list[int] = []
        self._unsent_text: list[str] = []
        self._unsent_ids: list[int] = []
        self._unsent_logprobs: list[TokenLogprob] = []
        self._submitted = time.monotonic()
        self._started = self._first_token = 0.0

    def start(self) -> None:
        """Note the time when the model begins with this request, once."""
        self._started = self._started or time.monotonic()

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Chunk | None:
        """Add the next token and return the chunk that it completes, if any."""
        if not self.token_ids:
            self._first_token = time.monotonic()
        self.token_ids.append(token_id)
        self._unsent_ids.append(token_id)
        if logprob is not None:
            self._unsent_logprobs.append(logprob)
        if token_id in self._end_ids:
            return self.finish("stop")
        self._undecoded.append(token_id)
        if len(self._undecoded) >= self._block_tokens:
            self._decode_block()
        if self._matcher.found:
            return self.finish("stop")
        if len(self.token_ids) >= self.request.max_new_tokens:
            return self.finish("length")
        return self._chunk() if self._in_pieces and self._unsent_text else None

    def push_text(self, text: str, token_ids: Sequence[int]) -> Chunk | None:
        """Add text that an engine of others has decoded, and return the chunk that it completes, if any.

        Only stop strings end the completion here: the engine says when its tokens have ended.

        Args:
            text: The text, in whole characters.
            token_ids: Tokens that it may have been made of, for counts.
        """
        self._first_token = self._first_token or time.monotonic()
        self.token_ids.extend(token_ids)
        self._unsent_ids.extend(token_ids)
        self._add_text(self._matcher.push(text))
        if self._matcher.found:
            return self.finish("stop")
        return self._chunk() if self._in_pieces and self._unsent_text else None

    def _decode_block(self) -> None:
        self._add_text(self._matcher.push(self._decoder.push(*self._undecoded)))
        self._undecoded.clear()

    def _add_text(self, text: str) -> None:
        if text:
            self._unsent_text.append(text)

    def finish(self, reason: str) -> Chunk:
        """End the completion and return its last chunk, with all text that was held back."""
        if self._undecoded:
            self._decode_block()
        if not self._matcher.found:
            self._add_text(self._matcher.push(self._decoder.flush()))
        if self._matcher.found:
            reason = "stop"
        self._add_text(self._matcher.flush())
        self.finish_reason = reason
        now = time.monotonic()
        usage = Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
            proposed_tokens=self.proposed_tokens,
            accepted_tokens=self.accepted_tokens,
            queued_s=(self._started or now) - self._submitted,
            first_token_s=(self._first_token or now) - self._submitted,
            total_s=now - self._submitted,
        )
        return self._chunk(usage)

    def _chunk(self, usage: Usage | None = None) -> Chunk:
        chunk = Chunk(
            row=self._index,
            text="".join(self._unsent_text),
            token_ids=tuple(self._unsent_ids),
            logprobs=tuple(self._unsent_logprobs),
            finish_reason=self.finish_reason,
            usage=usage,
        )
        self._unsent_text, self._unsent_ids, self._unsent_logprobs = [], [], []
        return chunk


def begin_completions(
    requests: Sequence[Request], tokenizer: Any, timeout_s: float | None, *, in_pieces: bool
) -> tuple[ChunkStream, list[Completion]]:
    """Open the stream of a submission, with a completion for each request; see `Engine.submit`."""
    stream = ChunkStream(len(requests), timeout_s)
    special_ids = frozenset(tokenizer.all_special_ids)
    completions = []
    for i, request in enumerate(requests):
        skips = request.options.skip_special_tokens
        completion = Completion(
            request,
            _decoder_of(tokenizer, skip_special_tokens=skips),
            stream,
            index=i,
            in_pieces=in_pieces,
            skipped_ids=special_ids if skips else (),
        )
        completions.append(completion)
    return stream, completions


def _decoder_of(tokenizer: Any, *, skip_special_tokens: bool) -> Decode:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    return decode
