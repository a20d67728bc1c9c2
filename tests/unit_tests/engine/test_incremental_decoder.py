"""Decoding piece by piece: any ids give the text of decoding them at once, at a cost that is linear in the text."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from langchain_quantllm.engine.detokenizer import Decode, IncrementalDecoder
from tests.support.models import byte_fallback_tokenizer
from tests.support.tokenizers import MADE

TOKENIZERS = ["smollm2", "qwen", "byte fallback", "bytes in Python", *MADE]
NEEDS_VALID_RUNS = ("byte fallback", "unigram")
"""Tokenizers that write a run of bytes which is no UTF-8 as U+FFFD throughout, with the characters in it."""


@functools.lru_cache
def read_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def get_tokenizer(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    def get(name: str) -> Any:
        if name == "smollm2":
            return request.getfixturevalue("tokenizer")
        if name == "qwen":
            return read_tokenizer(request.getfixturevalue("qwen_coder"))
        if name == "bytes in Python":
            return ByT5Tokenizer()
        return byte_fallback_tokenizer() if name == "byte fallback" else MADE[name]()

    return get


class CountingDecode:
    """A tokenizer's decode, which counts its calls and ids."""

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self.calls = self.longest = 0
        self.skipped_ids = tokenizer.all_special_ids if skip_special_tokens else []
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens

    def __call__(self, ids: list[int]) -> str:
        self.calls += 1
        self.longest = max(self.longest, len(ids))
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))


def one_by_one(decode: Decode, prompt: Sequence[int], ids: Sequence[int]) -> str:
    decoder = IncrementalDecoder(decode, prompt, getattr(decode, "skipped_ids", ()))
    return "".join(decoder.push(i) for i in ids) + decoder.flush()


def in_groups(decode: Decode, prompt: Sequence[int], ids: Sequence[int], random_: random.Random) -> str:
    decoder, text, at = IncrementalDecoder(decode, prompt, getattr(decode, "skipped_ids", ())), "", 0
    while at < len(ids):
        count = random_.randint(1, 64)
        text, at = text + decoder.push(*ids[at : at + count]), at + count
    return text + decoder.flush()


def draw(tokenizer: Any, random_: random.Random) -> list[int]:
    """Choose ids at random: any, or of those that decode to nothing or to a part of a character."""
    size = len(tokenizer)
    any_id = [random_.randrange(size) for _ in range(200)]
    broken = [i for i in any_id if "\ufffd" in tokenizer.decode([i])]
    count = random_.randint(1, 60)
    if random_.random() < 0.3:
        text = "".join(random_.choices("the cat  猫𠮷\u200dé👩‍👧\n.", k=count))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    pools = [any_id, any_id[:4], broken or any_id, tokenizer.all_special_ids, broken[:9] + any_id[:9]]
    return random_.choices(random_.choice(pools), k=count)


