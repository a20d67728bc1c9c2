"""Samples of a calibration out of chats, documents, examples and traced runs, and mixes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, messages_to_dict
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from langchain_quantllm import Calibration
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.quantization.calibration import read_texts, sequences
from langchain_quantllm.quantization.conversations import Conversation
from tests.support.checkpoints import make_tokenizer
from tests.support.quantization import TEXTS

_CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}"
_MESSAGES = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{_CALLS}{{% endfor %}}"
TEMPLATE = "{% for tool in tools or [] %}<tool {{ tool.function.name }}>{% endfor %}" + _MESSAGES
CALL = {"name": "weather", "args": {"city": "Bergen"}, "id": "c1"}
MESSAGES = [
    SystemMessage("Be brief."),
    HumanMessage("Rain today?"),
    AIMessage("", tool_calls=[CALL]),
    ToolMessage("wet", tool_call_id="c1", name="weather"),
    AIMessage([{"type": "text", "text": "Yes, "}, {"type": "text", "text": "all day."}]),
]
OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Rain today?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bergen"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "wet"},
    {"role": "assistant", "content": "Yes, all day."},
]
WRITTEN = "<system>Be brief.<user>Rain today?<assistant>[weather Bergen]<tool>wet<assistant>Yes, all day."
TOOL = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}


def tokenizer(template: str | None = TEMPLATE) -> Any:
    found = make_tokenizer()
    found.chat_template = template
    return found


def written(*source: Any) -> list[str]:
    """What a model reads of a source's samples."""
    samples = read_texts(Calibration(source=list(source)))
    return [sample.render(tokenizer()) if isinstance(sample, Conversation) else sample for sample in samples]


@pytest.mark.parametrize(
    "messages",
    [MESSAGES, OPENAI, messages_to_dict(MESSAGES), [message.model_dump() for message in MESSAGES]],
    ids=["langchain", "openai", "messages_to_dict", "model_dump"],
)
def test_messages_of_every_form_are_written_by_the_template(messages: Any, tmp_path: Path) -> None:
    assert written(messages) == [WRITTEN]
    assert written({"messages": messages, "tools": [TOOL]}) == [f"<tool weather>{WRITTEN}"]
    if isinstance(messages[0], dict):
        file = tmp_path / "chats.jsonl"
        file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:2]}))
        chats = read_texts(Calibration(source=file))
        assert [chat.render(tokenizer()) for chat in chats] == [WRITTEN, "<system>Be brief.<user>Rain today?"]


def test_pairs_and_documents_and_texts_may_be_together() -> None:
    pairs = [("human", "Hello"), ("ai", "Hi")]
    sharegpt = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    found = written(pairs, sharegpt, Document("A page."), {"page_content": "Another."}, "Text.", {"text": "A row."})
    assert found == ["<user>Hello<assistant>Hi"] * 2 + ["A page.", "Another.", "Text.", "A row."]


def test_runs_of_a_tracer_give_the_conversations_of_their_models(tmp_path: Path) -> None:
    collector = RunCollectorCallbackHandler()
    prompt = ChatPromptTemplate([("system", "Answer in one word."), ("human", "{question}")])
    chain = prompt | FakeListChatModel(responses=["Paris", "Rome"])
    for question in ("Capital of France?", "Capital of Italy?"):
        chain.invoke({"question": question}, {"callbacks": [collector]})
    expected = [
        "<system>Answer in one word.<user>Capital of France?<assistant>Paris",
        "<system>Answer in one word.<user>Capital of Italy?<assistant>Rome",
    ]
    assert written(*collector.traced_runs) == expected
    file = tmp_path / "runs.jsonl"
    every = [one for run in collector.traced_runs for one in (run, *run.child_runs)]  # as they are exported
    file.write_text("\n".join(run.model_dump_json() for run in every))
    assert [sample.render(tokenizer()) for sample in read_texts(Calibration(source=file))] == expected


def test_runs_without_a_chat_model_are_read_as_what_was_asked_and_answered() -> None:
    collector = RunCollectorCallbackHandler()
    (RunnableLambda(lambda values: f"Hello {values['name']}!")).invoke({"name": "Ida"}, {"callbacks": [collector]})
    FakeListLLM(responses=[" and answer"]).invoke("Prompt", {"callbacks": [collector]})
    assert written(*collector.traced_runs) == ["<user>Ida<assistant>Hello Ida!", "Prompt and answer"]
    assert read_texts(Calibration(source=collector.traced_runs[1])) == ["Prompt and answer"]  # one run, no list


