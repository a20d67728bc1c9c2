"""Images in messages: tiny random vision-language models of four families on the CPU, beside transformers' own way."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from PIL import Image
from pydantic import BaseModel

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, estimate_memory
from langchain_quantllm.chat import images
from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    QuantLLMError,
    UnsupportedError,
)
from tests.support.checkpoints import FakeHub, edit_json, make_cached, make_checkpoint, run_python
from tests.support.models import fail_at, forwards, slowly
from tests.support.vision import FAMILIES, TEMPLATES, make_vision_checkpoint, picture, png, without

TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {family: make_vision_checkpoint(root / family, family) for family in FAMILIES}


def chat_of(folder: Path, **fields: Any) -> ChatQuantizedHuggingFace:
    return ChatQuantizedHuggingFace(
        **{"model": str(folder), "device": "cpu", "max_tokens": TOKENS, "progress": False, **fields}
    )


@pytest.fixture(scope="module")
def chats(folders: dict[str, Path]) -> Iterator[dict[str, ChatQuantizedHuggingFace]]:
    chats = {family: chat_of(folder).load() for family, folder in folders.items()}
    yield chats
    for chat in chats.values():
        chat.unload()


@pytest.fixture(scope="module")
def chat(chats: dict[str, ChatQuantizedHuggingFace]) -> ChatQuantizedHuggingFace:
    return chats["llava"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("text") / "tiny")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATES["qwen2_5_vl"])
    return folder


def block(seed: int = 0, **options: Any) -> dict[str, Any]:
    return {"type": "image", "base64": png(picture(seed, **options)), "mime_type": "image/png"}


def ask(*seeds: int, text: str = "What is this?") -> HumanMessage:
    return HumanMessage([*map(block, seeds), {"type": "text", "text": text}])


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """Give a turn in transformers' words: pictures by their seeds, and texts."""
    names = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": picture(p)} for p in parts
    ]
    return {"role": role, "content": names}


def by_hand(chat: Any, turns: list[dict[str, Any]], new_tokens: int = TOKENS) -> tuple[str, int]:
    """Answer as transformers' documentation does, with the processor and `generate`; and count the prompt's tokens."""
    processor, model = chat.pipeline.processor, chat.pipeline.model
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    return processor.tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True), prompt_tokens


def folded(chunks: Any) -> Any:
    full = None
    for chunk in chunks:
        full = chunk if full is None else full + chunk
    return full