class TestText:
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_any_ids_give_the_text_of_decoding_them_at_once(
        self, get_tokenizer: Callable[[str], Any], name: str
    ) -> None:
        tokenizer, random_ = get_tokenizer(name), random.Random(0)
        compared = 0
        for _ in range(150):
            decode = CountingDecode(tokenizer, skip_special_tokens=random_.random() < 0.7)
            prompt, ids = draw(tokenizer, random_)[: random_.choice([0, 12])], draw(tokenizer, random_)
            text = one_by_one(decode, prompt, ids)
            assert in_groups(decode, prompt, ids, random_) == text, (prompt, ids)
            before, whole = decode(prompt), decode([*prompt, *ids])
            if "\ufffd" in before or (name in NEEDS_VALID_RUNS and "\ufffd" in whole):
                continue
            if name == "bytes in Python" and prompt:  # which leaves out an incomplete character of the prompt
                continue
            compared += 1
            assert text == whole[len(before) :], (prompt, ids)
        assert compared > 10

    def test_any_bytes_give_the_text_of_decoding_them_at_once(self) -> None:
        """Tokens that end one character and begin another, stray bytes, and a real U+FFFD."""
        random_ = random.Random(1)
        text = "吾輩は猫である。🍣👩‍👩‍👧と𠮷野家aé\ufffd".encode()
        strays = [bytes([byte]) for byte in (0x80, 0xC3, 0xE4, 0xF0)]
        for case in range(600):
            parts = [text, text[random_.randrange(len(text)) :], *(strays if case % 2 else [])]
            data = b"".join(random_.choice(parts) for _ in range(6))
            table = []
            while data:
                count = 3 if case % 5 == 0 else random_.randint(1, 5)
                table.append(data[:count])
                data = data[count:]

            def decode(ids: list[int], table: list[bytes] = table) -> str:
                return b"".join(table[i] for i in ids).decode("utf-8", "replace")

            ids = list(range(len(table)))
            assert one_by_one(decode, (), ids) == decode(ids) == in_groups(decode, (), ids, random_)

    @pytest.mark.parametrize("tokens", range(1, 14))
    def test_whole_characters_before_one_that_is_cut_stay(self, tokens: int) -> None:
        """Where tokenizers with a token for each byte write the whole run as U+FFFD."""
        tokenizer = byte_fallback_tokenizer()
        ids = tokenizer("中文字符", add_special_tokens=False)["input_ids"][1:][:tokens]
        decode = CountingDecode(tokenizer)
        expected = "中文字符"[: tokens // 3] + "\ufffd" * (tokens % 3 if tokens < 12 else 0)
        assert one_by_one(decode, tokenizer("the")["input_ids"], ids) == expected
        assert in_groups(decode, tokenizer("中")["input_ids"], ids, random.Random(tokens)) == expected

    def test_a_stray_byte_does_not_spoil_the_characters_around_it(self) -> None:
        tokenizer = byte_fallback_tokenizer()
        first, last = (tokenizer(c, add_special_tokens=False)["input_ids"][1:] for c in "中字")
        (cat,) = tokenizer.convert_tokens_to_ids(["▁cat"])
        stray = tokenizer.convert_tokens_to_ids("<0x80>")
        decode = CountingDecode(tokenizer)
        assert one_by_one(decode, (), [*first, stray, *last, stray, cat]) == "中\ufffd字\ufffd cat"

    @pytest.mark.parametrize(
        "prompt", ["the", "漢字", "the \ufffd\ufffd\ufffd", "the</s></s></s></s></s></s></s></s></s>"]
    )
    def test_a_word_keeps_its_space_after_any_end_of_a_prompt(self, prompt: str) -> None:
        tokenizer = byte_fallback_tokenizer()
        (cat,) = tokenizer.convert_tokens_to_ids(["▁cat"])
        assert one_by_one(CountingDecode(tokenizer), tokenizer(prompt)["input_ids"], [cat]) == " cat"

    def test_a_word_keeps_its_space_after_tokens_without_text(self) -> None:
        tokenizer = byte_fallback_tokenizer()
        the, end, cat = tokenizer.convert_tokens_to_ids(["▁the", "</s>", "▁cat"])
        assert one_by_one(CountingDecode(tokenizer), (), [the, *[end] * 50, cat]) == "the cat"

    def test_ids_without_text_that_are_not_known_as_skipped_lose_no_text(self) -> None:
        tokenizer = byte_fallback_tokenizer()
        the, end, cat = tokenizer.convert_tokens_to_ids(["▁the", "</s>", "▁cat"])
        decode = CountingDecode(tokenizer)
        decode.skipped_ids = []
        assert one_by_one(decode, (), [end, the, *[end] * 50, cat, *[end] * 30, cat]) == "the cat cat"


def unfinished(tokenizer: Any) -> int:
    """Find a token that is a part of a character."""
    ids = (i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids)
    return next(i for i in ids if tokenizer.decode([i]) in ("\ufffd", ""))


class TestCost:
    """Each token takes a few calls with a few ids, whatever came before; a second pays for shortening what waits."""

    @pytest.mark.parametrize("name", ["smollm2", "qwen", "byte fallback", "unigram", "bytes in Python"])
    @pytest.mark.parametrize("kind", ["end", "part of a character", "end and part", "word", "space", "joiner"])
    @pytest.mark.parametrize("says_skipped", [True, False])
    def test_each_token_decodes_a_few_ids(
        self, get_tokenizer: Callable[[str], Any], name: str, kind: str, says_skipped: bool
    ) -> None:
        tokenizer = get_tokenizer(name)
        end, part = tokenizer.eos_token_id, unfinished(tokenizer)
        text = {"word": "the", "space": " ", "joiner": "\u200d"}.get(kind, "")
        ids = {"end": [end], "part of a character": [part], "end and part": [part, *[end] * 9]}.get(kind)
        ids = ids or tokenizer(text, add_special_tokens=False)["input_ids"]
        decode = CountingDecode(tokenizer)
        decode.skipped_ids = decode.skipped_ids if says_skipped else []
        pushed = (ids * 2000)[:2000]
        one_by_one(decode, tokenizer("the cat")["input_ids"], pushed)
        assert decode.longest <= 32
        assert decode.calls <= 6 * len(pushed)

    def test_characters_that_go_on_at_every_token_decode_a_few_ids(self) -> None:
        data = "あ".encode() * 2000
        table = [data[:1], *(data[i : i + 3] for i in range(1, len(data), 3))]
        calls = longest = 0

        def decode(ids: list[int]) -> str:
            nonlocal calls, longest
            calls, longest = calls + 1, max(longest, len(ids))
            return b"".join(table[i] for i in ids).decode("utf-8", "replace")

        assert one_by_one(decode, (), range(len(table))) == "あ" * 2000
        assert longest <= 32
        assert calls <= 6 * len(table)

    def test_a_prompt_of_parts_of_characters_is_not_decoded_as_a_whole(self, tokenizer: Any) -> None:
        decode = CountingDecode(tokenizer)
        IncrementalDecoder(decode, [unfinished(tokenizer)] * 5000)
        assert decode.longest <= 32
        assert decode.calls <= 100
