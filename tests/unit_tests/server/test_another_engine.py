"""A server over an engine of others: here one that is a server of ours itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, Server
from tests.support.checkpoints import edit_json, make_checkpoint
from tests.support.serving import Running, serving

pytestmark = pytest.mark.enable_socket

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
PROMPT = "The sea is"


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    """A server with the weights, and one in front of it without them."""
    folder = make_checkpoint(tmp_path_factory.mktemp("front") / "tiny")
    edit_json(folder / "config.json", max_position_embeddings=512)
    below = QuantizedHuggingFaceLLM(model_id=str(folder))
    with serving(below, api_key="a-key") as back:
        llm = QuantizedHuggingFaceLLM(model_id=str(folder), engine=Server(back.url, api_key="a-key"))
        chat = ChatQuantizedHuggingFace(llm=llm, chat_template=TEMPLATE)  # type: ignore[call-arg]
        with serving(chat) as front:
            yield back, front
        llm.unload()
    below.unload()


@pytest.fixture
def client(ends: tuple[Running, Running]) -> Iterator[openai.OpenAI]:
    with ends[1].client() as client:
        yield client


def test_completions_are_those_of_the_engine(ends: tuple[Running, Running], client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "logprobs": 2}
    made = client.completions.create(**options)
    with ends[0].client("a-key") as below:
        expected = below.completions.create(**options)
    assert made.choices == expected.choices
    streamed = client.completions.create(**options, stream=True)
    assert "".join(part.choices[0].text for part in streamed if part.choices) == made.choices[0].text


@pytest.mark.parametrize(
    ("form", "allowed"),
    [({"choice": ["red", "blue"]}, {"red", "blue"}), ({"json": {"type": "boolean"}}, {True, False})],
)
def test_forms_are_held_by_the_engine(client: openai.OpenAI, form: dict[str, Any], allowed: set[Any]) -> None:
    made = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, temperature=1.0, seed=1, extra_body={"structured_outputs": form}
    )
    text = made.choices[0].text
    assert (json.loads(text) if "json" in form else text) in allowed


def test_answers_of_chats(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 8}
    made = client.chat.completions.create(**options)
    streamed = list(client.chat.completions.create(**options, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in streamed if part.choices)
    assert made.usage is not None
    assert made.usage.completion_tokens == 8
    assert text == made.choices[0].message.content != ""


def test_what_is_told_beside_answers(ends: tuple[Running, Running]) -> None:
    front = ends[1]
    ids = front.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert len(ids["tokens"]) == len(ids["token_strs"]) == ids["count"]
    assert front.post("/detokenize", {"tokens": ids["tokens"]}).json()["prompt"].strip() == PROMPT
    [card] = front.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 512)
    assert front.get("/health").status_code == 200
    assert "quantllm_generation_tokens" in front.get("/metrics").text


def test_what_the_engine_lacks_is_an_error_of_the_request(client: openai.OpenAI, ends: tuple[Running, Running]) -> None:
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="tiny", prompt=[1, 10**6], max_tokens=2)
    form = {"structured_outputs": {"json": {"type": "boolean", "minimum": {}}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, extra_body=form)
    assert ends[1].get("/health").status_code == 200
