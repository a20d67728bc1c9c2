"""Templates of strangers: each is stopped by one clear error within seconds, whatever it does."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.compat.jinja_bounds import TIME_S, Meter, TemplateBoundError
from langchain_quantllm.errors import QuantLLMError
from tests.support.chat_templates import LLAMA_3, MISTRAL, QWEN, TEMPLATES

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": [1, {"y": "z"}]}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "snow", "tool_call_id": "abcdefghi", "name": "f"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}

_BIG = "{% set s = 'ab' * 500000 %}"
_DOUBLED = "{% set ns = namespace(s='ab', l=[1]) %}{% for i in range(60) %}{% set ns.s = DOUBLE %}{% endfor %}"
_NESTED = "{% for a in range(100000) %}{% for b in range(100000) %}BODY{% endfor %}{% endfor %}"

HOSTILE = {
    "nested loops": _NESTED.replace("BODY", "x"),
    "nested empty loops": _NESTED.replace("BODY", ""),
    "filtered loops": "{% for a in range(100000) %}{% for b in range(100000) if b < 0 %}{% endfor %}{% endfor %}",
    "loops in filters": "{% for a in range(100000) %}{{ range(100000) | map('string') | list | length }}{% endfor %}",
    "many loops in filters": "{{ range(100000) | sum }}" * 2000,
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition, other way": "{{ 10**10 * 'a' }}",
    "repetition of a list": "{{ ([0] * 10**10) | length }}",
    "doubling by +": _DOUBLED.replace("DOUBLE", "ns.s + ns.s"),
    "doubling by ~": _DOUBLED.replace("DOUBLE", "ns.s ~ ns.s"),
    "doubling by %": _DOUBLED.replace("DOUBLE", "'%s%s' % (ns.s, ns.s)"),
    "doubling by format": _DOUBLED.replace("DOUBLE", "'{0}{0}'.format(ns.s)"),
    "doubling by format filter": _DOUBLED.replace("DOUBLE", "'%s%s' | format(ns.s, ns.s)"),
    "doubling by attr": _DOUBLED.replace("DOUBLE", "('{0}{0}' | attr('format'))(ns.s)"),
    "doubling by join": _DOUBLED.replace("DOUBLE", "[ns.s, ns.s] | join"),
    "doubling by a method": _DOUBLED.replace("DOUBLE", "ns.s.join([ns.s, ns.s])"),
    "doubling by replace": _DOUBLED.replace("DOUBLE", "ns.s | replace('a', ns.s)"),
    "doubling by replace's method": _DOUBLED.replace("DOUBLE", "ns.s.replace('b', ns.s)"),
    "doubling by set": _DOUBLED.replace("{% set ns.s = DOUBLE %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "doubling by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + _DOUBLED.replace("DOUBLE", "m(ns.s)"),
    "doubling by lists": _DOUBLED.replace("DOUBLE", "[ns.s, ns.s]") + "{{ ns.s | tojson }}",
    "doubling by dicts": _DOUBLED.replace("DOUBLE", "{'a': ns.s, 'b': ns.s}") + "{{ ns.s }}",
    "doubling by dict()": _DOUBLED.replace("DOUBLE", "dict(a=ns.s, b=ns.s)") + "{{ ns.s }}",
    "doubling tuples as keys": _DOUBLED.replace("DOUBLE", "(ns.s, ns.s)") + "{{ {ns.s: 1} | length }}",
    "comparing doubled lists": _DOUBLED.replace("DOUBLE", "[ns.s, ns.s]") + "{{ ns.s == [ns.s, 1] }}",
    "doubled namespaces": (
        "{% set ns = namespace(a=1) %}"
        + "".join(f"{{% set n{i} = namespace(a={'ns' if i == 0 else f'n{i - 1}'}, b=1) %}}" for i in range(60))
        + "{{ n59 }}{{ raise_exception('fine') }}"
    ),
    "center": "{{ 'a' | center(10**10) }}",
    "center's method": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "indent": "{{ ('a\n' * 100000) | indent(10**6) }}",
    "indent with text": "{{ ('a\n' * 100000) | indent('    ' * 200) }}",
    "tojson's indent": "{{ messages | tojson(indent=10**9) }}",
    "tojson's separators": "{{ messages | tojson(separators=('a' * 1000000, 'b')) }}",
    "width of %": "{{ '%9999999999d' % 1 }}",
    "width of %, as an argument": "{{ '%*d' % (10**9, 1) }}",
    "precision of %": "{{ '%.999999999f' % 1.5 }}",
    "width of format": "{{ '{:>9999999999}'.format('a') }}",
    "width of format, as an argument": "{{ '{:>{w}}'.format('a', w=10**10) }}",
    "format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "powers": "{{ 10**(10**10) }}",
    "growing numbers": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "batch": "{{ range(9) | batch(10**9, 'x') | list }}",
    "slice": "{{ range(9) | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**8, 'ceil') }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "dates": "{{ strftime_now('%999999999d') }}",
    "encode": "{{ ('a' * 1000).encode('utf-32') }}",
    "translate": _BIG + "{{ s.translate({97: s}) }}",
    "to_bytes": "{{ (1).to_bytes(10**10) }}",
    "striptags": "{{ ('<' * 1000000) | striptags }}",
    "striptags' method": "{{ ('<' * 1000000 | safe).striptags() }}{{ raise_exception('fine') }}",
    "urlize": "{{ ('www.a' * 200000) | urlize }}",
    "wordwrap": "{{ ('a ' * 500000) | wordwrap(1) }}",
    "pprint": "{{ range(100000) | list | pprint }}",
    "sorting by long paths": "{{ (['a'] * 100000) | sort(attribute='" + "a." * 20000 + "a') }}",
    "slices": _BIG + "{{ s[::2] ~ s[::2] }}" * 1500,
    "comparing": _BIG + "{{ s ~ 'a' == s ~ 'b' }}" * 1200,
    "searching": "{% set l = range(100000) | list %}" + "{{ 'x' in l }}" * 2400,
    "tests": "{% set l = range(100000) | list %}" + "{{ 'x' is in(l) }}" * 1800,
    "large output": _BIG + "{% for i in range(100000) %}{{ s }}{% endfor %}",
    "much in one output": _BIG + "{{ s }}" * 5000,
    "much in a macro": _BIG + "{% macro m() %}" + "{{ s }}" * 5000 + "{% endmacro %}{{ m() | length }}",
    "recursive macros": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that call twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loops": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "recursive blocks": "{% block b %}{{ self.b() }}{% endblock %}",
    "deep brackets": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for x in [1] %}" * 90 + "{% endfor %}" * 90,
    "long sums": "{{ 1" + "+1" * 40000 + " }}",
    "long chains": "{{ messages" + ".a" * 40000 + " }}",
    "many filters": "{{ 1" + "|abs" * 20000 + " }}",
    "lists inside lists": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}",
    "long source": "{# a #}" * 40000,
    "generators inside each other": "{{ range(100000)" + " | select" * 300 + " | list | length }}",
    "many views": "{% for i in range(99999) %}{% set x = dict(a=1, b=2, c=3).items() | list %}{% endfor %}" * 20,
    "many slices of lists": "{% set l = range(9999) | list %}{% for i in l %}{% set x = l[:] %}{% endfor %}",
    "spaces": "{%" + " " * 130000,
    "raw": "{% raw %}" * 10000,
    "quotes": "{{ '" + "\\" * 120000,
    "digits": "{{ " + "9" * 120000 + " }}",
    "unclosed": "{% for x in " * 10000,
    "many comments": "{#" * 60000,
}


def stopped(tokenizer: Any, template: str, tools: Any = ()) -> QuantLLMError:
    """Render with a hostile template, which must end soon by an error of the package; return it."""
    start = time.thread_time()
    with pytest.raises(QuantLLMError) as caught:
        ChatTemplate(tokenizer, template).render(MESSAGES, tools)
    assert time.thread_time() - start < 4
    assert len(str(caught.value)) < 1000
    return caught.value


QUICK = [
    "nested loops",
    "repetition",
    "doubling by ~",
    "doubling by lists",
    "width of %",
    "recursive macros",
    "deep loops",
]
GROWING = [
    name for name in HOSTILE if name.startswith(("doubl", "repe", "much", "large", "translate", "loops in", "indent"))
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in HOSTILE])
def test_a_hostile_template_is_stopped(tokenizer: Any, name: str) -> None:
    stopped(tokenizer, HOSTILE[name])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in GROWING])
def test_a_hostile_template_takes_little_memory(tokenizer: Any, name: str) -> None:
    tracemalloc.start()  # which makes everything slower
    try:
        with pytest.raises(QuantLLMError):
            ChatTemplate(tokenizer, HOSTILE[name]).render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 600 * 2**20
    finally:
        tracemalloc.stop()


def test_the_error_names_the_bound(tokenizer: Any) -> None:
    for name, says in {
        "nested empty loops": "chat template is stopped, because it takes longer than 1 seconds.*chat_template=",
        "repetition": r"because it makes a value of 1e\+10 characters or entries; for these messages",
        "center": "because it asks for a width of 10000000000; 1000 are allowed",
        "powers": "because it makes an integer of .* bits; 4096 are allowed",
        "recursive macros": "because its macros call each other, deeper than 100",
        "deep brackets": "because it has more than 30000 words",
        "deep lists": "because its parts stand inside each other too deeply",
        "long source": "because it has 280000 characters; 131072 are allowed",
    }.items():
        error = stopped(tokenizer, HOSTILE[name])
        assert isinstance(error, TemplateBoundError)
        with pytest.raises(TemplateBoundError, match=says):
            raise error


def _keep_the_processor(seconds: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


@pytest.mark.slow
def test_a_stall_while_shapes_are_tried_loses_nothing(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And now?"},
    ]
    get = tokenizer.get_chat_template
    for stalled in range(1, 16):
        calls = iter(range(1, 10_000))
        monkeypatch.setattr(
            tokenizer,
            "get_chat_template",
            lambda *args, n=stalled, count=calls, **kwargs: (
                _keep_the_processor(1.5 if next(count) == n else 0) or get(*args, **kwargs)
            ),
        )
        prompt, _ = ChatTemplate(tokenizer, MISTRAL).render(messages)
        assert all(text in prompt for text in ("I look.", "Oslo", "Be brief.", "And now?")), stalled


def test_a_stall_is_no_work_of_the_template() -> None:
    meter = Meter()

    def work(seconds: float, steps: int) -> None:
        for _ in range(steps):
            _keep_the_processor(seconds)
            meter.check_time()

    work(1.5 * TIME_S, 1)
    with pytest.raises(TemplateBoundError, match="longer than 1 seconds"):
        work(TIME_S / 20, 30)


def test_lists_inside_lists_are_counted_however_they_were_made(tokenizer: Any) -> None:
    nested = "{% set n = namespace(l=[]) %}{% for i in range(99) %}{% set n.l = [n.l] %}{% endfor %}"
    assert ChatTemplate(tokenizer, nested + "{{ 'x' }}").render(MESSAGES)[0] == "x"
    for one_more in ("{% set x = [[n.l]] %}", "{% set x = {'a': [n.l]} %}", "{% set y = [n.l] %}{% set x = [y, y] %}"):
        error = stopped(tokenizer, nested + one_more)
        assert "lists inside each other, deeper than 100" in str(error)


def test_trials_of_a_hostile_template_take_no_longer(tokenizer: Any) -> None:
    stopped(tokenizer, HOSTILE["nested loops"], [TOOL])


def test_other_threads_go_on_meanwhile(tokenizer: Any) -> None:
    hostile = threading.Thread(target=stopped, args=(tokenizer, HOSTILE["nested loops"], [TOOL]))
    hostile.start()
    good, count = ChatTemplate(tokenizer, QWEN), 0
    while hostile.is_alive():
        assert "snow" in good.render(MESSAGES, [TOOL])[0]
        count += 1
    assert count > 5


def test_long_conversations_are_within_the_bounds(tokenizer: Any) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "word " * 200} for i in range(1999)]
    for template in (None, QWEN, LLAMA_3, MISTRAL, TEMPLATES["alternating"]):
        prompt, _ = ChatTemplate(tokenizer, template).render(messages)
        assert len(prompt) > 1_900_000
    quadratic = "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}"
    assert len(ChatTemplate(tokenizer, quadratic + "{{ ns.s }}").render(messages)[0]) > 1_900_000


# --- changed templates ---


def mutated(chance: random.Random, source: str) -> str:
    """Change a template at a few places: a piece left out, doubled, moved, or replaced by another's."""
    parts = ["{%", "%}", "{{", "}}", "(", ")", "[", "]", "|", "~", "*", "**", "loop", "messages", "range(100000)", "'"]
    parts += ["{% for x in range(100000) %}", "{% endfor %}", "{% endif %}", "10**9", "ns.s ~ ns.s", "|join", "|list"]
    for _ in range(chance.randint(1, 6)):
        start, length = chance.randrange(len(source) + 1), chance.randint(0, 30)
        piece = source[start : start + length]
        how = chance.randrange(4)
        if how == 0:
            source = source[:start] + source[start + length :]
        elif how == 1:
            source = source[:start] + piece * chance.randint(1, 20) + source[start:]
        elif how == 2:
            at = chance.randrange(len(source) + 1)
            source = source[:at] + piece + source[at:]
        else:
            source = source[:start] + chance.choice(parts) + source[start:]
    return source


def check_mutations(tokenizers: list[Any], count: int, seed: int) -> None:
    chance = random.Random(seed)
    sources = [*TEMPLATES.values(), *(tokenizer.chat_template for tokenizer in tokenizers)]
    for _ in range(count):
        template = mutated(chance, chance.choice(sources))
        start = time.thread_time()
        with contextlib.suppress(QuantLLMError):  # the only kind of error that may come
            ChatTemplate(tokenizers[0], template).render(MESSAGES, [TOOL] if chance.random() < 0.5 else [])
        assert time.thread_time() - start < 6, template


def test_changed_templates_raise_no_raw_error(tokenizer: Any) -> None:
    check_mutations([tokenizer], 30, seed=1)


@pytest.mark.slow
def test_a_thousand_changed_templates_raise_no_raw_error(smollm2: Path, qwen_coder: Path) -> None:
    check_mutations([AutoTokenizer.from_pretrained(folder) for folder in (smollm2, qwen_coder)], 1000, seed=2)
