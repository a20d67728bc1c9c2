"""The mask of a row: the tokens that its constraint allows next, and the end of its text in time.

Owns the tokens' bytes, and the closing of a text before its tokens run out. Makes no grammar.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

from langchain_quantllm.engine.request import ForeseeingMask
from langchain_quantllm.errors import GenerationError
from langchain_quantllm.structured.foresight import Foresight, certain_text

END_STATES = 24  # each takes about a hundred masks
SLOW_S = 2.0
SLOW_TOKEN_S = 0.1
"""Seconds of the CPU that the masks of a row may take: the first, and the second for each token."""

_MOST_TOGETHER = 256  # intersections of sets that are kept
_PATIENCE = 12  # tokens of a string that is to end, before its end is searched

_DIGITS = 15  # in a row in a number, but for the last token's
_NUMBER_END = re.compile(rb"(?:\d[eE][+-]?(\d*)|(\d+))\Z")


@dataclass(frozen=True)
class CompiledConstraint:
    """A compiled constraint, and the facts that its masks need beside the grammar."""

    grammar: Any
    reserve: int  # the most tokens needed to close the text
    object_reserve: int  # the tokens that each open object adds to it; 0 where it does not grow with nesting
    style: str  # "json", "qwen_xml", "glm_xml" or "" where only the grammar tells the end of a text
    endings: tuple[bytes, ...]  # the end of the text after the last call's arguments, and after the call
    value_ends: tuple[bytes, ...]  # in XML, the texts that may end a value
    is_auto: bool
    allowed_outside: Any  # ordinary tokens, and the special tokens that mark calls or reasoning
    reasoning: tuple[str, str, bool] | None


class Vocabulary:
    """The tokens' bytes, and the sets of them that closing a text needs."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Iterable[int],
        stops: Sequence[int],
        encode: Callable[[str], Sequence[int]] = lambda text: (),
    ) -> None:
        self.tokens = tokens
        self._together: dict[tuple[int, ...], tuple[Any, Sequence[Any]]] = {}
        self.ids: dict[bytes, int] = {}
        self.special = frozenset(special) - frozenset(stops)
        for i, token in enumerate(tokens):
            if token and (token not in self.ids or i in self.special):
                self.ids[token] = i
        self.longest = max(map(len, self.ids))
        plain = {token: i for token, i in self.ids.items() if i not in self.special}
        self.foresight = Foresight(tokens, plain, encode)
        escapes: tuple[list[int], list[int]] = ([], [])
        for i, token in enumerate(tokens):
            for odd in (0, 1):
                if (b"\\" in token or (odd and token[:1] == b"u")) and _ESCAPE.match(b"\\" * odd + token):
                    escapes[odd].append(i)
        self.escapes = tuple(~self.bits(ids) for ids in escapes)
        broken = self.bits(i for i, token in enumerate(tokens) if _NO_UTF8.search(token))
        begun = {lead: bytes([lead]) for lead in (0xE0, 0xED, 0xF0, 0xF4)}
        self.utf8 = ~broken
        self.utf8_after = {
            lead: ~(broken | self.bits(i for i, token in enumerate(tokens) if _NO_UTF8.match(byte + token[:1])))
            for lead, byte in begun.items()
        }
        self.not_eos = ~self.bits(stops)
        self.plain = ~self.bits(self.special)
        controls = re.compile(rb'[^"]*[\x00-\x1f]')
        self.printed = ~self.bits(i for i, token in enumerate(tokens) if controls.match(token))
        # Numbers of any length and exponent would be infinite, or more digits than Python reads.
        self.no_digits = ~self.bits(i for i, token in enumerate(tokens) if token[:1].isdigit())
        far = [re.compile(rb'[^"]*\d[eE][+-]?\d{3}|[eE][+-]?\d{3}|[^"]*\d{19}')]
        far += [re.compile(far[0].pattern + rb"|\d{%d}" % n) for n in (3, 2, 1)]
        self.near = [~self.bits(i for i, token in enumerate(tokens) if one.match(token)) for one in far]
        self.space = self.bits(i for t, i in self.ids.items() if t in (b" ", b"\n"))
        # Outside of strings no token is begun by these, but for the rest of a literal such as true.
        self.string_probe = self.bits(
            i for t, i in self.ids.items() if t in b"ghijklmopqrsuvwxyzGHJKLMNOPQRSTUVWXYZ()%;@"
        )
        closing = self._by_length(rb"[}\]]+")
        values = [*self._by_length(rb'""[}\]]*'), *self._by_length(rb'"')]
        self.outside = [
            *closing,
            *self._by_length(rb"n(u(ll?)?)?"),
            *values,
            *self._by_length(rb'[,:]"?'),
            *self._by_length(rb"[^\s{\[\\][^{\[\\]*", together=True),
            *self._by_length(rb"[{\[]"),  # alone: other tokens open its content, too
        ]
        self.inside = [*self._by_length(rb'"[}\]]*'), *self._by_length(rb"[^\\]+", together=True)]

    def narrow(self, bits: Any, sets: Sequence[Any]) -> None:
        """Narrow the allowed tokens to sets, one after the other, but for those that would leave none.

        Where all together leave some, that is one step; it is the common case, and a step takes a text's time.
        """
        key = tuple(map(id, sets))
        found = self._together.get(key)
        if found is None:
            if len(self._together) >= _MOST_TOGETHER:
                self._together.clear()
            found = self._together[key] = (reduce(and_, sets), sets)  # they live on, and keep their ids
        if not _narrow(bits, found[0]):
            for one in sets:
                _narrow(bits, one)

    def _by_length(self, pattern: bytes, *, together: bool = False) -> list[Any]:
        lengths: dict[int, list[int]] = {}
        matches = re.compile(pattern, re.DOTALL).fullmatch  # `re.fullmatch` would look the pattern up for each token
        for token, i in self.ids.items():
            if matches(token) and i not in self.special:
                lengths.setdefault(0 if together else len(token), []).append(i)
        return [self.bits(lengths[n]) for n in sorted(lengths, reverse=True)]

    def bits(self, ids: Iterable[int]) -> Any:
        """Pack token ids into a row of 32-bit words, one bit a token."""
        import torch

        flags = torch.zeros(-(-len(self.tokens) // 32) * 32, dtype=torch.int64, device="cpu")
        flags[list(ids)] = 1
        return (flags.view(1, -1, 32) << torch.arange(32, device="cpu")).sum(-1).to(torch.int32)


_NO_UTF8 = re.compile(rb"[\xc0\xc1\xf5-\xff]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]")
"""Bytes that are not UTF-8: overlong forms, surrogates, code points beyond U+10FFFF."""

_ESCAPE = re.compile(rb"(?:[^\\]|\\[^u])*\\u", re.DOTALL)


def _narrow(bits: Any, by: Any) -> bool:
    """Narrow the allowed tokens to a set, unless none would be left; tell whether it was done."""
    both = bits & by
    if found := bool(both.any()):
        bits.copy_(both)
    return found


class OpenObjects:
    """Counts the objects of a text in JSON that are begun and not ended."""

    def __init__(self) -> None:
        self.count = 0
        self._in_string = False
        self._is_escaped = False

    def read(self, text: bytes) -> None:
        """Take the next part of the text."""
        for byte in text:
            if self._is_escaped:
                self._is_escaped = False
            elif byte == ord('"'):
                self._in_string = not self._in_string
            elif self._in_string:
                self._is_escaped = byte == ord("\\")
            elif byte in b"{}":
                self.count += 1 if byte == ord("{") else -1


class GrammarMask(ForeseeingMask):
    """Keeps one row to a constraint.

    Attributes:
        ended: True once the text is complete but the model has no end token. Only blanks are allowed then, and the
            engine ends the sequence.
    """

    def __init__(
        self, compiled: CompiledConstraint, vocabulary: Vocabulary, matcher: Any, max_new_tokens: int, stops: Any
    ) -> None:
        self.ended = False
        self._compiled = compiled
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._stops = stops
        self._budget = max_new_tokens
        self._used = 0
        self._pending = b""
        self._written: list[int] = []  # tokens since `forced` was asked, and the one before
        self._odd = 0  # whether an escape has begun
        self._last = 0  # byte of the text
        self._tail = b""  # of the text, as long as a number may be
        self._cpu_s = 0.0
        self._without_end = 0
        self._objects = OpenObjects() if compiled.style == "json" and not compiled.is_auto else None
        begin, end, self._is_open = compiled.reasoning or ("", "", False)
        self._begin, self._end = begin.encode(), end.encode()
        self._reasoned = bytearray() if compiled.reasoning else None

    def fill(self, bits: Any) -> bool:
        """Set a bit for each token that may come next.

        Raises:
            GenerationError: If the masks of the row take too long.
        """
        began = time.thread_time()
        is_limited = self._fill(bits)
        self._cpu_s += time.thread_time() - began
        if self._cpu_s > SLOW_S + SLOW_TOKEN_S * self._used:
            msg = (
                f"the masks of the first {self._used + 1} tokens took {self._cpu_s:.1f} s; at most {SLOW_S} s and "
                f"{SLOW_TOKEN_S} s a token are possible; give a simpler constraint, with lower counts in its patterns."
            )
            raise GenerationError(msg)
        return is_limited

    def _fill(self, bits: Any) -> bool:
        words = self._vocabulary
        if self.ended or self._matcher.is_terminated():  # terminated: with `ignore_eos`
            bits.copy_(words.space)
            return True
        is_limited = bool(self._matcher.fill_next_token_bitmask(bits, 0))
        if self._stops is None:  # the model's end tokens would not end the row
            bits &= words.not_eos
            is_limited = True
        late = self._budget - self._used <= self._reserve()
        if self._is_thinking():
            if late:
                self._force(bits, self._end)
            return is_limited or late
        if self._matcher.is_completed():
            if self._compiled.is_auto:
                return is_limited
            if self._stops is None and (late or not bits.any()):
                self.ended = True
                bits.copy_(words.space)
                return True
        inside = bool((bits & words.string_probe).any())
        words.narrow(bits, self._sets(inside=inside))
        if late:
            self._close(bits, inside)
        return True

    def _sets(self, *, inside: bool) -> list[Any]:
        """List the sets of tokens that a text in some style keeps to, inside a string or outside."""
        words, style = self._vocabulary, self._compiled.style
        # A decoder drops special tokens, and with them a part of a string.
        sets = [words.plain if inside else self._compiled.allowed_outside]
        # xgrammar accepts bytes that are not UTF-8; a decoder writes a sign for each, which makes a string too long.
        sets.append(words.utf8_after.get(self._last, words.utf8))
        if style:
            sets.append(words.escapes[self._odd])
        if style == "json" and inside:
            sets.append(words.printed)  # xgrammar allows control characters in strings with lengths
        return sets if inside or not style else [*sets, *self._of_numbers()]

    def _of_numbers(self) -> list[Any]:
        """List the sets that keep a number finite, and its digits few enough to be read."""
        number = _NUMBER_END.search(self._tail)
        digits = 0 if number is None or number[1] is None else len(number[1])
        sets = [self._vocabulary.near[min(digits + 1, 3) if number and number[1] is not None else 0]]
        if number is not None and number[2] is not None and len(number[2]) >= _DIGITS:
            sets.append(self._vocabulary.no_digits)
        return sets

    def accept(self, token_id: int) -> None:
        """Advance by the sampled token."""
        self._used += 1
        if self.ended or self._matcher.is_terminated():
            return
        token = self._vocabulary.tokens[token_id]
        if not self._matcher.accept_token(token_id):
            msg = f"the token {token_id} ({token!r}) was sampled although the constraint does not allow it."
            raise GenerationError(msg)
        self._written.append(token_id)
        self._pending = self._pending[len(token) :] if token and self._pending.startswith(token) else b""
        backslashes = len(token) - len(token.rstrip(b"\\"))
        self._last = token[-1] if token else 0
        self._tail = (self._tail + token)[-2 * _DIGITS :]
        if self._objects is not None and not self._is_thinking():
            self._objects.read(token)
        self._odd = (backslashes + self._odd * (backslashes == len(token))) % 2
        if self._reasoned is not None:
            self._reasoned += token
            tail = self._reasoned[-len(token) - len(self._end) :]
            opens = self._is_open or self._begin.startswith(self._reasoned[: len(self._begin)])
            if self._end in tail or not opens:
                self._reasoned = None

    def fork(self) -> GrammarMask:
        """Return a mask in the same state, which goes on by itself."""
        fork = copy.copy(self)
        fork._matcher, fork._written = self._matcher.fork(), [*self._written]
        fork._objects = copy.copy(self._objects)
        fork._reasoned = copy.copy(self._reasoned)
        return fork

    def forced(self, most: int) -> list[int]:
        """Return up to `most` tokens that come next, where the grammar leaves one way, or nearly so."""
        foresight = self._vocabulary.foresight
        foresight.learn(self._written)
        del self._written[:-1]
        if self.ended or self._is_thinking() or self._matcher.is_terminated():
            return []
        return foresight.ahead(self._matcher, self._written[-1] if self._written else None, most)

    def _is_thinking(self) -> bool:
        return self._reasoned is not None and (self._is_open or len(self._reasoned) >= len(self._begin))

    def _reserve(self) -> int:
        """Estimate the tokens needed to close the text: at most half of all, or three quarters where objects nest."""
        half, more = self._budget // 2, self._compiled.object_reserve
        if more and self._objects is None:  # nesting is unknown
            return min(self._compiled.reserve + self._used // 2, half)
        nested = 0 if self._objects is None else more * self._objects.count
        return max(min(self._compiled.reserve + nested, half), min(nested, self._budget - self._budget // 4))

    def _force(self, bits: Any, text: bytes) -> bool:
        """Allow only the longest token that begins a text, or the rest of it."""
        self._pending = self._pending or text
        for n in range(min(len(self._pending), self._vocabulary.longest), 0, -1):
            i = self._vocabulary.ids.get(self._pending[:n])
            if i is not None and bits[0, i // 32] >> i % 32 & 1:
                bits.zero_()
                bits[0, i // 32] = (1 << i % 32) - (i % 32 == 31) * 2**32
                return True
        self._pending = b""
        return False

    def _close(self, bits: Any, inside: bool) -> None:
        """Narrow the allowed tokens to those that end the text soonest."""
        if self._matcher.is_completed() and self._stops is not None and _narrow(bits, self._stops):
            return
        for end in (self._pending, *self._compiled.endings):
            if end and self._would_end(end):
                self._pending = end
                self._force(bits, end)
                return
        if certain := certain_text(self._matcher):
            self._pending = b""
            if self._force(bits, certain):
                return
        for end in self._compiled.value_ends:
            if self._ends_value(end) and self._force(bits, end):
                return
        if not self._compiled.style:
            end = self._pending or self._shortest_end()
            if end:
                self._force(bits, end)
            return
        if inside and self._end_string(bits):
            return
        any(_narrow(bits, step) for step in (self._vocabulary.inside if inside else self._vocabulary.outside))

    def _end_string(self, bits: Any) -> bool:
        """Lead to the quote that ends a string, where its pattern asks for something else first."""
        if any(_narrow(bits, step) for step in self._vocabulary.inside[:-1]):
            return True
        self._without_end += 1  # most patterns lead to their end by themselves
        if self._without_end <= _PATIENCE:
            return False
        end = self._pending or self._shortest_end(b'"')
        return bool(end) and self._force(bits, end)

    def _would_end(self, text: bytes) -> bool:
        ahead = self._matcher.fork()
        return bool(ahead.accept_string(text) and ahead.is_completed())

    def _ends_value(self, end: bytes) -> bool:
        """Whether an end of a parameter's value, or the rest of it, would end the value and not be a part of it."""
        import torch

        ahead = self._matcher.fork()
        if not ahead.accept_string(self._pending or end):
            return False
        bits = torch.full_like(self._stops if self._stops is not None else self._vocabulary.space, -1)
        ahead.fill_next_token_bitmask(bits, 0)
        return not bool((bits & self._vocabulary.string_probe).any())

    def _shortest_end(self, end: bytes = b"") -> bytes:
        """Find the shortest completion; empty where none is near.

        Among texts with the same allowed next tokens, only one is explored.

        Args:
            end: The text to come to in place of the end of all.
        """
        import torch

        bits = torch.empty_like(self._vocabulary.space)
        seen: set[bytes] = set()
        paths = [b""]
        for path in paths:
            for code in (*range(32, 127), 9, 10):
                ahead, text = self._matcher.fork(), path + bytes([code])
                if not ahead.accept_string(text):
                    continue
                if bytes([code]) == end or (not end and ahead.is_completed()):
                    return text
                bits.fill_(-1)
                ahead.fill_next_token_bitmask(bits, 0)
                if (state := bits.numpy().tobytes()) not in seen and len(paths) < END_STATES:
                    seen.add(state)
                    paths.append(text)
        return b""