def test_examples_of_a_data_set_are_read_as_question_and_answer(tmp_path: Path) -> None:
    langsmith = pytest.importorskip("langsmith.schemas")
    ids = {"id": "0" * 32, "dataset_id": "1" * 32}
    inputs = [{"question": "2+2?"}, {"messages": OPENAI[:2]}, {"question": "Who?", "context": "Ida."}]
    outputs = [{"answer": "4"}, {"output": "Yes."}, None]
    examples = [langsmith.Example(inputs=i, outputs=o, **ids) for i, o in zip(inputs, outputs, strict=True)]
    expected = ["<user>2+2?<assistant>4", "<system>Be brief.<user>Rain today?<assistant>Yes."]
    expected.append("<user>question: Who?\n\ncontext: Ida.")
    assert written(*examples) == expected
    file = tmp_path / "examples.json"
    file.write_text(json.dumps([{"inputs": i, "outputs": o} for i, o in zip(inputs, outputs, strict=True)]))
    assert [sample.render(tokenizer()) for sample in read_texts(Calibration(source=file))] == expected


def test_templates_that_refuse_a_form_get_another() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    chat = Conversation(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}])
    assert chat.render(tokenizer(no_system)) == "<user>Be brief.\n\nRain?"
    arguments = "{% for c in m.tool_calls or [] %}{{ c.function.arguments + '' }}{% endfor %}"
    text_arguments = f"{{% for m in messages %}}{arguments}{{% endfor %}}"
    [call] = read_texts(Calibration(source=[OPENAI]))
    assert call.render(tokenizer(text_arguments)) == '{"city": "Bergen"}'
    assert chat.render(tokenizer(None)) == "Be brief.\n\nRain?"
    with pytest.raises(InvalidOptionError, match=r"refuses a conversation .*'Be brief.'\): never"):
        chat.render(tokenizer("{{ raise_exception('never') }}"))


def test_parts_of_a_mix_have_their_shares_of_the_tokens() -> None:
    made = tokenizer()
    digits, words = ["7 " * 3000], ["word " * 200]
    calibration = Calibration(source=[(digits, 3), (words, 1)], samples=40, tokens=16)
    cut = sequences(calibration, read_texts(calibration), made, None)
    seven = made("7 7", add_special_tokens=False)["input_ids"][-1]
    of_digits = [seven in ids for ids in cut]
    assert len(cut) == 40
    assert sum(of_digits) == 30
    assert of_digits[:30] != [True] * 30  # in any order
    assert calibration.source_label == "1 texts (75%), 1 texts (25%)"
    whole = Calibration(source=[(TEXTS, 0.5), ("built-in", 0.5)], samples=4, tokens=16)
    assert len(sequences(whole, read_texts(whole), made, None)) == 4


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([3], "row 1 of the calibration is of type int; it must be a text, a list of messages"),
        (["a", HumanMessage("b")], "row 2 of the calibration is of type HumanMessage; it must be a text, a list of"),
        ([{"messages": []}], "row 1 of the calibration holds no list of messages"),
        ([{"messages": [{"role": "boss", "content": "a"}]}], "message 1 of row 1 of the calibration has role 'boss'"),
        ([[HumanMessage([{"type": "image", "url": "x"}])]], "holds a block of type 'image'"),
        ([[{"role": "ai", "content": "", "tool_calls": [{"name": "f", "args": "x"}]}]], "arguments that are no object"),
        ([{"inputs": {}}], "row 1 of the calibration has inputs='{}', which is no object with content"),
        ([("a.txt", -1.0), ("b.txt", 2)], "share -1.0; shares are positive"),
        ([("built-in", 0.5), ("none", 0.5)], "'none' cannot be a part"),
        ([("missing.jsonl", 0.5), ("built-in", 0.5)], "missing.jsonl cannot be read"),
    ],
)
def test_what_is_no_sample_is_refused_by_its_place(source: Any, words: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        read_texts(Calibration(source=source))
    assert words in str(caught.value)
