"""Eight LangChain agents in threads over one model: one running batch, and each agent acts as it does alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from pydantic import Field

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.models import pipeline_of, tiny_model

pytest.importorskip("xgrammar")


def weather(city: str, days: Annotated[int, Field(ge=1, le=7)]) -> str:
    """Get the weather of a city for some days."""
    return f"{days} days of snow in {city}"


def price(item: str, currency: Literal["EUR", "USD"]) -> str:
    """Look up what an item costs."""
    return f"{item}: {len(item) * 3}.50 {currency}"


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def translate(text: str, language: Literal["French", "German"]) -> str:
    """Translate a text."""
    return f"{text} in {language}"


def distance(start: str, end: str) -> str:
    """Measure the distance between two places."""
    return f"{start} to {end}: {10 * len(start + end)} km"


def remind(day: Literal["Monday", "Friday"], text: str) -> str:
    """Set a reminder."""
    return f"{day}: {text}"


def stock(sku: Annotated[int, Field(ge=100, le=999)]) -> str:
    """Count what is left of an article."""
    return f"{sku % 7} left of {sku}"


def clock(city: str, summer: bool) -> str:
    """Tell the time in a city."""
    return f"It is {12 + summer} o'clock in {city}"


TASKS: list[tuple[Callable[..., Any], str]] = [
    (weather, "What will the weather be in Oslo for three days?"),
    (price, "How many euros is a lamp?"),
    (add, "What is 21 plus 13?"),
    (translate, "Say good morning in French."),
    (distance, "How far is it from Oslo to Bergen?"),
    (remind, "On Friday I have to buy milk."),
    (stock, "Are there any of article 340 left?"),
    (clock, "What time is it in Cairo in winter?"),
]


class Calls(AgentMiddleware):
    """Forces a number of calls and then an answer, because small models do neither by themselves."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        done = sum(isinstance(message, ToolMessage) for message in request.messages)
        choice = "any" if done < self.calls else "none"
        settings = {"max_tokens": 64 if done < self.calls else 4, "parallel_tool_calls": False}
        return handler(request.override(tool_choice=choice, model_settings=settings))


@pytest.fixture(
    scope="module",
    params=[pytest.param("tiny", marks=pytest.mark.compat), pytest.param("smollm2", marks=pytest.mark.slow)],
)
def chat(request: pytest.FixtureRequest, tokenizer: Any, smollm2: Path) -> Iterator[ChatQuantizedHuggingFace]:
    """In float32, where batching changes logits by far less than the best two differ."""
    fields: dict[str, Any] = {"model": str(smollm2), "dtype": "float32", "device": "cpu", "progress": False}
    if request.param == "tiny":
        fields = {"pipeline": pipeline_of(tiny_model(len(tokenizer)), tokenizer)}
    chat = ChatQuantizedHuggingFace(**fields, temperature=0)
    yield chat
    chat.unload()


def _calls(i: int) -> int:
    return 2 if i == 3 else 1


def run(chat: ChatQuantizedHuggingFace, i: int) -> list[Any]:
    """Run an agent and return its messages: contents, names and arguments of calls, without the random ids."""
    tool, question = TASKS[i]
    agent: Any = create_agent(
        chat, [tool], system_prompt=f"You are agent {i}. Use your tool.", middleware=[Calls(_calls(i))]
    )
    messages: list[BaseMessage] = agent.invoke({"messages": [("human", question)]})["messages"]
    calls = [[(c["name"], c["args"]) for c in m.tool_calls] if isinstance(m, AIMessage) else [] for m in messages]
    return [(m.type, m.text, called) for m, called in zip(messages, calls, strict=True)]


def test_eight_agents_share_one_batch_and_do_what_they_do_alone(
    chat: ChatQuantizedHuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = chat.load()._engine()._runner
    run_step = runner.run
    rows: list[int] = []

    def count(step: Any, *args: Any) -> Any:
        if step.decoding:
            rows.append(len(step.decoding))
        return run_step(step, *args)

    monkeypatch.setattr(runner, "run", count)
    # One token a step, and no keys and values of an earlier run.
    by_itself = ChatQuantizedHuggingFace(llm=chat, prefix_caching=False, speculation="off")
    beside = ChatQuantizedHuggingFace(llm=chat, speculation="off")
    alone = [run(by_itself, i) for i in range(len(TASKS))]
    tokens_alone = list(rows)
    assert set(tokens_alone) == {1}
    rows.clear()
    barrier = threading.Barrier(len(TASKS))

    def start(i: int) -> list[Any]:
        barrier.wait()
        return run(beside, i)

    with ThreadPoolExecutor(len(TASKS)) as executor:
        together = list(executor.map(start, range(len(TASKS))))
    for i, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one == other
        called = [call for _, _, calls in one for call in calls]
        assert [name for name, _ in called] == [TASKS[i][0].__name__] * _calls(i)
        assert one[-1][0] == "ai"
        assert one[-1][1]
    assert sum(rows) == len(tokens_alone)  # the same tokens, sampled in far fewer steps
    assert max(rows) == len(TASKS)
    assert len(rows) < len(tokens_alone) / 3
