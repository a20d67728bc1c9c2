"""xgrammar's grammars in llama.cpp's notation: the same texts, in names and escapes that llama.cpp takes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from langchain_quantllm.compat.xgrammar_gbnf import to_gbnf

xgrammar = pytest.importorskip("xgrammar")
pytestmark = pytest.mark.compat


def accepts(grammar: str, text: str) -> bool:
    """Whether a text is complete by a grammar; llama.cpp's notation is xgrammar's own, with fewer escapes."""
    from xgrammar.testing import _is_grammar_accept_string

    return bool(_is_grammar_accept_string(xgrammar.Grammar.from_ebnf(grammar), text))


def check_notation(grammar: str) -> None:
    """Check that names are letters, digits and dashes, and that only the escapes are there which llama.cpp reads."""
    outside = re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]', " ", grammar)
    assert not re.findall(r"[A-Za-z][\w-]*_[\w-]*|[A-Za-z]\w*\(|\(=|-1\}", outside)
    assert set(re.findall(r"\\(.)", grammar)) <= set("uU")


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", 'gr"ün\\ 漢🌊']},
        "n": {"type": "integer", "minimum": 3, "maximum": 40},
        "short": {"type": "string", "pattern": '^[^"\\\\]{0,4}$'},
        "any": {},
    },
    "required": ["colour", "n", "short", "any"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (
            'root ::= ("a-b" | "a_b") my_rule{2,} last?\nmy_rule ::= [x-z\\-] | "é\\"漢🌊\\n"\nlast ::= [^a-y\\]^]',
            ["a-bxx", "a_b--", 'a-bé"漢🌊\nyA', "a-bxyzzzz0"],
            ["a-b", "a-bxw", "a-bxx]", "a-bxx^", "a.bxx"],
        ),
        (
            str(xgrammar.Grammar.from_json_schema(json.dumps(SCHEMA), any_whitespace=False)),
            [
                json.dumps(
                    {"colour": colour, "n": 40, "short": "öäü", "any": {"a": [1.5, None, True]}}, ensure_ascii=False
                )
                for colour in SCHEMA["properties"]["colour"]["enum"]  # type: ignore[index]
            ],
            [
                '{"colour": "red", "n": 41, "short": "", "any": 1}',
                '{"colour": "red", "n": 4, "short": "12345", "any": 1}',
            ],
        ),
        (str(xgrammar.Grammar.from_regex(r"(19|20)\d{2}[^\w]?")), ["1999", "2042-"], ["1899", "199", "1999x"]),
    ],
    ids=["ebnf", "schema", "regex"],
)
def test_the_same_texts_are_accepted(grammar: str, right: list[str], wrong: list[str]) -> None:
    found = to_gbnf(str(xgrammar.Grammar.from_ebnf(grammar)))
    check_notation(found)
    for text in right:
        assert accepts(grammar, text), text
        assert accepts(found, text), text
    for text in wrong:
        assert not accepts(grammar, text), text
        assert not accepts(found, text), text


def test_a_string_of_json_takes_no_character_that_has_to_be_escaped() -> None:
    schema = json.dumps({"type": "string", "pattern": "^[^a]{2}$"})
    found = to_gbnf(str(xgrammar.Grammar.from_json_schema(schema)))
    assert accepts(found, '"bc"')
    for text in ('"b\n"', '"b""', '"b\\"', '"ba"'):
        assert not accepts(found, text)


def test_strings_of_json_with_escapes_are_refused() -> None:
    grammar = str(xgrammar.Grammar.from_json_schema(json.dumps({"type": "string", "pattern": "^[!-~]$"})))
    with pytest.raises(ValueError, match="counterpart"):
        to_gbnf(grammar)


def test_texts_that_go_on_freely_between_calls_are_refused() -> None:
    tag: dict[str, Any] = {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}
    layout = {"type": "triggered_tags", "triggers": ["<t>"], "tags": [tag]}
    grammar = str(xgrammar.Grammar.from_structural_tag(json.dumps({"type": "structural_tag", "format": layout})))
    with pytest.raises(ValueError, match="TagDispatch"):
        to_gbnf(grammar)
