"""Conversations of every shape over templates with the traits of real families: nothing is refused, nothing is lost."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from transformers import AutoTokenizer

from langchain_quantllm.chat.bridge_rules import FILLER
from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.chat.template import ChatTemplate, TemplateRefusalError
from tests.support.chat_templates import GEMMA, LLAMA_3, MISTRAL, QWEN, TEMPLATES, random_conversation

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells.", "parameters": {"type": "object", "properties": {}}},
}
CALL = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Oslo"}, "id": "call_1"}])
RESULT = ToolMessage("snow", tool_call_id="call_1")
SYSTEM = SystemMessage("SYS")


def check_random_conversations(tokenizer: Any, template: str | None, count: int, seed: int) -> None:
    """Render random conversations; every text must stand in the prompt, and in order but for system messages."""
    chance = random.Random(seed)
    chat = ChatTemplate(tokenizer, template)
    for _ in range(count):
        messages, system, turns = random_conversation(chance)
        tools = [TOOL] if chance.random() < 0.5 else []
        prompt, _ = chat.render(template_messages(messages), tools)
        assert all(text in prompt for text in [*system, *itertools.chain(*turns)]), (messages, prompt)
        places = [[prompt.index(text) for text in turn] for turn in turns]
        assert all(max(one) < min(other) for one, other in itertools.pairwise(places)), (messages, prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_keep_every_text(tokenizer: Any, name: str) -> None:
    check_random_conversations(tokenizer, TEMPLATES[name], 25, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thousand_random_conversations_keep_every_text(tokenizer: Any, name: str) -> None:
    check_random_conversations(tokenizer, TEMPLATES[name], 1000, seed=2)


@pytest.mark.slow
def test_a_thousand_random_conversations_with_the_models_own_templates(smollm2: Path, qwen_coder: Path) -> None:
    for folder in (smollm2, qwen_coder):
        check_random_conversations(AutoTokenizer.from_pretrained(folder), None, 1000, seed=3)


WELL_FORMED = {
    "question": [HumanMessage("q")],
    "chat": [HumanMessage("q"), AIMessage("a"), HumanMessage("r")],
    "prefill": [HumanMessage("q"), AIMessage("It is")],
}
WITH_SYSTEM = {f"system, {name}": [SYSTEM, *messages] for name, messages in WELL_FORMED.items()}
WITH_CALLS = {
    "result": [HumanMessage("q"), CALL, RESULT],
    "answered": [HumanMessage("q"), CALL, RESULT, AIMessage("Snow."), HumanMessage("thanks")],
}


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (None, [*WELL_FORMED, *WITH_SYSTEM]),
        (GEMMA, [*WELL_FORMED]),
        (MISTRAL, [*WELL_FORMED, "system, question", "system, chat"]),
        (LLAMA_3, [*WELL_FORMED, *WITH_SYSTEM, *WITH_CALLS]),
        (QWEN, [*WELL_FORMED, *WITH_SYSTEM, *WITH_CALLS]),
    ],
)
def test_well_formed_conversations_are_rendered_as_transformers_does(
    tokenizer: Any, render: Any, template: str | None, names: list[str]
) -> None:
    for name in names:
        messages = {**WELL_FORMED, **WITH_SYSTEM, **WITH_CALLS}[name]
        continues = "prefill" in name
        for tools in [[], [TOOL]] if template in (LLAMA_3, QWEN) else [[]]:
            expected = tokenizer.apply_chat_template(
                template_messages(messages),
                tools=tools or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
            )
            assert render(template, messages, tools) == expected, name


# --- single rules ---


def test_a_system_message_stays_when_a_tool_has_answered(render: Any) -> None:
    prompt = render(MISTRAL, [SYSTEM, HumanMessage("q"), CALL, RESULT], [TOOL])
    assert "[INST] SYS\n\nq[/INST]" in prompt
    assert "[TOOL_CALLS]" in prompt  # nothing else changes
    assert "[TOOL_RESULTS]" in prompt
    last = TEMPLATES["system last"]
    assert render(last, [SYSTEM, HumanMessage("q"), CALL, RESULT]).startswith("[INST]SYS\n\nq[/INST][CALLS]")


def test_a_system_message_alone_is_the_user_s(render: Any) -> None:
    assert render(TEMPLATES["system last"], [SYSTEM]) == "[INST]SYS[/INST]"
    assert render(QWEN, [SYSTEM]) == "<|im_start|>user\nSYS<|im_end|>\n<|im_start|>assistant\n"


def test_a_system_message_stays_with_an_answer_to_continue(render: Any) -> None:
    prompt = render(MISTRAL, [SYSTEM, HumanMessage("q"), AIMessage("It is")])
    assert "[INST] SYS\n\nq[/INST]" in prompt
    assert prompt.endswith("It is")


def test_text_beside_a_call_becomes_a_turn_before_it(render: Any) -> None:
    call = AIMessage("I look.", tool_calls=CALL.tool_calls)
    prompt = render(TEMPLATES["system last"], [HumanMessage("q"), call, RESULT])
    assert prompt.startswith("[INST]q[/INST]I look.[CALLS]")
    assert render(LLAMA_3, [HumanMessage("q"), call, RESULT]).count("assistant<|end_header_id|>") == 3


def test_several_calls_become_a_turn_each(render: Any) -> None:
    calls = [*CALL.tool_calls, {"name": "weather", "args": {"city": "Rome"}, "id": "call_2"}]
    results = [RESULT, ToolMessage("sun", tool_call_id="call_2")]
    prompt = render(LLAMA_3, [HumanMessage("q"), AIMessage("", tool_calls=calls), *results], [TOOL])
    assert prompt.index("Oslo") < prompt.index("snow") < prompt.index("Rome") < prompt.index("sun")
    assert prompt.count("ipython") == 2


def test_turns_that_a_template_misses_are_filled_in(render: Any) -> None:
    interrupted = render(MISTRAL, [HumanMessage("q"), CALL, RESULT, HumanMessage("stop")])
    assert f"[/TOOL_RESULTS] {FILLER}<|im_end|>[INST] stop[/INST]" in interrupted
    assert f"<start_of_turn>user\n{FILLER}<end_of_turn>\n<start_of_turn>model\na<end" in render(
        GEMMA, [AIMessage("a"), HumanMessage("b")]
    )
    assert f"<|im_start|>user\n{FILLER}<|im_end|>\n<|im_start|>assistant\nIt is" in render(QWEN, [AIMessage("It is")])


def test_an_answer_to_continue_that_the_template_leaves_out_stands_behind_the_prompt(render: Any) -> None:
    prompt = render(TEMPLATES["prefill left out"], [HumanMessage("q"), AIMessage("It is")])
    assert prompt.endswith("<|im_start|>assistant\nIt is")


def test_other_roles_become_the_user_s_where_they_are_refused(render: Any) -> None:
    messages = [HumanMessage("q"), ChatMessage("Too long.", role="critic")]
    assert "<|im_start|>critic\nToo long." in render(TEMPLATES["plain"], messages)
    assert "q<|im_end|>\n<|im_start|>user\ncritic: Too long." in render(TEMPLATES["no system, no tool"], messages)


def test_a_template_that_takes_nothing_is_one_clear_error(render: Any) -> None:
    with pytest.raises(TemplateRefusalError, match="does not take this conversation: never"):
        render("{{ raise_exception('never') }}", [SYSTEM, HumanMessage("q"), CALL, RESULT], [TOOL])
