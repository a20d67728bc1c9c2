"""A short form of `python -m benchmarks.validity`: what is constrained is valid, twice checked, and varies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from benchmarks.validity import (
    CASES,
    FORCED,
    FURTHER,
    STRUCTURED,
    Case,
    Question,
    Unconstrained,
    ask,
    ask_all,
    questions,
)
from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.models import pipeline_of, tiny_model

pytest.importorskip("xgrammar")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def chat(request: pytest.FixtureRequest, tokenizer: Any, smollm2: Path) -> Iterator[ChatQuantizedHuggingFace]:
    fields: dict[str, Any] = {"model": str(smollm2), "quantization": "nf4", "device": "cpu", "progress": False}
    if request.param == "tiny":
        fields = {"pipeline": pipeline_of(tiny_model(len(tokenizer)), tokenizer)}
    chat = ChatQuantizedHuggingFace(**fields)
    yield chat
    chat.unload()


def test_every_answer_is_valid_and_seeds_vary_it(chat: Any) -> None:
    forced = [Question(c, FORCED[i % 2], i, CASES[i - 1]) for i, c in enumerate(CASES)]
    structured = [Question(c, STRUCTURED[i % 2], i, c) for i, c in enumerate(CASES[::2])]
    again = [Question(q.case, q.kind, 100, q.case) for q in structured[:2]]
    answers = ask_all(chat, forced + structured + again)
    assert [(a.question.case.name, a.question.kind, a.error, a.message) for a in answers if a.error] == []
    assert len({(a.question.case.name, a.value) for a in answers}) == len(answers)


def test_every_answer_of_a_further_class_is_valid(chat: Any) -> None:
    answers = ask_all(chat, questions(16, FORCED + STRUCTURED, FURTHER))
    assert [(a.question.case.name, a.question.kind, a.error, a.value) for a in answers if a.error] == []


def test_without_constraints_the_prompt_is_the_same(chat: Any) -> None:
    for kind in (FORCED[0], *STRUCTURED):
        question = Question(CASES[0], kind, 1, CASES[1])
        used = [ask(c, question, max_tokens=2).message.usage_metadata for c in (chat, Unconstrained(llm=chat))]
        assert used[0]["input_tokens"] == used[1]["input_tokens"] > 50


def test_questions_are_spread_over_kinds_and_schemas() -> None:
    asked = questions(200, FORCED)
    assert len({q.seed for q in asked}) == 200
    for case in CASES:
        assert [sum((q.case, q.kind) == (case, kind) for q in asked) for kind in FORCED] == [10, 10]


def test_the_checks_themselves() -> None:
    good = {"day": "2024-02-29", "made_at": "2024-02-01T10:00:00.5Z", "until": None, "guests": 12}
    booking = next(case for case in CASES if case.name == "Booking")
    assert booking.error(good) == ""
    bad: list[dict[str, Any]] = [{"day": "2023-02-29"}, {"made_at": "yesterday"}, {"guests": 13}, {"guests": "3"}]
    for wrong in bad:
        assert booking.error({**good, **wrong})
    reading = next(case for case in CASES if case.name == "reading")
    ok = {"sensor": "s01", "celsius": 1.5, "percent": 5, "at": "2024-02-01T10:00:00+01:00", "level": True}
    assert reading.error(ok) == ""
    assert reading.error({**ok, "at": "2024-02-30T10:00:00Z"})
    assert reading.error({**ok, "percent": 7})


class Part(BaseModel):
    """A part of a machine."""

    name: str
    parts: list[Part] = []


def test_a_class_that_refers_to_itself_as_a_tool(chat: Any) -> None:
    """LangChain writes `{}` for the reference, under which `{"name": "a", "parts": [3]}` would be valid."""
    bound: Any = chat.bind_tools([Part], tool_choice="Part")
    function = bound.kwargs["tools"][0]["function"]
    assert Case("Part", "", "", function["parameters"]).error({"name": "a", "parts": [3]})
    for seed in (1, 2):
        options = {"seed": seed, "temperature": 2.0, "max_new_tokens": 80}
        (call,) = bound.invoke("A chair has legs, a seat and a back.", **options).tool_calls
        assert Part.model_validate(call["args"], strict=True)
