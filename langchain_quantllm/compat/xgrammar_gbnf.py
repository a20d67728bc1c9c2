"""xgrammar's grammars, as it prints them, in the notation of llama.cpp (GBNF).

Source: cpp/grammar_printer.cc of xgrammar; grammars/README.md and src/llama-grammar.cpp of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["to_gbnf"]

_TOKEN = re.compile(
    r'(?P<text>"(?:\\.|[^"\\])*")|(?P<set>\[(?:\\.|[^\]\\])*\])|(?P<regex>Regex\("(?:\\.|[^"\\])*"(?P<options>[^)]*)\))|'
    r"(?P<name>[A-Za-z_][\w.-]*)(?P<call>\()?|\{(?P<times>[\d, -]*)\}|(?P<other>::=|\(=|.)",
    re.DOTALL,
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "b": "\b", "a": "\a", "e": "\x1b", "0": "\0"}
_PLAIN = re.compile(r"[A-Za-z0-9 _.,:;{}()<>/=+*?!|%&@#$'`~]")
_NOT_IN_JSON = re.compile(r'[\x00-\x1f"\\]')
"""Characters that a string of JSON has only as escapes."""
_NEITHER = r"\u0000-\u001F\u0022\u005C"


def to_gbnf(grammar: str) -> str:
    """Write a grammar of xgrammar for llama.cpp.

    Names of rules lose what llama.cpp does not take, characters are escaped in its way, and looking ahead, by which
    xgrammar only computes faster, is left out.

    Args:
        grammar: Text of an `xgrammar.Grammar`.

    Raises:
        ValueError: If the grammar has parts that llama.cpp's have no counterpart for.
    """
    return _Writer().write(grammar, root="root")


class _Writer:
    """Writes grammars under names of their own."""

    def __init__(self) -> None:
        self._rules = 0
        self._further: list[str] = []

    def write(self, grammar: str, *, root: str, in_json: bool = False) -> str:
        """Write a grammar whose first rule gets the name `root`; one for a string of JSON has no escapes."""
        names = {"root": root}
        written: list[str] = []
        ahead = 0  # open brackets of what is looked for ahead
        for token in _TOKEN.finditer(grammar):
            other, name = token["other"], token["name"]
            if ahead or other == "(=":
                ahead += (other in ("(", "(=")) + (token["call"] is not None) - (other == ")")
            elif token["text"] is not None:
                characters = [c for c, _ in _characters(token["text"][1:-1])]
                if in_json and any(map(_NOT_IN_JSON.match, characters)):
                    msg = f"a string of JSON that is to have {token['text']} in it has no counterpart there"
                    raise ValueError(msg)
                written.append(f'"{"".join(map(_escaped, characters))}"')
            elif token["set"] is not None:
                written.append(_set(token["set"][1:-1], in_json=in_json))
            elif token["regex"] is not None:
                written.append(self._regex(token["regex"], token["options"]))
            elif token["call"] is not None:
                msg = f"{name} of xgrammar's grammars has no counterpart in those of llama.cpp"
                raise ValueError(msg)
            elif name is not None:
                written.append(names[name] if name in names else names.setdefault(name, self._new()))
            elif token["times"] is not None:
                least, _, most = (part.strip() for part in token["times"].partition(","))
                written.append(f"{{{least},{'' if most == '-1' else most or least}}}")
            else:
                written.append(other)
        further, self._further = self._further, []
        return "\n".join(["".join(written), *further])

    def _new(self) -> str:
        self._rules += 1
        return f"rule-{self._rules}"

    def _regex(self, call: str, options: str) -> str:
        """Write the rules of a regular expression; returns the name of the first."""
        import xgrammar

        text = "".join(c for c, _ in _characters(call[len('Regex("') : call.rindex('"')]))
        name = self._new()
        inner = _Writer()
        inner._rules = self._rules
        grammar = inner.write(str(xgrammar.Grammar.from_regex(text)), root=name, in_json="json_string=true" in options)
        self._rules = inner._rules
        self._further.append(grammar)
        return name


def _characters(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each character of a text or set, and whether it was escaped."""
    for found in _CHARACTER.finditer(text):
        code = found[1] or found[2] or found[3]
        if code is not None:
            yield chr(int(code, 16)), True
        elif found[4] is not None:
            yield _ESCAPES.get(found[4], found[4]), True
        else:
            yield found[5], False


def _set(text: str, *, in_json: bool) -> str:
    """Write a set of characters; one in a string of JSON has none that are escaped there."""
    negated, parts = text.startswith("^"), []
    members: list[str] = []
    for character, is_escaped in _characters(text[1:] if negated else text):
        is_range = character == "-" and not is_escaped
        parts.append("-" if is_range else _escaped(character))
        members.append("-" if is_range else re.escape(character))
    if in_json and negated:
        parts.append(_NEITHER)
    elif in_json and any(re.match(f"[{''.join(members)}]", chr(code)) for code in (*range(0x20), 0x22, 0x5C)):
        msg = f"a string of JSON that is to have one of [{text}] in it has no counterpart there"
        raise ValueError(msg)
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _escaped(character: str) -> str:
    code = ord(character)
    if _PLAIN.fullmatch(character):
        return character
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
