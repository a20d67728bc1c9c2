"""The bounds of a chat template's work, and the meter that counts it.

A template comes with a checkpoint, from strangers: it may loop for years, or write until no memory is left. Owns the
bounds and their errors; `jinja_sandbox` calls the meter wherever a template works. Knows no Jinja.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import ItemsView, Iterable, Iterator, Mapping, MappingView, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any

from langchain_quantllm.errors import InvalidOptionError

TIME_S = 1.0
"""Seconds of processor time for one rendering; long conversations have more."""

SOURCE_CHARS = 1 << 17
"""Characters of a template. The longest of known models have some 30,000."""

SOURCE_TOKENS = 30_000
"""Words, signs and spaces in a template."""

NESTED_LOOPS = 16

DEPTH = 100
"""Calls of macros inside each other, and lists inside lists."""

_VALUE = 1 << 20
_TOTAL = 1 << 26
_ENTRY = 64
"""Characters for which an entry of a list counts."""

_INTEGER_BITS = 4096
_WIDTH = 1000
_SLOW_CHARS = 10_000
_NUMBERS = re.compile(r"[0-9]+")


class TemplateBoundError(InvalidOptionError):
    """A chat template needs more time or memory than any conversation does."""


class ProcessorTime:
    """The processor time of this thread, less its longest stretch between two readings.

    A stretch may hold what is not the work that is measured: a collection of garbage in a large heap, or the time of
    other machines on a shared processor.
    """

    def __init__(self) -> None:
        """Begin to count."""
        self._start = self._last = time.thread_time()
        self._longest = 0.0

    def read(self) -> float:
        """Return the seconds so far."""
        now = time.thread_time()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        return now - self._start - self._longest


class Meter:
    """The work of one rendering so far.

    Every value that a template makes is at most as large as some times its input: a text by its characters, a list by
    those of all that is in it, each time that it is in it. So no later step, comparing or writing it say, takes long.
    """

    def __init__(self, inputs: Any = (), turns: int = 0) -> None:
        """Begin to count.

        Args:
            inputs: The variables of the template.
            turns: Number of messages.
        """
        self._weights: dict[int, tuple[Any, int, int]] = {}
        self.most = self.most_seconds = float("inf")
        size = self.weight(inputs)
        self.most = _VALUE + 8 * size
        self._most_made = _TOTAL + size * (64 + turns)
        self.most_seconds = TIME_S + size / 1e6 + turns / 1e3
        self._made = self._steps = self.depth = 0
        self.start()

    def start(self) -> None:
        """Begin to count the time."""
        self._time = ProcessorTime()

    def step(self) -> None:
        """Count a step, such as a turn of a loop."""
        self._steps += 1
        if not self._steps & 15:
            self.check_time()

    def check_time(self) -> None:
        """Raise the error of a template that has taken too long."""
        if self._time.read() > self.most_seconds:
            msg = f"it takes longer than {self.most_seconds:.3g} seconds of processor time"
            raise TemplateBoundError(msg)

    def size(self, size: float) -> None:
        """Check the size that a value is going to have."""
        if size > self.most:
            msg = (
                f"it makes a value of {size:.3g} characters or entries; for these messages {self.most:.3g} are allowed"
            )
            raise TemplateBoundError(msg)

    def made(self, value: Any) -> Any:
        """Count a new value; return it."""
        if isinstance(value, str):
            size = len(value)
            self.size(size)
        elif isinstance(value, MappingView):  # of a dict that was counted
            size = _ENTRY * len(value)
        elif isinstance(value, list | tuple | Mapping | AbstractSet):
            size = _ENTRY * len(value)
            self.weight(value)
        elif isinstance(value, int):
            self.bits(value.bit_length())
            size = 0
        else:
            size = 0
        self._made += size
        if self._made > self._most_made:
            msg = f"it makes more than {self._most_made:.3g} characters and entries"
            raise TemplateBoundError(msg)
        if size > _SLOW_CHARS:
            self.check_time()
        return value

    def bits(self, bits: int) -> None:
        """Check the number of bits of an integer."""
        if bits > _INTEGER_BITS:
            msg = f"it makes an integer of {bits} bits; {_INTEGER_BITS} are allowed"
            raise TemplateBoundError(msg)

    def weight(self, value: Any) -> int:
        """Count the characters and entries in a value, each as often as it is in it.

        A list does not change after it was made, so its weight is counted once.
        """
        return self._weigh(value, 0)[0]

    def _weigh(self, value: Any, depth: int) -> tuple[int, int]:
        """Return the weight of a value that stands `depth` lists deep, and how many lists inside each other it is."""
        if isinstance(value, str):
            return len(value), 0
        if isinstance(value, ItemsView):
            return sum(self.weight(key) + self.weight(entry) for key, entry in value), 0
        if isinstance(value, Mapping):
            entries: Iterable[Any] = itertools.chain(value, value.values())
        elif isinstance(value, list | tuple | AbstractSet | ValuesView):
            entries = value
        else:
            return 1, 0
        known = self._weights.get(id(value))
        total, height = known[1:] if known is not None and known[0] is value else (1, 0)
        if depth + height > DEPTH:
            msg = f"it makes lists inside each other, deeper than {DEPTH}"
            raise TemplateBoundError(msg)
        if height:
            return total, height
        for entry in entries:
            added, below = self._weigh(entry, depth + 1)
            total, height = total + added, max(height, below + 1)
            self.size(total)
        self._weights[id(value)] = (value, total, height)
        return total, height

    def width(self, *values: Any) -> None:
        """Check numbers of spaces or digits."""
        for value in values:
            wide = len(value) if isinstance(value, str) else value
            if isinstance(wide, int) and abs(wide) > _WIDTH:
                msg = f"it asks for a width of {wide}; {_WIDTH} are allowed"
                raise TemplateBoundError(msg)

    def slow(self, value: Any) -> None:
        """Check the size of a value for a filter whose time grows faster than that."""
        if self.weight(value) > _SLOW_CHARS:
            msg = f"it gives a slow filter more than {_SLOW_CHARS} characters"
            raise TemplateBoundError(msg)

    def stepping(self, values: Iterable[Any]) -> Iterator[Any]:
        """Count a step for each entry of an iterable, as it is read."""
        for value in values:
            self.step()
            yield value

    def taken(self, values: Any) -> Sequence[Any]:
        """Read the entries of any iterable into a list."""
        if isinstance(values, str | list | tuple):
            return values
        found: list[Any] = []
        for value in values:
            self.step()
            found.append(value)
            self.size(len(found))
        return found

    def joining(self, values: Sequence[Any], between: str) -> None:
        """Check the size of a join."""
        self.size(sum(map(self.weight, values)) + len(between) * len(values))

    def replacing(self, text: str, old: str, new: str) -> None:
        """Check the size of a replacement of all occurrences."""
        self.size(len(text) + text.count(old) * len(new))

    def formatting(self, text: str, values: Any) -> None:
        """Check the size that `text % values` may have."""
        self.width(*(int(number[:9]) for number in _NUMBERS.findall(text)))
        places = text.count("%")
        if isinstance(values, Mapping):
            largest = max(map(self.weight, values.values()), default=0)
            self.size(len(text) + places * (_WIDTH + largest))
            return
        parts = values if isinstance(values, tuple) else (values,)
        if "*" in text:
            self.width(*(part for part in parts if isinstance(part, int)))
        self.size(len(text) + places * _WIDTH + sum(map(self.weight, parts)))

    def spec(self, spec: str) -> None:
        """Check the widths in a format of `str.format`."""
        self.width(*(int(number[:9]) for number in _NUMBERS.findall(spec)))
