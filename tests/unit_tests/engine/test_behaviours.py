"""What every engine does alike, written once: each test holds on each engine, and compares it with itself alone.

`generate`, the fast engine, and a server of ours on this machine run always. With QUANTLLM_SERVER_URL, a server of
others is tested as well, for the model in QUANTLLM_SERVER_MODEL; with QUANTLLM_VLLM=1, vLLM in this process. A server
with the adapters `sql` and `chat` is named with QUANTLLM_SERVER_ADAPTERS=1. llama.cpp's server is tested where the
package xllamacpp, which brings it along, is installed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.exceptions import ModelTimeoutError

from langchain_quantllm import VLLM, ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, Server
from langchain_quantllm.errors import InvalidOptionError, PromptTooLongError
from langchain_quantllm.structured import Choice, Regex
from tests.support.adapters import make, make_adapter_folders
from tests.support.checkpoints import edit_json
from tests.support.engine import Background
from tests.support.gguf_files import llamacpp_serving, write_gguf
from tests.support.serving import serving

pytest.importorskip("fastapi")
pytest.importorskip("peft")

pytestmark = [pytest.mark.enable_socket, pytest.mark.timeout(1200)]  # vLLM starts in a minute or more

KINDS = ["pipeline", "fast", "server"]
KINDS += ["other server"] if os.environ.get("QUANTLLM_SERVER_URL") else []
KINDS += ["llama.cpp"] if importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf") else []
KINDS += ["vllm"] if os.environ.get("QUANTLLM_VLLM") else []

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
PROMPT = "The sea is"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "now": {"type": "boolean"}},
            "required": ["city", "now"],
        },
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_adapter_folders(tmp_path_factory.mktemp("behaviours"))
    edit_json(folder / "tiny" / "config.json", max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def llm(request: pytest.FixtureRequest, root: Path) -> Iterator[QuantizedHuggingFaceLLM]:
    """An LLM of 12 new tokens on each engine, with the adapters `sql` and `chat`."""
    kind = request.param
    if kind == "server":
        below = make(root)
        with serving(below, name="tiny", api_key="a-key") as running:
            llm = make(root, dtype="auto", engine=Server(running.url, api_key="a-key"))
            yield llm
            llm.unload()
        below.unload()
        return
    if kind == "llama.cpp":
        write_gguf(root / "tiny", root / "tiny.gguf")
        with llamacpp_serving(root / "tiny.gguf", context=2048) as url:
            llm = make(root, dtype="auto", adapters={}, engine=Server(url))
            yield llm
            llm.unload()
        return
    if kind == "other server":
        llm = QuantizedHuggingFaceLLM(
            model_id=os.environ["QUANTLLM_SERVER_MODEL"],
            engine=Server(os.environ["QUANTLLM_SERVER_URL"]),
            adapters={n: n for n in ("sql", "chat") if os.environ.get("QUANTLLM_SERVER_ADAPTERS")},
            max_new_tokens=12,
        )
    elif kind == "vllm":
        llm = make(root, engine=VLLM(enforce_eager=True, kv_cache_memory_bytes=8 << 20))
    else:
        llm = make(root, engine=kind)
    yield llm
    llm.unload()


@pytest.fixture(scope="module")
def chat(llm: QuantizedHuggingFaceLLM) -> ChatQuantizedHuggingFace:
    return ChatQuantizedHuggingFace(llm=llm, max_new_tokens=120, chat_template=TEMPLATE)  # type: ignore[call-arg]


def skip_without_ids(llm: QuantizedHuggingFaceLLM) -> None:
    if "no token ids" in (llm.engine_info.reason or ""):
        pytest.skip("this server gives no token ids")


def test_the_engine_says_its_name(llm: QuantizedHuggingFaceLLM) -> None:
    expected = llm.engine if isinstance(llm.engine, str) else llm.engine.name
    assert llm.engine_info.name == expected


def test_greedy_texts_are_repeatable_and_streams_join_to_them(llm: QuantizedHuggingFaceLLM) -> None:
    text = llm.invoke(PROMPT)
    assert len(text) > 4
    assert llm.invoke(PROMPT) == text
    assert "".join(llm.stream(PROMPT)) == text

    async def stream() -> str:
        return "".join([piece async for piece in llm.astream(PROMPT)])

    assert asyncio.run(stream()) == text


def test_a_stop_string_cuts_the_text_wherever_tokens_end(llm: QuantizedHuggingFaceLLM) -> None:
    text = llm.invoke(PROMPT)
    for begin, end in ((3, 4), (2, 6), (len(text) // 2, len(text) // 2 + 3)):
        stop = text[begin:end]
        expected = text[: text.index(stop)]
        assert llm.invoke(PROMPT, stop=[stop, "never so"]) == expected
        assert "".join(llm.stream(PROMPT, stop=[stop])) == expected
    made = llm.generate([PROMPT], stop=[text[3:6]]).generations[0][0]
    assert made.generation_info is not None
    assert made.generation_info["finish_reason"] == "stop"


def test_a_seed_gives_the_same_text_alone_and_beside_others(llm: QuantizedHuggingFaceLLM) -> None:
    def sampled(seed: int) -> str:
        return llm.invoke(PROMPT, temperature=1.0, seed=seed)

    first = sampled(1)
    with Background(lambda: llm.batch(["One", "Two", "Three"], temperature=1.0, seed=7)):
        assert sampled(1) == first
    assert len({sampled(seed) for seed in range(1, 5)}) > 1


def test_n_samples_differ_and_repeat_with_the_seed(llm: QuantizedHuggingFaceLLM) -> None:
    results = [llm.generate([PROMPT, "One"], n=3, temperature=1.0, seed=3) for _ in range(2)]
    texts = [[made.text for made in row] for row in results[0].generations]
    assert [len(row) for row in texts] == [3, 3]
    assert len(set(texts[0])) > 1
    assert [[made.text for made in row] for row in results[1].generations] == texts
    assert results[0].llm_output is not None
    usage = results[0].llm_output["token_usage"]
    assert usage["prompt_tokens"] == sum(map(llm.get_num_tokens, (PROMPT, "One")))
    infos = [made.generation_info or {} for row in results[0].generations for made in row]
    assert usage["completion_tokens"] == sum(info["usage_metadata"]["output_tokens"] for info in infos)


def test_log_probabilities_of_each_token_and_its_alternatives(llm: QuantizedHuggingFaceLLM) -> None:
    skip_without_ids(llm)
    [[made]] = llm.generate([PROMPT], logprobs=2).generations
    info = made.generation_info or {}
    entries = info["logprobs"]["content"]
    assert len(entries) == info["usage_metadata"]["output_tokens"]
    assert "".join(entry["token"] for entry in entries) == made.text or "\ufffd" in made.text
    for entry in entries:
        first, second = entry["top_logprobs"]
        assert entry["token_id"] == first["token_id"]  # greedy
        assert entry["logprob"] == pytest.approx(first["logprob"], abs=1e-4)
        assert 0 >= first["logprob"] >= second["logprob"]
    streamed = [chunk.generation_info or {} for chunk in llm._stream(PROMPT, logprobs=2)]
    joined = [entry for info in streamed for entry in info.get("logprobs", {"content": []})["content"]]
    assert [entry["token_id"] for entry in joined] == [entry["token_id"] for entry in entries]


def test_usage_counts_tokens_and_the_reason_says_why_it_ended(llm: QuantizedHuggingFaceLLM) -> None:
    [[made]] = llm.generate([PROMPT], max_new_tokens=5, ignore_eos=True).generations
    info = made.generation_info or {}
    usage = info["usage_metadata"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (llm.get_num_tokens(PROMPT), 5)
    assert info["finish_reason"] == "length"


def test_a_token_of_the_call_s_own_ends_its_text(llm: QuantizedHuggingFaceLLM) -> None:
    skip_without_ids(llm)
    [ended] = llm._engine().submit(llm._requests(PROMPT, llm._options(None, {"max_new_tokens": 5})), in_pieces=False)
    end = ended.token_ids[2]  # where the text is to end
    [[made]] = llm.generate([PROMPT], max_new_tokens=5, eos_token_id=end).generations
    info = made.generation_info or {}
    assert info["finish_reason"] == "stop"
    assert info["usage_metadata"]["output_tokens"] == ended.token_ids.index(end) + 1


def test_a_closed_stream_ends_and_others_go_on(llm: QuantizedHuggingFaceLLM) -> None:
    alone = llm.invoke("One")
    streams = [llm.stream(PROMPT, max_new_tokens=60, ignore_eos=True) for _ in range(3)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    assert llm.invoke("One") == alone


def test_a_time_limit_ends_a_call_and_no_other(llm: QuantizedHuggingFaceLLM) -> None:
    alone = llm.invoke("One")
    with Background(lambda: llm.invoke("One")) as other, pytest.raises(ModelTimeoutError, match=r"timeout=0\.001 "):
        llm.invoke(PROMPT, max_new_tokens=150, ignore_eos=True, timeout=0.001)
    assert other.result == alone


def test_wrong_calls_raise_and_harm_no_other(llm: QuantizedHuggingFaceLLM) -> None:
    alone = llm.invoke("One", max_new_tokens=30, ignore_eos=True)
    with Background(lambda: llm.invoke("One", max_new_tokens=30, ignore_eos=True)) as other:
        with pytest.raises(InvalidOptionError, match="temperature=-1"):
            llm.invoke(PROMPT, temperature=-1)
        with pytest.raises(InvalidOptionError, match="adapter='none'"):
            llm.invoke(PROMPT, adapter="none")
        with pytest.raises(PromptTooLongError, match="tokens"):
            llm.invoke("many words " * 4000)
        with pytest.raises(InvalidOptionError, match="eos_token_id=99999999"):
            llm.invoke(PROMPT, eos_token_id=99999999)
    assert other.result == alone


def test_adapters_are_chosen_by_each_call(llm: QuantizedHuggingFaceLLM) -> None:
    if not llm.adapters:
        pytest.skip("this server has no adapters")
    names = ["base", "sql", "chat"]
    alone = {name: llm.invoke(PROMPT, adapter=name) for name in names}
    assert len(set(alone.values())) == 3

    def write(name: str) -> Any:
        return Background(lambda: llm.invoke(PROMPT, adapter=name))

    with write("base") as base, write("sql") as sql, write("chat") as chat:
        pass
    assert {"base": base.result, "sql": sql.result, "chat": chat.result} == alone
    assert llm.invoke(PROMPT) == alone["base"]


def test_sixty_four_calls_at_once_give_their_texts(llm: QuantizedHuggingFaceLLM) -> None:
    prompts = [f"{i} is a number" for i in range(64)]
    texts = llm.batch(prompts, max_new_tokens=6)
    assert len(texts) == 64
    for i in (0, 13, 40, 63):
        assert texts[i] == llm.invoke(prompts[i], max_new_tokens=6)


class TestForms:
    """Texts that are held to a form."""

    @pytest.fixture(autouse=True)
    def _needs_xgrammar(self) -> None:
        pytest.importorskip("xgrammar")

    def test_json_by_its_schema(self, chat: ChatQuantizedHuggingFace) -> None:
        schema = {
            "title": "Answer",
            "type": "object",
            "properties": {"sure": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
            "required": ["sure", "colour"],
        }
        made = chat.with_structured_output(schema, method="json_schema").invoke("What colour?")
        assert isinstance(made, dict)
        assert made.keys() == {"sure", "colour"}
        assert made["sure"] in (True, False)
        assert made["colour"] in ("red", "blue")

    def test_an_expression_and_a_choice(self, chat: ChatQuantizedHuggingFace) -> None:
        assert chat.invoke("When?", constraint=Regex("(19|20)[0-9]{2}")).text[:2] in ("19", "20")
        assert chat.invoke("Well?", constraint=Choice(("yes", "no"))).content in ("yes", "no")

    def test_a_required_call_of_a_tool_whole_and_streamed(self, chat: ChatQuantizedHuggingFace) -> None:
        bound = chat.bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
        [call] = bound.invoke("Weather in Oslo?").tool_calls
        assert call["name"] == "weather"
        assert call["args"]["city"] in ("Oslo", "Rome")
        assert isinstance(call["args"]["now"], bool)
        made: Any = None
        for chunk in bound.stream("Weather in Oslo?"):
            made = chunk if made is None else made + chunk
        assert made.tool_calls[0]["args"] == call["args"]

    def test_a_wrong_schema_raises(self, chat: ChatQuantizedHuggingFace) -> None:
        with pytest.raises(InvalidOptionError, match="cannot be enforced"):
            chat.invoke("Well?", constraint=Regex("(["))
