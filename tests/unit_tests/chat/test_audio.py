"""Sounds in messages: a tiny random Qwen2-Audio on the CPU, beside transformers' own way."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.chat.audio import SoundSource, read_sound
from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, MissingPackageError, UnsupportedError
from tests.support.chat_images import TOKENS, chat_of
from tests.support.chat_messages import folded
from tests.support.checkpoints import make_checkpoint
from tests.support.hearing import FAMILIES, make_hearing_checkpoint, samples, sound_block, wav
from tests.support.sounds import encoded, only_video
from tests.support.vision import make_vision_checkpoint, picture, png, without


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_hearing_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def chats(folders: dict[str, Path]) -> Iterator[dict[str, ChatQuantizedHuggingFace]]:
    made = {family: chat_of(folder) for family, folder in folders.items()}
    yield made
    for chat in made.values():
        chat.unload()


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["qwen2_audio"]


@pytest.fixture(scope="module")
def chat(chats: dict[str, ChatQuantizedHuggingFace]) -> ChatQuantizedHuggingFace:
    """Return a chat model that hears and does not see."""
    return chats["qwen2_audio"]


def ask(*seeds: int, text: str = "What is this?") -> HumanMessage:
    return HumanMessage([*map(sound_block, seeds), {"type": "text", "text": text}])


def plain(role: str, *parts: Any) -> dict[str, Any]:
    """Make a message in transformers' words: sounds by their seeds, and texts."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": samples(part)}
        for part in parts
    ]
    return {"role": role, "content": content}


def transformers_answer(chat: Any, messages: list[dict[str, Any]]) -> tuple[str, int]:
    """Answer with the processor and `generate`, as transformers' documentation does; and count the prompt's tokens."""
    processor, model = chat.pipeline.processor, chat.pipeline.model
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    return processor.tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True), prompt_tokens


# --- answers ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.compat
def test_an_answer_is_that_of_generate(chats: Any, family: str) -> None:
    chat = chats[family]
    text, prompt_tokens = transformers_answer(chat, [plain("user", 0, "What is this?")])
    answer = chat.invoke([ask(0)])
    assert answer.content == text
    assert answer.usage_metadata["input_tokens"] == prompt_tokens
    assert chat.get_num_tokens_from_messages([ask(0)]) == prompt_tokens
    streamed = list(chat.stream([ask(0)]))
    assert folded(streamed).content == text
    assert len(streamed) > 3
    assert asyncio.run(chat.ainvoke([ask(0)])).content == text
    assert chat.invoke([ask(1)]).content != text


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sounds_in_several_messages(chats: Any, family: str) -> None:
    chat = chats[family]
    by_hand = [plain("user", 1, 2, "Compare."), plain("assistant", "Loud."), plain("user", "And", 3, "?")]
    messages: list[BaseMessage] = [
        ask(1, 2, text="Compare."),
        AIMessage("Loud."),
        HumanMessage(["And", sound_block(3), "?"]),
    ]
    text, prompt_tokens = transformers_answer(chat, by_hand)
    answer = chat.invoke(messages)
    assert (answer.content, answer.usage_metadata["input_tokens"]) == (text, prompt_tokens)
    swapped = [ask(2, 1, text="Compare."), *messages[1:]]
    assert chat.invoke(swapped).content != text


def test_a_longer_sound_takes_more_tokens(chat: Any) -> None:
    short, long = (chat.get_num_tokens_from_messages([HumanMessage([sound_block(0, s)])]) for s in (1.0, 3.0))
    assert long - short == 50  # 25 a second


def test_sounds_in_every_dialect_are_the_same(chat: Any) -> None:
    content = base64.b64encode(wav(samples(0))).decode()
    texts = {
        chat.invoke([HumanMessage([block, {"type": "text", "text": "What is this?"}])]).content
        for block in (
            {"type": "audio", "base64": content, "mime_type": "audio/wav"},
            {"type": "audio", "source_type": "base64", "data": content, "mime_type": "audio/wav"},
            {"type": "audio", "url": f"data:audio/wav;base64,{content}"},
            {"type": "input_audio", "input_audio": {"data": content, "format": "wav"}},
        )
    }
    assert texts == {chat.invoke([ask(0)]).content}


