"""The metered sandbox beside transformers' own: the same texts, filters, tags and globals."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from transformers.utils.chat_template_utils import render_jinja_template

from langchain_quantllm.compat import jinja_sandbox
from langchain_quantllm.compat.jinja_bounds import TemplateBoundError
from langchain_quantllm.compat.jinja_sandbox import render_chat_template

MESSAGES = [
    {"role": "user", "content": " a <b>\n"},
    {"role": "assistant", "content": "c", "tool_calls": [{"x": [1, 2]}]},
]
TEXTS = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.revindex }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% for m in messages recursive %}{{ m.role }}{% if m.tool_calls %}{{ loop(m.tool_calls) }}{% endif %}{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ 'é' | tojson(ensure_ascii=True) }}",
    "{% set ns = namespace(a=1, b='x') %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b ~ 1 ~ none ~ [1, 'a'] }}",
    "{% macro m(a, b=2) %}[{{ a }}{{ b }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}"
    "{% call m(3) %}x{% endcall %}",
    "{{ messages[::-1] | map(attribute='role') | join(',') }}{{ messages[0].content[1:3] }}{{ messages[-1]['role'] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 7 // 2 }}{{ 2 ** 5 }}",
    "{{ range(3) | list }}",
    "{{ '%s-%03d' % ('a', 5) }}{{ '{:>5}|{a}'.format('x', a=1) }}{{ 'a,b'.split(',') }}{{ 'ab' * 3 }}{{ [1] + [2] }}",
    "{{ 'abc' | replace('b', 'x') | upper | center(9) }}{{ 'a\nb' | indent(2) }}",
    "{{ 1.55 | round(1) }}{{ 'a b' | title }}",
    "{% set t %}x{{ 1 }}{% endset %}{{ t }}{% filter upper %}y{% endfilter %}{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{{ dict(a=1).items() | list }}{{ {'b': 2, 'a': [1]} | dictsort }}",
    "{{ 'x' in ['x'] and 1 is defined and y is undefined }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}  \n  {% if true %}\n  a\n  {% endif %}\n",
    "{{ bos_token }}{{ strftime_now('%Y') }}{{ messages[0].nothing }}{{ (messages[0].content | safe).strip() }}",
    "{{ none }}{{ true }}{{ 1.0 }}{{ [none, 'a'] }}{{ messages[0].content | escape }}{{ messages[0].get('x', 'd') }}",
    "{% set x = 1 %}{% if x %}{% set x = 2 %}{% endif %}{{ x }}{% raw %}{{ }}{% endraw %}{# note #}{{ '<' ~ '>' }}",
    "{{ [3, 1, 2] | sort | first }}{{ [1, 1] | unique | list }}{{ messages | groupby('role') | length }}{{ -3 | abs }}",
]


@pytest.mark.parametrize("template", TEXTS)
def test_templates_are_rendered_as_by_transformers(template: str) -> None:
    variables = {"bos_token": "<s>"}
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **variables)
    found = render_chat_template(
        template,
        {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True, **variables},
    )
    assert found == expected


def test_every_filter_test_and_global_is_there() -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    own, made = _compile_jinja_template("").environment, jinja_sandbox._environment()
    assert made.filters.keys() > own.filters.keys()
    assert made.tests.keys() == own.tests.keys()
    assert made.globals.keys() == own.globals.keys() - {"lipsum"}
    assert made.extensions.keys() == own.extensions.keys()
    assert (made.trim_blocks, made.lstrip_blocks) == (own.trim_blocks, own.lstrip_blocks) == (True, True)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no') }}", TemplateError),
        ("{{ messages.append(1) }}", SecurityError),
        ("{{ ''.__class__.__mro__ }}", (UndefinedError, SecurityError)),
        ("{{ ('' | attr('format')).__self__ }}{{ ''.format.__globals__.x }}", (UndefinedError, SecurityError)),
        ("{{ '{0.__class__}'.format(1).x.y }}", (UndefinedError, SecurityError)),
        ("{{ 'a'.encode() }}", SecurityError),
        ("{% include 'x' %}", TypeError),
        ("{{ nothing.a.b }}", UndefinedError),
    ],
)
def test_the_sandbox_stays_closed(template: str, error: Any) -> None:
    with pytest.raises(error):
        render_chat_template(template, {"messages": []})


def test_format_reads_no_private_attribute() -> None:
    text = render_chat_template("{{ '{0.__class__}|{0[__class__]}'.format('a') }}", {"messages": []})
    assert "class" not in text


def test_one_render_counts_for_itself() -> None:
    """Each of two renderings has its own bounds, the one inside a longer program too."""
    template = "{% for i in range(20000) %}{% for j in range(10) %}{% endfor %}{% endfor %}{{ 'a' * 900000 }}"
    for _ in range(3):
        assert len(render_chat_template(template, {"messages": []})) == 900_000


def test_larger_inputs_have_larger_bounds() -> None:
    template = (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ m ~ m %}{% endfor %}{{ ns.s }}"
    )
    messages = ["a" * 5000] * 400
    assert render_chat_template(template, {"messages": messages}) == "a" * 4_000_000
    with pytest.raises(TemplateBoundError, match="it makes a value"):
        render_chat_template("{{ 'a' * 4000000 }}", {"messages": ["a"]})
