"""Clients that go away, queues that are full, and servers that begin and end: nothing is lost and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM, Server
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.server.run import listen
from tests.support.adapters import make, make_adapter_folders
from tests.support.checkpoints import make_checkpoint
from tests.support.models import forwards, slowly, wait_until
from tests.support.serving import Running, serving

pytestmark = pytest.mark.enable_socket

LONG = {"prompt": "The sea is", "max_tokens": 4000}
REST = (0, 0, 0)


def test_the_engine_stops_when_the_client_of_a_stream_goes_away(server: Running) -> None:
    before = server.outcomes("completions").get("cancelled", 0)
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as response,
    ):
        assert next(response.iter_lines()).startswith("data: ")
        assert server.load[0] == 1
    wait_until(lambda: server.load == REST, 30)
    wait_until(lambda: server.outcomes("completions").get("cancelled", 0) == before + 1, 30)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_engine_stops_when_the_client_of_a_whole_answer_goes_away(server: Running, path: str) -> None:
    body = dict(LONG) if "chat" not in path else {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000}

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            task = asyncio.create_task(client.post(f"{server.url}{path}", json={**body, "n": 3}))
            await asyncio.to_thread(wait_until, lambda: server.load[0] == 3, 30)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(ask_and_leave())
    wait_until(lambda: server.load == REST, 30)


def test_many_clients_get_their_own_answers_beside_wrong_and_broken_ones(
    server: Running, tiny: QuantizedHuggingFaceLLM
) -> None:
    prompts = [f"Number {i} is" for i in range(48)]
    expected = tiny.batch(prompts, max_new_tokens=6)

    def ask(i: int) -> Any:
        body = {"prompt": prompts[i], "max_tokens": 6, "temperature": 0}
        if i % 6 == 1:
            return server.post("/v1/completions", {**body, "temperature": -1}).status_code
        if i % 6 == 2:
            with httpx.Client(timeout=60) as client:
                sent = {**body, "stream": True, "max_tokens": 4000}
                with client.stream("POST", f"{server.url}/v1/completions", json=sent) as response:
                    return response.status_code
        if i % 6 == 3:
            lines = server.post("/v1/completions", {**body, "stream": True}).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            return "".join(event["choices"][0]["text"] for event in events)
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(ask, range(48)))
    for i, answer in enumerate(found):
        assert answer == {1: 400, 2: 200}.get(i % 6, expected[i])
    wait_until(lambda: server.load == REST, 30)


def test_a_full_queue_is_told_and_the_others_go_on(tiny: QuantizedHuggingFaceLLM) -> None:
    limited = tiny.model_copy(update={"batch_size": 1})
    goes_on = threading.Event()

    def wait(number: int) -> None:
        goes_on.wait(0.3)

    with (
        serving(limited, max_waiting=1) as server,
        forwards(tiny, wait),
        ThreadPoolExecutor(2) as threads,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(goes_on.set)
        body = {"prompt": "a", "max_tokens": 100}
        first = threads.submit(server.post, "/v1/completions", body)
        wait_until(lambda: server.load[0] == 1, 30)
        second = threads.submit(server.post, "/v1/completions", body)
        wait_until(lambda: server.service.served.engine._scheduler.waiting_count == 1, 30)
        third = server.post("/v1/completions", body)
        assert (third.status_code, third.json()["error"]["type"]) == (429, "rate_limit_error")
        assert third.headers["retry-after"] == "1"
        goes_on.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
        assert server.outcomes("completions") == {"ok": 2, "refused": 1}


def test_requests_are_refused_while_the_model_is_loaded_and_after_that_failed(tmp_path: Path) -> None:
    failed = threading.Event()
    llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path), progress=False)
    with serving(llm, waits=False, on_failure=failed.set) as server:
        assert failed.wait(60)
        response = server.post("/v1/completions", {"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert str(tmp_path) not in response.text
        assert (server.get("/health").status_code, server.get("/health").json()) == (503, {"status": "failed"})
        server.service.served.failure = None
        assert "is being loaded" in server.post("/v1/completions", {"prompt": "a"}).text
        assert server.get("/metrics").status_code == 200


def test_a_server_that_closes_cancels_what_runs_and_says_so(tiny: QuantizedHuggingFaceLLM) -> None:
    with serving(tiny, closing_s=0.2) as server, httpx.Client(timeout=60) as client:
        sent = {**LONG, "stream": True}
        with client.stream("POST", f"{server.url}/v1/completions", json=sent) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.stop()
            last = [line for line in lines if line][-2:]
        assert "the server is closing" in last[0]
        assert last[1] == "data: [DONE]"
        server.thread.join(30)
        assert not server.thread.is_alive()
        wait_until(lambda: server.load == REST, 30)
    assert tiny.invoke("a", max_new_tokens=2)  # it is its owner's, and stays loaded


def test_a_server_that_closes_lets_what_runs_end(tiny: QuantizedHuggingFaceLLM) -> None:
    with serving(tiny, closing_s=30) as server, forwards(tiny, slowly(0.02)), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, "/v1/completions", {"prompt": "a", "max_tokens": 20})
        wait_until(lambda: server.load[0] == 1, 30)
        server.server.stop()
        assert answer.result().json()["usage"]["completion_tokens"] == 20


def test_the_metrics_count_requests_tokens_and_times(tiny: QuantizedHuggingFaceLLM) -> None:
    with serving(tiny) as server:
        server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4, "n": 2})
        server.post("/v1/completions", {"prompt": ""})
        server.post("/tokenize", {"prompt": "a"})
        lines = server.get("/metrics").text.splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
    assert values['quantllm_requests_total{endpoint="completions",outcome="ok"}'] == 1
    assert values['quantllm_requests_total{endpoint="completions",outcome="invalid"}'] == 1
    assert values['quantllm_requests_total{endpoint="tokenize",outcome="ok"}'] == 1
    assert values["quantllm_prompt_tokens_total"] == 6
    assert values["quantllm_generation_tokens_total"] == 8
    assert values["quantllm_time_to_first_token_seconds_count"] == 2
    assert values["quantllm_time_per_output_token_seconds_count"] == 2
    assert values["quantllm_requests_running"] == values["quantllm_requests_waiting"] == 0
    assert values["quantllm_requests_in_flight"] == values["quantllm_kv_cache_tokens_used"] == 0
    assert values["quantllm_kv_cache_tokens"] == tiny.engine_info.kv_cache_tokens


@pytest.mark.slow
def test_adapters_are_models_of_their_names(tmp_path: Path) -> None:
    llm = make(make_adapter_folders(tmp_path))
    with serving(llm, name="tiny") as server, server.client() as client:
        assert [card.id for card in client.models.list().data] == ["tiny", "sql", "chat"]
        texts = {}
        for name in ("tiny", "sql", "chat"):
            made = client.completions.create(model=name, prompt="One", max_tokens=8, temperature=0)
            assert made.model == name
            texts[name] = made.choices[0].text
        assert texts == {n: llm.invoke("One", max_new_tokens=8, adapter="base" if n == "tiny" else n) for n in texts}
        assert len(set(texts.values())) == 3
    llm.unload()


def test_a_server_of_the_pipeline_engine_answers_too(tiny: QuantizedHuggingFaceLLM) -> None:
    with serving(tiny.model_copy(update={"engine": "pipeline"})) as server, server.client() as client:
        made = client.completions.create(model="acme/tiny", prompt="One", max_tokens=8, temperature=0)
        assert made.choices[0].text == tiny.invoke("One", max_new_tokens=8)
        assert server.service.served.load_now.running == 0


def test_a_server_of_an_engine_of_others_answers_too(tmp_path: Path) -> None:
    below = QuantizedHuggingFaceLLM(model_id=str(make_checkpoint(tmp_path / "tiny")), dtype="float32", progress=False)
    with serving(below) as inner:
        llm = QuantizedHuggingFaceLLM(model_id=below.model_id, engine=Server(inner.url), progress=False)
        with serving(llm) as outer:
            body = {"prompt": "The sea", "max_tokens": 6, "temperature": 0, "logprobs": 1}
            made, expected = (server.post("/v1/completions", body).json() for server in (outer, inner))
            assert [choice["text"] for choice in made["choices"]] == [choice["text"] for choice in expected["choices"]]
            held = outer.post("/v1/completions", {**body, "structured_outputs": {"choice": ["yes", "no"]}})
            assert held.json()["choices"][0]["text"] in ("yes", "no")
            assert outer.post("/tokenize", {"prompt": "The sea"}).json()["tokens"] == below.get_token_ids("The sea")
            gate = threading.Event()

            def wait(number: int) -> None:
                gate.wait(60)

            with forwards(below, wait), ThreadPoolExecutor(1) as threads:
                answer = threads.submit(outer.post, "/v1/completions", body)
                wait_until(lambda: "quantllm_requests_running 1.0" in outer.get("/metrics").text, 30)
                gate.set()
                assert answer.result().status_code == 200
            wait_until(lambda: "quantllm_requests_running 0.0" in outer.get("/metrics").text, 30)
        llm.unload()
    below.unload()


@pytest.mark.slow
def test_smollm2_answers_openais_client(llm: QuantizedHuggingFaceLLM) -> None:
    with serving(llm) as server, server.client() as client:
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        made = client.chat.completions.create(
            model=server.service.served.name, messages=question, max_tokens=12, temperature=0
        )
    assert "Paris" in str(made.choices[0].message.content)


@pytest.mark.parametrize("port", [-1, 65536, 70000, 2**40])
def test_a_port_that_there_is_not_is_refused_and_no_other_opened(port: int) -> None:
    with pytest.raises(InvalidOptionError, match="it must be 0 to 65535"):
        listen("127.0.0.1", port)


def test_an_address_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(InvalidOptionError, match="cannot be listened on"):
        listen("127.0.0.1", taken.getsockname()[1])
