"""The results of calls: the text of transformers' own `generate`, samples, limits, logprobs and usage."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from langchain_core.exceptions import ContextOverflowError
from langchain_core.outputs import Generation

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError
from tests.support.models import (
    TINY,
    byte_fallback_tokenizer,
    forwards,
    greedy_text,
    llm_of,
    scripted_model,
    slowly,
    tiny_model,
)

PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):\n", "日本で一番高い山は"]


def info_of(generation: Generation) -> dict[str, Any]:
    assert generation.generation_info is not None
    return generation.generation_info


async def all_ways(llm: QuantizedHuggingFaceLLM, prompt: str, **options: Any) -> list[str]:
    """Complete a prompt in every way that LangChain has."""
    return [
        llm.invoke(prompt, **options),
        "".join(llm.stream(prompt, **options)),
        *llm.batch([prompt], **options),
        await llm.ainvoke(prompt, **options),
        "".join([text async for text in llm.astream(prompt, **options)]),
        *(await llm.abatch([prompt], **options)),
        llm.generate([prompt], **options).generations[0][0].text,
        (await llm.agenerate([prompt], **options)).generations[0][0].text,
    ]


class TestText:
    @pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[3]])
    async def test_every_way_of_calling_gives_generate_s_greedy_text(
        self, llm: QuantizedHuggingFaceLLM, prompt: str
    ) -> None:
        """Only the completion, and exactly: the same float32 computation on both sides."""
        expected = greedy_text(llm, prompt, max_new_tokens=4)
        assert await all_ways(llm, prompt, max_new_tokens=4) == [expected] * 8

    @pytest.mark.parametrize("family", sorted(TINY))
    @pytest.mark.compat
    async def test_families_of_models_give_generate_s_text(self, tokenizer: Any, family: str) -> None:
        llm = llm_of(tiny_model(len(tokenizer), family), tokenizer, max_new_tokens=30)
        expected = greedy_text(llm, "The sea is", max_new_tokens=30)
        assert await all_ways(llm, "The sea is") == [expected] * 8

    async def test_a_tokenizer_that_strips_spaces(self) -> None:
        """SentencePiece-like: the completion keeps the space between it and the prompt, in every way of calling."""
        tokenizer = byte_fallback_tokenizer()
        prompt, completion = "日本の cat", " the 漢字 cat, こに"
        script = tokenizer(completion.strip())["input_ids"]
        model = scripted_model(320, script, len(tokenizer(prompt)["input_ids"]), context_tokens=64)
        llm = llm_of(model, tokenizer, max_new_tokens=len(script))
        assert await all_ways(llm, prompt) == [completion] * 8

    async def test_quantized_weights_give_generate_s_text(self, quantized_llm: QuantizedHuggingFaceLLM) -> None:
        """Exactly `generate`'s text, and a sensible one."""
        expected = greedy_text(quantized_llm, PROMPTS[0], max_new_tokens=3)
        assert await all_ways(quantized_llm, PROMPTS[0], max_new_tokens=3) == [expected] * 8
        assert "Paris" in expected

    def test_schemes_do_not_flood_the_log(
        self, quantized_llm: QuantizedHuggingFaceLLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Bitsandbytes' int8 would log a line for each layer of each forward, thousands for one answer."""
        with caplog.at_level(logging.WARNING):
            quantized_llm.invoke("One, two,", max_new_tokens=2)
        assert len(caplog.records) <= 1, caplog.records[0].getMessage()

    @pytest.mark.parametrize("options", [{"return_full_text": True}, {"skip_prompt": False}])
    async def test_the_prompt_before_the_completion_where_asked(
        self, tiny_llm: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        prompt = "  The sea is "
        expected = prompt + tiny_llm.invoke(prompt, max_new_tokens=5)
        assert await all_ways(tiny_llm, prompt, max_new_tokens=5, **options) == [expected] * 8

    def test_the_prompt_before_each_sample(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        result = tiny_llm.generate(["The sea", "The sky"], n=2, seed=1, temperature=1.0, return_full_text=True)
        assert [[g.text[:7] for g in row] for row in result.generations] == [["The sea"] * 2, ["The sky"] * 2]

    def test_special_tokens_of_a_prompt_are_not_doubled(self, tokenizer: Any) -> None:
        """A prompt that has its begin token, from a chat template say, gets no second one."""
        from tokenizers.processors import TemplateProcessing

        class_ = type(tokenizer)
        with_bos = class_.from_pretrained(tokenizer.name_or_path)
        bos = with_bos.bos_token
        with_bos._tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, with_bos.bos_token_id)]
        )
        llm = llm_of(tiny_model(len(tokenizer)), with_bos, max_new_tokens=5)
        assert with_bos(f"{bos}The sea")["input_ids"][:2] == [with_bos.bos_token_id] * 2
        assert llm.invoke(f"{bos}The sea") == llm.invoke("The sea")
        assert llm.invoke(f"{bos}The sea") == llm.invoke(f"{bos}The sea", add_special_tokens=False)
        assert llm.invoke("The sea") != llm.invoke("The sea", add_special_tokens=False)


