"""Images in messages: tiny random vision-language models of four families on the CPU, beside transformers' own way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, estimate_memory
from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.errors import QuantLLMError, UnsupportedError
from tests.support.chat_images import TOKENS, ask, block, chat_of, plain, transformers_answer
from tests.support.chat_messages import folded
from tests.support.models import fail_at, forwards, slowly
from tests.support.vision import FAMILIES, picture, png, without

# --- answers ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.compat
def test_an_answer_is_that_of_generate(chats: Any, family: str) -> None:
    chat = chats[family]
    text, prompt_tokens = transformers_answer(chat, [plain("user", "Look:", 0, "What is this?")])
    message = HumanMessage([{"type": "text", "text": "Look:"}, block(0), {"type": "text", "text": "What is this?"}])
    answer = chat.invoke([message])
    assert answer.content == text
    assert answer.usage_metadata["input_tokens"] == prompt_tokens
    assert chat.get_num_tokens_from_messages([message]) == prompt_tokens
    streamed = list(chat.stream([message]))
    assert folded(streamed).content == text
    counts = [dict(a.usage_metadata, input_token_details=None) for a in (folded(streamed), answer)]  # but for the cache
    assert counts[0] == counts[1]
    assert len(streamed) > 3

    async def run() -> None:
        assert (await chat.ainvoke([message])).content == text
        assert folded([chunk async for chunk in chat.astream([message])]).content == text

    asyncio.run(run())
    other = HumanMessage([{"type": "text", "text": "Look:"}, block(1), {"type": "text", "text": "What is this?"}])
    assert chat.invoke([other]).content != text


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_in_several_messages(chats: Any, family: str) -> None:
    chat = chats[family]
    messages_by_hand = [plain("user", 1, 2, "Compare."), plain("assistant", "Blue."), plain("user", "And", 3, "?")]
    messages: list[BaseMessage] = [
        ask(1, 2, text="Compare."),
        AIMessage("Blue."),
        HumanMessage(["And", block(3), "?"]),
    ]
    text, prompt_tokens = transformers_answer(chat, messages_by_hand)
    answer = chat.invoke(messages)
    assert (answer.content, answer.usage_metadata["input_tokens"]) == (text, prompt_tokens)
    messages[0] = ask(2, 1, text="Compare.")
    logprobs = [a.response_metadata["logprobs"]["content"] for a in chat.batch([messages, messages], logprobs=0)]
    likeliest = [[(one["token_id"], pytest.approx(one["logprob"], abs=1e-4)) for one in row] for row in logprobs]
    assert likeliest[0] == [(one["token_id"], one["logprob"]) for one in logprobs[1]]  # but for rounding beside others
    in_order = chat.invoke([ask(1, 2, text="Compare."), *messages[1:]], logprobs=0).response_metadata["logprobs"]
    assert likeliest[0] != [(one["token_id"], one["logprob"]) for one in in_order["content"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_on_a_model_that_reads_images(chats: Any, folders: Any, family: str) -> None:
    chat = chats[family]
    text, prompt_tokens = transformers_answer(chat, [plain("user", "What is the capital of Norway?")])
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
    expected = transformers_answer(chat, [plain("user", 4, "Hm?")])[0]
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
        [plain("user", 0, "What is this?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    beams = chat.pipeline.model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    expected = chat.pipeline.tokenizer.decode(beams[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.invoke([ask(0)], num_beams=3, max_tokens=6).content == expected


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_models_answer_as_generate(folders: Any, quantization: str) -> None:
    chat = chat_of(folders["llava"], quantization=quantization)
    kinds = {type(module).__name__ for module in chat.pipeline.model.modules()}
    assert ("Linear4bit" if quantization == "nf4" else "Linear8bitLt") in kinds
    assert type(chat.pipeline.model.lm_head) is torch.nn.Linear  # what transformers leaves out itself
    answer = chat.invoke([ask(0)], logprobs=0)
    assert answer.content == transformers_answer(chat, [plain("user", 0, "What is this?")])[0]
    other = chat.invoke([ask(1)], logprobs=0)
    assert other.response_metadata["logprobs"] != answer.response_metadata["logprobs"]
    assert chat.invoke("Hello.").content == transformers_answer(chat, [plain("user", "Hello.")])[0]
    loaded = chat._loaded()
    assert loaded.estimate is not None
    assert loaded.weights.total_bytes == loaded.estimate.weights.total_bytes
    assert estimate_memory(str(folders["llava"]), quantization).weights == loaded.weights
    chat.unload()


def test_a_quantized_qwen_answers_as_generate(folders: Any) -> None:
    """Computed in float32: in 16 bits, random weights give scores so near to each other that rounding decides."""
    chat = chat_of(folders["qwen2_5_vl"], quantization="nf4", dtype="float32")
    assert chat.invoke([ask(0, 1)]).content == transformers_answer(chat, [plain("user", 0, 1, "What is this?")])[0]
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


def test_what_the_caller_s_thread_has_set_does_not_reach_the_images(chat: Any) -> None:
    messages = [ask(0)]
    expected = chat.invoke(messages).content
    for state in (torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16)):
        with state:
            assert chat.invoke(messages).content == expected


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


def test_the_profile_says_whether_images_are_read(folders: Any, chats: Any, tiny: Path, tmp_path: Path) -> None:
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


def test_images_of_joined_messages_keep_their_order(chats: Any) -> None:
    """As Gemma's template wants roles that alternate, the system message goes into the first of the user's."""
    chat = chats["gemma3"]
    messages = [SystemMessage("Be brief."), ask(0, text="one"), ask(1, text="two"), AIMessage("c"), ask(2, text="d")]
    prompt, sources = chat._template().render(template_messages(messages, images=True))
    assert prompt.count("<start_of_image>") == 3
    assert [source.message for source in sources] == [1, 2, 4]
    assert "Be brief.\n\n<start_of_image>one<start_of_image>two" in prompt
    answer = chat.invoke(messages).content
    messages_by_hand = [
        plain("system", "Be brief."),
        plain("user", 0, "one", 1, "two"),
        plain("assistant", "c"),
        plain("user", 2, "d"),
    ]
    assert answer == transformers_answer(chat, messages_by_hand)[0]


def test_roles_without_a_place_for_images(chats: Any) -> None:
    gemma = chats["gemma3"]
    system = SystemMessage([block(0), {"type": "text", "text": "You see this."}])
    with pytest.raises(UnsupportedError, match="message 0 holds an image.* none in system messages.*the user's"):
        gemma.invoke([system, HumanMessage("What?")])
    llava = chats["llava"]
    expected = transformers_answer(llava, [plain("system", 0, "You see this."), plain("user", "What?")])[0]
    assert llava.invoke([system, HumanMessage("What?")]).content == expected


def test_results_of_tools_hold_images(chats: Any) -> None:
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