# --- answers ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.compat
def test_an_answer_is_that_of_generate(chats: Any, family: str) -> None:
    chat = chats[family]
    text, prompt_tokens = by_hand(chat, [turn("user", "Look:", 0, "What is this?")])
    message = HumanMessage([{"type": "text", "text": "Look:"}, block(0), {"type": "text", "text": "What is this?"}])
    answer = chat.invoke([message])
    assert answer.content == text
    assert answer.usage_metadata["input_tokens"] == prompt_tokens
    assert chat.get_num_tokens_from_messages([message]) == prompt_tokens
    streamed = list(chat.stream([message]))
    assert folded(streamed).content == text
    assert folded(streamed).usage_metadata == answer.usage_metadata
    assert len(streamed) > 3

    async def run() -> None:
        assert (await chat.ainvoke([message])).content == text
        assert folded([chunk async for chunk in chat.astream([message])]).content == text

    asyncio.run(run())
    other = HumanMessage([{"type": "text", "text": "Look:"}, block(1), {"type": "text", "text": "What is this?"}])
    assert chat.invoke([other]).content != text


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_and_turns(chats: Any, family: str) -> None:
    chat = chats[family]
    turns = [turn("user", 1, 2, "Compare."), turn("assistant", "Blue."), turn("user", "And", 3, "?")]
    messages: list[BaseMessage] = [
        ask(1, 2, text="Compare."),
        AIMessage("Blue."),
        HumanMessage(["And", block(3), "?"]),
    ]
    text, prompt_tokens = by_hand(chat, turns)
    answer = chat.invoke(messages)
    assert (answer.content, answer.usage_metadata["input_tokens"]) == (text, prompt_tokens)
    messages[0] = ask(2, 1, text="Compare.")
    logprobs = [a.response_metadata["logprobs"]["content"] for a in chat.batch([messages, messages], logprobs=0)]
    assert logprobs[0] == logprobs[1]
    assert logprobs[0] != chat.invoke([ask(1, 2, text="Compare."), *messages[1:]], logprobs=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_on_a_model_that_reads_images(chats: Any, folders: Any, family: str) -> None:
    chat = chats[family]
    text, prompt_tokens = by_hand(chat, [turn("user", "What is the capital of Norway?")])
    answer = chat.invoke("What is the capital of Norway?")
    assert (answer.content, answer.usage_metadata["input_tokens"]) == (text, prompt_tokens)
    llm = QuantizedHuggingFaceLLM(model_id=str(folders[family]), device="cpu", max_new_tokens=TOKENS, progress=False)
    processor, model = chat.pipeline.processor, chat.pipeline.model
    inputs = processor(text=["The quick brown fox"], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert llm.invoke("The quick brown fox") == expected
    assert llm.pipeline.model is model
    assert llm.batch(["a", "The quick brown fox"])[1] == expected
    assert llm.engine_info.name == "fast"  # which looks at the model after images were shown to it, too
    shown = chat.invoke([ask(0)]).content
    assert chat.batch(["What is the capital of Norway?", [ask(0)], "Hello."])[0].content == text
    assert chat.invoke([ask(0)]).content == shown


def test_images_in_every_dialect(chat: Any) -> None:
    data, jpeg = png(picture(4)), png(picture(4), "JPEG")
    url, mime = f"data:image/png;base64,{data}", {"mime_type": "image/png"}
    dialects: list[dict[str, Any]] = [
        {"type": "image", "base64": data, "mime_type": "image/png"},
        {"type": "image", "base64": "\n".join(data[i : i + 76] for i in range(0, len(data), 76)), **mime},
        {"type": "image", "url": url},
        {"type": "image", "source_type": "base64", "data": data, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
    ]
    expected = by_hand(chat, [turn("user", 4, "Hm?")])[0]
    for dialect in dialects:
        assert chat.invoke([HumanMessage([dialect, {"type": "text", "text": "Hm?"}])]).content == expected, dialect
    assert chat.invoke([HumanMessage([{"type": "image", "base64": jpeg, "mime_type": "image/jpeg"}, "Hm?"])]).content
    assert chat.invoke([HumanMessage(content_blocks=[block(4), {"type": "text", "text": "Hm?"}])])
    turned = picture(4).convert("RGBA").convert("P")
    assert chat.invoke(
        [HumanMessage([{"type": "image", "base64": png(turned, "GIF"), "mime_type": "image/gif"}, "Hm?"])]
    ).content


def test_a_batch_of_images_and_texts_is_as_its_calls_alone(chat: Any) -> None:
    batch: list[Any] = [[ask(0)], "Hello.", [ask(1)], [HumanMessage("Another.")], [ask(0, 1)], "Hi"]
    alone = [chat.invoke(messages).content for messages in batch]
    with forwards(chat, slowly(0.002)) as seen:
        assert [answer.content for answer in chat.batch(batch)] == alone
    assert {tokens: rows for rows, tokens in seen.prefills if tokens > 35} == dict.fromkeys(
        (tokens for _, tokens in seen.prefills if tokens > 35), 1
    )

    async def run() -> list[str]:
        return [answer.content for answer in await chat.abatch(batch)]

    assert asyncio.run(run()) == alone


def test_sampling_and_generates_own_options(chat: Any) -> None:
    result = chat.generate([[ask(0)]], n=3, temperature=1.0, seed=3)
    texts = [generation.text for generation in result.generations[0]]
    assert len(set(texts)) == 3
    again = chat.generate([[ask(0)]], n=3, temperature=1.0, seed=3)
    assert [generation.text for generation in again.generations[0]] == texts
    assert texts[0] == chat.invoke([ask(0)], temperature=1.0, seed=3).content
    inputs = chat.pipeline.processor.apply_chat_template(
        [turn("user", 0, "What is this?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    beams = chat.pipeline.model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    expected = chat.pipeline.tokenizer.decode(beams[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.invoke([ask(0)], num_beams=3, max_tokens=6).content == expected


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized(folders: Any, quantization: str) -> None:
    chat = chat_of(folders["llava"], quantization=quantization)
    kinds = {type(module).__name__ for module in chat.pipeline.model.modules()}
    assert ("Linear4bit" if quantization == "nf4" else "Linear8bitLt") in kinds
    assert type(chat.pipeline.model.lm_head) is torch.nn.Linear  # what transformers leaves out itself
    answer = chat.invoke([ask(0)], logprobs=0)
    assert answer.content == by_hand(chat, [turn("user", 0, "What is this?")])[0]
    other = chat.invoke([ask(1)], logprobs=0)
    assert other.response_metadata["logprobs"] != answer.response_metadata["logprobs"]
    assert chat.invoke("Hello.").content == by_hand(chat, [turn("user", "Hello.")])[0]
    loaded = chat._loaded()
    assert loaded.estimate is not None
    assert loaded.weights.total_bytes == loaded.estimate.weights.total_bytes
    assert estimate_memory(str(folders["llava"]), quantization).weights == loaded.weights
    chat.unload()


def test_quantized_qwen(folders: Any) -> None:
    chat = chat_of(folders["qwen2_5_vl"], quantization="nf4", dtype="bfloat16")
    assert chat.invoke([ask(0, 1)]).content == by_hand(chat, [turn("user", 0, 1, "What is this?")])[0]
    chat.unload()


# --- what comes with it ---


class Person(BaseModel):
    """A person."""

    name: str
    is_glad: bool


def show(city: str) -> str:
    """Show a city.

    Args:
        city: The city.
    """
    return city


def test_structured_output_and_forced_calls(chat: Any) -> None:
    pytest.importorskip("xgrammar")
    options = {"max_tokens": 80, "temperature": 1.0, "seed": 1}
    assert isinstance(chat.with_structured_output(Person).invoke([ask(0)], **options), Person)
    answer = chat.bind_tools([show], tool_choice="show").invoke([ask(0)], **options)
    assert [call["name"] for call in answer.tool_calls] == ["show"]
    # The schema joins a system message, one with an image too.
    system = SystemMessage([block(1), {"type": "text", "text": "Be brief."}])
    assert isinstance(chat.with_structured_output(Person).invoke([system, ask(0)], **options), Person)


def test_streams_stop_and_time_out(chat: Any) -> None:
    with forwards(chat, slowly(0.01)) as seen:
        stream = chat.stream([ask(0)], max_tokens=500)
        next(stream)
        stream.close()
        assert seen.settle() < 100
        with pytest.raises(ModelTimeoutError):
            chat.invoke([ask(0)], max_tokens=500, ignore_eos=True, timeout=0.2)
    full = chat.invoke([ask(0)]).content
    assert chat.invoke([ask(0)], stop=[full[3:5]]).content == full[: full.index(full[3:5])]


def test_a_failure_is_told(chat: Any) -> None:
    with forwards(chat, fail_at(1, RuntimeError("boom"))), pytest.raises(QuantLLMError, match="boom"):
        chat.invoke([ask(0)])
    assert chat.invoke([ask(0)]).content


def test_images_count_towards_the_context(chat: Any) -> None:
    prompt_tokens = chat.invoke([ask(0)]).usage_metadata["input_tokens"]
    bare = chat.invoke("What is this?").usage_metadata["input_tokens"]
    assert prompt_tokens - bare >= 16  # patches
    with pytest.raises(ContextOverflowError, match="fewer or smaller images"):
        chat.invoke([ask(0)], max_length=prompt_tokens)
    with pytest.raises(ContextOverflowError, match=r"the model's context allows 1024.*fewer or smaller images"):
        chat.invoke([ask(*range(70))], truncation=True)
    text = chat.invoke([ask(0)], max_length=prompt_tokens + 4, truncation=True)
    assert text.usage_metadata["input_tokens"] == prompt_tokens  # what an image has become is not cut


def test_other_images_are_other_entries_of_the_cache(folders: Any, chats: Any) -> None:
    cached = chat_of(folders["llava"], cache=InMemoryCache())
    first, second = cached.invoke([ask(0)]).content, cached.invoke([ask(1)]).content
    assert first != second
    with forwards(cached) as seen:
        assert cached.invoke([ask(0)]).content == first
        assert cached.invoke([ask(1)]).content == second
        assert seen.count == 0


def test_the_profile_says_so(folders: Any, chats: Any, tiny: Path, tmp_path: Path) -> None:
    for chat in chats.values():
        assert chat.profile["image_inputs"]
        assert chat.profile["image_url_inputs"]
    taken = {f: ChatQuantizedHuggingFace(pipeline=chat.pipeline).profile for f, chat in chats.items()}
    assert all(profile["image_inputs"] for profile in taken.values())
    assert taken["llava"]["image_tool_message"]
    assert not chat_of(tiny).profile["image_inputs"]
    assert not chat_of(tiny).profile["image_tool_message"]
    bare = without(folders["gemma3"], tmp_path / "bare", "processor_config.json")
    assert not chat_of(bare).profile["image_inputs"]


# --- pipelines ---


def test_a_pipeline_of_ones_own(folders: Any) -> None:
    folder = folders["llava"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor, max_new_tokens=5)
    chat = ChatQuantizedHuggingFace(pipeline=pipe)
    answer = chat.invoke([ask(0)])
    assert answer.content == by_hand(chat, [turn("user", 0, "What is this?")], 5)[0]
    assert answer.usage_metadata["output_tokens"] == 5
    assert QuantizedHuggingFaceLLM(pipeline=pipe).invoke("The quick")
    tokenizer = processor.tokenizer
    text_only = ChatQuantizedHuggingFace(
        pipeline=transformers.pipeline("text-generation", model=model, tokenizer=tokenizer), max_tokens=4
    )
    assert text_only.invoke("Hello.").usage_metadata["output_tokens"] <= 4
    with pytest.raises(UnsupportedError, match="message 0 holds an image.*for the task 'image-text-to-text'"):
        text_only.invoke([ask(0)])
    with pytest.raises(InvalidOptionError, match="image-text-to-text"):
        ChatQuantizedHuggingFace(pipeline=transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer))


def test_to_and_from_hugging_face_pipeline(folders: Any, chats: Any) -> None:
    pytest.importorskip("langchain_huggingface")
    llm = QuantizedHuggingFaceLLM(model_id=str(folders["llava"]), device="cpu", max_new_tokens=8, progress=False)
    there = llm.to_huggingface_pipeline()
    assert there.invoke("The quick") == "The quick" + llm.invoke("The quick")
    back = QuantizedHuggingFaceLLM.from_huggingface_pipeline(there)
    assert back.max_new_tokens == 8
    assert back.invoke("The quick") == llm.invoke("The quick")


def test_the_fast_engine_never_gets_an_image(folders: Any, chat: Any) -> None:
    model = chat._loaded()
    with pytest.raises(InvalidOptionError, match="images are read by the pipeline engine only"):
        model.engines.choose("fast", has_media=True)
    assert model.engines.choose("auto", has_media=True).info.name == "pipeline"
    with pytest.raises(QuantLLMError, match="engine='auto'"):
        chat_of(folders["llava"], engine="fast").invoke([ask(0)])


# --- templates ---


def test_templates_of_texts_get_the_image_token(chat: Any) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    given = ChatQuantizedHuggingFace(pipeline=chat.pipeline, chat_template=template, max_tokens=6)
    assert given.profile["image_inputs"]
    messages = template_messages([HumanMessage(["a", block(0), "b"]), AIMessage("c")], images=True)
    found, _ = given._template().render(messages)
    assert found == "[user] a\n<image>\nb\n[assistant] c"
    inputs = chat.pipeline.processor(
        text=["[user] <image>\nWhat is this?\n"], images=[[picture(0)]], return_tensors="pt"
    )
    output = chat.pipeline.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = chat.pipeline.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert given.invoke([ask(0)]).content == expected


def test_images_of_joined_turns_keep_their_order(chats: Any) -> None:
    """As Gemma's template wants turns that alternate, the system message goes into the first of the user's."""
    chat = chats["gemma3"]
    messages = [SystemMessage("Be brief."), ask(0, text="one"), ask(1, text="two"), AIMessage("c"), ask(2, text="d")]
    prompt, sources = chat._template().render(template_messages(messages, images=True))
    assert prompt.count("<start_of_image>") == 3
    assert [source.message for source in sources] == [1, 2, 4]
    assert "Be brief.\n\n<start_of_image>one<start_of_image>two" in prompt
    answer = chat.invoke(messages).content
    turns = [
        turn("system", "Be brief."),
        turn("user", 0, "one", 1, "two"),
        turn("assistant", "c"),
        turn("user", 2, "d"),
    ]
    assert answer == by_hand(chat, turns)[0]


def test_roles_without_a_place_for_images(chats: Any) -> None:
    gemma = chats["gemma3"]
    system = SystemMessage([block(0), {"type": "text", "text": "You see this."}])
    with pytest.raises(UnsupportedError, match="message 0 holds an image.* none in system messages.*the user's"):
        gemma.invoke([system, HumanMessage("What?")])
    llava = chats["llava"]
    expected = by_hand(llava, [turn("system", 0, "You see this."), turn("user", "What?")])[0]
    assert llava.invoke([system, HumanMessage("What?")]).content == expected


def test_images_of_tools(chats: Any) -> None:
    call = AIMessage(
        "", tool_calls=[{"name": "show", "args": {"city": "Oslo"}, "id": "call00001", "type": "tool_call"}]
    )
    result = ToolMessage([block(5), {"type": "text", "text": "Oslo"}], tool_call_id="call00001")
    anthropic = HumanMessage([{"type": "tool_result", "tool_use_id": "call00001", "content": result.content}])
    for family in {*FAMILIES} - {"gemma3"}:
        bound = chats[family].bind_tools([show])
        answers = {bound.invoke([HumanMessage("Oslo?"), call, m]).content for m in (result, anthropic)}
        assert len(answers) == 1
        other = ToolMessage([block(6), {"type": "text", "text": "Oslo"}], tool_call_id="call00001")
        assert bound.invoke([HumanMessage("Oslo?"), call, other]).content not in answers
    template = ChatTemplate(chats["qwen2_5_vl"].pipeline.tokenizer, None, chats["qwen2_5_vl"].pipeline.processor)
    prompt, _ = template.render(template_messages([HumanMessage("Oslo?"), call, result], images=True))
    assert "<tool_response>\n<|vision_start|><|image_pad|><|vision_end|>Oslo\n</tool_response>" in prompt


# --- errors ---


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A server on this machine with a picture, something else, and things that do not end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/nothing" else 200)
            self.end_headers()
            if self.path == "/picture.png":
                self.wfile.write(base64.b64decode(png(picture(4))))
            elif self.path == "/page.html":
                self.wfile.write(b"<!DOCTYPE html><html></html>")
            elif self.path == "/drops":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.02)  # a slow server, on purpose
            elif self.path == "/large":
                self.wfile.write(b"x" * 300_000)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.enable_socket
def test_urls_are_fetched(chat: Any, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_hand(chat, [turn("user", 4, "Hm?")])[0]
    for path in ("/picture.png", "/moved"):
        for dialect in (
            {"type": "image", "url": web + path},
            {"type": "image_url", "image_url": {"url": web + path}},
            {"type": "image_url", "image_url": web + path},
            {"type": "image", "source_type": "url", "url": web + path},
            {"type": "image", "source": {"type": "url", "url": web + path}},
        ):
            assert chat.invoke([HumanMessage([dialect, "Hm?"])]).content == expected

    def fetch(path: str, **options: Any) -> Any:
        return chat.invoke([HumanMessage("a"), HumanMessage([{"type": "image", "url": path}])], **options)

    with pytest.raises(InvalidOptionError, match="message 1 cannot be fetched from .*/nothing .*404.*in base64"):
        fetch(f"{web}/nothing")
    with pytest.raises(InvalidOptionError, match=r"message 1 is no image that can be read.*DOCTYPE.*PNG"):
        fetch(f"{web}/page.html")
    with pytest.raises(InvalidOptionError, match="cannot be fetched from http://127.0.0.1:9/"):
        fetch("http://127.0.0.1:9/")
    began = time.monotonic()
    with pytest.raises(InvalidOptionError, match="longer than 0.3 seconds"):
        fetch(f"{web}/drops", timeout=0.3)
    assert time.monotonic() - began < 1.5
    monkeypatch.setattr(images, "_MOST_BYTES", 2**17)
    with pytest.raises(InvalidOptionError, match=r"/large, is larger than"):
        fetch(f"{web}/large")


@pytest.mark.enable_socket
async def test_fetching_leaves_the_event_loop_free(chat: Any, web: str) -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    task = asyncio.create_task(beat())
    with pytest.raises(InvalidOptionError, match="longer than 0.4 seconds"):
        await chat.ainvoke([HumanMessage([{"type": "image", "url": f"{web}/drops"}])], timeout=0.4)
    task.cancel()
    assert beats > 15


_TRUNCATED = base64.b64encode(base64.b64decode(png(picture(0, (200, 200))))[:200]).decode()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"base64": "no base64!"}, InvalidOptionError, "the image of message 1 is no valid base64"),
        ({"base64": "abc"}, InvalidOptionError, "message 1 is no valid base64"),
        ({"base64": ""}, InvalidOptionError, "message 1 is empty"),
        ({"base64": "aGVsbG8gd29ybGQ="}, InvalidOptionError, "message 1 is no image.*b'hello world'"),
        ({"base64": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()}, InvalidOptionError, "is no image"),
        ({"base64": _TRUNCATED}, InvalidOptionError, "message 1 is damaged"),
        ({"url": "data:image/svg+xml;utf8,<svg/>"}, InvalidOptionError, "data URL must look like"),
        ({"url": "data:image/png;base64,"}, InvalidOptionError, "message 1 is empty"),
        ({"url": "file:///etc/passwd"}, UnsupportedError, "message 1 is given as 'file:.*not read by their path"),
        ({"url": "picture.png"}, UnsupportedError, "given as 'picture.png'.*base64"),
        ({"url": "ftp://host/picture.png"}, UnsupportedError, "must be base64"),
        ({"file_id": "file-123"}, UnsupportedError, "message 1 is given as file_id='file-123'.*another provider"),
        ({"source": {"type": "file", "file_id": "f1"}}, UnsupportedError, "file_id='f1'"),
        ({"source": 3}, InvalidOptionError, "message 1 holds .* an image without its data"),
        ({}, InvalidOptionError, "message 1 holds .* an image without its data"),
    ],
)
def test_what_is_no_image(chat: Any, given: dict[str, Any], error: type[Exception], says: str) -> None:
    # LangChain itself wants a type beside base64.
    given = {"type": "image", "mime_type": "image/png", **given} if "base64" in given else {"type": "image", **given}
    message = HumanMessage([given, {"type": "text", "text": "What?"}])
    with forwards(chat) as seen, pytest.raises(error, match=says):
        chat.invoke([SystemMessage("Be brief."), message])
    assert seen.count == 0


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (1500, 700):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(InvalidOptionError, match=f"message 0 has .*pixels.*MAX_IMAGE_PIXELS={most}"):
            chat.invoke([ask(0)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert chat.invoke([ask(0)]).content


def test_other_media_and_models_of_text(chat: Any, tiny: Path) -> None:
    audio = {"type": "audio", "base64": "aGVsbG8=", "mime_type": "audio/wav"}
    with pytest.raises(UnsupportedError, match="message 0 holds a block of type 'audio'.* text and images only"):
        chat.invoke([HumanMessage([block(0), audio])])
    with pytest.raises(
        UnsupportedError, match="message 0 holds a block of type 'image', and this model reads text only"
    ):
        chat_of(tiny).invoke([ask(0)])
    with pytest.raises(
        InvalidOptionError, match="does not take this prompt with its images.*'<image>', which stands for an image"
    ):
        chat.invoke([ask(0, text="What does <image> mean?")])


# --- loading ---


def test_without_its_processor(folders: Any, tmp_path: Path) -> None:
    """A model that transformers loads for text alone stays one of text; another cannot be loaded."""
    gemma = chat_of(without(folders["gemma3"], tmp_path / "gemma", "processor_config.json"))
    assert gemma.pipeline.task == "text-generation"
    assert gemma.invoke("Hello.").content
    with pytest.raises(UnsupportedError, match="message 0 holds an image.*preprocessor_config.json"):
        gemma.invoke([ask(0)])
    gemma.unload()
    llava = without(folders["llava"], tmp_path / "llava", "processor_config.json")
    with pytest.raises(CheckpointError, match="'llava' model.*has no image processor.*preprocessor_config.json"):
        chat_of(llava).load()


def test_processors_that_cannot_be_read(folders: Any, tmp_path: Path) -> None:
    broken = without(folders["llava"], tmp_path / "broken", "processor_config.json")
    (broken / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="the processor of .* cannot be read"):
        chat_of(broken).load()
    bare = without(folders["llava"], tmp_path / "bare", "tokenizer*")
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        chat_of(bare).load()
    if not transformers.utils.is_torchvision_available():
        modern = without(folders["qwen2_5_vl"], tmp_path / "modern")
        edit_json(modern / "preprocessor_config.json", image_processor_type="Cohere2VisionImageProcessor")
        with pytest.raises(MissingPackageError, match=r'needs torchvision: pip install "torchvision==0\.\d+\.\*"'):
            chat_of(modern).load()


def test_weights_that_are_missing(folders: Any, tmp_path: Path) -> None:
    folder = without(folders["llava"], tmp_path / "deeper")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vision_config.num_hidden_layers = 3
    config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="no fitting weights for .*vision"):
        chat_of(folder).load()


def test_without_pillow(folders: Any) -> None:
    code = """
import importlib.machinery, importlib.util, sys
class NoPillow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "PIL" else found(name, package)
sys.meta_path.insert(0, NoPillow())
from langchain_quantllm import ChatQuantizedHuggingFace
image = {"type": "image", "base64": "aGVsbG8=", "mime_type": "image/png"}
options = {"device": "cpu", "max_tokens": 3, "progress": False}
chat = ChatQuantizedHuggingFace(model=sys.argv[1], **options)
assert not chat.profile["image_inputs"]
print(len(chat.invoke("Hello.").content))
for call in (lambda: chat.invoke([("human", [image])]), ChatQuantizedHuggingFace(model=sys.argv[2], **options).load):
    try:
        call()
    except ImportError as error:
        print(type(error).__name__, error)
"""
    said = run_python(code, folders["gemma3"], folders["llava"]).stdout.splitlines()
    assert int(said[0]) > 0
    assert said[1].startswith(
        'MissingPackageError message 0 holds an image, which needs pillow: pip install "langchain-'
    )
    assert "'llava' model" in said[2]
    assert 'needs pillow: pip install "langchain-quantllm[vision]"' in said[2]


@pytest.mark.enable_socket
def test_a_snapshot_that_was_fetched_for_its_text(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the processor needs is asked of the Hub where its cache has the weights and the tokenizer only."""
    cache = tmp_path / "hub"
    # A folder of the cache itself, as what is fetched is linked into it.
    snapshot = make_cached(cache, folders["gemma3"], "acme/seer", commit="c" * 40)
    snapshot.unlink()
    without(folders["gemma3"], snapshot, "processor_config.json", "chat_template.jinja")
    fields = {"model": "acme/seer", "cache_dir": str(cache)}
    with FakeHub({"acme/seer": folders["gemma3"]}) as hub:
        FakeHub.point_to(hub.url, monkeypatch)
        chat = chat_of(Path(), **fields)
        expected = by_hand(chat, [turn("user", 0, "What is this?")])[0]
        assert chat.invoke([ask(0)]).content == expected
        assert not [path for path in hub.asked if path.startswith("GET") and path.endswith("safetensors")]
        chat.unload()
        offline = chat_of(Path(), **fields, local_files_only=True)
        assert offline.invoke([ask(0)]).content == expected
        offline.unload()
