"""The fast engine writes what transformers' `generate` writes, whatever else runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm import NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from tests.support.engine import PROMPTS, Background, MakeLLM, ask, ids_after, ids_of, on_pipeline, plan
from tests.support.families import FAST, Family, family_model, generated_ids, likeliest_ids
from tests.support.models import forwards, greedy_text, llm_of, slowly

pytestmark = pytest.mark.usefixtures("one_thread")


class TestGreedy:
    @pytest.mark.slow
    def test_smollm2_writes_what_generate_writes(self, llm: QuantizedHuggingFaceLLM) -> None:
        assert llm.engine_info.name == "fast"
        model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:4]]
        alone = ids_after(llm, prompts[0], max_new_tokens=64)
        expected = generated_ids(model, prompts[0], 64)
        assert alone == expected
        answers = ask(llm, [plan(llm, prompt, max_new_tokens=64 - 10 * i)[0] for i, prompt in enumerate(prompts)])
        assert answers[0].token_ids == alone
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == likeliest_ids(model, prompt, answer.token_ids)

    @pytest.mark.slow
    def test_qwen_coder_writes_what_generate_writes(self, qwen_coder: Path) -> None:
        """Half a second a token where the machine is busy: first beside another row, then alone."""
        llm = QuantizedHuggingFaceLLM(model_id=str(qwen_coder), dtype="float32", progress=False)
        assert llm.engine_info.name == "fast"
        model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[3:]]
        answers = ask(llm, [plan(llm, prompt, max_new_tokens=64 - 32 * i)[0] for i, prompt in enumerate(prompts)])
        assert answers[0].token_ids[:6] == generated_ids(model, prompts[0], 6)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == likeliest_ids(model, prompt, answer.token_ids)
        llm.unload()

    def test_long_prompts_run_in_chunks_between_the_steps_of_others(self, tiny: QuantizedHuggingFaceLLM) -> None:
        long = ids_of(1301)
        with (
            forwards(tiny, slowly(0.005)) as seen,
            Background(lambda: ids_after(tiny, ids_of(9), max_new_tokens=60)) as other,
        ):
            seen.wait_for(5)
            found = ids_after(tiny, long, max_new_tokens=20)
        model = tiny.pipeline.model
        assert found == likeliest_ids(model, long, found)
        assert other.result == likeliest_ids(model, ids_of(9), other.result)
        sizes = [tokens for _, tokens in seen.shapes]
        pieces = [i for i, size in enumerate(sizes) if size > 9]
        assert [sizes[i] for i in pieces] == [128] * 10 + [32]  # one token of each belongs to the other sequence
        assert {b - a for a, b in itertools.pairwise(pieces)} == {1}

    def test_more_requests_than_slots_all_get_their_tokens(self, tiny: QuantizedHuggingFaceLLM) -> None:
        prompts = [ids_of(3 + i % 20, seed=i) for i in range(45)]
        answers = ask(tiny, [plan(tiny, prompt, max_new_tokens=4 + i % 7)[0] for i, prompt in enumerate(prompts)])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == likeliest_ids(tiny.pipeline.model, prompt, answer.token_ids)

    def test_batch_size_bounds_the_sequences_of_a_step(self, tiny: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, batch_size=2)
        requests = [plan(llm, ids_of(1, seed=i), max_new_tokens=5)[0] for i in range(7)]
        with forwards(llm) as seen:
            answers = ask(llm, requests)
        assert max(tokens for _, tokens in seen.shapes) <= 2
        assert [answer.token_ids for answer in answers] == [
            ids_after(tiny, r.prompt_ids, max_new_tokens=5) for r in requests
        ]


class TestQuantized:
    def test_quantized_text_is_that_of_generate_up_to_the_first_tie(
        self, quantized_llm: QuantizedHuggingFaceLLM
    ) -> None:
        """Quantized products round differently for one row than for many.

        In int8 the input of a layer is rounded too, and which of its columns are left out of that (as outliers)
        depends on all tokens of a forward; in 4 bits another kernel multiplies one token than many; and bfloat16 has
        8 bits. So where the reference's best two logits lie close together, either may be written, and what comes
        after it is another text. Up to there both must be the same.
        """
        llm = quantized_llm
        if isinstance(llm.scheme, Int8):  # what the engine has in its layers' place rounds no input: test_cpu_products
            llm = QuantizedHuggingFaceLLM(model_id=llm.model_id, quantization="int8", fuse=False, progress=False)
        assert llm.engine_info.name == "fast"
        model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
        close = 0.5  # logits lie around 20, where bfloat16 has steps of 0.125
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
        references = [generated_ids(model, prompt, 20) for prompt in prompts]
        answers = ask(llm, [plan(llm, prompt, max_new_tokens=20)[0] for prompt in prompts])
        alone = ask(llm, plan(llm, prompts[0], max_new_tokens=20))[0]
        compared = 0
        for row, answer in ((0, answers[0]), (1, answers[1]), (0, alone)):
            expected, found = references[row], answer.token_ids
            same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))
            compared += same
            if same < len(expected):
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompts[row], *expected[:same]]])).logits[0, -1].float()
                assert float(logits[expected[same]] - logits[found[same]]) < close
        assert compared >= 20  # else everything was a tie
        if llm is not quantized_llm:
            llm.unload()

    def test_a_model_whose_kernels_round_single_rows_differently_is_fast(self, any_smollm2: Path) -> None:
        """On CPUs with AVX512-BF16, bitsandbytes' product of a single row is another than that of several."""
        given = {"quantization": NF4(compute_dtype="float32"), "dtype": "float32", "device": "cpu", "progress": False}
        llm = QuantizedHuggingFaceLLM(model_id=str(any_smollm2), engine="fast", max_new_tokens=4, **given)
        assert llm.invoke("The capital of France is")
        llm.unload()