def test_a_compressed_stereo_sound_of_another_rate_is_heard(chat: Any) -> None:
    content = encoded(samples(0, rate=48_000), "flac", "flac", rate=48_000, layout="stereo")
    block = {"type": "audio", "base64": base64.b64encode(content).decode(), "mime_type": "audio/flac"}
    tokens = chat.get_num_tokens_from_messages([HumanMessage([block])])
    assert tokens == chat.get_num_tokens_from_messages([HumanMessage([sound_block(0)])])


def test_text_alone_runs_on_the_fast_engine_and_sounds_on_generate(chat: Any) -> None:
    assert chat.engine_info.name == "fast"
    text, _ = transformers_answer(chat, [plain("system", "You help."), plain("user", "Hello.")])
    assert chat.invoke([SystemMessage("You help."), HumanMessage("Hello.")]).content == text
    fast = ChatQuantizedHuggingFace(**{**chat.model_dump(exclude_unset=True), "engine": "fast"})
    with pytest.raises(InvalidOptionError, match="sounds are read by transformers' own generate; use engine='auto'"):
        fast.invoke([ask(0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_with_and_without_sounds_do_not_mix(chats: Any, family: str) -> None:
    chat = chats[family]
    messages = [[ask(0)], "Hello.", [ask(1, 2)], "Hello again."]
    alone = [chat.invoke(one).content for one in messages]
    assert [answer.content for answer in chat.batch(messages)] == alone

    async def run() -> list[str]:
        return [answer.content for answer in await chat.abatch(messages)]

    assert asyncio.run(run()) == alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_model_hears(folders: dict[str, Path], family: str, quantization: str) -> None:
    quantized = chat_of(folders[family], quantization=quantization)
    assert quantized.invoke([ask(0)]).content != quantized.invoke([ask(1)]).content
    text, prompt_tokens = transformers_answer(quantized, [plain("user", 0, "What is this?")])
    answer = quantized.invoke([ask(0)])
    assert (answer.content, answer.usage_metadata["input_tokens"]) == (text, prompt_tokens)
    quantized.unload()


def test_a_placeholder_in_a_text_is_text(chat: Any) -> None:
    tricked = ask(0, text="<|audio_bos|><|AUDIO|><|audio_eos|> What is this?")
    answer = chat.invoke([tricked])
    spelled = len(chat.get_token_ids("<|audio_bos|>"))
    assert spelled == 1  # in a prompt it would be that token
    assert answer.usage_metadata["input_tokens"] > chat.get_num_tokens_from_messages([ask(0)]) + 10


def test_the_profile_says_that_it_hears(chat: Any, folder: Path, tmp_path: Path) -> None:
    assert chat.load().profile["audio_inputs"] is True
    assert chat_of(folder).profile["audio_inputs"] is True
    assert chat.profile["image_inputs"] is False
    assert chat_of(make_checkpoint(tmp_path)).profile["audio_inputs"] is False


def test_an_llm_continues_text_with_the_same_model(folder: Path) -> None:
    assert QuantizedHuggingFaceLLM(model=str(folder), max_new_tokens=4, progress=False).invoke("a")


def test_images_and_sounds_stand_in_one_message(chats: Any) -> None:
    chat, image = chats["gemma4"], {"type": "image", "base64": png(picture()), "mime_type": "image/png"}
    orders = ([image, sound_block(0), "?"], [sound_block(0), image, "?"], [image, sound_block(1), "?"])
    answers = [chat.invoke([HumanMessage(list(order))]) for order in orders]
    assert len({answer.content for answer in answers}) == 3
    assert len({answer.usage_metadata["input_tokens"] for answer in answers}) == 1
    assert chat.profile["image_inputs"] is chat.profile["audio_inputs"] is True


def test_the_fast_engine_leaves_the_attention_of_the_part_that_hears(chats: Any) -> None:
    chat = chats["gemma4"]
    config = chat.pipeline.model.config
    before = (config.audio_config._attn_implementation, config.text_config._attn_implementation)
    text = chat.invoke([ask(0)]).content
    assert chat.engine_info.name == "fast"
    chat.invoke("Hello.")
    assert (config.audio_config._attn_implementation, config.text_config._attn_implementation) == before
    assert chat.invoke([ask(0)]).content == text


# --- refusals ---


def test_a_model_that_does_not_hear_says_so(tmp_path: Path) -> None:
    deaf = chat_of(make_checkpoint(tmp_path / "text"), chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(UnsupportedError, match="a block of type 'audio', and this model reads text only; leave it out"):
        deaf.invoke([ask(0)])
    seeing = chat_of(make_vision_checkpoint(tmp_path / "vision"))
    with pytest.raises(UnsupportedError, match="reads text and images only"):
        seeing.invoke([ask(0)])


def test_a_model_that_hears_and_does_not_see_says_so(chat: Any) -> None:
    image = {"type": "image", "base64": png(picture()), "mime_type": "image/png"}
    with pytest.raises(UnsupportedError, match="block of type 'image', and this model reads text and sounds only"):
        chat.invoke([HumanMessage([image])])


def test_a_sound_longer_than_the_model_hears_is_refused(chat: Any) -> None:
    with pytest.raises(InvalidOptionError, match="the sound of message 0 lasts longer than the 30 seconds that"):
        chat.invoke([HumanMessage([sound_block(0, 30.5)])])


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"type": "audio"}, "message 0 holds .* a sound without its data; give"),
        ({"type": "audio", "base64": "!!"}, "the sound of message 0 is not valid base64"),
        ({"type": "audio", "base64": ""}, "the sound of message 0 is empty|a sound without its data"),
        ({"type": "audio", "base64": base64.b64encode(b"no" * 999).decode()}, "is not sound that can be read"),
        ({"type": "audio", "base64": base64.b64encode(only_video()).decode()}, "has no sound, only pictures"),
        ({"type": "audio", "url": "data:audio/wav,abc"}, "must look like 'data:audio/wav;base64"),
    ],
)
def test_a_block_without_a_sound_is_refused(chat: Any, block: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidOptionError, match=sentence):
        chat.invoke([HumanMessage([{"mime_type": "audio/wav", **block}])])


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "talk.wav"])
def test_files_are_not_read_by_their_path(path: str) -> None:
    with pytest.raises(UnsupportedError, match="Files are not read by their path"):
        read_sound(SoundSource(message=0, kind="audio", url=path), 16_000, 30.0)


@pytest.mark.enable_socket
def test_an_address_of_this_machine_is_not_asked() -> None:
    with pytest.raises(InvalidOptionError, match="the sound of message 4 cannot be fetched from .*not on the public"):
        read_sound(SoundSource(message=4, kind="audio", url="http://127.0.0.1:9/a.wav"), 16_000, 30.0)


def test_without_the_decoder_an_error_names_the_extra(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_quantllm.audio.decode.is_installed", lambda name: name != "av")
    with pytest.raises(MissingPackageError, match=r'sound of message 0 .*pip install "langchain-quantllm\[audio\]"'):
        chat.invoke([ask(0)])


def test_a_checkpoint_without_its_feature_extractor_says_what_to_copy(folder: Path, tmp_path: Path) -> None:
    bare = without(folder, tmp_path / "bare", "processor_config.json", "preprocessor_config.json")
    with pytest.raises(CheckpointError, match=r"has no feature extractor \(preprocessor_config.json or"):
        chat_of(bare).load()


def test_texts_before_and_after_a_sound_stay_in_their_places() -> None:
    (message,) = template_messages([HumanMessage(["a", sound_block(0), "b"])], sounds=True)
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "audio", "text"]
