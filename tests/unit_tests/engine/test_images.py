"""Images in the running batch: tiny random models of seven families on the CPU, beside `generate`."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from langchain_core.messages import AIMessage, HumanMessage

from langchain_quantllm import ChatQuantizedHuggingFace
from langchain_quantllm.engine.sequence import bare_sequence
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from langchain_quantllm.loading.processors import Media
from tests.support.adapters import quietly
from tests.support.chat_images import TOKENS, ask, block, chat_of
from tests.support.image_requests import (
    FAMILIES,
    QUICK,
    ask_all,
    engine_of,
    generated,
    in_chunks,
    make_chat,
    tower_runs,
)
from tests.support.models import forwards, slowly
from tests.support.selection import slow_but
from tests.support.vision import make_vision_checkpoint

IMAGES = Media(images=(object(),))
TEXTS = ([HumanMessage("What is the capital of Norway?")], [HumanMessage("Hello.")])


def sized(*sizes: tuple[int, int], text: str = "Hm?") -> HumanMessage:
    """Ask about images of some sizes, with words between them."""
    parts: list[Any] = [part for i, size in enumerate(sizes) for part in (f"Image {i}:", block(i + 20, size=size))]
    return HumanMessage([*parts, text])


@pytest.fixture(scope="module", params=slow_but(QUICK, FAMILIES))
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = make_chat(tmp_path_factory.mktemp("images") / request.param, request.param)
    yield made
    made.unload()


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make models that a test may spoil."""
    chats = []

    def make(family: str = "llava", **fields: Any) -> ChatQuantizedHuggingFace:
        chats.append(make_chat(tmp_path_factory.mktemp("own") / family, family, **fields))
        return chats[-1]

    yield make
    for chat in chats:
        chat.unload()


# --- the tokens of `generate` ---


def test_a_prompt_with_images_gives_the_tokens_of_generate(chat: Any) -> None:
    for messages in ([ask(0)], [ask(1, 2)], [sized((90, 40), (40, 40), (30, 70))]):
        assert ask_all(chat, [messages])[0].token_ids == generated(chat, messages)
    assert chat._engine(media=IMAGES).info.name == "fast"


def test_images_beside_texts_and_other_images_give_the_same_tokens(chat: Any) -> None:
    conversations = [[ask(3)], TEXTS[0], [ask(4, 3)], [sized((70, 50))], TEXTS[1], [ask(3, text="And now?")]]
    expected = [generated(chat, messages) for messages in conversations]
    for order in (1, -1):
        answers = ask_all(chat, conversations[::order])
        assert [answer.token_ids for answer in answers] == expected[::order]
    # A slot that a prompt with images has left is one of texts alone.
    assert [answer.token_ids for answer in ask_all(chat, TEXTS)] == [expected[1], expected[4]]


def test_a_chunk_of_a_prompt_may_end_within_an_image(chat: Any) -> None:
    conversations = [[sized((60, 60), (30, 50), text=f"Number {i}?")] for i in range(2)] + [TEXTS[0]]
    expected = [generated(chat, messages) for messages in conversations]
    ask_all(chat, [[ask(0)]])
    for tokens in (5, 18):
        engine_of(chat)._reset_cache()  # no block is found again
        with in_chunks(chat, tokens):
            assert [answer.token_ids for answer in ask_all(chat, conversations)] == expected


# --- the tower, once for each image ---


def test_the_tower_runs_once_for_each_image(chat: Any) -> None:
    ask_all(chat, [[ask(5)]])
    before = tower_runs(chat)
    ask_all(chat, [[ask(5, text="Another question about it.")], [ask(5)]])
    assert tower_runs(chat) == before
    answers = ask_all(chat, [[ask(6)], [ask(6, text="Something else?")]])
    of_one = tower_runs(chat) - before  # several, if the model divides an image into tiles
    assert of_one >= 1
    ask_all(chat, [[ask(7)]])
    assert tower_runs(chat) == before + 2 * of_one
    assert all(answer.error is None for answer in answers)


def test_samples_of_one_call_share_the_image(chat: Any) -> None:
    ask_all(chat, [[ask(0)]])
    before = tower_runs(chat)
    options = {"temperature": 1.0, "seed": 5}
    answers = ask_all(chat, [[ask(8)]], n=3, **options)
    runs = tower_runs(chat) - before
    ask_all(chat, [[ask(9)]])
    assert tower_runs(chat) - before == 2 * runs
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert answers[0].token_ids == ask_all(chat, [[ask(8)]], **options)[0].token_ids