@pytest.fixture(scope="module")
def repeating(tokenizer: Any) -> QuantizedHuggingFaceLLM:
    """A random model that repeats itself, so that penalties and n-gram options change its text."""
    model = tiny_model(len(tokenizer), seed=2)
    with torch.no_grad():  # the logits follow the current token's embedding
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
        model.lm_head.weight.add_(0.7 * model.model.embed_tokens.weight)
    return llm_of(model, tokenizer)


class TestTransformersOptions:
    PROMPT = "Paris, Paris, Paris, London, Paris, Paris, Paris, London, Paris,"

    @pytest.mark.parametrize(
        ("options", "changes"),
        [
            ({"num_beams": 3}, True),
            ({"num_beams": 4, "length_penalty": 0.2, "early_stopping": True}, True),
            ({"num_beams": 2, "repetition_penalty": 9.0}, True),
            ({"num_beams": 2, "no_repeat_ngram_size": 1}, True),
            ({"no_repeat_ngram_size": 1}, True),
            ({"repetition_penalty": 9.0}, True),
            ({"repetition_penalty": 9.0, "no_repeat_ngram_size": 1}, True),
            ({"suppress_tokens": "FIRST"}, True),
            ({"begin_suppress_tokens": "FIRST"}, True),
            ({"bad_words_ids": "FIRST"}, True),
            ({"sequence_bias": "FIRST"}, True),
            ({"encoder_repetition_penalty": 5.0}, True),
            ({"guidance_scale": 1.5}, True),
            ({"prompt_lookup_num_tokens": 3}, False),
            ({"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}, False),
            ({"use_cache": False}, False),
            ({"cache_implementation": "static", "disable_compile": True}, False),
            ({"prefill_chunk_size": 3}, False),
            ({"remove_invalid_values": True, "renormalize_logits": True}, False),
        ],
        ids=str,
    )
    @pytest.mark.compat
    def test_the_text_is_generate_s(
        self, repeating: QuantizedHuggingFaceLLM, tokenizer: Any, options: dict[str, Any], changes: bool
    ) -> None:
        plain = greedy_text(repeating, self.PROMPT, max_new_tokens=10)
        first = tokenizer(plain)["input_ids"][0]
        forms = {"sequence_bias": [[[first], -500.0]], "bad_words_ids": [[first]]}
        options = {k: forms.get(k, [first]) if v == "FIRST" else v for k, v in options.items()}
        expected = greedy_text(repeating, self.PROMPT, max_new_tokens=10, **options)
        assert (expected != plain) is changes  # the option has an effect on this text
        assert repeating.invoke(self.PROMPT, max_new_tokens=10, **options) == expected

    def test_beams_of_a_trained_model(self, llm: QuantizedHuggingFaceLLM) -> None:
        expected = greedy_text(llm, PROMPTS[1], max_new_tokens=5, num_beams=2)
        assert llm.invoke(PROMPTS[1], max_new_tokens=5, num_beams=2) == expected

    async def test_whole_decoding_streams_and_stops_as_well(
        self, repeating: QuantizedHuggingFaceLLM, tokenizer: Any
    ) -> None:
        text = greedy_text(repeating, self.PROMPT, max_new_tokens=10, num_beams=2)
        stop = text[8:12]
        expected = text[: text.index(stop)]
        texts = await all_ways(repeating, self.PROMPT, max_new_tokens=10, num_beams=2, stop=[stop])
        assert texts == [expected] * 8

    def test_a_batch_with_transformers_options_equals_single_calls(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Their processors see padding, so prompts of different lengths must not share a batch."""
        for options in ({"no_repeat_ngram_size": 1}, {"num_beams": 2}, {"encoder_repetition_penalty": 2.0}):
            singles = [tiny_llm.invoke(p, max_new_tokens=6, **options) for p in PROMPTS]
            assert tiny_llm.batch(PROMPTS, max_new_tokens=6, **options) == singles

    def test_max_time_ends_early_and_says_so(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        (generation,) = tiny_llm.generate(["The sea"], max_new_tokens=4000, max_time=0.2).generations[0]
        info = info_of(generation)
        assert info["finish_reason"] == "length"
        assert 0 < info["usage_metadata"]["output_tokens"] < 4000

    def test_whole_decoding_does_not_sample(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with pytest.raises(InvalidOptionError, match="do_sample=False"):
            tiny_llm.invoke("The sea", num_beams=2, temperature=0.5)


SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 8}


class TestSamples:
    def test_n_samples_differ_and_repeat_with_their_seed(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        def texts(**options: Any) -> list[list[str]]:
            result = tiny_llm.generate(["The sea", "The sky"], **SAMPLED, **options)
            return [[g.text for g in row] for row in result.generations]

        first = texts(n=3, seed=5)
        assert [len(row) for row in first] == [3, 3]
        assert all(len(set(row)) == 3 for row in first)
        assert texts(n=3, seed=5) == first
        assert texts(n=3, seed=6) != first
        # Sample i has random numbers of its own, whatever n is.
        assert [row[:1] for row in first] == texts(n=1, seed=5)
        assert [row[:2] for row in first] == texts(n=2, seed=5)

    def test_greedy_samples_are_n_times_the_same(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        (row,) = tiny_llm.generate(["The sea"], n=3).generations
        assert [g.text for g in row] == [greedy_text(tiny_llm, "The sea")] * 3

    def test_without_a_seed_calls_differ_and_tell_the_seed_that_repeats_them(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        one, two = (tiny_llm.generate(["The sea"], **SAMPLED).generations[0][0] for _ in range(2))
        assert one.text != two.text
        assert tiny_llm.invoke("The sea", seed=info_of(one)["seed"], **SAMPLED) == one.text

    async def test_a_seed_gives_the_same_in_every_way_of_calling(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        assert len(set(await all_ways(tiny_llm, "The sea", seed=11, **SAMPLED))) == 1

    def test_a_seeded_text_does_not_depend_on_what_else_runs(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Each prompt has sampling options of its own, alone and in a batch."""
        import threading

        rows: list[tuple[str, dict[str, Any]]] = [
            (PROMPTS[0], {"seed": 1, "temperature": 0.8}),
            (PROMPTS[1], {"seed": 2, "temperature": 1.5, "top_k": 20}),
            (PROMPTS[2], {"seed": 3, "top_p": 0.7, "repetition_penalty": 1.2}),
            (PROMPTS[3], {}),
            (PROMPTS[0], {"seed": 1, "min_p": 0.1, "min_new_tokens": 6}),
            (PROMPTS[1], {"max_new_tokens": 3, "ignore_eos": True}),
        ]
        alone = [tiny_llm.invoke(prompt, **{"max_new_tokens": 6, **options}) for prompt, options in rows]
        together: list[str] = [""] * len(rows)
        barrier = threading.Barrier(len(rows))

        def call(i: int) -> None:
            prompt, options = rows[i]
            barrier.wait()
            together[i] = tiny_llm.invoke(prompt, **{"max_new_tokens": 6, **options})

        with forwards(tiny_llm, slowly()) as seen:
            threads = [threading.Thread(target=call, args=(i,)) for i in range(len(rows))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert seen.count < (5 * 6 + 3) / 2  # 33 one by one, 6 in one batch
        assert together == alone

    def test_torch_s_global_generator_is_untouched(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        before = torch.random.get_rng_state()
        tiny_llm.invoke("The sea", seed=3, **SAMPLED)
        list(tiny_llm.stream("The sea", **SAMPLED))
        assert torch.equal(before, torch.random.get_rng_state())

    def test_the_model_s_generation_config_is_untouched(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        before = tiny_llm.pipeline.model.generation_config.to_dict()
        tiny_llm.invoke("The sea", seed=3, stop=["x"], eos_token_id=5, **SAMPLED)
        tiny_llm.invoke("The sea", num_beams=2)
        assert tiny_llm.pipeline.model.generation_config.to_dict() == before

    def test_n_cannot_stream(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with pytest.raises(InvalidOptionError, match="pass n=1, or use generate"):
            list(tiny_llm.stream("The sea", n=2))


@pytest.fixture(scope="module")
def short(tokenizer: Any) -> QuantizedHuggingFaceLLM:
    """A model with a context of 64 tokens."""
    return llm_of(tiny_model(len(tokenizer), "qwen2", context_tokens=64), tokenizer)


@pytest.fixture(scope="module")
def long_prompt(tokenizer: Any) -> str:
    """Eighty tokens, each word one of them."""
    words = [" one", " two", " three", " four", " five", " six", " seven", " eight"] * 10
    assert len(tokenizer("".join(words))["input_ids"]) == 80
    return "".join(words)


class TestLengths:
    async def test_a_prompt_too_long_is_a_context_overflow(
        self, short: QuantizedHuggingFaceLLM, long_prompt: str
    ) -> None:
        words = "80 tokens .* allows 64 .*truncation='left'"
        assert short.engine_info.name == "fast"  # its check of the model is done by now
        with forwards(short) as seen:
            with pytest.raises(ContextOverflowError, match=words) as error:
                short.invoke(long_prompt)
            assert isinstance(error.value, QuantLLMError)
            with pytest.raises(ContextOverflowError, match=words):
                list(short.stream(long_prompt))
            with pytest.raises(ContextOverflowError, match=words):
                short.batch(["fine", long_prompt])
            with pytest.raises(ContextOverflowError, match=words):
                await short.ainvoke(long_prompt)
            with pytest.raises(ContextOverflowError, match=words):
                _ = [text async for text in short.astream(long_prompt)]
            assert seen.count == 0

    @pytest.mark.parametrize(
        ("truncation", "kept"), [("left", slice(-56, None)), ("right", slice(0, 56)), (True, slice(0, 56))]
    )
    def test_truncation_keeps_the_declared_side(
        self, short: QuantizedHuggingFaceLLM, long_prompt: str, tokenizer: Any, truncation: Any, kept: slice
    ) -> None:
        """56 tokens stay, as 8 new ones are asked for; True is the tokenizer's side, here the right."""
        assert tokenizer.truncation_side == "right"
        cut = tokenizer.decode(tokenizer(long_prompt)["input_ids"][kept])
        (generation,) = short.generate([long_prompt], truncation=truncation, max_new_tokens=8).generations[0]
        assert generation.text == short.invoke(cut, max_new_tokens=8)
        assert info_of(generation)["usage_metadata"]["input_tokens"] == 56

    def test_truncation_leaves_short_prompts_alone(self, short: QuantizedHuggingFaceLLM) -> None:
        assert short.invoke("The sea", truncation=True, max_new_tokens=5) == short.invoke("The sea", max_new_tokens=5)

    def test_new_tokens_end_with_the_context(self, short: QuantizedHuggingFaceLLM, tokenizer: Any) -> None:
        prompt = " one" * 60
        for options in ({}, {"max_new_tokens": 100}, {"max_length": 1000}):
            (generation,) = short.generate([prompt], **options).generations[0]
            assert info_of(generation)["usage_metadata"]["output_tokens"] == 4
            assert info_of(generation)["finish_reason"] == "length"

    def test_max_length_counts_the_prompt(self, short: QuantizedHuggingFaceLLM) -> None:
        (generation,) = short.generate([" one" * 10], max_length=16).generations[0]
        assert info_of(generation)["usage_metadata"]["output_tokens"] == 6
        with pytest.raises(ContextOverflowError, match="10 tokens and max_length=10"):
            short.invoke(" one" * 10, max_length=10)
        (generation,) = short.generate([" one" * 10], max_length=8, truncation="left").generations[0]
        assert info_of(generation)["usage_metadata"]["total_tokens"] == 8

    def test_new_tokens_that_leave_no_room_for_a_prompt_are_refused(self, short: QuantizedHuggingFaceLLM) -> None:
        with pytest.raises(InvalidOptionError, match="max_new_tokens=64 leaves no room"):
            short.invoke("The sea", max_new_tokens=64, truncation=True)

    def test_a_prompt_that_fills_the_context_but_for_one_token(self, short: QuantizedHuggingFaceLLM) -> None:
        (generation,) = short.generate([" one" * 63]).generations[0]
        assert info_of(generation)["usage_metadata"]["output_tokens"] == 1
        with pytest.raises(ContextOverflowError):
            short.invoke(" one" * 64)


class TestAnswers:
    def test_completions_have_usage_finish_reason_model_name_and_timing(
        self, tiny_llm: QuantizedHuggingFaceLLM, tokenizer: Any
    ) -> None:
        result = tiny_llm.generate(PROMPTS[:2], max_new_tokens=4, n=2)
        counts = [len(tokenizer(p)["input_ids"]) for p in PROMPTS[:2]]
        for row, count in zip(result.generations, counts, strict=True):
            for generation in row:
                info = info_of(generation)
                assert info["usage_metadata"] == {
                    "input_tokens": count,
                    "output_tokens": 4,
                    "total_tokens": count + 4,
                    "input_token_details": {"cache_read": 0},
                }
                assert info["finish_reason"] == "length"
                assert info["model_name"] == tiny_llm.model_id
                timing = info["timing"]
                assert 0 <= timing["queued_s"] <= timing["first_token_s"] <= timing["total_s"] < 60
                rate = 3 / (timing["total_s"] - timing["first_token_s"])
                assert timing["rate_tok_s"] == pytest.approx(rate)
        assert result.llm_output is not None
        assert result.llm_output["model_name"] == tiny_llm.model_id
        assert result.llm_output["token_usage"] == {  # a prompt is read once for its two samples
            "prompt_tokens": sum(counts),
            "completion_tokens": 16,
            "total_tokens": sum(counts) + 16,
            "cached_tokens": 0,
        }

    def test_an_end_of_text_is_a_stop(self, tiny_llm: QuantizedHuggingFaceLLM, tokenizer: Any) -> None:
        text = tiny_llm.invoke("The sea", max_new_tokens=6)
        third = tokenizer(text)["input_ids"][2]
        (generation,) = tiny_llm.generate(["The sea"], max_new_tokens=6, eos_token_id=third).generations[0]
        assert info_of(generation)["finish_reason"] == "stop"
        assert info_of(generation)["usage_metadata"]["output_tokens"] == 3

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 4}, {"repetition_penalty": 1.5}], ids=str)
    def test_logprobs_are_those_of_a_forward(
        self, llm: QuantizedHuggingFaceLLM, tokenizer: Any, options: dict[str, Any]
    ) -> None:
        """Of the model's own logits. 1e-3: with a KV cache and without, float32 sums in another order."""
        prompt = PROMPTS[0]
        (generation,) = llm.generate([prompt], max_new_tokens=4, logprobs=3, **options).generations[0]
        content = info_of(generation)["logprobs"]["content"]
        ids = tokenizer(prompt)["input_ids"]
        made = [entry["token_id"] for entry in content]
        assert tokenizer.decode(made) == generation.text
        assert len(made) == 4
        with torch.no_grad():
            logits = llm.pipeline.model(torch.tensor([ids + made])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1)
        for i, entry in enumerate(content):
            assert entry["logprob"] == pytest.approx(float(expected[i, made[i]]), abs=1e-3)
            assert entry["token"] == tokenizer.decode([made[i]])
            assert [t["token_id"] for t in entry["top_logprobs"]] == expected[i].topk(3).indices.tolist()
            assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(
                expected[i].topk(3).values.tolist(), abs=1e-3
            )

    def test_logprobs_only_where_asked(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        assert "logprobs" not in info_of(tiny_llm.generate(["The sea"], logprobs=False).generations[0][0])
        content = info_of(tiny_llm.generate(["The sea"], logprobs=True).generations[0][0])["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in content] == [[]] * 12
        assert all(math.isfinite(entry["logprob"]) and entry["logprob"] <= 0 for entry in content)

    def test_logprobs_beside_an_option_that_changes_them_are_refused(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with pytest.raises(InvalidOptionError, match="suppress_tokens changes the scores"):
            tiny_llm.generate(["The sea"], logprobs=1, max_new_tokens=1, suppress_tokens=[3])

    def test_token_counts_are_the_model_s_own(self, llm: QuantizedHuggingFaceLLM, tokenizer: Any) -> None:
        for text in (*PROMPTS, "🍣" * 5):
            assert llm.get_num_tokens(text) == len(tokenizer(text)["input_ids"])
            assert llm.get_token_ids(text) == tokenizer(text)["input_ids"]

    @pytest.mark.parametrize("prompt", ["", [], None])
    def test_an_empty_prompt_is_an_error(self, tiny_llm: QuantizedHuggingFaceLLM, prompt: Any) -> None:
        if prompt == "":
            with pytest.raises(InvalidOptionError, match="at least one character"):
                list(tiny_llm.stream(prompt))
            with pytest.raises(InvalidOptionError, match="at least one character"):
                tiny_llm.invoke(prompt)
        else:
            with pytest.raises(ValueError, match=r"at least one character|Invalid input type"):
                tiny_llm.invoke(prompt)

    def test_an_end_token_outside_the_vocabulary_is_refused(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """The error comes before the model runs."""
        with pytest.raises(InvalidOptionError, match="99999999"):
            tiny_llm.invoke("The sea", eos_token_id=99999999, min_new_tokens=2)


class TestRoom:
    def test_truncation_leaves_room_for_a_text(self, tokenizer: Any) -> None:
        """The error about a long prompt recommends truncation, so more than one new token must fit."""
        llm = llm_of(tiny_model(len(tokenizer), context_tokens=64), tokenizer)
        (generation,) = llm.generate(["sea " * 100], truncation="left").generations[0]
        usage = info_of(generation)["usage_metadata"]
        assert usage["input_tokens"] == usage["output_tokens"] == 32

    def test_the_cache_is_counted_as_it_was_not_as_it_might_have_been(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer)
        llm.invoke("The sea is", max_new_tokens=4000, timeout=600, stop=list("abcdefghijklmnopqrstuvwxyz"))
        assert 3 <= llm._engine().peak_cache_tokens < 100