class TestSampling:
    OPTIONS = (
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.3, "top_p": 0.6},
        {"temperature": 0.5, "min_p": 0.1, "repetition_penalty": 1.2},
        {"top_k": 50, "top_p": 0.9, "min_new_tokens": 5},
    )
    # Tokens of a random model have tiny probabilities, so that without a cut its samples hang on rounding now and then.

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.compat
    def test_a_seed_gives_the_same_text_on_both_engines(
        self, tiny: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        plain = on_pipeline(tiny)
        for seed in (1, 2, 3):
            found = tiny.batch(PROMPTS[:2], seed=seed, max_new_tokens=12, **options)
            assert found == plain.batch(PROMPTS[:2], seed=seed, max_new_tokens=12, **options)

    def test_a_seed_gives_the_same_text_on_both_engines_for_a_trained_model(self, llm: QuantizedHuggingFaceLLM) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 1, "max_new_tokens": 16}
        assert llm.invoke(PROMPTS[1], **options) == on_pipeline(llm).invoke(PROMPTS[1], **options)

    def test_a_seed_gives_the_same_tokens_whatever_else_runs(self, tiny: QuantizedHuggingFaceLLM) -> None:
        options = {"do_sample": True, "temperature": 1.1, "top_k": 30, "seed": 5, "max_new_tokens": 20}
        alone = ids_after(tiny, ids_of(17), **options)
        others = [
            *plan(tiny, ids_of(30, seed=2), do_sample=True, top_k=5, seed=8, n=3, max_new_tokens=31),
            *plan(tiny, ids_of(3, seed=3), max_new_tokens=2),
            *plan(tiny, ids_of(17), do_sample=True, seed=6, max_new_tokens=25),
        ]
        answers = ask(tiny, [*others, *plan(tiny, ids_of(17), **options)])
        assert answers[-1].token_ids == alone
        assert answers[-2].token_ids[:20] != alone
        assert ids_after(tiny, ids_of(17), **{**options, "seed": 7}) != alone

    def test_samples_are_those_of_the_pipeline_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        options: dict[str, Any] = {"n": 3, "temperature": 1.0, "top_k": 30, "seed": 4, "max_new_tokens": 10}
        found = [[g.text for g in row] for row in tiny.generate(PROMPTS[:2], **options).generations]
        expected = [[g.text for g in row] for row in on_pipeline(tiny).generate(PROMPTS[:2], **options).generations]
        assert found == expected
        assert len(set(found[0])) == 3

    def test_without_a_seed_texts_differ(self, tiny: QuantizedHuggingFaceLLM) -> None:
        assert tiny.invoke("Sea", temperature=1.0) != tiny.invoke("Sea", temperature=1.0)


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"stop": ["er", "ing"]},
            {"stop": ["a"], "n": 2, "temperature": 0.8, "top_k": 30, "seed": 1},
            {"min_new_tokens": 9},
            {"ignore_eos": True},
            {"repetition_penalty": 1.3},
            {"repetition_penalty": 0.8},
            {"min_new_tokens": 5, "repetition_penalty": 1.1, "stop": ["or"]},
            {"skip_special_tokens": False},
            {"return_full_text": True},
            {"truncation": "left", "max_new_tokens": 20, "max_length": 24},
        ],
        ids=str,
    )
    @pytest.mark.compat
    def test_options_give_the_text_of_the_pipeline_engine(
        self, tiny: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        options = {"max_new_tokens": 24, **options}
        plain, encode = on_pipeline(tiny), tiny.pipeline.tokenizer
        prompts = PROMPTS[:3]
        # Tokens that come in the middle of what the model writes end it from here on.
        ends = [
            ids_after(tiny, encode(prompt)["input_ids"])[at] for prompt, at in zip(prompts, (3, 7, 11), strict=True)
        ]
        found = tiny.generate(prompts, eos_token_id=ends, **options)
        expected = plain.generate(prompts, eos_token_id=ends, **options)
        for one, other in zip(found.generations, expected.generations, strict=True):
            assert [self._facts(g) for g in one] == [self._facts(g) for g in other]
        for prompt, row in zip(prompts, found.generations, strict=True):
            assert self._facts(tiny.generate([prompt], eos_token_id=ends, **options).generations[0][0]) == self._facts(
                row[0]
            )

    @staticmethod
    def _facts(generation: Any) -> tuple[str, str, int]:
        info = generation.generation_info
        return generation.text, info["finish_reason"], info["usage_metadata"]["output_tokens"]

    def test_logprobs_are_the_model_s_own(self, llm: QuantizedHuggingFaceLLM) -> None:
        """Before temperature and penalty, beside rows that want none."""
        model, prompt = llm.pipeline.model, llm.pipeline.tokenizer(PROMPTS[0])["input_ids"]
        requests = [
            *plan(llm, prompt, logprobs=3, max_new_tokens=8),
            *plan(llm, prompt, max_new_tokens=8),
            *plan(llm, prompt, logprobs=0, max_new_tokens=8, do_sample=True, temperature=2.0, seed=1),
            *plan(llm, prompt, logprobs=5, max_new_tokens=6, repetition_penalty=1.5),
        ]
        answers = ask(llm, requests)
        assert answers[1].logprobs == []
        for answer, wanted in zip(answers, (3, None, 0, 5), strict=True):
            if wanted is None:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
            for entry, row in zip(answer.logprobs, expected, strict=True):
                # float32 over 30 layers of sums in another order
                assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
                best = row.topk(max(wanted, 1))
                assert [i for i, _ in entry.top] == best.indices[:wanted].tolist()
                assert [p for _, p in entry.top] == pytest.approx(best.values[:wanted].tolist(), abs=1e-3)

    def test_logprobs_of_a_call_are_those_of_the_pipeline_engine(self, llm: QuantizedHuggingFaceLLM) -> None:
        found = llm.generate([PROMPTS[0]], logprobs=2, max_new_tokens=3).generations[0][0].generation_info
        expected = (
            on_pipeline(llm).generate([PROMPTS[0]], logprobs=2, max_new_tokens=3).generations[0][0].generation_info
        )
        for one, other in zip(found["logprobs"]["content"], expected["logprobs"]["content"], strict=True):
            assert one["token_id"] == other["token_id"]
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
            assert [top["token"] for top in one["top_logprobs"]] == [top["token"] for top in other["top_logprobs"]]


class TestOptionsOfGenerate:
    @pytest.mark.parametrize(
        "options", [{"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[30], [31]]}], ids=str
    )
    def test_options_of_generate_run_on_the_pipeline_engine(
        self, llm: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        expected = greedy_text(llm, PROMPTS[0], **options)
        assert llm.engine_info.name == "fast"
        assert llm.invoke(PROMPTS[0], **options) == expected
        strict = QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="fast")
        with forwards(strict) as seen, pytest.raises(InvalidOptionError, match=next(iter(options))):
            strict.invoke(PROMPTS[0], **options)
        assert seen.count == 0

    def test_rare_samplers_run_on_the_pipeline_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "typical_p": 0.5, "seed": 1}
        assert tiny.invoke("Sea", **options) == on_pipeline(tiny, max_new_tokens=12).invoke("Sea", **options)
        strict = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, engine="fast")
        with pytest.raises(InvalidOptionError, match="typical_p"):
            strict.invoke("Sea", **options)

    def test_both_engines_run_over_one_model_at_once(self, llm: QuantizedHuggingFaceLLM) -> None:
        """Over one model: the pipeline's `generate` runs while the fast engine drives it."""
        fast = llm.invoke(PROMPTS[1], max_new_tokens=24)
        beams = llm.invoke(PROMPTS[0], num_beams=2)
        with Background(lambda: llm.invoke(PROMPTS[1], max_new_tokens=24)) as other:
            assert llm.invoke(PROMPTS[0], num_beams=2) == beams
        assert other.result == fast

    def test_an_encoder_decoder_runs_on_the_pipeline_engine(self, tokenizer: Any) -> None:
        config = transformers.T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
        llm = llm_of(model, tokenizer)
        assert llm.engine_info.name == "pipeline"
        assert "encoder-decoder" in llm.engine_info.reason
        given = tokenizer("Sea", return_tensors="pt")["input_ids"]
        expected = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8)
        assert llm.invoke("Sea", max_new_tokens=8) == tokenizer.decode(expected[0, 1:], skip_special_tokens=True)
        with pytest.raises(UnsupportedError, match="encoder-decoder"):
            QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="fast").invoke("Sea")

    def test_a_model_that_attends_both_ways_runs_on_the_pipeline_engine(self, tokenizer: Any) -> None:
        family = Family(config="GemmaConfig", options={**FAST["gemma"].options, "use_bidirectional_attention": True})
        info = llm_of(family_model(family), tokenizer).engine_info
        assert info.name == "pipeline"
        assert "ahead" in info.reason

    def test_engine_info_is_for_the_options_of_the_object(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(num_beams=2)
        assert llm.engine_info.name == "pipeline"
        assert "num_beams=2" in llm.engine_info.reason
