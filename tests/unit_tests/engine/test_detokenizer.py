"""From ids to text: whole characters, stop strings, the end of a row; and where a stop string ends the model."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import stop_strings
from langchain_quantllm.engine.detokenizer import Completion, Decode, IncrementalDecoder
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.stop_strings import StopMatcher
from langchain_quantllm.engine.stream import Chunk
from langchain_quantllm.options import GenerationOptions
from tests.support.models import byte_fallback_tokenizer, forwards, llm_of, scripted_model

JAPANESE = "吾輩は猫である。名前はまだ無い。🍣👩‍👩‍👧と𠮷野家へ行く。"


def first_end(text: str, stop: Sequence[str]) -> str:
    """Cut a whole text where a stop string is complete first; of two that end together, at the longer."""
    for end in range(len(text) + 1):
        if begins := [end - len(s) for s in stop if text[:end].endswith(s)]:
            return text[: min(begins)]
    return text


def split(text: str, random_: random.Random) -> list[str]:
    pieces = []
    while text:
        n = random_.randint(1, 4)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


class TestStopMatcher:
    def test_any_split_of_a_text_gives_what_the_whole_gives(self) -> None:
        """A small alphabet, so that stop strings overlap each other and themselves."""
        random_ = random.Random(0)
        stopped = 0
        for _ in range(4000):
            text = "".join(random_.choices("ab\n", k=random_.randint(0, 24)))
            stop = ["".join(random_.choices("ab\n", k=random_.randint(1, 5))) for _ in range(random_.randint(0, 3))]
            matcher, given = StopMatcher(stop), ""
            for piece in split(text, random_):
                given += matcher.push(piece)
                if matcher.found:
                    break
            given += matcher.flush()
            assert given == first_end(text, stop), (text, stop)
            assert matcher.found == any(s in text for s in stop)
            stopped += matcher.found
        assert 500 < stopped < 3500  # both cases were tried

    def test_text_is_held_back_only_while_it_may_become_a_stop_string(self) -> None:
        """After each piece everything has been given except an end that begins a stop string."""
        random_ = random.Random(1)
        for _ in range(1000):
            stop = ["".join(random_.choices("ab", k=random_.randint(2, 5))) for _ in range(2)]
            matcher, seen, given = StopMatcher(stop), "", ""
            for piece in split("".join(random_.choices("abc", k=20)), random_):
                seen += piece
                given += matcher.push(piece)
                if matcher.found:
                    break
                held = seen[len(given) :]
                longest = max(n for s in stop for n in range(len(s)) if seen.endswith(s[:n]) or n == 0)
                assert seen.startswith(given)
                assert len(held) == longest

    @pytest.mark.parametrize(
        ("text", "stop", "expected"),
        [
            ("one\n\ntwo", ["\n\n"], "one"),
            ("one\ntwo\n\n", ["\n\n"], "one\ntwo"),
            ("ENDless", ["END"], ""),
            ("a then b", ["b", "then"], "a "),
            ("xabcx", ["bc", "abc"], "x"),
            ("xabcx", ["abcx", "b"], "xa"),
            ("aaab", ["aab"], "a"),
            ("nothing", ["else"], "nothing"),
            ("猫である。", ["である"], "猫"),
        ],
    )
    def test_examples_of_texts_and_stop_strings(self, text: str, stop: list[str], expected: str) -> None:
        matcher = StopMatcher(stop)
        given = ""
        for character in text:
            given += matcher.push(character)
            if matcher.found:
                break
        assert given + matcher.flush() == expected
        whole = StopMatcher(stop)
        assert whole.push(text) + whole.flush() == expected

    def test_the_cost_of_a_long_stop_string_is_linear_in_the_text(self) -> None:
        """Counted in lines of Python: a text that almost becomes a stop string at every place."""
        stop = ["a" * 900 + "b", "ab" * 400 + "c", "a" * 1200]
        lines = 0

        def count(frame: Any, event: str, arg: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return count if frame.f_code.co_filename == stop_strings.__file__ else None

        text = ("a" * 850 + "c") * 2 + "ab" * 350 + "a" * 1300
        matcher, given = StopMatcher(stop), ""
        before = sys.gettrace()
        sys.settrace(count)
        try:
            for character in text:
                given += matcher.push(character)
        finally:
            sys.settrace(before)
        assert given + matcher.flush() == text[:-1300]
        assert matcher.found
        assert lines <= 60 * len(text)


def decode_of(tokenizer: Any, *, skip_special_tokens: bool = True) -> Decode:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    return decode


@pytest.fixture(params=["byte-level", "byte-fallback"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tokenizer if request.param == "byte-level" else byte_fallback_tokenizer()


class TestIncrementalDecoder:
    @pytest.mark.parametrize(
        "text",
        [JAPANESE, "the cat, the cat.", "naïve café — “so”", "日本語 the 漢字 cat", "a🍣b🍣🍣", "한국어 العربية हिन्दी"],
    )
    def test_pieces_are_whole_characters_and_join_to_the_text(self, any_tokenizer: Any, text: str) -> None:
        prompt = any_tokenizer("the cat")["input_ids"]
        ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
        decode = decode_of(any_tokenizer)
        decoder = IncrementalDecoder(decode, prompt)
        pieces = [decoder.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + decoder.flush() == decode(prompt + ids)[len(decode(prompt)) :]

    def test_each_character_comes_with_its_last_token(self, any_tokenizer: Any) -> None:
        """Text without a single space is not held back: as many characters as the ids so far are certain of."""
        ids = any_tokenizer(JAPANESE, add_special_tokens=False)["input_ids"]
        decode = decode_of(any_tokenizer)
        decoder = IncrementalDecoder(decode)
        whole, given = decode(ids), ""
        for n, i in enumerate(ids, 1):
            given += decoder.push(i)
            certain = decode(ids[:n]).rstrip("\ufffd")
            if whole.startswith(certain):  # byte fallback writes a run of bytes that ends too early as � throughout
                assert len(given) >= len(certain), (n, given, certain)

    def test_a_character_is_given_before_the_next_one_that_shares_its_token(self) -> None:
        """Certain is certain: a token may end one character and begin another."""
        table = {0: b"\xe3\x81", 1: b"\x82\xe3", 2: b"\x81\x84"}  # あ, い over three tokens

        def decode(ids: list[int]) -> str:
            return b"".join(table[i] for i in ids).decode("utf-8", errors="replace")

        decoder = IncrementalDecoder(decode)
        assert [decoder.push(i) for i in (0, 1, 2)] == ["", "あ", "い"]

    @pytest.mark.parametrize("tokens", range(1, 12))
    def test_a_text_cut_inside_a_character_ends_as_decode_gives_it(self, tokenizer: Any, tokens: int) -> None:
        ids = tokenizer("𠮷🍣漢字𠮷", add_special_tokens=False)["input_ids"][:tokens]
        decode = decode_of(tokenizer)
        decoder = IncrementalDecoder(decode)
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == decode(ids)

    def test_the_first_word_keeps_its_space_where_decode_would_strip_it(self) -> None:
        """SentencePiece tokenizers drop the first space of what they decode; a completion's first word has one."""
        tokenizer = byte_fallback_tokenizer()
        (cat,) = tokenizer.convert_tokens_to_ids(["▁cat"])
        for prompt in ("the", "漢", "漢字", "漢字漢", "漢字漢字漢字", "日本漢字"):
            decoder = IncrementalDecoder(decode_of(tokenizer), tokenizer(prompt)["input_ids"])
            assert (prompt, decoder.push(cat)) == (prompt, " cat")

    def test_a_prompt_cut_inside_a_character_does_not_spoil_the_completion(self, any_tokenizer: Any) -> None:
        prompt = any_tokenizer("the 漢字", add_special_tokens=False)["input_ids"][:-1]
        ids = any_tokenizer("the cat", add_special_tokens=False)["input_ids"]
        decoder = IncrementalDecoder(decode_of(any_tokenizer), prompt)
        assert ("".join(decoder.push(i) for i in ids) + decoder.flush()).strip() == "the cat"

    def test_decoding_stays_cheap_on_long_texts(self, tokenizer: Any) -> None:
        """Each step decodes a few ids, however many came before."""
        longest = 0

        def decode(ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(ids))

        decoder = IncrementalDecoder(decode, list(range(100, 400)))
        for i in tokenizer(JAPANESE * 20)["input_ids"]:
            decoder.push(i)
        assert longest <= 24


