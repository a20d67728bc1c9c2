"""The formats of tool calls and reasoning, by model family: one table, and the entry that a chat template means.

Reads no answer (`chat.output_parser` does) and knows no LangChain. The texts are those of the chat templates that the
models' makers have published.

xgrammar's own structural tags are no replacement (tried with 0.2.9 on the tests of this table): required calls of its
qwen_3, qwen_3_coder, llama and gemma_4 allow free text after a call; qwen_3_coder wants a line's end before
`</function>` that a call without parameters does not have; its cohere is the XML of later models; for the others, but
both of DeepSeek, there is none. The parser and the masks need the marks of every format in any case.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """A family's format of calls: `opening call arguments call_end [separator call arguments call_end]... closing`.

    Args:
        name: The name of the format.
        marks: Texts of which a chat template that wants this format has every one.
        trigger: The mark that opens a call amid text; empty where calls are the whole answer.
        call: The text before the arguments; `{name}` stands for the function's name.
        call_end: The text after them.
        opening: The text before the first call.
        separator: The text between two calls.
        closing: The text after the last call.
        style: The notation of the arguments: `"json"`, `"qwen_xml"`, `"glm_xml"`, `"python"` or `"gemma"`.
        inner: Further marks that a call may contain; the parser must see those that are special tokens.
    """

    name: str
    marks: tuple[str, ...]
    trigger: str = ""
    call: str = '{"name": "{name}", "arguments": '
    call_end: str = "}"
    opening: str = ""
    separator: str = ", "
    closing: str = ""
    style: str = "json"
    inner: tuple[str, ...] = ()

    def begin(self, name: str) -> str:
        """Write the text before the arguments of a call of a function."""
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
"""Qwen 2 to 3, Hermes, Granite 4 and many fine-tuned models; also the one that a template without tools is taught."""

_MISTRAL = ToolFormat(
    name="mistral", marks=("[TOOL_CALLS]",), trigger="[TOOL_CALLS]", opening="[TOOL_CALLS] [", closing="]"
)

_GRANITE = ToolFormat(
    name="granite",
    marks=("<|start_of_role|>", "<|tool_call|>"),
    trigger="<|tool_call|>",
    opening="<|tool_call|>[",
    closing="]",
)

_DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    marks=("<｜tool▁calls▁begin｜>",),
    trigger="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>",
    separator="",
    closing="<｜tool▁calls▁end｜>",
)

_PYTHONIC = ToolFormat(
    name="pythonic",
    marks=("[func_name1(params_name1=params_value1",),
    opening="[",
    call="{name}(",
    call_end=")",
    closing="]",
    style="python",
)

_FUNCTION_GEMMA = ToolFormat(
    name="function_gemma",
    marks=("<start_function_call>",),
    trigger="<start_function_call>",
    call="<start_function_call>call:{name}{",
    call_end="}<end_function_call>",
    separator="",
    style="gemma",
    inner=("<escape>",),
)

_GLM = ToolFormat(
    name="glm",
    marks=("<arg_key>", "<arg_value>"),
    trigger="<tool_call>",
    call="<tool_call>{name}\n",
    call_end="</tool_call>",
    separator="\n",
    style="glm_xml",
)

HARMONY = ToolFormat(
    name="harmony",
    marks=("<|start|>", "<|channel|>", "<|message|>"),
    trigger="<|channel|>commentary to=functions.",
    call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
    call_end="",  # <|call|> ends the answer
    separator="",
    inner=("<|start|>", "<|end|>", "<|call|>", "<|return|>"),
)
"""gpt-oss: an answer is messages in channels, and a call is one of them."""

FORMATS: tuple[ToolFormat, ...] = (
    HARMONY,
    ToolFormat(
        name="qwen_coder",
        marks=("<tool_call>", "<function=", "<parameter="),
        trigger="<tool_call>",
        call="<tool_call>\n<function={name}>\n",
        call_end="</function>\n</tool_call>",
        separator="\n",
        style="qwen_xml",
    ),
    replace(_GLM, name="glm_4_7", marks=("</arg_key><arg_value>",), call="<tool_call>{name}"),
    _GLM,
    replace(
        _DEEPSEEK_V31,
        name="deepseek_v3",
        marks=("<｜tool▁calls▁begin｜>", "```json"),
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
        call_end="\n```<｜tool▁call▁end｜>",
        separator="\n",
    ),
    _DEEPSEEK_V31,
    ToolFormat(
        name="mistral_args",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        trigger="[TOOL_CALLS]",
        call="[TOOL_CALLS]{name}[ARGS]",
        call_end="",
        separator="",
        inner=("[CALL_ID]",),
    ),
    # Mistral Nemo has no space.
    replace(_MISTRAL, name="mistral_tekken", marks=("[TOOL_CALLS][",), opening="[TOOL_CALLS]["),
    _MISTRAL,
    _GRANITE,
    # The template writes no calls; its marks go around the tools.
    replace(_GRANITE, name="phi4", marks=("<|tool|>", "<|/tool|>"), closing="]<|/tool_call|>"),
    ToolFormat(
        name="cohere",
        marks=("<|START_ACTION|>",),
        trigger="<|START_ACTION|>",
        opening="<|START_ACTION|>[\n    ",
        call='{"tool_call_id": "0", "tool_name": "{name}", "parameters": ',  # of several calls the ids count up
        separator=",\n    ",
        closing="\n]<|END_ACTION|>",
    ),
    replace(
        _FUNCTION_GEMMA,
        name="gemma4",
        marks=("<|tool_call>call:",),
        trigger="<|tool_call>",
        call="<|tool_call>call:{name}{",
        call_end="}<tool_call|>",
        inner=('<|"|>',),
    ),
    _FUNCTION_GEMMA,
    replace(
        _PYTHONIC,
        name="lfm2",
        marks=("<|tool_list_start|>",),
        trigger="<|tool_call_start|>",
        opening="<|tool_call_start|>[",
        closing="]<|tool_call_end|>",
    ),
    _PYTHONIC,
    ToolFormat(
        name="llama3",
        marks=('"parameters": dictionary of argument name',),  # 3.1's also has <|python_tag|>, 3.2's has not
        call='{"name": "{name}", "parameters": ',
        separator="; ",
        inner=("<|python_tag|>",),
    ),
    HERMES,
)
"""All formats; of two whose marks a template has, the more specific comes first."""


def format_of(template: str | None) -> ToolFormat:
    """Find the format that a chat template wants; `HERMES` where it names none."""
    text = template or ""
    return next((entry for entry in FORMATS if all(mark in text for mark in entry.marks)), HERMES)


@dataclass(frozen=True)
class ReasoningFormat:
    """A family's marks around its reasoning.

    Args:
        begin: The mark before the reasoning; a prompt may already end with it.
        end: The mark after it.
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


HARMONY_REASONING = ReasoningFormat("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
"""That of gpt-oss, whose calls are in the format `HARMONY`."""

FINAL_HEADER = "<|channel|>final<|message|>"
"""The header of gpt-oss's answer to the user."""


def reasoning_of(texts: str) -> ReasoningFormat | None:
    """Find the format of reasoning that a chat template's text names, by either of its marks."""
    return next((entry for entry in REASONING if entry.begin in texts or entry.end in texts), None)
