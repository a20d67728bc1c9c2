"""Messages and prompts: the conversion of each kind of message, and the rules for templates that do not take it.

The templates here are written by hand, after those of the families that they are named for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from transformers import AutoTokenizer

from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from tests.support.chat_templates import GEMMA, MISTRAL

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}

DEEPSEEK = """{% for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}
{%- for call in message.tool_calls %}
  {{- "<call>" + call.function.name + "|" + call.function.arguments + "</call>" }}
{%- endfor %}
{%- else %}<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}
{%- if tools %}<tools>{{ tools | tojson }}{% endif %}"""

SYSTEM_LEFT_OUT = """{% for m in messages if m.role != "system" %}<{{ m.role }}>{{ m.content }}{% endfor %}"""
FIRST_SYSTEM_ONLY = """{% if messages[0].role == "system" %}<S>{{ messages[0].content }}{% endif %}
{%- for m in messages if m.role != "system" %}<{{ m.role }}>{{ m.content }}{% endfor %}"""


CALL = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1, "b": "é"}, "id": "call_0123456789"}])
RESULT = ToolMessage("3", tool_call_id="call_0123456789")


# --- messages ---


def test_every_kind_of_message_is_converted() -> None:
    messages = [
        SystemMessage("s"),
        HumanMessage("h", name="Ada"),
        AIMessage("a", additional_kwargs={"reasoning_content": "r"}),
        ChatMessage("c", role="developer"),
        CALL,
        RESULT,
        FunctionMessage("f", name="add"),
    ]
    call = {"type": "function", "id": "call_0123456789", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    assert template_messages(messages) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h", "name": "Ada"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "system", "content": "c"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "call_0123456789", "name": "add"},
        {"role": "tool", "content": "f", "name": "add"},
    ]


def test_content_blocks_become_their_texts() -> None:
    blocks = [
        "one",
        {"type": "text", "text": "two"},
        {"type": "text-plain", "text": "three", "mime_type": "text/plain"},
    ]
    assert template_messages([HumanMessage(blocks)]) == [{"role": "user", "content": "one\ntwo\nthree"}]
    answer = AIMessage(
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "yes"}, {"type": "tool_use", "id": "1"}]
    )
    assert template_messages([answer]) == [{"role": "assistant", "content": "yes", "reasoning_content": "hm"}]


def test_anthropic_tool_results_become_template_messages_their_own() -> None:
    blocks = [
        {"type": "tool_result", "tool_use_id": "call_0123456789", "content": [{"type": "text", "text": "3"}]},
        {"type": "text", "text": "and now?"},
    ]
    plain = template_messages([HumanMessage("1+2"), CALL, HumanMessage(blocks)])
    assert [message["role"] for message in plain] == ["user", "assistant", "tool", "user"]
    assert plain[2] == {"role": "tool", "content": "3", "tool_call_id": "call_0123456789", "name": "add"}


def test_wrong_calls_go_back_as_text() -> None:
    wrong = [{"name": "add", "args": '{"a": ', "id": "1", "error": "cut off", "type": "invalid_tool_call"}]
    plain = template_messages([AIMessage("so:", invalid_tool_calls=wrong)])[0]
    assert plain["content"] == 'so:\nadd{"a": '
    assert "tool_calls" not in plain


@pytest.mark.parametrize(
    ("messages", "error", "says"),
    [
        ([], InvalidOptionError, "there are no messages"),
        ([HumanMessage("a"), RemoveMessage(id="1")], InvalidOptionError, "message 1 is a RemoveMessage"),
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])], UnsupportedError, "'image_url'"),
        (
            [AIMessage("", tool_calls=[{"name": "add", "args": {"a": {1}}, "id": "1"}])],
            InvalidOptionError,
            "message 0 calls 'add' with arguments that are not JSON",
        ),
        ([HumanMessage([{"type": "hologram"}])], InvalidOptionError, "not a known content block"),
    ],
)
def test_messages_that_no_prompt_can_hold(messages: list[Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        template_messages(messages)


# --- templates ---


def test_a_template_that_takes_everything_is_left_alone(qwen_coder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen_coder)
    messages = [SystemMessage("s"), HumanMessage("a"), HumanMessage("b"), CALL, RESULT]
    plain = template_messages(messages)
    found, _ = ChatTemplate(tokenizer).render(plain, [TOOL])
    expected = tokenizer.apply_chat_template(plain, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert found == expected


def test_tools_are_described_where_the_template_has_none(render: Any) -> None:
    prompt = render(None, [SystemMessage("Be brief."), HumanMessage("1+2?"), CALL, RESULT, RESULT], [TOOL])
    system, user, call, results, answer = prompt.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n# Tools")
    assert '"name": "add"' in system
    assert user == "user\n1+2?<|im_end|>\n"
    assert call == (
        'assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call><|im_end|>\n'
    )
    response = "<tool_response>\n3\n</tool_response>"
    assert results == f"user\n{response}\n{response}<|im_end|>\n"
    assert answer == "assistant\n"


def test_messages_are_joined_where_roles_must_alternate(render: Any) -> None:
    messages = [
        SystemMessage("s"),
        HumanMessage("a"),
        HumanMessage("b"),
        AIMessage("c"),
        AIMessage("d"),
        HumanMessage("e"),
    ]
    assert "[INST] a\n\nb[/INST] c\n\nd" in render(MISTRAL, messages)
    gemma = render(GEMMA, messages)
    assert "<start_of_turn>user\ns\n\na\n\nb<end_of_turn>\n<start_of_turn>model\nc\n\nd<end_of_turn>" in gemma


def test_system_messages_in_the_middle_join_the_first(render: Any) -> None:
    messages = [SystemMessage("s"), HumanMessage("a"), AIMessage("b"), SystemMessage("t"), HumanMessage("c")]
    assert render(FIRST_SYSTEM_ONLY, messages) == "<S>s\n\nt<user>a<assistant>b<user>c"
    assert render(SYSTEM_LEFT_OUT, messages) == "<user>s\n\nt\n\na<assistant>b<user>c"
    assert render(None, messages).count("<|im_start|>system") == 2  # which this one takes as they are


def test_ids_of_calls_become_short_where_the_template_insists(render: Any) -> None:
    prompt = render(MISTRAL, [HumanMessage("1+2?"), CALL, RESULT], [TOOL])
    call_id = prompt.split('"id": "')[1][:9]
    assert call_id.isalnum()
    assert f'"call_id": "{call_id}"' in prompt
    short = AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "abcdefghi"}])
    assert "abcdefghi" in render(
        MISTRAL, [HumanMessage("a"), short, ToolMessage("3", tool_call_id="abcdefghi")], [TOOL]
    )


def test_arguments_become_text_where_the_template_wants_it(render: Any) -> None:
    prompt = render(DEEPSEEK, [HumanMessage("1+2?"), CALL, RESULT], [TOOL])
    assert '<call>add|{"a": 1, "b": "é"}</call><tool>3' in prompt


def test_a_last_answer_is_continued(render: Any) -> None:
    assert render(None, [HumanMessage("a"), AIMessage("It is")]).endswith("<|im_start|>assistant\nIt is")


def test_calls_at_the_end_are_no_answer_to_continue(render: Any) -> None:
    prompt = render(None, [HumanMessage("1+2?"), CALL], [TOOL])
    assert prompt.endswith("</tool_call><|im_end|>\n<|im_start|>assistant\n")


def test_blocks_of_other_providers_tools_are_left_out(render: Any) -> None:
    block = {"type": "server_tool_call", "name": "web_search", "args": {}, "id": "1"}
    assert "It is" in render(None, [HumanMessage("a"), AIMessage([block, "It is"]), HumanMessage("b")])


def test_variables_that_the_call_sets_are_refused(render: Any) -> None:
    with pytest.raises(InvalidOptionError, match="'tokenize', which comes from the call"):
        render(None, [HumanMessage("a")], tokenize=True)


def test_a_broken_template_says_so(render: Any) -> None:
    with pytest.raises(InvalidOptionError, match="is not valid Jinja"):
        render("{% if %}", [HumanMessage("a")])


def test_options_reach_the_template(render: Any) -> None:
    template = "{% if enable_thinking %}think{% endif %}{{ messages[0].content }}"
    assert render(template, [HumanMessage("a")]) == "a"
    assert render(template, [HumanMessage("a")], enable_thinking=True) == "thinka"


def test_the_refusal_of_a_template_is_told(render: Any) -> None:
    with pytest.raises(InvalidOptionError, match="does not take this conversation: only on Sundays"):
        render("{{ raise_exception('only on Sundays') }}", [HumanMessage("a")])


def test_a_tokenizer_without_a_template_says_so(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template.*chat_template=.*QuantizedHuggingFaceLLM"):
        ChatTemplate(bare).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("failing", ["1 // 0", "2.0 ** 99999", "messages | tojson(indent={})", "nothing.a"])
def test_a_trial_that_fails_in_any_way_says_that_an_ability_is_missing(
    render: Any, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="langchain_quantllm")
    template = (
        f"{{% if tools %}}{{{{ {failing} }}}}{{% endif %}}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    )
    assert "<tools>" in render(template, [HumanMessage("a")], [TOOL])
    assert "a trial of the chat template failed" in caplog.text
    with pytest.raises(InvalidOptionError, match="chat template does not take this conversation: ."):
        render(f"{{{{ {failing} }}}}", [HumanMessage("a")], [TOOL])
