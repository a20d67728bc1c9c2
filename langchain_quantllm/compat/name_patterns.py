"""Regular expressions for names of modules, as configs of others have them: whether matching one may take forever.

Python's `re` tries all ways to share a name among repetitions. peft runs these expressions on every module's name, and
rules of GPTQ checkpoints are matched likewise, so those of strangers are looked at first; what is refused is more than
what really takes long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_MOST_CHARS = 4_000
_MOST_REPETITIONS = 6
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[*+]|\{\d*,?\d*\}|[()|]", re.DOTALL)
_REPEATS = re.compile(r"[*+]|\{\d*,?\d*\}")


def texts_in(value: Any) -> Iterator[str]:
    """List the texts of a setting: itself, its entries, or its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | set | Mapping):
        yield from (entry for entry in value if isinstance(entry, str))


def may_take_long(pattern: str) -> bool:
    """Whether a pattern has many repetitions, or repeats a group with repetitions or alternatives in it.

    Args:
        pattern: The regular expression.
    """
    if len(pattern) > _MOST_CHARS:
        return True
    varies = [False]  # of each open group: whether it has repetitions or alternatives
    repetitions = 0
    closed: tuple[int, bool] = (-1, False)  # the end of the last group, and whether it varies
    for token in _TOKEN.finditer(pattern):
        sign = token[0]
        if sign == "(":
            varies.append(False)
        elif sign == ")" and len(varies) > 1:
            inner = varies.pop()
            varies[-1] |= inner
            closed = (token.end(), inner)
        elif sign == "|":
            varies[-1] = True
        elif _REPEATS.fullmatch(sign):
            if closed == (token.start(), True):
                return True
            repetitions += 1
            varies[-1] = True
    return repetitions > _MOST_REPETITIONS
