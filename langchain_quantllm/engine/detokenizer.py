"""From token ids to text: whole characters, stop strings, the end of a row.

Owns incremental decoding, the search for stop strings across token borders, and one row's
way from its first token to its last. Knows token ids and text; no tensors, no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from langchain_quantllm.engine.request import Chunk, Request, TokenLogprob, Usage

Decode = Callable[[list[int]], str]
"""Turns token ids into text, as a tokenizer's `decode` does."""

_CONTEXT_TOKENS = 8  # of the prompt: mostly enough for a tokenizer to know whether a word begins here
_UNFINISHED = "\ufffd"  # what a tokenizer gives for the bytes of half a character


class IncrementalDecoder:
    """Turns ids into text piece by piece, never giving a part of a character.

    Decoding a token alone loses the space before it in some tokenizers, so the end of what
    came before is decoded along with it and taken off again.
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
        """Take ids and give the text that has become certain, possibly none."""
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
        """Give what is left at the end, an unfinished character as the tokenizer writes it."""
        text = self._new_text()[self._given_chars :]
        self._given_from = self._given_to = len(self._ids)
        self._given_chars = 0
        return text

    def _new_text(self) -> str:
        given = self._decode(self._ids[self._given_from : self._given_to])
        return self._decode(self._ids[self._given_from :])[len(given) :]


def _context(decode: Decode, prompt_ids: Sequence[int]) -> list[int]:
    """Take enough of a prompt's end to decode by itself, that is to begin and end with whole characters."""
    tokens = _CONTEXT_TOKENS
    while True:
        context = list(prompt_ids[-tokens:])
        if _UNFINISHED not in decode(context):
            return context
        if tokens >= len(prompt_ids):
            return []  # the prompt itself was cut inside a character
        tokens *= 2


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, holding back what may become one.

    The stop string that is complete first ends the text; of two that end together, the longer.
    So the cut does not depend on where the pieces end.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for any of the strings, none of them empty."""
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take the next piece and give the text that no stop string can contain any more."""
        if not self._stop:
            return text
        self._held += text
        if ends := [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]:
            self.found = True
            _, start = min(ends)
            text, self._held = self._held[:start], ""
            return text
        keep = max((n for s in self._stop if (n := _overlap(self._held, s))), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """Give what was held back, as the text ends here."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string, short of all of it."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Row:
    """One request on its way: takes tokens, gives chunks, and knows when it has ended."""

    def __init__(self, request: Request, index: int, decode: Decode, *, in_pieces: bool = True) -> None:
        """Begin a row.

        Args:
            request: What is asked for.
            index: Its place in the submission.
            decode: Turns ids into text.
            in_pieces: Give text as it becomes certain; without, the last chunk has all of it.
        """
        self.request = request
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.cached_tokens = 0
        """Tokens of the prompt whose keys and values were there already."""
        self._in_pieces = in_pieces
        # A stop string has to be looked for at every token; without one, a whole text is decoded at once.
        self._decodes_late = not in_pieces and not request.options.stop
        self._decoder = IncrementalDecoder(decode, request.prompt_ids)
        self._matcher = StopMatcher(request.options.stop)
        self._unsent_text = ""
        self._unsent_ids: list[int] = []
        self._unsent_logprobs: list[TokenLogprob] = []
        self._submitted = time.monotonic()
        self._started = self._first_token = 0.0

    def start(self) -> None:
        """Note that the model begins with this row."""
        self._started = time.monotonic()

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Chunk | None:
        """Take the next token and give the chunk that it completes, if it does."""
        if not self.token_ids:
            self._first_token = time.monotonic()
        self.token_ids.append(token_id)
        self._unsent_ids.append(token_id)
        if logprob is not None:
            self._unsent_logprobs.append(logprob)
        request = self.request
        if token_id in request.stop_token_ids + request.eos_token_ids and not request.options.ignore_eos:
            return self.finish("stop")
        if not self._decodes_late:
            self._unsent_text += self._matcher.push(self._decoder.push(token_id))
        if self._matcher.found:
            return self.finish("stop")
        if len(self.token_ids) >= request.max_new_tokens:
            return self.finish("length")
        return self._chunk() if self._in_pieces and self._unsent_text else None

    def finish(self, reason: str) -> Chunk:
        """End the row and give its last chunk, with all that was held back."""
        text = ""
        if self._decodes_late:
            ends = () if self.request.options.ignore_eos else self.request.stop_token_ids + self.request.eos_token_ids
            ended = reason == "stop" and self.token_ids[-1:] and self.token_ids[-1] in ends  # which is no text
            text = self._decoder.push(*(self.token_ids[:-1] if ended else self.token_ids))
        if not self._matcher.found:
            text += self._matcher.push(self._decoder.flush())
        if self._matcher.found:
            reason = "stop"
        self._unsent_text += text + self._matcher.flush()
        self.finish_reason = reason
        now = time.monotonic()
        first_token = self._first_token or now
        usage = Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
            queued_s=(self._started or now) - self._submitted,
            first_token_s=first_token - self._submitted,
            total_s=now - self._submitted,
        )
        return self._chunk(usage)

    def _chunk(self, usage: Usage | None = None) -> Chunk:
        chunk = Chunk(
            row=self.index,
            text=self._unsent_text,
            token_ids=tuple(self._unsent_ids),
            logprobs=tuple(self._unsent_logprobs),
            finish_reason=self.finish_reason,
            usage=usage,
        )
        self._unsent_text, self._unsent_ids, self._unsent_logprobs = "", [], []
        return chunk
