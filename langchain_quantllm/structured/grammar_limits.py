"""The limits of a grammar that is given as text: its size, and its counted repetitions.

A counted repetition in another, also one in a rule that it repeats, is what takes xgrammar longest to compile.
"""

from __future__ import annotations

import re

from langchain_quantllm.structured.schema_limits import MOST_LITERALS, SchemaLimitError

_MOST_REPEATED = 1_000
_MOST_NESTED = 50
_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]|\#[^\n]*|(?P<rule>[A-Za-z_][\w.-]*)[ \t\r\n]*::='
    r"|(?P<name>[A-Za-z_][\w.-]*)|(?P<open>\()|(?P<close>\))"
    r"|\{[ ]*(?P<least>\d+)[ ]*(?:(?P<more>,)[ ]*(?P<most>\d+)?[ ]*)?\}"
)
"""One token, with bounded backtracking; other characters are skipped."""


def checked_grammar(ebnf: str) -> str:
    """Return a grammar that is within the limits.

    Raises:
        SchemaLimitError: If it is too long, or repeats too much.
    """
    if len(ebnf) > MOST_LITERALS:
        msg = f"it has {len(ebnf):,} characters; at most {MOST_LITERALS:,} are possible"
        raise SchemaLimitError(msg)
    names = {found["rule"] for found in _TOKEN.finditer(ebnf) if found["rule"]}
    products = dict.fromkeys(names, 1)
    for _ in range(4):  # rules that repeat rules that repeat
        before = dict(products)
        _multiply(ebnf, products)
        if before == products:
            break
    return ebnf


def _multiply(ebnf: str, products: dict[str, int]) -> None:
    """Update the product of the nested counts of each rule."""
    rule, groups, last = "", [1], 1
    for found in _TOKEN.finditer(ebnf):
        if found["rule"]:
            rule, groups, last = found["rule"], [1], 1
        elif found["open"]:
            groups.append(1)
        elif found["close"] and len(groups) > 1:
            last = groups.pop()
        elif found["least"]:
            count = int(found["most"] or found["least"])
            if count > _MOST_REPEATED:
                msg = f"it repeats a part {count} times; at most {_MOST_REPEATED} are possible"
                raise SchemaLimitError(msg)
            if last > 1 and last * count > _MOST_NESTED:
                msg = (
                    f"it repeats a part {count} times that itself repeats one {last} times; together at most "
                    f"{_MOST_NESTED} are possible"
                )
                raise SchemaLimitError(msg)
            last *= count
        else:
            last = products.get(found["name"], 1) if found["name"] else 1
        groups[-1] = max(groups[-1], last)
        if rule:
            products[rule] = max(products[rule], groups[0])
