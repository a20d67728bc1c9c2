"""How families of models write tool calls and reasoning: one table, and which entry a chat template means.

Owns the formats. Reads no answer and knows no LangChain: `parsing` does the one, `chat_models` the other.
The texts are those of the chat templates that the models' makers have published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family writes its calls: `opening call arguments call_end [separator call arguments call_end]... closing`.

    Args:
        name: What the format is called.
        marks: Texts of which a chat template that wants this format has every one.
        trigger: What opens a call, as a model writes it amid its text; empty where a call is the whole answer.
        call: What comes before the arguments; `{name}` stands for the function's name.
        call_end: What comes after them.
        opening: What comes before the first call.
        separator: What comes between two calls.
        closing: What comes after the last call.
        style: How the arguments are written: `"json"`, or another one that `parsing` knows.
        inner: Further marks that a call may contain, which have to reach `parsing` if they are special tokens.
    """

    name: str
    marks: tuple[str, ...]
    trigger: str
    call: str
    call_end: str
    opening: str = ""
    separator: str = ""
    closing: str = ""
    style: str = "json"
    inner: tuple[str, ...] = ()

    def begin(self, name: str) -> str:
        """Write what comes before the arguments of a call of a function."""
        quoted = json.dumps(name, ensure_ascii=False)[1:-1] if '"{name}"' in self.call else name
        return self.call.replace("{name}", quoted)


HERMES = ToolFormat(
    name="hermes",
    marks=("<tool_call>", '"arguments"'),
    trigger="<tool_call>",
    call='<tool_call>\n{"name": "{name}", "arguments": ',
    call_end="}\n</tool_call>",
    separator="\n",
)
"""Qwen 2 to 3, Hermes, Granite 4 and many fine-tuned models; also what a template without tools is taught."""

_LLAMA3 = ToolFormat(
    name="llama3",
    marks=('"parameters": dictionary of argument name',),  # 3.1's also has <|python_tag|>, 3.2's has not
    trigger="",
    call='{"name": "{name}", "parameters": ',
    call_end="}",
    separator="; ",
    inner=("<|python_tag|>",),
)

_PYTHONIC = ToolFormat(
    name="pythonic",
    marks=("[func_name1(params_name1=params_value1",),
    trigger="",
    opening="[",
    call="{name}(",
    call_end=")",
    separator=", ",
    closing="]",
    style="python",
)

_LFM2 = ToolFormat(
    name="lfm2",
    marks=("<|tool_list_start|>",),
    trigger="<|tool_call_start|>",
    opening="<|tool_call_start|>[",
    call="{name}(",
    call_end=")",
    separator=", ",
    closing="]<|tool_call_end|>",
    style="python",
)

_MISTRAL = ToolFormat(
    name="mistral",
    marks=("[TOOL_CALLS]",),
    trigger="[TOOL_CALLS]",
    opening="[TOOL_CALLS] [",
    call='{"name": "{name}", "arguments": ',
    call_end="}",
    separator=", ",
    closing="]",
)

_MISTRAL_TEKKEN = replace(_MISTRAL, name="mistral_tekken", marks=("[TOOL_CALLS][",), opening="[TOOL_CALLS][")
"""The same without the space, as Mistral Nemo writes it."""

_MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    marks=("[TOOL_CALLS]", "[ARGS]"),
    trigger="[TOOL_CALLS]",
    call="[TOOL_CALLS]{name}[ARGS]",
    call_end="",
    inner=("[CALL_ID]",),
)

_PHI4 = ToolFormat(
    name="phi4",
    marks=("<|tool|>", "<|/tool|>"),  # the template writes no calls; these go around the tools
    trigger="<|tool_call|>",
    opening="<|tool_call|>[",
    call='{"name": "{name}", "arguments": ',
    call_end="}",
    separator=", ",
    closing="]<|/tool_call|>",
)

_GRANITE = ToolFormat(
    name="granite",
    marks=("<|start_of_role|>", "<|tool_call|>"),
    trigger="<|tool_call|>",
    opening="<|tool_call|>[",
    call='{"name": "{name}", "arguments": ',
    call_end="}",
    separator=", ",
    closing="]",
)

_DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    marks=("<｜tool▁calls▁begin｜>", "```json"),
    trigger="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
    call_end="\n```<｜tool▁call▁end｜>",
    separator="\n",
    closing="<｜tool▁calls▁end｜>",
)

_DEEPSEEK_V31 = replace(
    _DEEPSEEK_V3,
    name="deepseek_v31",
    marks=("<｜tool▁calls▁begin｜>",),
    call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>",
    separator="",
)

_COHERE = ToolFormat(
    name="cohere",
    marks=("<|START_ACTION|>",),
    trigger="<|START_ACTION|>",
    opening="<|START_ACTION|>[\n    ",
    call='{"tool_call_id": "0", "tool_name": "{name}", "parameters": ',  # of several calls the ids count up
    call_end="}",
    separator=",\n    ",
    closing="\n]<|END_ACTION|>",
)

_QWEN_CODER = ToolFormat(
    name="qwen_coder",
    marks=("<tool_call>", "<function=", "<parameter="),
    trigger="<tool_call>",
    call="<tool_call>\n<function={name}>\n",
    call_end="</function>\n</tool_call>",
    separator="\n",
    style="qwen_xml",
)

_FUNCTION_GEMMA = ToolFormat(
    name="function_gemma",
    marks=("<start_function_call>",),
    trigger="<start_function_call>",
    call="<start_function_call>call:{name}{",
    call_end="}<end_function_call>",
    style="gemma",
    inner=("<escape>",),
)

_GEMMA4 = replace(
    _FUNCTION_GEMMA,
    name="gemma4",
    marks=("<|tool_call>call:",),
    trigger="<|tool_call>",
    call="<|tool_call>call:{name}{",
    call_end="}<tool_call|>",
    inner=('<|"|>',),
)

FORMATS: tuple[ToolFormat, ...] = (
    _QWEN_CODER,
    _DEEPSEEK_V3,
    _DEEPSEEK_V31,
    _MISTRAL_ARGS,
    _MISTRAL_TEKKEN,
    _MISTRAL,
    _GRANITE,
    _PHI4,
    _COHERE,
    _GEMMA4,
    _FUNCTION_GEMMA,
    _LFM2,
    _PYTHONIC,
    _LLAMA3,
    HERMES,
)
"""All formats; of two whose marks a template has, the more specific comes first."""


def format_of(template: str | None) -> ToolFormat:
    """Find the format that a chat template wants; `HERMES` where it names none."""
    text = template or ""
    return next((entry for entry in FORMATS if all(mark in text for mark in entry.marks)), HERMES)


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family sets its reasoning apart from its answer.

    Args:
        begin: What comes before the reasoning; a prompt may already end with it.
        end: What comes after it.
    """

    begin: str
    end: str


REASONING: tuple[ReasoningFormat, ...] = (
    ReasoningFormat("<think>", "</think>"),  # Qwen 3, DeepSeek, SmolLM3, Granite 3.3 and most others
    ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral and Ministral
    ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ReasoningFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
    ReasoningFormat("<|channel>thought", "<channel|>"),  # Gemma 4
)
"""All formats of reasoning."""


def reasoning_of(texts: str) -> ReasoningFormat | None:
    """Find the format of reasoning that a chat template's text names, by either of its marks."""
    return next((entry for entry in REASONING if entry.begin in texts or entry.end in texts), None)
