"""The engine over servers: what goes there, what comes back, and every way in which a server can fail."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, Server
from langchain_quantllm.errors import (
    GenerationError,
    InvalidOptionError,
    PromptTooLongError,
    QueueFullError,
    ServerError,
    UnsupportedError,
)
from langchain_quantllm.structured import Choice, Grammar, JSONSchema, Regex
from tests.support.checkpoints import edit_json, make_checkpoint, make_tokenizer
from tests.support.engine import Background
from tests.support.external_servers import HOST, Asked, ScriptedServer
from tests.support.models import wait_until

pytestmark = pytest.mark.enable_socket

PROMPT = "The sea is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its weights."""
    path = make_checkpoint(tmp_path_factory.mktemp("server") / "tiny")
    for file in path.glob("*.safetensors"):
        file.unlink()
    edit_json(path / "config.json", max_position_embeddings=1 << 21)
    return path


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(tokenizer=make_tokenizer()) as made:
        yield made


class Made:
    """Makes LLMs over servers, and ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.llms: list[QuantizedHuggingFaceLLM] = []

    def __call__(self, server: ScriptedServer | str, fields: dict[str, Any] | None = None, **options: Any) -> Any:
        url = server if isinstance(server, str) else server.url
        engine = Server(url, **{"read_timeout_s": 20, **options})
        given = {"max_new_tokens": 8, "eos_token_id": 1, **(fields or {})}
        self.llms.append(QuantizedHuggingFaceLLM(model_id=str(self._folder), engine=engine, **given))
        return self.llms[-1]


@pytest.fixture
def make_llm(folder: Path) -> Iterator[Made]:
    made = Made(folder)
    yield made
    for llm in made.llms:
        llm.unload()


def ids_of(text: str) -> list[int]:
    ids: list[int] = make_tokenizer().encode(text)
    return ids


def write(text: str, reason: str = "stop") -> Any:
    """Make a script that writes a text, token by token."""

    def script(asked: Asked) -> None:
        asked.open_stream()
        ids = ids_of(text)
        for i in ids[:-1]:
            asked.tokens([i])
        asked.tokens(ids[-1:], reason=reason)
        usage = {"prompt_tokens": 3, "completion_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": 2}}
        asked.event({"choices": [], "usage": usage})
        asked.end_stream()

    return script


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "quantllm-server"]


class TestWhatIsSent:
    def test_every_option_goes_with_its_value(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write(" blue")]
        llm = make_llm(server, api_key="a-secret")
        assert llm.invoke(PROMPT) == " blue"
        llm.invoke(PROMPT, temperature=0.7, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=5)
        llm.invoke(PROMPT, max_new_tokens=3, min_new_tokens=2, ignore_eos=True, priority=4, cache_salt="salt")
        greedy, sampled, others = (asked.body for asked in server.asked)
        assert greedy["model"] == "tiny"
        assert greedy["prompt"] == ids_of(PROMPT)
        fixed = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert fixed.items() <= greedy.items()
        assert "seed" not in greedy
        assert {"max_tokens": 8, "stop_token_ids": [1], "ignore_eos": False, "return_token_ids": True}.items() <= (
            greedy.items()
        )
        chosen = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 5}
        assert chosen.items() <= sampled.items()
        assert {"max_tokens": 3, "min_tokens": 2, "ignore_eos": True, "priority": 4, "cache_salt": "salt"}.items() <= (
            others.items()
        )
        assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer a-secret"}

    def test_samples_have_seeds_of_their_own_that_repeat(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write(" blue")]
        llm = make_llm(server)
        for _ in range(2):
            llm.generate([PROMPT], n=3, temperature=1.0, seed=9)
        seeds = [asked.body["seed"] for asked in server.asked]
        assert 9 in seeds[:3]
        assert len(set(seeds[:3])) == 3
        assert sorted(seeds[:3]) == sorted(seeds[3:])

    def test_prompts_that_share_nothing_have_salts_of_their_own(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write(" blue")]
        llm = make_llm(server, {"prefix_caching": False})
        llm.batch([PROMPT, PROMPT])
        assert len({asked.body["cache_salt"] for asked in server.asked}) == 2

    def test_at_most_max_connections_requests_are_there_at_once(self, server: ScriptedServer, make_llm: Made) -> None:
        running, most = itertools.count(), []
        now = [0]
        lock = threading.Lock()

        def script(asked: Asked) -> None:
            with lock:
                now[0] += 1
                most.append(now[0])
            time.sleep(0.02)
            with lock:
                now[0] -= 1
            write(f" {next(running)}")(asked)

        server.script = [script]
        assert len(make_llm(server, max_connections=3).batch([PROMPT] * 20)) == 20
        assert max(most) <= 3
        most.clear()
        assert len(make_llm(server, {"batch_size": 2}).batch([PROMPT] * 10)) == 10
        assert max(most) <= 2

    def test_a_full_queue_says_so(self, server: ScriptedServer, make_llm: Made) -> None:
        release = threading.Event()

        def script(asked: Asked) -> None:
            release.wait(20)
            write(" blue")(asked)

        server.script = [script]
        llm = make_llm(server, {"max_waiting": 1}, max_connections=1)
        with Background(lambda: llm.invoke(PROMPT)), Background(lambda: llm.invoke(PROMPT)):
            wait_until(lambda: llm._engine().load.waiting == 1)
            assert len(server.asked) <= 1
            with pytest.raises(QueueFullError, match="max_waiting=1"):
                llm.invoke(PROMPT)
            release.set()

    def test_a_stream_that_is_closed_before_it_begins_leaves_the_queue(
        self, server: ScriptedServer, make_llm: Made
    ) -> None:
        server.script = [write(" blue")]
        llm = make_llm(server, {"max_waiting": 1}, max_connections=1)
        engine, begin = llm._engine(), threading.Event()
        engine._thread.post(begin.wait, 60)
        for _ in range(2):
            engine.submit(llm._requests(PROMPT, llm._options(None, {}))).close()
        begin.set()
        wait_until(lambda: not engine._unended, 20)
        assert llm.invoke(PROMPT) == " blue"

    def test_calls_that_have_ended_leave_nothing(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write(" blue")]
        llm = make_llm(server)
        assert llm.generate([]).generations == []
        assert llm.batch([PROMPT, PROMPT]) == [" blue", " blue"]
        engine = llm._engine()
        wait_until(lambda: not engine._streams and not engine._unended and not engine._places._owners, 20)


class TestWhatComesBack:
    def test_cached_tokens_and_reasons(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write(" blue and wide", reason="length")]
        [[made]] = make_llm(server, {"max_new_tokens": 50}).generate([PROMPT]).generations
        info = made.generation_info or {}
        assert info["usage_metadata"]["input_token_details"]["cache_read"] == 2
        assert info["usage_metadata"]["output_tokens"] == len(ids_of(" blue and wide"))
        assert info["finish_reason"] == "length"

    def test_log_probabilities_by_ids(self, server: ScriptedServer, make_llm: Made) -> None:
        one, two = ids_of("a")[0], ids_of("b")[0]

        def script(asked: Asked) -> None:
            asked.open_stream()
            found = {
                "tokens": [f"token_id:{one}"],
                "token_logprobs": [-0.5],
                "top_logprobs": [{f"token_id:{two}": -1.5, f"token_id:{one}": -0.5, "token_id:7": -9.0}],
            }
            choice = {"index": 0, "text": "", "token_ids": [one], "logprobs": found, "finish_reason": "stop"}
            asked.event({"choices": [choice]})
            asked.end_stream()

        server.script = [script]
        [[made]] = make_llm(server).generate([PROMPT], logprobs=2).generations
        [entry] = (made.generation_info or {})["logprobs"]["content"]
        assert (entry["token_id"], entry["logprob"]) == (one, -0.5)
        assert [(top["token_id"], top["logprob"]) for top in entry["top_logprobs"]] == [(one, -0.5), (two, -1.5)]
        assert (server.asked[0].body["logprobs"], server.asked[0].body["return_tokens_as_token_ids"]) == (2, True)

    def test_connections_are_used_again(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write(" blue")]
        llm = make_llm(server)
        for _ in range(4):
            llm.invoke(PROMPT)
        assert len({id(asked.connection) for asked in server.asked}) == 1

    def test_characters_that_end_lines_elsewhere_end_none_here(self, server: ScriptedServer, make_llm: Made) -> None:
        def script(asked: Asked) -> None:
            asked.open_stream()
            data = '{"choices": [{"index": 0, "text": "\u2028\u0085", "token_ids": [%d], "finish_reason": "stop"}]}'
            whole = b": a comment\r\nevent: x\r\ndata: " + (data % ids_of("a")[0]).encode() + b"\r\n\r\n"
            for byte in whole:
                asked.piece(bytes([byte]))
            asked.end_stream()

        server.script = [script]
        assert make_llm(server).invoke(PROMPT) == "a"

    def test_an_answer_that_was_compressed_on_its_way(self, server: ScriptedServer, make_llm: Made) -> None:
        def script(asked: Asked) -> None:
            kind = b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
            asked.send(b"HTTP/1.1 200 X\r\n" + kind)
            event = {"choices": [{"index": 0, "text": "", "token_ids": ids_of("a"), "finish_reason": "stop"}]}
            asked.piece(gzip.compress(b"data: " + json.dumps(event).encode() + b"\n\n"))
            asked.send(b"0\r\n\r\n")

        server.script = [script]
        llm = make_llm(server)
        assert llm.invoke(PROMPT) == "a"
        assert server.asked[0].headers["accept-encoding"] == "identity"

    def test_a_stop_string_ends_the_request_at_the_server(self, server: ScriptedServer, make_llm: Made) -> None:
        cut = threading.Event()

        def script(asked: Asked) -> None:
            asked.open_stream()
            for i in ids_of("one two three"):
                asked.tokens([i])
            if asked.wait_for_cut():
                cut.set()

        server.script = [script]
        assert make_llm(server, {"max_new_tokens": 100}).invoke(PROMPT, stop=["two"]) == "one "
        assert cut.wait(20)

    def test_a_closed_stream_ends_the_request_at_the_server(self, server: ScriptedServer, make_llm: Made) -> None:
        cut = threading.Event()

        def script(asked: Asked) -> None:
            asked.open_stream()
            asked.tokens(ids_of("one two"))
            if asked.wait_for_cut():
                cut.set()

        server.script = [script]
        stream = make_llm(server, {"max_new_tokens": 100}).stream(PROMPT)
        assert next(stream)
        stream.close()
        assert cut.wait(20)

    def test_a_stream_that_is_closed_again_and_again_ends_the_request(
        self, server: ScriptedServer, make_llm: Made
    ) -> None:
        cut = threading.Event()

        def script(asked: Asked) -> None:
            asked.open_stream()
            asked.tokens(ids_of("one two"))
            if asked.wait_for_cut():
                cut.set()

        server.script = [script]
        llm = make_llm(server, {"max_new_tokens": 100})
        engine = llm._engine()
        stream = engine.submit(llm._requests(PROMPT, llm._options(None, {})))
        assert next(iter(stream)).text

        def close(times: int) -> None:  # while the connection is being closed
            stream.close()
            if times:
                engine._thread.loop.call_soon(close, times - 1)

        engine._thread.post(close, 20)
        assert cut.wait(20)

    def test_a_time_limit_ends_the_request_at_the_server_without_a_reader(
        self, server: ScriptedServer, make_llm: Made
    ) -> None:
        cut = threading.Event()

        def script(asked: Asked) -> None:
            asked.open_stream()
            if asked.wait_for_cut():
                cut.set()

        server.script = [script]
        llm = make_llm(server)
        engine = llm._engine()
        stream = engine.submit(llm._requests(PROMPT, llm._options(None, {})), timeout_s=0.5)
        wait_until(lambda: stream.cancelled, 20)
        wait_until(lambda: not engine._unended, 20)
        assert not server.asked or cut.wait(20)  # on a busy machine, time may be over before it was sent
        with pytest.raises(TimeoutError, match=r"timeout=0\.5"):
            list(stream)

    def test_a_reader_that_waits_makes_the_server_wait(self, server: ScriptedServer, make_llm: Made) -> None:
        seen: list[Asked] = []
        big, events = 12288 * "x", 3000

        def script(asked: Asked) -> None:
            asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            seen.append(asked)
            asked.open_stream()
            one = ids_of("a")
            for _ in range(events):
                asked.tokens(one, text=big)
            asked.tokens(one, reason="stop")
            asked.end_stream()

        server.script = [script]
        llm = make_llm(server, {"max_new_tokens": 100})
        stream = llm._engine().submit(llm._requests(PROMPT, llm._options(None, {"max_new_tokens": 1 << 20})))
        wait_until(lambda: stream.is_full, 20)

        def is_still() -> bool:
            before = seen[0].sent_bytes
            time.sleep(0.3)
            return seen[0].sent_bytes == before

        wait_until(is_still, 20)
        assert seen[0].sent_bytes < events * len(big) / 2
        text = "".join(chunk.text for chunk in stream)  # and goes on when it is read
        assert text == "a" * (events + 1)

    def test_texts_of_a_server_without_token_ids(self, make_llm: Made) -> None:
        def script(asked: Asked) -> None:
            asked.open_stream()
            for piece in ("It is b", "lue, a", "nd wide"):
                asked.event({"choices": [{"index": 0, "text": piece, "finish_reason": None}]})
            asked.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
            asked.end_stream()

        with ScriptedServer(gives_ids=False, models=[{"id": "tiny", "owned_by": "someone"}]) as server:
            server.script = [script]
            llm = make_llm(server)
            assert "tokenized again" in llm.engine_info.reason
            assert llm.invoke(PROMPT) == "It is blue, and wide"
            assert llm.invoke(PROMPT, stop=["and"]) == "It is blue, "
            assert server.asked[0].body.keys() == {
                *("model", "prompt", "max_tokens", "temperature", "top_p", "stream", "stream_options"),
            }
            for option in ({"top_k": 3, "temperature": 1.0}, {"repetition_penalty": 1.1}, {"cache_salt": "x"}):
                with pytest.raises(InvalidOptionError, match=next(iter(option))):
                    llm.invoke(PROMPT, **option)
            with pytest.raises(InvalidOptionError, match="logprobs"):
                llm.invoke(PROMPT, logprobs=1)
            with pytest.raises(InvalidOptionError, match="skip_special_tokens"):
                llm.invoke(PROMPT, skip_special_tokens=False)
            with pytest.raises(InvalidOptionError, match=r"eos_token_id=\[7\]"):
                llm.invoke(PROMPT, eos_token_id=7)


class TestFailures:
    def test_nothing_listens(self, make_llm: Made) -> None:
        with socket.create_server((HOST, 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=rf"no server answers at http://{HOST}:{port}/v1"):
            make_llm(f"http://{HOST}:{port}", max_retries=0).load()
        assert not threads()

    def test_a_wrong_key(self, server: ScriptedServer, make_llm: Made) -> None:
        server.answers_models = lambda asked: asked.answer({"error": "no"}, status=401)
        with pytest.raises(ServerError, match=r"refuses a request without a key .*QUANTLLM_API_KEY"):
            make_llm(server).load()
        with pytest.raises(ServerError, match="refuses the key that was sent") as error:
            make_llm(server, api_key="very-secret").load()
        assert "very-secret" not in str(error.value)

    def test_something_else_than_a_server_of_models(self, server: ScriptedServer, make_llm: Made) -> None:
        server.answers_models = lambda asked: asked.answer(b"<html>")
        with pytest.raises(ServerError, match="does not answer with JSON"):
            make_llm(server).load()
        server.answers_models = lambda asked: asked.answer({"detail": "Not Found"}, status=404)
        with pytest.raises(ServerError, match="the base of its addresses"):
            make_llm(server).load()
        server.answers_models = lambda asked: asked.answer(b"", status=307, Location="http://elsewhere.example/v1")
        with pytest.raises(ServerError, match=r"refers to http://elsewhere\.example/v1"):
            make_llm(server).load()

    @pytest.mark.parametrize("status", [200, 404, 500])
    def test_a_compression_that_cannot_be_read(self, server: ScriptedServer, make_llm: Made, status: int) -> None:
        server.answers_models = lambda asked: asked.answer(b"none", status=status, Content_Encoding="gzip")
        with pytest.raises(ServerError, match="compression cannot be read" if status == 200 else f"status {status}"):
            make_llm(server, max_retries=0).load()

    def test_a_config_that_cannot_be_read_leaves_no_connection(self, server: ScriptedServer, tmp_path: Path) -> None:
        broken = make_checkpoint(tmp_path / "tiny")
        edit_json(broken / "config.json", quantization_config={"quant_method": "gptq", "bits": "4"})
        with pytest.raises(InvalidOptionError, match="bits='4'"):
            QuantizedHuggingFaceLLM(model_id=str(broken), engine=Server(server.url)).load()
        assert not threads()

    def test_models_and_adapters_that_it_does_not_have(self, server: ScriptedServer, make_llm: Made) -> None:
        server.models = [{"id": "a/one", "owned_by": "vllm"}, {"id": "two", "owned_by": "vllm"}]
        with pytest.raises(InvalidOptionError, match=r"has no model 'three'; its models are 'a/one', 'two'"):
            make_llm(server, model="three").load()
        with pytest.raises(InvalidOptionError, match=r"name it, Server\(model=\.\.\.\): 'a/one', 'two'"):
            make_llm(server).load()
        with pytest.raises(InvalidOptionError, match="adapter 'sql' is no model of"):
            make_llm(server, {"adapters": {"sql": "./sql"}}, model="two").load()

    def test_another_tokenizer(self, make_llm: Made, tokenizer: Any) -> None:
        with ScriptedServer(tokenizer=tokenizer) as server, pytest.raises(UnsupportedError, match="another tokenizer"):
            make_llm(server).load()

    def test_a_shorter_context_is_the_servers(self, server: ScriptedServer, make_llm: Made) -> None:
        server.models = [{"id": "tiny", "owned_by": "vllm", "max_model_len": 10}]
        with pytest.raises(PromptTooLongError, match="allows 10"):
            make_llm(server).invoke("many words " * 20)

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_busy_server_is_asked_again(self, server: ScriptedServer, make_llm: Made, status: int) -> None:
        def busy(asked: Asked) -> None:
            asked.answer({"error": {"message": "too much"}}, status=status, Retry_After="0")

        server.script = [busy, busy, write(" blue")]
        assert make_llm(server, max_retries=2).invoke(PROMPT) == " blue"
        server.script = [busy]
        kind = QueueFullError if status == 429 else ServerError
        with pytest.raises(kind, match="too much"):
            make_llm(server, max_retries=1).invoke(PROMPT)
        assert len(server.asked) == 5

    def test_a_connection_that_breaks_is_made_again_before_the_first_token_only(
        self, server: ScriptedServer, make_llm: Made
    ) -> None:
        def breaks(asked: Asked) -> None:
            asked.open_stream()
            asked.connection.shutdown(socket.SHUT_RDWR)

        def breaks_later(asked: Asked) -> None:
            asked.open_stream()
            asked.tokens(ids_of("one two"))
            asked.connection.shutdown(socket.SHUT_RDWR)

        server.script = [breaks, write(" blue")]
        llm = make_llm(server)
        assert llm.invoke(PROMPT) == " blue"
        server.script = [breaks_later]
        server.asked.clear()
        with pytest.raises(ServerError, match="ended the connection amid an answer"):
            llm.invoke(PROMPT)
        assert len(server.asked) == 1

    def test_answers_that_are_none(self, server: ScriptedServer, make_llm: Made) -> None:
        def ends(asked: Asked) -> None:
            asked.open_stream()
            asked.tokens(ids_of("one two"))
            asked.end_stream()

        def events(*contents: Any) -> Any:
            def script(asked: Asked) -> None:
                asked.open_stream()
                for content in contents:
                    asked.event(content)
                asked.end_stream()

            return script

        one = {"index": 0, "text": "", "finish_reason": None}
        llm = make_llm(server, max_retries=0)
        for script, words in (
            (ends, "without its last part"),
            (events({"error": {"message": "CUDA is gone"}}), "CUDA is gone"),
            (events(b"{no json"), "no JSON"),
            (events([1, 2]), "no answer"),
            (events({"choices": ["x"]}), "is none"),
            (events({"choices": [{**one, "token_ids": ["x"]}]}), "in place of a token id"),
            (events({"choices": [{**one, "token_ids": [5], "finish_reason": "abort"}]}), "'abort'"),
            (events(b"\xff\xfe"), "no stream of answers"),
            (lambda asked: asked.answer({"choices": []}), "instead of a stream"),
        ):
            server.script = [script]
            with pytest.raises(ServerError, match=words):
                llm.invoke(PROMPT)
        server.script = [write(" blue")]
        assert llm.invoke(PROMPT) == " blue"

    def test_a_refused_request_says_why(self, server: ScriptedServer, make_llm: Made) -> None:
        llm = make_llm(server)
        server.script = [lambda asked: asked.answer({"error": {"message": "temperature is too high"}}, status=400)]
        with pytest.raises(InvalidOptionError, match="temperature is too high"):
            llm.invoke(PROMPT)
        server.script = [lambda asked: asked.answer({"error": {"message": "maximum context length is 9"}}, status=400)]
        with pytest.raises(PromptTooLongError, match="context length is 9"):
            llm.invoke(PROMPT)

    def test_silence_has_an_end(self, server: ScriptedServer, make_llm: Made) -> None:
        def silent(asked: Asked) -> None:
            asked.open_stream()
            asked.tokens(ids_of("one two"))
            threading.Event().wait(5)

        server.script = [silent]
        with pytest.raises(ServerError, match=r"read_timeout_s=0\.5"):
            make_llm(server, read_timeout_s=0.5).invoke(PROMPT)

    def test_unloading_ends_calls_and_the_thread(self, server: ScriptedServer, make_llm: Made) -> None:
        begun, cut = threading.Event(), threading.Event()

        def script(asked: Asked) -> None:
            asked.open_stream()
            asked.tokens(ids_of("one two"))
            begun.set()
            if asked.wait_for_cut():
                cut.set()

        server.script = [script]
        llm = make_llm(server, {"max_new_tokens": 100})

        def call() -> None:
            with pytest.raises(GenerationError, match="unloaded while it was generating"):
                llm.invoke(PROMPT)

        with Background(call):
            assert begun.wait(20)
            llm.unload()
        assert cut.wait(20)
        assert not threads()
        server.script = [write(" blue")]
        assert llm.invoke(PROMPT) == " blue"

    def test_dropping_the_last_llm_ends_the_thread(self, server: ScriptedServer, folder: Path) -> None:
        server.script = [write(" blue")]
        llm = QuantizedHuggingFaceLLM(model_id=str(folder), engine=Server(server.url))
        llm.invoke(PROMPT)
        assert len(threads()) == 1
        del llm
        wait_until(lambda: not threads(), 20)


class TestForms:
    def test_forms_go_in_the_servers_terms(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write("yes")]
        chat = ChatQuantizedHuggingFace(llm=make_llm(server), chat_template="{{ messages[0].content }}")
        tools = [{"name": "go", "description": "Go.", "parameters": {"type": "object", "properties": {}}}]
        for constraint in (
            Choice(("yes", "no")),
            Regex("y[a-z]+"),
            Grammar('root ::= "yes"'),
            JSONSchema({"type": "boolean"}),
        ):
            chat.invoke("Well?", constraint=constraint)
        chat.invoke("Well?", tools=[{"type": "function", "function": tools[0]}], tool_choice="required")
        forms = [asked.body["structured_outputs"] for asked in server.asked]
        kinds = [next(iter(form)) for form in forms]
        assert kinds == ["choice", "regex", "grammar", "structural_tag", "structural_tag"]
        assert forms[0]["choice"] == ["yes", "no"]
        assert '"go"' in forms[4]["structural_tag"].replace('\\"', '"')

    def test_a_text_of_a_form_ends_at_the_models_end_tokens_too(self, server: ScriptedServer, make_llm: Made) -> None:
        server.script = [write("yes")]
        chat = ChatQuantizedHuggingFace(llm=make_llm(server), chat_template="{{ messages[0].content }}")
        chat.invoke("Well?", constraint=Choice(("yes", "no")), eos_token_id=7)
        chat.invoke("Well?", eos_token_id=7)
        with_form, without = (asked.body for asked in server.asked)
        assert (with_form["ignore_eos"], with_form["stop_token_ids"]) == (False, [7])
        assert without["ignore_eos"]  # it ends here, at token 7 alone

    @pytest.mark.parametrize("holds", [True, False])
    def test_a_server_of_an_unknown_kind_is_tried(self, server: ScriptedServer, make_llm: Made, holds: bool) -> None:
        server.models = [{"id": "tiny", "owned_by": "someone"}]
        server.script, server.holds_forms = [write("yes")], holds
        llm = make_llm(server)
        chat = ChatQuantizedHuggingFace(llm=llm, chat_template="{{ messages[0].content }}")
        assert llm.engine_info.version == "someone"
        assert server.form is not None
        if holds:
            chat.invoke("Well?", constraint=Choice(("yes", "no")), temperature=1.0, top_k=3)
            assert server.asked[0].body["structured_outputs"] == {"choice": ["yes", "no"]}
            return
        with pytest.raises(UnsupportedError, match="it knows none"):
            chat.invoke("Well?", constraint=Choice(("yes", "no")))
        with pytest.raises(InvalidOptionError, match="top_k=3 is not carried out by this server"):
            llm.invoke(PROMPT, temperature=1.0, top_k=3)
        assert llm.invoke(PROMPT) == "yes"

    def test_a_server_without_forms_refuses_those_that_must_hold(self, make_llm: Made) -> None:
        def script(asked: Asked) -> None:
            asked.open_stream()
            asked.event({"choices": [{"index": 0, "text": "no call", "finish_reason": "stop"}]})
            asked.end_stream()

        with ScriptedServer(gives_ids=False) as server:
            server.script = [script]
            chat = ChatQuantizedHuggingFace(llm=make_llm(server), chat_template="{{ messages[0].content }}")
            with pytest.raises(UnsupportedError, match="it knows none"):
                chat.invoke("Well?", constraint=Choice(("yes", "no")))
            tools = [{"name": "go", "description": "Go.", "parameters": {"type": "object", "properties": {}}}]
            assert chat.bind_tools(tools).invoke("Well?").content == "no call"