# --- blocks ---


def test_the_same_image_shares_blocks_and_another_does_not(chat: Any) -> None:
    first, again, other = [sized((40, 40), (40, 40))], [sized((40, 40), (40, 40))], [sized((40, 40), (40, 40))]
    other[0].content[1] = block(77, size=(40, 40))
    ask_all(chat, [first])
    request = chat._plan(first, None, {}).requests[0]
    token = chat.pipeline.model.config.image_token_id
    place = request.prompt_ids.index(token)
    reused = ask_all(chat, [again])[0]
    assert reused.token_ids == generated(chat, first)
    last = max(i for i, one in enumerate(request.prompt_ids) if one == token)
    assert reused.usage.cached_tokens >= last // 16 * 16 > place
    apart = ask_all(chat, [other])[0]
    assert apart.usage.cached_tokens <= place
    assert apart.token_ids == generated(chat, other)
    assert apart.token_ids != reused.token_ids


def test_the_second_turn_of_a_chat_finds_the_first(chat: Any) -> None:
    turns = [ask(10, text="What is in this picture? Describe all that you see in it, please.")]
    answer = chat.invoke(turns)
    before = tower_runs(chat)
    turns += [AIMessage("A house beside a river."), ask(11, text="And in this one?")]
    second = ask_all(chat, [turns])[0]
    assert second.token_ids == generated(chat, turns)
    assert second.usage.cached_tokens >= answer.usage_metadata["input_tokens"] // 16 * 16 - 16
    assert tower_runs(chat) > before
    before = tower_runs(chat)
    turns += [AIMessage("A boat."), HumanMessage("Which of them is larger?")]
    assert ask_all(chat, [turns])[0].token_ids == generated(chat, turns)
    assert tower_runs(chat) == before


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_prompts_that_give_way_are_computed_again(make: Any, family: str) -> None:
    conversations = [[ask(i, text="Why is that so? Say it in some words.")] for i in range(4)] + [TEXTS[0]]
    of_token = 512 if family == "llava" else 768
    chat = make(family, kv_cache_memory=17 * 16 * of_token, max_tokens=40)
    expected = [generated(chat, messages, 40) for messages in conversations]
    engine = chat._engine(media=IMAGES)
    engine._parts.images._cache_bytes = 0  # the tower has to run again, too
    assert [answer.token_ids for answer in ask_all(chat, conversations)] == expected
    assert engine._scheduler.preempted > 0
    assert not engine._parts.images._kept


# --- what else a call may ask for ---


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_streams_end_early_and_free_all(make: Any, family: str) -> None:
    chat = make(family)
    expected = generated(chat, [ask(0)])
    ask_all(chat, [[ask(0)]])
    with forwards(chat, slowly(0.01)) as seen:
        stream = chat.stream([ask(1)], max_tokens=500, ignore_eos=True)
        next(stream)
        stream.close()
        assert seen.settle() < 100
    engine = engine_of(chat)
    assert ask_all(chat, [[ask(0)]])[0].token_ids == expected
    assert not engine._scheduler.sequences
    assert not engine._with_images
    text = chat.invoke([ask(0)]).content
    assert chat.invoke([ask(0)], stop=[text[3:5]]).content == text[: text.index(text[3:5])]


def test_pixels_are_released_with_their_request(make: Any) -> None:
    chat = make("llava")
    plan = chat._plan([ask(0)], None, {})
    pixels = weakref.ref(plan.requests[0].media["pixel_values"])
    with plan.engine.submit(plan.requests) as stream:
        list(stream)
    del plan, stream
    until = time.monotonic() + 10  # the thread leaves its loop a little later
    while pixels() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert pixels() is None


def test_a_token_of_images_in_a_text_is_a_token(make: Any) -> None:
    """Beside a prompt with an image, and with one of its own."""
    chat = make("qwen3_vl", special_tokens="allow")
    text = [HumanMessage("This <|image_pad|> is a word, and <|image_pad|> too.")]
    ids = chat._plan(text, None, {}).requests[0].prompt_ids
    assert ids.count(chat.pipeline.model.config.image_token_id) == 2
    expected = [generated(chat, text), generated(chat, [ask(0)])]
    assert [answer.token_ids for answer in ask_all(chat, [text, [ask(0)]])] == expected


