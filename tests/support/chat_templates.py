"""Small chat templates that have the traits of real families, and random conversations.

Written by hand, after those of the families that they are named for.
"""

from __future__ import annotations

import random
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage

_TURN = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_EACH = "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK

MISTRAL = """{{- bos_token }}
{%- set system = "" %}
{%- if messages[0].role == "system" %}
  {%- set system = messages[0].content + "\n\n" %}{% set messages = messages[1:] %}
{%- endif %}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- set ns = namespace(user=true) %}
{%- for message in messages %}
  {%- if message.role in ("user", "assistant") and not message.tool_calls %}
    {%- if (message.role == "user") != ns.user %}{{ raise_exception("roles must alternate") }}{% endif %}
    {%- set ns.user = not ns.user %}
  {%- endif %}
  {%- if message.role == "user" %}[INST] {{ system if loop.last }}{{ message.content }}[/INST]
  {%- elif message.tool_calls %}[TOOL_CALLS] [
    {%- for call in message.tool_calls %}
      {%- if call.id | length != 9 %}{{ raise_exception("ids must have nine letters") }}{% endif %}
      {{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
    {%- endfor %}]{{ eos_token }}
  {%- elif message.role == "assistant" %} {{ message.content }}{{ eos_token }}
  {%- elif message.role == "tool" %}[TOOL_RESULTS] {{
    {"content": message.content, "call_id": message.tool_call_id} | tojson }}[/TOOL_RESULTS]
  {%- else %}{{ raise_exception("unknown role") }}{% endif %}
{%- endfor %}"""
"""Writes the system message into the last turn of the user only, and no text beside a call."""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}
{%- for message in messages %}
  {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
  {%- set role = "model" if message.role == "assistant" else message.role %}
  {{- "<start_of_turn>" + role + "\n" + message.content | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}"""

LLAMA_3 = """{{- bos_token }}
{%- set system = "" %}
{%- if messages[0].role == "system" %}
  {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" + system + "<|eot_id|>" }}
{%- if tools %}
  {%- if not messages or messages[0].role != "user" %}{{ raise_exception("no first user message") }}{% endif %}
  {{- "<|start_header_id|>user<|end_header_id|>\n\n" + tools | tojson + messages[0].content | trim + "<|eot_id|>" }}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
  {%- if "tool_calls" in message %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception("only single tool-calls") }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" + call | tojson + "<|eot_id|>" }}
  {%- elif message.role == "tool" %}
    {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content | tojson + "<|eot_id|>" }}
  {%- else %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n" + message.content | trim + "<|eot_id|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}"""
"""Takes one call a turn, leaves out the text beside it, and wants a user's turn where there are tools."""

QWEN = """{%- if tools %}<|im_start|>system
{% if messages[0].role == "system" %}{{ messages[0].content }}{% endif %}<tools>{{ tools | tojson }}</tools><|im_end|>
{% elif messages[0].role == "system" %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == "user" %}{% set ns.last = loop.index0 %}{% endfor %}
{%- if ns.last < 0 %}{{ raise_exception("No user query found in messages.") }}{% endif %}
{%- for m in messages %}
{%- if m.role == "system" and not loop.first %}{{ raise_exception("System message must be at the beginning.") }}
{%- elif m.role == "user" %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == "assistant" %}<|im_start|>assistant
{{ m.content.split("</think>")[-1].lstrip("\n") }}
{%- for c in m.tool_calls %}
<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}<|im_end|>
{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "plain": _EACH,
    "alternating": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}" + _TURN + "{% endfor %}" + _ASK
    ),
    "needs a user": (
        "{% if not (messages | selectattr('role', 'equalto', 'user') | list) %}{{ raise_exception('no user') }}"
        "{% endif %}" + _EACH
    ),
    "system last": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' and loop.last and s %}"
        "{{ '[INST]' + s + '|' + m.content + '[/INST]' }}{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]'"
        " }}{% elif m.tool_calls %}{{ '[CALLS]' + (m.tool_calls | tojson) }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    ),
    "no system, no tool": (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}"
        "{% endif %}" + _TURN + "{% endfor %}" + _ASK
    ),
    "prefill left out": "{% for m in messages %}{% if not (loop.last and m.role == 'assistant') %}"
    + _TURN
    + "{% endif %}"
    "{% endfor %}" + _ASK,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "llama-3": LLAMA_3,
    "qwen": QWEN,
}


def random_conversation(chance: random.Random) -> tuple[list[BaseMessage], list[str], list[list[str]]]:
    """Make messages in any order, with calls that lack results and results that lack calls.

    Returns:
        The messages, the texts of system messages, and those of the other turns in their order; calls and the results
        that follow them are one turn.
    """
    messages: list[BaseMessage] = []
    system: list[str] = []
    turns: list[list[str]] = [[]]
    calls: list[str] = []

    def text(kind: str) -> str:
        made = f"{kind}{len(messages)} says {chance.randrange(10**6)}."
        (system if kind == "system" else turns[-1]).append(made)
        return made

    for _ in range(chance.randint(1, 7)):
        kind = chance.choice(["system", "user", "user", "ai", "ai", "call", "call", "result", "result"])
        if kind != "result":
            turns.append([])
        if kind == "system":
            messages.append(SystemMessage(text(kind)))
        elif kind == "user":
            messages.append(HumanMessage(text(kind)))
        elif kind == "ai":
            messages.append(AIMessage(text(kind) if chance.random() < 0.9 else ""))
        elif kind == "call":
            content = text(kind) if chance.random() < 0.5 else ""
            made: list[Any] = []
            for _ in range(chance.randint(1, 2)):
                calls.append(f"call_{len(calls)}_{chance.randrange(10**4)}")
                made.append({"name": "weather", "args": {"city": text("city")}, "id": calls[-1]})
            messages.append(AIMessage(content, tool_calls=made))
        else:
            call_id = chance.choice(calls) if calls and chance.random() < 0.8 else "call_unknown"
            messages.append(ToolMessage(text(kind), tool_call_id=call_id))
    return messages, system, [turn for turn in turns if turn]