def completion_of(tokenizer: Any, prompt: str = "the", eos: tuple[int, ...] = (), **options: Any) -> Completion:
    max_new_tokens = options.pop("max_new_tokens", 100)
    request = Request(
        prompt_ids=tuple(tokenizer(prompt)["input_ids"]),
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        options=GenerationOptions(max_new_tokens=max_new_tokens, **options),
        sample_index=0,
        seed=0,
        eos_token_ids=eos,
    )
    return Completion(request, decode_of(tokenizer))


def push_all(completion: Completion, ids: Sequence[int]) -> list[Chunk]:
    chunks = []
    for i in ids:
        if chunk := completion.push(i):
            chunks.append(chunk)
        if completion.finish_reason:
            break
    return chunks


class TestCompletion:
    def test_tokens_become_chunks_and_the_last_has_reason_and_usage(self, tokenizer: Any) -> None:
        ids = tokenizer(" cats sleep all day")["input_ids"]
        completion = completion_of(tokenizer, max_new_tokens=len(ids))
        chunks = push_all(completion, ids)
        assert "".join(c.text for c in chunks) == " cats sleep all day"
        assert [i for c in chunks for i in c.token_ids] == ids
        assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (1, len(ids))
        assert all(c.usage is None for c in chunks[:-1])

    def test_a_text_that_comes_whole_is_decoded_in_blocks(self, tokenizer: Any) -> None:
        """So the engine's thread never stops for all of it."""
        ids = tokenizer(JAPANESE * 20)["input_ids"]
        request = completion_of(tokenizer, max_new_tokens=len(ids)).request
        longest = 0

        def decode(token_ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return decode_of(tokenizer)(token_ids)

        (chunk,) = push_all(Completion(request, decode, in_pieces=False), ids)
        assert chunk.text == JAPANESE * 20
        assert chunk.token_ids == tuple(ids)
        assert longest <= 100

    def test_an_end_token_is_counted_and_not_written(self, tokenizer: Any) -> None:
        completion = completion_of(tokenizer, eos=(2,))
        chunks = push_all(completion, [*tokenizer(" cats")["input_ids"], 2, 5])
        assert "".join(c.text for c in chunks) == " cats"
        assert completion.finish_reason == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(tokenizer(" cats")["input_ids"]) + 1

    def test_a_stop_string_s_characters_never_come_out(self, tokenizer: Any) -> None:
        text = "one two.\n\nThree"
        for stop in ("\n\nThr", "two.\n", "e two", "one", "hree"):
            chunks = push_all(completion_of(tokenizer, stop=(stop,)), tokenizer(text)["input_ids"])
            assert "".join(c.text for c in chunks) == text[: text.index(stop)]
            assert chunks[-1].finish_reason == "stop"

    def test_the_beginning_of_a_stop_string_at_the_end_of_the_text_is_given(self, tokenizer: Any) -> None:
        ids = tokenizer("one two")["input_ids"]
        completion = completion_of(tokenizer, stop=("two three",), max_new_tokens=len(ids))
        chunks = push_all(completion, ids)
        assert ("".join(c.text for c in chunks), completion.finish_reason) == ("one two", "length")

    def test_a_stop_string_that_ends_with_the_last_token_is_a_stop(self, tokenizer: Any) -> None:
        ids = tokenizer("one two")["input_ids"]
        completion = completion_of(tokenizer, stop=(" two",), max_new_tokens=len(ids))
        assert ("".join(c.text for c in push_all(completion, ids)), completion.finish_reason) == ("one", "stop")

    def test_a_stop_string_inside_a_character_run(self, tokenizer: Any) -> None:
        ids = tokenizer(JAPANESE)["input_ids"]
        for stop in ("猫", "である", "🍣", "👩‍👩", "𠮷"):
            chunks = push_all(completion_of(tokenizer, stop=(stop,)), ids)
            assert "".join(c.text for c in chunks) == JAPANESE[: JAPANESE.index(stop)]


PROMPT = "Here it is:"
TEXT = " first line\nsecond line\n\nUser: 猫である。 END of it"


@pytest.fixture(scope="module")
def scripted(tokenizer: Any) -> QuantizedHuggingFaceLLM:
    """A model that writes TEXT after PROMPT."""
    ids = tokenizer(TEXT)["input_ids"]
    model = scripted_model(len(tokenizer), ids, len(tokenizer(PROMPT)["input_ids"]), context_tokens=64)
    return llm_of(model, tokenizer, max_new_tokens=len(ids))


BYTE_TEXT = "cat 中文字符 the 🍣!"


@pytest.fixture(scope="module")
def byte_scripted() -> QuantizedHuggingFaceLLM:
    """A model that writes BYTE_TEXT after "the", with a tokenizer that has a token for each byte."""
    tokenizer = byte_fallback_tokenizer()
    ids, prompt = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (BYTE_TEXT, "the"))
    model = scripted_model(len(tokenizer), ids, len(prompt), context_tokens=64)
    return llm_of(model, tokenizer, add_special_tokens=False)