# --- failures ---


def test_a_bad_image_fails_its_request_alone(make: Any) -> None:
    chat = make("llava")
    plan = chat._plan([ask(0)], None, {})
    media = plan.requests[0].media
    bad = replace(plan.requests[0], media={"pixel_values": media["pixel_values"][:, :1]})
    with plan.engine.submit(plan.requests) as good, plan.engine.submit([bad]) as stream:
        with pytest.raises(GenerationError, match="this request failed"):
            list(stream)
        assert [i for chunk in good for i in chunk.token_ids] == generated(chat, [ask(0)])
    few = replace(plan.requests[0], prompt_ids=plan.requests[0].prompt_ids[:8])
    with plan.engine.submit([few]) as stream, pytest.raises(GenerationError, match="16 features for an image that has"):
        list(stream)
    assert not engine_of(chat)._scheduler.sequences


def test_too_few_tokens_for_an_image_are_refused(make: Any) -> None:
    chat = make("qwen2_5_vl")
    plan = chat._plan([ask(0)], None, {})
    ids = plan.requests[0].prompt_ids
    few = replace(plan.requests[0], prompt_ids=ids[: ids.index(chat.pipeline.model.config.image_token_id) + 3])
    few.media.pop("mm_token_type_ids", None)
    with pytest.raises(InvalidOptionError, match="the prompt has 3 tokens for images, and its images need"):
        plan.engine.submit([few])


def test_an_image_of_nan_fails_alone_and_is_not_found_again(make: Any) -> None:
    chat = make("qwen2_5_vl")
    plan = chat._plan([ask(0)], None, {})
    media = plan.requests[0].media
    bad = replace(plan.requests[0], media={**media, "pixel_values": media["pixel_values"] * torch.nan})
    for _ in range(2):
        with plan.engine.submit([bad]) as stream, pytest.raises(GenerationError, match="not numbers"):
            list(stream)
    assert ask_all(chat, [[ask(0)]])[0].token_ids == generated(chat, [ask(0)])


# --- changes of the model ---


def test_a_changed_tower_reads_its_images_anew(make: Any) -> None:
    chat = make("llava")
    before = ask_all(chat, [[ask(0)]])[0].token_ids
    with torch.no_grad():
        chat.pipeline.model.model.multi_modal_projector.linear_1.weight.mul_(-1.5)
    after = ask_all(chat, [[ask(0)]])[0].token_ids
    assert after == generated(chat, [ask(0)])
    assert after != before
    chat.pipeline.model.set_input_embeddings(
        torch.nn.Embedding.from_pretrained(chat.pipeline.model.get_input_embeddings().weight.flip(0).clone())
    )
    assert ask_all(chat, [[ask(0)]])[0].token_ids == generated(chat, [ask(0)])


def test_the_model_is_as_it_was_without_the_engine(make: Any) -> None:
    chat = make("qwen3_vl")
    embedding = chat.pipeline.model.get_input_embeddings()
    layers = chat.pipeline.model.model.language_model.layers
    messages = [ask(0)]
    expected = generated(chat, messages)
    ask_all(chat, [messages])
    assert generated(chat, messages) == expected
    assert "forward" in vars(embedding)
    assert "forward" in vars(layers[0])
    chat.unload()
    assert "forward" not in vars(embedding)
    assert "forward" not in vars(layers[0])


# --- adapters ---


def adapter(folder: Path, to: Path, modules: str, seed: int) -> Path:
    with quietly():
        import peft

        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(to)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False])
def test_adapters_beside_images(tmp_path: Path, reads: bool) -> None:
    """Those of the text part run in one batch; with one on the tower, `generate` reads the images."""
    folder = make_vision_checkpoint(tmp_path / "llava")
    modules = r".*language_model.*q_proj" if reads else r".*(language_model|vision_tower).*q_proj"
    adapters = {name: str(adapter(folder, tmp_path / name, modules, i)) for i, name in enumerate(["one", "two"])}
    chat = chat_of(folder, adapters=adapters)
    info = chat._engine(media=IMAGES).info
    assert info.name == ("fast" if reads else "pipeline")
    assert ("its adapters change the part that reads images" in info.reason) != reads
    names = ["one", "two", "base"]
    answers = [chat.invoke([ask(0)], adapter=name).content for name in names]
    assert len(set(answers)) == 3
    by_generate = ChatQuantizedHuggingFace(
        **{**chat.model_dump(exclude_unset=True), "adapters": adapters, "engine": "pipeline"}
    )
    assert [by_generate.invoke([ask(0)], adapter=name).content for name in names] == answers
    with ThreadPoolExecutor() as pool:
        together = pool.map(lambda name: chat.invoke([ask(0)], adapter=name).content, names)
        assert list(together) == answers
    if reads:
        assert tower_runs(chat) == 2  # with the picture of the check
    chat.unload()


