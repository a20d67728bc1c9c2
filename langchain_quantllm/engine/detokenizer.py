"""From token ids to text: incremental decoding, and one request's completion as its tokens come.

Knows token ids and text; no tensors and no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.stop_strings import StopMatcher
from langchain_quantllm.engine.stream import Chunk, ChunkStream, TokenLogprob, Usage

Decode = Callable[[list[int]], str]
"""Turns token ids into text, as a tokenizer's `decode` does."""

_CONTEXT_TOKENS = 8  # of the prompt: mostly enough for a tokenizer to know whether a word begins after it
_UNFINISHED = "\ufffd"  # decoded from the bytes of an incomplete character


class IncrementalDecoder:
    """Decodes token ids piece by piece, in whole characters.

    Decoding a token alone loses the space before it in some tokenizers, so the end of the ids before it is decoded
    with it and cut off again.
    Source: the method of vllm/transformers_utils/detokenizer_utils.py.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = ()) -> None:
        """Begin after a prompt, whose end decides how the first token is written."""
        self._decode = decode
        self._ids = _context(decode, prompt_ids)
        self._given_from = 0
        self._given_to = len(self._ids)
        self._given_chars = 0  # of the text after `_given_to`

    def push(self, *token_ids: int) -> str:
        """Add ids and return the text that has become certain, possibly none."""
        self._ids.extend(token_ids)
        text = self._new_text()
        certain = text.rstrip(_UNFINISHED)
        piece = certain[self._given_chars :]
        if certain and certain == text:
            self._given_from, self._given_to, self._given_chars = self._given_to, len(self._ids), 0
        else:
            self._given_chars = max(self._given_chars, len(certain))
        return piece

    def flush(self) -> str:
        """Return the rest at the end of the text, an incomplete character as the tokenizer writes it."""
        text = self._new_text()[self._given_chars :]
        self._given_from = self._given_to = len(self._ids)
        self._given_chars = 0
        return text

    def _new_text(self) -> str:
        given = self._decode(self._ids[self._given_from : self._given_to])
        return self._decode(self._ids[self._given_from :])[len(given) :]


def _context(decode: Decode, prompt_ids: Sequence[int]) -> list[int]:
    """Return a short end of the prompt that decodes to whole characters; nothing if there is none."""
    tokens = _CONTEXT_TOKENS
    while True:
        context = list(prompt_ids[-tokens:])
        if _UNFINISHED not in decode(context):
            return context
        if tokens >= len(prompt_ids):
            return []  # the prompt itself was cut inside a character
        tokens *= 2


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
    ) -> None:
        """Begin a completion.

        Args:
            request: The request.
            decode: Turns ids into text.
            stream: The stream of the request's submission; a new one for it alone by default.
            index: Index of the request in its submission.
            in_pieces: Make a chunk whenever text has become certain; if false, the last chunk has all text.
        """
        self.request = request
        self.stream = ChunkStream(1) if stream is None else stream
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.cached_tokens = 0
        """Tokens of the prompt whose keys and values were in the cache already."""
        self._index = index
        self._in_pieces = in_pieces
        # A stop string has to be looked for at every token; without one, a whole text is decoded at once.
        self._decodes_late = not in_pieces and not request.options.stop
        self._end_ids = () if request.options.ignore_eos else request.end_token_ids
        self._decoder = IncrementalDecoder(decode, request.prompt_ids)
        self._matcher = StopMatcher(request.options.stop)
        self._unsent_text = ""
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
        if not self._decodes_late:
            self._unsent_text += self._matcher.push(self._decoder.push(token_id))
        if self._matcher.found:
            return self.finish("stop")
        if len(self.token_ids) >= self.request.max_new_tokens:
            return self.finish("length")
        return self._chunk() if self._in_pieces and self._unsent_text else None

    def finish(self, reason: str) -> Chunk:
        """End the completion and return its last chunk, with all text that was held back."""
        text = ""
        if self._decodes_late:
            has_end = reason == "stop" and self.token_ids[-1:] and self.token_ids[-1] in self._end_ids
            text = self._decoder.push(*(self.token_ids[:-1] if has_end else self.token_ids))
        if not self._matcher.found:
            text += self._matcher.push(self._decoder.flush())
        if self._matcher.found:
            reason = "stop"
        self._unsent_text += text + self._matcher.flush()
        self.finish_reason = reason
        now = time.monotonic()
        usage = Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
            queued_s=(self._started or now) - self._submitted,
            first_token_s=(self._first_token or now) - self._submitted,
            total_s=now - self._submitted,
        )
        return self._chunk(usage)

    def _chunk(self, usage: Usage | None = None) -> Chunk:
        chunk = Chunk(
            row=self._index,
            text=self._unsent_text,
            token_ids=tuple(self._unsent_ids),
            logprobs=tuple(self._unsent_logprobs),
            finish_reason=self.finish_reason,
            usage=usage,
        )
        self._unsent_text, self._unsent_ids, self._unsent_logprobs = "", [], []
        return chunk


def begin_completions(
    requests: Sequence[Request], tokenizer: Any, timeout_s: float | None, *, in_pieces: bool
) -> tuple[ChunkStream, list[Completion]]:
    """Open the stream of a submission, with a completion for each request; see `Engine.submit`."""
    stream = ChunkStream(len(requests), timeout_s)
    return stream, [
        Completion(request, _decoder_of(tokenizer, request), stream, index=i, in_pieces=in_pieces)
        for i, request in enumerate(requests)
    ]


def _decoder_of(tokenizer: Any, request: Request) -> Decode:
    skip = request.options.skip_special_tokens

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    return decode
