"""What is wrong with a request is said with OpenAI's status and body, names the field, and harms no other request."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

import openai
import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.server import create_app
from langchain_quantllm.server.access import check_listening
from langchain_quantllm.server.fields import IGNORED, NEUTRAL, ChatBody, CompletionBody
from tests.support.models import fail_at, forwards, wait_until
from tests.support.serving import Running, serving

pytestmark = pytest.mark.enable_socket

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
JSON = {"content-type": "application/json"}


def refused(server: Running, body: Any, path: str = "/v1/completions") -> dict[str, Any]:
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?"))
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "8"),
        ("max_tokens", 1.5),
        ("temperature", -1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 129),
        ("seed", "x"),
        ("stop", 3),
        ("stop", [""]),
        ("stop_token_ids", [10**6]),
        ("stop_token_ids", [-1]),
        ("logprobs", 21),
        ("stream", "yes"),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"include_usage": True}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}),
        ("structured_outputs", {"nothing": 1}),
        ("response_format", {"type": "xml"}),
        ("cache_salt", ""),
        ("speculation", "eagle"),
        ("speculation", "draft"),  # without a draft model
        ("prompt", []),
        ("prompt", ["a", 1]),
        ("prompt", [[1], []]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", None),
        ("echo", True),
        ("suffix", "x"),
        ("best_of", 2),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
        ("priority", 1),
    ],
)
def test_a_value_that_is_not_possible_is_named(server: Running, field: str, value: Any) -> None:
    assert refused(server, {"prompt": "a", "max_tokens": 1, field: value})["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hi"),
        ("messages", ["hi"]),
        ("top_logprobs", 2),
        ("logprobs", 3),
        ("tools", {}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "g"}}),
        ("response_format", {"type": "json_schema"}),
        ("chat_template_kwargs", []),
        ("reasoning_effort", "high"),
        ("modalities", ["audio"]),
        ("functions", []),
        ("max_completion_tokens", 0),
    ],
)
def test_a_value_that_a_chat_does_not_take_is_named(server: Running, field: str, value: Any) -> None:
    assert refused(server, {"messages": MESSAGES, field: value}, "/v1/chat/completions")["param"] == field


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "robot", "content": "x"},
        {"role": ["user"], "content": "x"},
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
        {"role": "assistant", "content": "", "tool_calls": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 3}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ],
)
def test_a_message_that_cannot_be_read_is_told(server: Running, message: Any) -> None:
    assert "message" in refused(server, {"messages": [*MESSAGES, message]}, "/v1/chat/completions")["message"]


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(server: Running) -> None:
    assert refused(server, {"prompt": [5] * 9000})["code"] == "context_length_exceeded"
    assert refused(server, {"prompt": [[5] * 9000, [5]]})["code"] == "context_length_exceeded"
    assert "not in the model's vocabulary" in refused(server, {"prompt": [10**6]})["message"]
    assert "1040 sequences" in refused(server, {"prompt": ["a"] * 65, "n": 16})["message"]


def test_an_unknown_field_is_told_with_the_one_that_is_meant(server: Running) -> None:
    error = refused(server, {"prompt": "a", "max_token": 3})
    assert (error["param"], error["code"]) == ("max_token", "unknown_parameter")
    assert "did you mean 'max_tokens'?" in error["message"]


def test_fields_that_change_no_text_are_taken(server: Running) -> None:
    ignored = {**dict.fromkeys(IGNORED, "x"), **{name: value[0] for name, value in NEUTRAL.items() if value}}
    plain = server.post("/v1/completions", {"prompt": "a", "max_tokens": 4}).json()["choices"]
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 4, **ignored}).json()["choices"] == plain
    nothing: dict[str, Any] = dict.fromkeys({*NEUTRAL, *CompletionBody.model_fields} - {"prompt"})
    assert server.post("/v1/completions", {**nothing, "prompt": "a", "max_tokens": 4}).json()["choices"] == plain
    assert not (IGNORED | NEUTRAL.keys()) & (CompletionBody.model_fields.keys() | ChatBody.model_fields.keys())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"prompt": "a", "temperature": NaN}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"a": 1' + b"0" * 5000,
    ],
)
def test_a_body_that_is_no_object_of_json_is_told(server: Running, content: bytes) -> None:
    response = server.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("depth", [400, 480, 900])
def test_values_that_are_nested_deeply_are_no_failure_of_the_server(server: Running, depth: int) -> None:
    nested = json.loads('{"a": ' * depth + "1" + "}" * depth)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps(nested)}}
    for given in (
        {"chat_template_kwargs": {"documents": nested}},
        {"chat_template_kwargs": {"date_string": nested}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested}}]},
        {"response_format": nested},
        {"messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, *MESSAGES]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "more": nested}]}]},
    ):
        response = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, **given})
        assert response.status_code in (200, 400), (list(given), response.text)
        assert response.status_code == 200 or response.json()["error"]["message"]


def test_halves_of_characters_do_no_harm(server: Running) -> None:
    for body in (
        b'{"prompt": "\\ud800 x", "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
    ):
        path = "/v1/completions" if b"prompt" in body else "/v1/chat/completions"
        body = body.replace(b'"}]}', b'"}], "max_tokens": 2}')
        assert server.post(path, content=body, headers=JSON).status_code == 200
    response = server.post("/v1/completions", content=b'{"prompt": "a", "model": "\\ud800"}', headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_each_kind_of_refusal_has_its_status(server: Running) -> None:
    assert server.post("/v1/completions", {"prompt": "a", "model": "gpt-4"}).status_code == 404
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert server.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    rebound = server.get("/v1/models", headers={"host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "wrong_host")
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert server.get(path).status_code == 404
    assert "access-control-allow-origin" not in server.get("/v1/models", headers={"origin": "http://x"}).headers


def test_a_body_that_is_too_large_is_not_read(tiny: QuantizedHuggingFaceLLM) -> None:
    with serving(tiny, max_body_bytes=1000) as server:
        for options in ({"json": {"prompt": "a" * 2000}}, {"content": iter([b"a" * 600] * 3), "headers": JSON}):
            response = server.post("/v1/completions", **options)  # type: ignore[arg-type]
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_bodies_are_bounded_together(tiny: QuantizedHuggingFaceLLM) -> None:
    body = {"prompt": "a", "max_tokens": 1, "user": "u" * 500}
    with serving(tiny, max_body_bytes=1000) as server, contextlib.ExitStack() as slow:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        for _ in range(8):  # bodies whose last byte does not come
            client = slow.enter_context(socket.create_connection(address))
            client.sendall(head + b"content-length: 1000\r\n\r\n" + b" " * 999)
        wait_until(lambda: server.service.calls.body_bytes == 8 * 999)
        response = server.post("/v1/completions", body)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "bodies_full")
        assert response.headers["retry-after"]
        slow.close()
        wait_until(lambda: server.service.calls.body_bytes == 0)
        assert server.post("/v1/completions", body).status_code == 200
        assert server.service.calls.body_bytes == 0


def test_a_key_is_asked_for_everywhere_but_at_the_probe(tiny: QuantizedHuggingFaceLLM) -> None:
    with serving(tiny, api_key="s3cret") as server:
        for path in ("/v1/models", "/metrics"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
                response = server.get(path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert server.get(path, headers={"authorization": "Bearer s3cret", "host": "a.example"}).status_code == 200
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 401
        assert server.get("/health").json() == {"status": "ok"}
        with (
            server.client("wrong") as client,
            pytest.raises(openai.AuthenticationError, match="the API key is missing"),
        ):
            client.models.list()
        with server.client("s3cret") as client:
            assert client.models.list().data


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com", ""])
def test_other_machines_are_served_with_a_key_only(host: str) -> None:
    with pytest.raises(InvalidOptionError, match="give --api-key, set QUANTLLM_API_KEY"):
        check_listening(host, None)
    check_listening(host, "key")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_is_served_without_a_key(host: str) -> None:
    check_listening(host, None)


@pytest.mark.parametrize("key", ["", "  ", "schlüssel", "a\nb", " padded ", "a b"])
def test_a_key_that_no_header_can_hold_is_refused(tiny: QuantizedHuggingFaceLLM, key: str) -> None:
    with pytest.raises(InvalidOptionError, match="API key"):
        check_listening("127.0.0.1", key)
    with pytest.raises(InvalidOptionError, match="API key"):  # an empty one would let everybody in
        create_app(tiny, api_key=key)


def test_a_failure_inside_tells_a_stranger_nothing(server: Running, tiny: QuantizedHuggingFaceLLM) -> None:
    body = {"prompt": "a", "max_tokens": 8}
    with forwards(tiny, fail_at(3, RuntimeError("/home/secret"))):
        response = server.post("/v1/completions", body)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the model failed; the server's log has the reason."
    with forwards(tiny, fail_at(3, RuntimeError("/home/secret"))):
        lines = [line for line in server.post("/v1/completions", {**body, "stream": True}).text.split("\n") if line]
    *texts, failure, end = lines
    assert texts
    assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in failure
    assert end == "data: [DONE]"
    with forwards(tiny, fail_at(3, RuntimeError("/home/secret"))), server.client() as client:
        events = client.completions.create(model="acme/tiny", prompt="a", max_tokens=8, stream=True)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(events)
    assert server.post("/v1/completions", body).status_code == 200
    assert server.outcomes("completions")["failed"] == 3
