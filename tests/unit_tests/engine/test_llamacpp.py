"""llama.cpp's server by its own names. The suite of behaviours runs against the real one where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, Server
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured import Choice
from tests.support.checkpoints import make_checkpoint
from tests.support.external_servers import Asked, ScriptedServer

pytestmark = [pytest.mark.enable_socket]

TOOL = {"type": "function", "function": {"name": "go", "description": "Go.", "parameters": {"type": "object"}}}


def answer(asked: Asked) -> None:
    """Write a text as llama.cpp does: in pieces without ids, with counts beside the reason."""
    asked.open_stream()
    for piece in ("It is ", "blue"):
        asked.event({"choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": None}]})
    usage = {"completion_tokens": 31, "prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    asked.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage})
    asked.end_stream()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(gives_ids=False, models=[{"id": "tiny", "owned_by": "llamacpp"}]) as made:
        made.script = [answer]
        yield made


@pytest.fixture
def llm(server: ScriptedServer, tmp_path: Path) -> Iterator[QuantizedHuggingFaceLLM]:
    made = QuantizedHuggingFaceLLM(
        model_id=str(make_checkpoint(tmp_path / "tiny", max_position_embeddings=2048)), engine=Server(server.url)
    )
    yield made
    made.unload()


def test_options_go_by_their_names_there_and_others_are_refused(
    server: ScriptedServer, llm: QuantizedHuggingFaceLLM
) -> None:
    llm.invoke("The sea", max_new_tokens=20)
    llm.invoke("The sea", temperature=0.7, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=2**40, max_new_tokens=20)
    llm.invoke("The sea", ignore_eos=True, max_new_tokens=20)
    greedy, sampled, endless = (asked.body for asked in server.asked)
    neutral = {"temperature": 0.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "ignore_eos": False, "mirostat": 0}
    assert neutral.items() <= greedy.items()
    assert {"top_k": 7, "min_p": 0.1, "repeat_penalty": 1.2}.items() <= sampled.items()
    assert sampled["repeat_last_n"] == len(sampled["prompt"]) + 20
    assert 0 <= sampled["seed"] < 2**32 - 1  # this one would ask for a seed by chance
    assert endless["ignore_eos"]
    assert "repetition_penalty" not in sampled
    for option in ({"min_new_tokens": 2}, {"cache_salt": "x"}, {"priority": 3}, {"logprobs": 1}):
        with pytest.raises(InvalidOptionError, match=next(iter(option))):
            llm.invoke("The sea", max_new_tokens=20, **option)


def test_what_it_lacks_and_how_many_tokens_it_has_written_are_told(llm: QuantizedHuggingFaceLLM) -> None:
    [[made]] = llm.generate(["The sea"]).generations
    assert made.text == "It is blue"
    usage = (made.generation_info or {})["usage_metadata"]
    assert usage["output_tokens"] == 31
    assert usage["input_token_details"]["cache_read"] == 2
    assert "gives no token ids" in llm.engine_info.reason
    assert "lacks cache_salt, min_new_tokens, priority" in llm.engine_info.reason


def test_forms_go_as_grammars_and_optional_calls_go_free(server: ScriptedServer, llm: QuantizedHuggingFaceLLM) -> None:
    pytest.importorskip("xgrammar")
    chat: Any = ChatQuantizedHuggingFace(llm=llm, chat_template="{{ messages[0].content }}")  # type: ignore[call-arg]
    chat.invoke("Well?", constraint=Choice(("yes", "no")))
    assert '"yes"' in server.asked[0].body["grammar"]
    chat.invoke("Well?", tools=[TOOL], tool_choice="required")
    assert "root ::=" in server.asked[1].body["grammar"]
    chat.bind_tools([TOOL]).invoke("Well?")
    assert "grammar" not in server.asked[2].body