class TestInTheModel:
    def test_without_a_stop_string_the_text_is_whole(self, scripted: QuantizedHuggingFaceLLM) -> None:
        assert scripted.invoke(PROMPT) == TEXT

    @pytest.mark.parametrize(
        "stop",
        [
            ["\n"],
            ["\n\n"],
            ["\n\nUser:"],
            [" f"],
            [" "],
            ["cond li"],
            ["irst", "first"],
            ["である", "END"],
            ["nope", "END"],
            ["Nothing like it"],
            ["。"],
        ],
        ids=repr,
    )
    async def test_every_way_of_calling_cuts_exactly(self, scripted: QuantizedHuggingFaceLLM, stop: list[str]) -> None:
        expected = first_end(TEXT, stop)
        assert scripted.invoke(PROMPT, stop=stop) == expected
        pieces = list(scripted.stream(PROMPT, stop=stop))
        assert "".join(pieces) == expected
        assert scripted.batch([PROMPT, PROMPT], stop=stop) == [expected] * 2
        assert await scripted.ainvoke(PROMPT, stop=stop) == expected
        assert "".join([piece async for piece in scripted.astream(PROMPT, stop=stop)]) == expected
        (generation,) = scripted.generate([PROMPT], stop=stop).generations[0]
        assert generation.generation_info is not None
        assert generation.generation_info["finish_reason"] == ("length" if expected == TEXT else "stop")

    @pytest.mark.parametrize("stop", [None, ["字"], ["文字", "zz"], ["!"]], ids=repr)
    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    async def test_every_way_of_calling_gives_the_same_text_at_every_length(
        self, byte_scripted: QuantizedHuggingFaceLLM, engine: str, stop: list[str] | None
    ) -> None:
        """A tokenizer with a token for each byte: most lengths cut a character."""
        llm = QuantizedHuggingFaceLLM(pipeline=byte_scripted.pipeline, engine=engine, stop=stop)
        tokenizer = llm.pipeline.tokenizer
        script = tokenizer(BYTE_TEXT, add_special_tokens=False)["input_ids"]
        for length in range(1, len(script) + 1):
            text = llm.invoke("the", max_new_tokens=length)
            whole = decode_of(tokenizer)(script[:length]).strip("\ufffd")
            assert "".join(llm.stream("the", max_new_tokens=length)) == text
            assert llm.batch(["the", "the"], max_new_tokens=length) == [text, text]
            assert await llm.ainvoke("the", max_new_tokens=length) == text
            if stop is None and whole and BYTE_TEXT.startswith(whole):
                assert text.startswith(f" {whole}"), length
        assert text == first_end(f" {BYTE_TEXT}", stop or [])

    def test_a_stop_string_ends_the_forwards_where_it_ends(
        self, scripted: QuantizedHuggingFaceLLM, tokenizer: Any
    ) -> None:
        ids = tokenizer(TEXT)["input_ids"]
        for stop in ("\n", "second", "END"):
            needed = next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))
            for call in (scripted.invoke, lambda p, **k: list(scripted.stream(p, **k))):
                with forwards(scripted) as seen:
                    call(PROMPT, stop=[stop])
                    assert seen.count == needed

    def test_the_call_s_stop_strings_replace_the_field_s(self, scripted: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=scripted.pipeline, stop=["second"], max_new_tokens=24)
        assert llm.invoke(PROMPT) == first_end(TEXT, ["second"])
        assert llm.invoke(PROMPT, stop=["\n"]) == first_end(TEXT, ["\n"])
        assert llm.invoke(PROMPT, stop=[]).startswith(" first line\nsecond line")
        assert llm.bind(stop="line").invoke(PROMPT) == " first "

    def test_a_special_token_as_stop_string(self, tokenizer: Any) -> None:
        """`<|im_end|>` is never text, so a stop string of this name ends at the token."""
        ids = tokenizer(" a b<|im_start|> c<|im_end|> d")["input_ids"]
        model = scripted_model(len(tokenizer), ids, 1, context_tokens=64)
        llm = llm_of(model, tokenizer, max_new_tokens=len(ids), eos_token_id=0)
        assert llm.engine_info.name == "fast"  # which has run the model for its own check by now
        with forwards(llm) as seen:
            assert llm.invoke("x", stop=["<|im_start|>"]) == " a b"
            assert seen.count == 3
        assert "".join(llm.stream("x", stop=["zzz", "<|im_start|>"])) == " a b"
        assert llm.invoke("x", stop=["<|im_end|>"]) == " a b c"
        assert llm.invoke("x", stop=["<|im_end|>"], skip_special_tokens=False) == " a b<|im_start|> c"

    def test_eos_token_id_of_a_call_ends_the_text(self, scripted: QuantizedHuggingFaceLLM, tokenizer: Any) -> None:
        ids = tokenizer(TEXT)["input_ids"]
        assert scripted.invoke(PROMPT, eos_token_id=ids[3]) == tokenizer.decode(ids[:3])
        assert scripted.invoke(PROMPT, eos_token_id=[ids[5], ids[2]]) == tokenizer.decode(ids[:2])

    def test_an_empty_eos_token_id_means_no_end_token(self, tokenizer: Any) -> None:
        """The call's value wins over the checkpoint's, an empty list too."""
        ids = tokenizer(" a<|im_end|> b")["input_ids"]
        model = scripted_model(len(tokenizer), ids, 1, context_tokens=64)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        llm = llm_of(model, tokenizer, max_new_tokens=len(ids))
        assert llm.invoke("x") == " a"
        assert llm.invoke("x", eos_token_id=[]) == " a b"

    def test_ignore_eos_and_min_new_tokens_hold_the_end_off(self, tokenizer: Any) -> None:
        eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model = scripted_model(len(tokenizer), [eos, eos, eos, eos], 1, context_tokens=64)
        model.generation_config.eos_token_id = eos
        llm = llm_of(model, tokenizer, max_new_tokens=6)

        def tokens_of(**options: Any) -> int:
            info = llm.generate(["x"], **options).generations[0][0].generation_info
            assert info is not None
            return int(info["usage_metadata"]["output_tokens"])

        assert tokens_of() == 1
        assert tokens_of(ignore_eos=True) == 6
        assert tokens_of(min_new_tokens=2) == 3
        assert tokens_of(min_length=4) == 4  # one of the prompt, and three before the end