# --- models that the engine does not read images with ---


def show_images_upside_down(model: Any) -> None:
    """Make a model whose own forward does something else with images than its tower."""
    plain = type(model.model).forward

    def forward(self: Any, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        turned = None if pixel_values is None else pixel_values.flip(-2)
        return plain(self, *args, pixel_values=turned, **kwargs)

    model.model.__class__ = type("Turning", (type(model.model),), {"forward": forward})


def test_a_model_that_does_something_else_with_images_goes_to_generate_in_the_open(make: Any) -> None:
    chat = make("llava")
    show_images_upside_down(chat.pipeline.model)
    info = chat._engine(media=IMAGES).info
    assert info.name == "pipeline"
    assert "its logits over KV cache blocks are not its own" in info.reason
    assert ask_all(chat, [[ask(0)]])[0].token_ids == generated(chat, [ask(0)])
    assert chat.engine_info.name == "fast"
    assert "images are read by transformers' own generate: its logits" in chat.engine_info.reason
    fast = ChatQuantizedHuggingFace(pipeline=chat.pipeline, engine="fast", max_tokens=4)
    assert fast.invoke("Hello.").content
    with pytest.raises(InvalidOptionError, match="its logits over KV cache.*; use engine='auto'"):
        fast.invoke([ask(0)])


def test_a_model_that_was_put_right_reads_images_again(make: Any) -> None:
    chat = make("llava")
    kind = type(chat.pipeline.model.model)
    show_images_upside_down(chat.pipeline.model)
    assert chat._engine(media=IMAGES).info.name == "pipeline"
    chat.pipeline.model.model.__class__ = kind
    assert ask_all(chat, [[HumanMessage("Hello.")]])[0].token_ids  # a request, at which changes are noticed
    assert chat._engine(media=IMAGES).info.name == "fast"
    assert ask_all(chat, [[ask(0)]])[0].token_ids == generated(chat, [ask(0)])


def test_the_reason_is_that_of_the_call(make: Any) -> None:
    chat = make("llava")
    show_images_upside_down(chat.pipeline.model)
    beams = replace(chat._options(None, {}), extra={"num_beams": 2})
    assert "num_beams" in chat._engine(beams).info.reason
    assert "its logits" in chat._engine(media=IMAGES).info.reason
    assert "num_beams" in chat._engine(beams).info.reason


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_two_engines_of_one_model_read_images(make: Any, family: str) -> None:
    chat = make(family)
    expected = [generated(chat, [ask(i)]) for i in range(4)]
    assert ask_all(chat, [[ask(0)]])[0].token_ids == expected[0]
    second = ChatQuantizedHuggingFace(pipeline=chat.pipeline, max_tokens=TOKENS)
    info = second._engine(media=IMAGES).info
    assert info.name == "fast", info.reason
    assert ask_all(second, [[ask(1)]])[0].token_ids == expected[1]
    assert ask_all(chat, [[ask(2)]])[0].token_ids == expected[2]
    chat.unload()
    assert ask_all(second, [[ask(3)]])[0].token_ids == expected[3]
    second.unload()


def test_an_urgent_request_is_read_though_others_have_been_read_ahead(make: Any) -> None:
    chat = make("llava")
    ask_all(chat, [[ask(0)]])
    engine = engine_of(chat)

    def waiting(seed: int, priority: int) -> Any:
        [request] = engine._find_images(chat._plan([ask(seed)], None, {}).requests)
        return bare_sequence(request.prompt_ids, 4, images=request.images, priority=priority)

    patient, urgent = [waiting(10 + i, 5) for i in range(6)], waiting(30, 0)
    engine._with_images = [*patient]
    while engine._read_next_images():
        pass
    assert sum(sequence.has_seen_images for sequence in patient) == 4
    engine._with_images.append(urgent)
    assert engine._read_next_images()
    assert urgent.has_seen_images
    engine._with_images = []
