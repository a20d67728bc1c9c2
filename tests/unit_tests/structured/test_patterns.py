"""Regular expressions: what they match, in linear time, and what xgrammar is given for them."""

from __future__ import annotations

import random
import re
import time

import pytest

from langchain_quantllm.structured.automaton import States, compile_cost
from langchain_quantllm.structured.pattern_lengths import lengths, within
from langchain_quantllm.structured.patterns import expression, read


def random_pattern(r: random.Random, depth: int = 0) -> str:
    chance = r.random()
    if depth > 3 or chance < 0.4:
        return r.choice(["a", "b", "c", "[ab]", "[^a]", r"\d", ".", "[a-c]", r"\w", r"\.", "[]b]"])
    if chance < 0.6:
        return random_pattern(r, depth + 1) + random_pattern(r, depth + 1)
    if chance < 0.75:
        return f"({random_pattern(r, depth + 1)}|{random_pattern(r, depth + 1)})"
    return f"(?:{random_pattern(r, depth + 1)})" + r.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "{0,2}", "*?"])


def random_text(r: random.Random) -> str:
    return "".join(r.choice("abc1.]") for _ in range(r.randrange(8)))


def test_it_matches_what_python_matches() -> None:
    r = random.Random(1)
    found = 0
    for _ in range(1500):
        pattern = r.choice(["^", ""]) + random_pattern(r) + r.choice(["$", ""])
        read_one = read(pattern)
        plain = read(expression(read_one.whole, in_json=False))
        for text in (random_text(r) for _ in range(6)):
            inside, whole = re.search(pattern, text), re.fullmatch(pattern.strip("^$"), text)
            assert read_one.found_in(text) is (inside is not None), (pattern, text)
            assert States(read_one.whole).match(text) is (whole is not None), (pattern, text)
            assert States(plain.whole).match(text) is (whole is not None), (pattern, text)
            found += whole is not None
    assert found > 500


def test_a_narrowed_expression_has_only_texts_of_the_lengths() -> None:
    r = random.Random(2)
    narrowed = 0
    for _ in range(1500):
        tree = read(random_pattern(r)).whole
        least = r.randrange(6)
        most = least + r.randrange(5)
        found = within(tree, least, most)
        if found is None:
            continue
        narrowed += found != tree
        shortest, longest = lengths(found)
        assert shortest >= least
        assert longest is not None
        assert longest <= most
        for text in (random_text(r) for _ in range(6)):
            assert not States(found).match(text) or States(tree).match(text)
    assert narrowed > 300


def test_matching_takes_linear_time() -> None:
    """Python's `re` takes minutes for the first and hours for the second."""
    began = time.process_time()
    assert not read("^(a+)+$").found_in("a" * 40 + "!")
    assert not read("^(a|a|aa)*$").found_in("a" * 1000 + "!")
    assert read("(x+x+)+y").found_in("x" * 500 + "y")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a{1000000000}", "1000000000 characters"),
        ("((a{0,99}){0,99}){0,99}", "970299 characters"),
        ("x" * 5000, "5000 characters; at most 4000"),
        ("(" * 50 + "a" + ")" * 50, "more than 40 deep"),
        ("(?=a)b", "looks ahead"),
        ("(?<!a)b", "behind"),
        (r"\bword\b", r"does not know \\b"),
        (r"(a)\1", r"does not know \\1"),
        (r"\p{L}", r"does not know \\p"),
        ("(?i)a", "flags"),
        ("a^b", "'\\^' stands amid"),
        ("a**", "repetition is repeated"),
        ("*a", "repeats nothing"),
        ("[b-a]", "no characters"),
        ("[a&&b]", "different things"),
        ("a{3,2}", "ends before"),
        ("[a", "Unclosed"),
        ("(a", "not closed"),
        ("a)", "closes nothing"),
    ],
)
def test_what_cannot_be_enforced_says_why(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(pattern)


@pytest.mark.parametrize(
    ("pattern", "is_dear"),
    [
        ("^[^x]{0,64}$", False),
        ("^[^@ ]{1,64}@[^@ ]{1,255}$", False),
        (r"^\d{4}-\d{2}-\d{2}$", False),
        ("([^x]{0,10}){0,10}", True),  # a minute in xgrammar 0.2.9
        (".{0,300}.{0,300}", True),
        ("((a{0,20}){0,20}){0,20}", True),
    ],
)
def test_ambiguous_repetitions_are_dear(pattern: str, is_dear: bool) -> None:
    began = time.process_time()
    assert (compile_cost(read(pattern).whole, 500) > 500) is is_dear
    assert time.process_time() - began < 1


def test_a_json_string_has_no_quotes_or_escapes() -> None:
    assert not States(read(expression(read("^[^a]*$").whole, in_json=True)).whole).match('x"')
    assert not States(read(expression(read("^.$").whole, in_json=True)).whole).match("\t")
    with pytest.raises(ValueError, match="quotes"):
        expression(read(r'a["\\]b').whole, in_json=True)
