"""The states of a regular expression: matching in linear time, and an estimate of the time that compiling it takes."""

from __future__ import annotations

from dataclasses import dataclass

from langchain_quantllm.structured.characters import Characters

_MOST_STEPS = 2_000_000  # of a match: states times characters
_MOST_WORK = 200_000  # of an estimate: states in sets, for each character
_WIDE, _WORDLIKE = 200, 16  # characters of a class
_WEIGHTS = (1.0, 0.2, 0.02)
_REPEATED = 128  # repetitions of one class that xgrammar 0.2 writes out; it counts more of them


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A part that is repeated; without an upper bound, `most` is None."""

    part: Node
    least: int
    most: int | None


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Parts that follow each other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Either:
    """Parts of which one stands."""

    options: tuple[Node, ...]


Node = Characters | Repeat | Sequence | Either


class States:
    """The states of an expression, of which any number may hold at once.

    Args:
        node: The tree of the expression.
        most_repeated: Repetitions of one class that are written out; None for all.
    """

    def __init__(self, node: Node, most_repeated: int | None = None) -> None:
        # A state: the characters that it reads, and the states after them; without characters it reads nothing.
        self._states: list[tuple[Characters | None, list[int]]] = [(None, [])]
        self._most_repeated = most_repeated
        self._first = self._build(node, 0)

    def _add(self, reads: Characters | None, after: list[int]) -> int:
        self._states.append((reads, after))
        return len(self._states) - 1

    def _build(self, part: Node, after: int) -> int:
        """Return the state before a part."""
        if isinstance(part, Characters):
            return self._add(part, [after])
        if isinstance(part, Sequence):
            for one in reversed(part.parts):
                after = self._build(one, after)
            return after
        if isinstance(part, Either):
            return self._add(None, [self._build(option, after) for option in part.options])
        least, most = part.least, part.most
        if self._most_repeated is not None and isinstance(part.part, Characters):
            least = min(least, self._most_repeated)
            most = None if most is None else min(most, self._most_repeated)
        if most is None:
            loop = after = self._add(None, [after])
            self._states[loop][1].append(self._build(part.part, loop))
        else:
            end = after
            for _ in range(most - least):
                after = self._add(None, [end, self._build(part.part, after)])
        for _ in range(least):
            after = self._build(part.part, after)
        return after

    def _closed(self, states: set[int]) -> frozenset[int]:
        """Add the states that are reached without a character."""
        found, waiting = set(states), list(states)
        while waiting:
            reads, after = self._states[waiting.pop()]
            if reads is None:
                waiting += [state for state in after if state not in found]
                found.update(after)
        return frozenset(found)

    def _step(self, states: frozenset[int], sign: str) -> frozenset[int]:
        after: set[int] = set()
        for state in states:
            reads, following = self._states[state]
            if reads is not None and sign in reads:
                after.update(following)
        return self._closed(after)

    def can_match(self, text: str) -> bool:
        """Whether matching a text ends soon."""
        return len(self._states) * (len(text) + 1) <= _MOST_STEPS

    def match(self, text: str) -> bool:
        """Whether a whole text matches."""
        states = self._closed({self._first})
        for sign in text:
            states = self._step(states, sign)
            if not states:
                return False
        return 0 in states

    def cost(self, limit: float) -> float:
        """Estimate the time of compiling the masks, in units of about 10 ms with 50,000 tokens.

        xgrammar goes through the tokens once for each set of states that a text can lead to, and for each state in it:
        all tokens where the state reads almost any character, few where it reads some.

        Args:
            limit: A cost above which the exact one does not matter.
        """
        weights = [0.0 if reads is None else _weight(reads) for reads, _ in self._states]
        bounds = sorted(
            {first for reads, _ in self._states if reads for r in reads.ranges for first in (r[0], r[1] + 1)}
        )
        signs = [chr(point) for point in bounds if point < 0x110000]
        waiting = [self._closed({self._first})]
        seen = set(waiting)
        cost = work = 0.0
        for states in waiting:
            cost += sum(weights[state] for state in states)
            work += len(states) * len(signs)
            if cost > limit or work > _MOST_WORK:
                return limit + 1
            for after in {self._step(states, sign) for sign in signs} - seen:
                if after:
                    seen.add(after)
                    waiting.append(after)
        return cost


def _weight(reads: Characters) -> float:
    count = sum(last - first + 1 for first, last in reads.ranges)
    return _WEIGHTS[0] if count > _WIDE else _WEIGHTS[1] if count >= _WORDLIKE else _WEIGHTS[2]


def compile_cost(node: Node, limit: float) -> float:
    """Estimate the time of compiling an expression, as `States.cost` does."""
    return States(node, _REPEATED).cost(limit)
