"""The fast engine as its callers see it: right texts whatever else runs, and failures that stay where they belong."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm import NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.kv_cache import LayerShape, allocate_pools, resident_bytes
from langchain_quantllm.engine.request import Request, TokenLogprob, Usage, plan_requests
from langchain_quantllm.errors import (
    GenerationError,
    GenerationTimeoutError,
    InvalidOptionError,
    NotEnoughMemoryError,
    PromptTooLongError,
    UnsupportedError,
)
from langchain_quantllm.options import GenerationOptions
from tests.support.adapters import add_adapter, enable_adapters
from tests.support.checkpoints import run_python
from tests.support.families import FAST, Family, family_model, generated_ids, likeliest_ids
from tests.support.models import (
    fail_at,
    forwards,
    greedy_text,
    llm_of,
    slowly,
    tiny_model,
    wait_for_rest,
    wait_until,
)

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little",
    "1, 2, 3, 4,",
    "Sea",
    "def add(a, b):\n    return",
]
HAS_PEFT = importlib.util.find_spec("peft") is not None


@dataclass
class Answer:
    """What came back for one row."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None


def ids_of(count: int, *, seed: int = 0) -> list[int]:
    """Give token ids of SmolLM2's vocabulary at random, none of them special."""
    generator = torch.Generator().manual_seed(seed * 1009 + count)
    return torch.randint(1000, 40000, (count,), generator=generator).tolist()


def plan(llm: QuantizedHuggingFaceLLM, prompt_ids: Sequence[int], mask: Any = None, **options: Any) -> list[Request]:
    given = GenerationOptions(**{"max_new_tokens": 12, "eos_token_id": (), **options})
    limits = llm._engine(given).limits
    return plan_requests(
        prompt_ids, given, limits, max_rows=llm.batch_size, shares_prefix=llm.prefix_caching, mask=mask
    )


def ask(llm: QuantizedHuggingFaceLLM, requests: Sequence[Request]) -> list[Answer]:
    """Run requests of one submission."""
    answers = [Answer() for _ in requests]
    with llm._engine(requests[0].options).submit(requests) as stream:
        for chunk in stream:
            answer = answers[chunk.row]
            answer.token_ids += chunk.token_ids
            answer.text += chunk.text
            answer.logprobs += chunk.logprobs
            answer.finish_reason, answer.usage = chunk.finish_reason, chunk.usage
    return answers


def ids_after(llm: QuantizedHuggingFaceLLM, prompt_ids: Sequence[int], **options: Any) -> list[int]:
    return ask(llm, plan(llm, prompt_ids, **options))[0].token_ids


def on_pipeline(llm: QuantizedHuggingFaceLLM, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Give an LLM over the same model that runs on the other engine."""
    return QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="pipeline", **fields)


class Background:
    """A call in a thread of its own; leaving the block waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._thread.join(60)
        if kind is None:
            assert not self._thread.is_alive()
            if self._error is not None:
                raise self._error


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of such sizes take longer when several cores share them, and much longer when these are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    """A random Llama over SmolLM2's vocabulary, with an engine that no other module's tests have used."""
    llm = llm_of(tiny_model(len(tokenizer), seed=3), tokenizer, max_new_tokens=12)
    assert llm.engine_info.name == "fast"  # made now, so that its trial forwards are over when tests count
    yield llm
    llm.unload()


@pytest.fixture
def make_tiny(tokenizer: Any) -> Iterator[Callable[..., QuantizedHuggingFaceLLM]]:
    """Make LLMs over a random Llama that the test may spoil."""
    made = []

    def make(seed: int = 3, **fields: Any) -> QuantizedHuggingFaceLLM:
        made.append(llm_of(tiny_model(len(tokenizer), seed=seed), tokenizer, **{"max_new_tokens": 12, **fields}))
        return made[-1]

    yield make
    for llm in made:
        llm.unload()


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

    def test_long_prompts_go_in_pieces_between_the_steps_of_others(self, tiny: QuantizedHuggingFaceLLM) -> None:
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
        assert [sizes[i] for i in pieces] == [128] * 10 + [21]  # beside a row that decodes
        assert {b - a for a, b in itertools.pairwise(pieces)} == {2}  # which takes turns with them

    def test_more_rows_than_there_are_places(self, tiny: QuantizedHuggingFaceLLM) -> None:
        prompts = [ids_of(3 + i % 20, seed=i) for i in range(45)]
        answers = ask(tiny, [plan(tiny, prompt, max_new_tokens=4 + i % 7)[0] for i, prompt in enumerate(prompts)])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == likeliest_ids(tiny.pipeline.model, prompt, answer.token_ids)

    def test_batch_size_bounds_the_rows(self, tiny: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, batch_size=2)
        requests = [plan(llm, ids_of(1, seed=i), max_new_tokens=5)[0] for i in range(7)]
        with forwards(llm) as seen:
            answers = ask(llm, requests)
        assert max(tokens for _, tokens in seen.shapes) <= 2
        assert [answer.token_ids for answer in answers] == [
            ids_after(tiny, r.prompt_ids, max_new_tokens=5) for r in requests
        ]


class TestQuantized:
    def test_the_text_of_generate_where_no_tie_decides(self, quantized_llm: QuantizedHuggingFaceLLM) -> None:
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

    def test_kernels_for_one_row_may_round_otherwise(self, any_smollm2: Path) -> None:
        """On CPUs with AVX512-BF16, bitsandbytes' product of a single row is another than that of several."""
        given = {"quantization": NF4(compute_dtype="float32"), "dtype": "float32", "device": "cpu", "progress": False}
        llm = QuantizedHuggingFaceLLM(model_id=str(any_smollm2), engine="fast", max_new_tokens=4, **given)
        assert llm.invoke("The capital of France is")
        llm.unload()


class TestTheUsersModel:
    """It stays the user's: nothing of it is changed, and it may be used in other threads meanwhile."""

    def test_its_attention_is_as_before(self, tiny: QuantizedHuggingFaceLLM) -> None:
        config = tiny.pipeline.model.config
        before = config._attn_implementation
        tiny.invoke("Sea")
        assert config._attn_implementation == before == "sdpa"
        with forwards(tiny, fail_at(2, RuntimeError("broken"))), pytest.raises(GenerationError):
            tiny.invoke("Sea")
        assert config._attn_implementation == before

    @pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "mixtral"])
    def test_it_runs_in_another_thread_meanwhile(self, tokenizer: Any, family: str) -> None:
        """With padding, whose mask only the user's own attention knows."""
        model = family_model(FAST[family])
        before = model.config._attn_implementation
        llm = llm_of(model, tokenizer)
        prompt_ids = [20 + i for i in range(30)]
        alone = ids_after(llm, prompt_ids, max_new_tokens=40)
        pad = torch.zeros(2, 9, dtype=torch.long)
        given = torch.cat([torch.cat([pad, torch.arange(50, 90).reshape(2, 20)], 1), torch.arange(100, 129)[None]])
        mask = torch.cat(
            [torch.cat([pad, torch.ones(2, 20, dtype=torch.long)], 1), torch.ones(1, 29, dtype=torch.long)]
        )

        def generate() -> list[list[int]]:
            return model.generate(
                given, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0
            ).tolist()

        expected = generate()
        done = threading.Event()

        def keep_running() -> list[list[int]]:
            found = []
            while not done.is_set():
                found.append(ids_after(llm, prompt_ids, max_new_tokens=40))
            return found

        with forwards(llm, slowly(0.001)), Background(keep_running) as running:
            try:
                for _ in range(4):
                    assert generate() == expected
            finally:
                done.set()
        assert all(ids == alone for ids in running.result)
        assert model.config._attn_implementation == before

    def test_two_pipelines_over_one_model(self, tokenizer: Any) -> None:
        """Each has an engine of its own, and both drive the model at once."""
        model = tiny_model(len(tokenizer))
        llms = [llm_of(model, tokenizer) for _ in range(2)]
        expected = [ids_after(llm, ids_of(7)) for llm in llms]
        assert expected[0] == expected[1]
        with forwards(llms[0], slowly(0.002)):
            for _ in range(3):
                with (
                    Background(lambda: ids_after(llms[0], ids_of(7), max_new_tokens=30)) as one,
                    Background(lambda: ids_after(llms[1], ids_of(7), max_new_tokens=23)) as other,
                ):
                    pass
                assert one.result[:12] == other.result[:12] == expected[0]
        assert model.config._attn_implementation == "sdpa"

    def test_gradients_are_not_turned_off_for_the_user(self, tiny: QuantizedHuggingFaceLLM) -> None:
        tiny.invoke("Sea")
        assert torch.is_grad_enabled()
        assert all(p.requires_grad for p in tiny.pipeline.model.parameters())

    def test_a_checkpoint_that_says_use_cache_false_is_fast(self, tokenizer: Any) -> None:
        """As fine-tuning with gradient checkpointing leaves it in the config; it changes no text."""
        model = tiny_model(len(tokenizer))
        model.config.use_cache = model.generation_config.use_cache = False
        llm = llm_of(model, tokenizer, max_new_tokens=5)
        assert llm.engine_info.name == "fast"
        expected = greedy_text(llm, "Sea", max_new_tokens=5)
        with forwards(llm) as seen:
            assert llm.invoke("Sea") == expected
        sizes = [tokens for _, tokens in seen.shapes]
        assert sizes[1:] == [1] * 4  # the pipeline engine, without a cache, runs all the text at each token
        assert QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="fast", max_new_tokens=5).invoke("Sea") == expected


class TestSampling:
    OPTIONS = (
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.3, "top_p": 0.6},
        {"temperature": 0.5, "min_p": 0.1, "repetition_penalty": 1.2},
        {"top_k": 50, "top_p": 0.9, "min_new_tokens": 5},
    )
    # Tokens of a random model have tiny probabilities, so that without a cut its draws hang on rounding now and then.

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.compat
    def test_a_seed_gives_the_same_text_on_both_engines(
        self, tiny: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        plain = on_pipeline(tiny)
        for seed in (1, 2, 3):
            found = tiny.batch(PROMPTS[:2], seed=seed, max_new_tokens=12, **options)
            assert found == plain.batch(PROMPTS[:2], seed=seed, max_new_tokens=12, **options)

    def test_the_same_on_a_trained_model(self, llm: QuantizedHuggingFaceLLM) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 1, "max_new_tokens": 16}
        assert llm.invoke(PROMPTS[1], **options) == on_pipeline(llm).invoke(PROMPTS[1], **options)

    def test_whatever_else_runs(self, tiny: QuantizedHuggingFaceLLM) -> None:
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
    def test_the_text_of_the_pipeline_engine(self, tiny: QuantizedHuggingFaceLLM, options: dict[str, Any]) -> None:
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

    def test_logprobs_are_the_model_s(self, llm: QuantizedHuggingFaceLLM) -> None:
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

    def test_logprobs_of_a_call(self, llm: QuantizedHuggingFaceLLM) -> None:
        found = llm.generate([PROMPTS[0]], logprobs=2, max_new_tokens=3).generations[0][0].generation_info
        expected = (
            on_pipeline(llm).generate([PROMPTS[0]], logprobs=2, max_new_tokens=3).generations[0][0].generation_info
        )
        for one, other in zip(found["logprobs"]["content"], expected["logprobs"]["content"], strict=True):
            assert one["token_id"] == other["token_id"]
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
            assert [top["token"] for top in one["top_logprobs"]] == [top["token"] for top in other["top_logprobs"]]


class AllowOnly:
    """Lets a row write some ids only, and notes what it wrote."""

    def __init__(
        self,
        ids: Sequence[int],
        *,
        fails_at: int | None = None,
        frees_after: int | None = None,
        ends_after: int | None = None,
    ) -> None:
        self.ids = ids
        self.accepted: list[int] = []
        self.ended = False
        self._fails_at = fails_at
        self._frees_after = frees_after
        self._ends_after = ends_after

    def fill(self, bits: torch.Tensor) -> bool:
        assert bits.dtype == torch.int32
        assert bool((bits == -1).all())
        if self._fails_at == len(self.accepted):
            msg = "the grammar is broken"
            raise RuntimeError(msg)
        if self._frees_after is not None and len(self.accepted) >= self._frees_after:
            bits.zero_()  # is not looked at
            return False
        self.ended = self._ends_after == len(self.accepted)
        bits.zero_()
        for i in self.ids:
            word = int(bits[0, i // 32]) & 0xFFFFFFFF | 1 << i % 32
            bits[0, i // 32] = word - (1 << 32) if word >= 1 << 31 else word
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


class TestMasks:
    IDS = (31, 32, 63, 64, 1000, 49151, 49120)

    def test_only_what_is_allowed(self, tiny: QuantizedHuggingFaceLLM) -> None:
        mask = AllowOnly(self.IDS)
        found = ids_after(tiny, ids_of(9), mask=lambda: mask, max_new_tokens=20)
        assert set(found) <= set(self.IDS)
        assert len(set(found)) > 1
        assert mask.accepted == found
        model = tiny.pipeline.model
        with torch.no_grad():
            logits = model(torch.tensor([[*ids_of(9), *found]])).logits[0, 8:-1, list(self.IDS)]
        assert found == [self.IDS[i] for i in logits.argmax(-1).tolist()]

    def test_beside_rows_that_have_none(self, tiny: QuantizedHuggingFaceLLM) -> None:
        requests = [
            *plan(tiny, ids_of(9), mask=lambda: AllowOnly(self.IDS), max_new_tokens=9),
            *plan(tiny, ids_of(20), max_new_tokens=12),
            *plan(tiny, ids_of(9), mask=lambda: AllowOnly((7, 8), frees_after=3), max_new_tokens=9),
            *plan(tiny, ids_of(5), mask=lambda: AllowOnly(self.IDS), do_sample=True, temperature=3.0, seed=1),
        ]
        answers = ask(tiny, requests)
        assert [a.token_ids for a in answers] == [ask(tiny, [request])[0].token_ids for request in requests]
        assert answers[1].token_ids == ids_after(tiny, ids_of(20), max_new_tokens=12)
        assert set(answers[0].token_ids) | set(answers[3].token_ids) <= set(self.IDS)
        assert set(answers[2].token_ids[:3]) <= {7, 8}
        assert not set(answers[2].token_ids[3:]) & {7, 8}

    @pytest.mark.parametrize("in_pieces", [True, False])
    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_a_mask_may_end_its_row(self, tiny: QuantizedHuggingFaceLLM, after: int, in_pieces: bool) -> None:
        for llm in (tiny, on_pipeline(tiny)):
            whole = ids_after(llm, ids_of(9), mask=lambda: AllowOnly(self.IDS), max_new_tokens=9)
            requests = [
                *plan(llm, ids_of(9), mask=lambda: AllowOnly(self.IDS, ends_after=after), max_new_tokens=9),
                *plan(llm, ids_of(20), max_new_tokens=9),
            ]
            chunks = list(llm._engine().submit(requests, in_pieces=in_pieces))
            found = [i for chunk in chunks if chunk.row == 0 for i in chunk.token_ids]
            assert found == whole[:after]
            text = "".join(chunk.text for chunk in chunks if chunk.row == 0)
            assert text == llm.pipeline.tokenizer.decode(whole[:after])
            ends = {chunk.row: chunk.finish_reason for chunk in chunks if chunk.finish_reason}
            assert ends == {0: "stop", 1: "length"}

    @pytest.mark.parametrize("where", ["first", "later", "factory", "accept"])
    def test_an_error_of_its_own_fails_its_row_alone(self, tiny: QuantizedHuggingFaceLLM, where: str) -> None:
        def make() -> AllowOnly:
            if where == "factory":
                msg = "the grammar is broken"
                raise RuntimeError(msg)
            mask = AllowOnly(self.IDS, fails_at={"first": 0, "later": 4}.get(where))
            if where == "accept":
                mask.accept = lambda token_id: [][token_id]  # type: ignore[method-assign]
            return mask

        expected = ids_after(tiny, ids_of(8), max_new_tokens=40)
        with (
            forwards(tiny, slowly(0.002)) as seen,
            Background(lambda: ids_after(tiny, ids_of(8), max_new_tokens=40)) as other,
        ):
            seen.wait_for(4)
            with pytest.raises(GenerationError) as caught:
                ids_after(tiny, ids_of(9), mask=make, max_new_tokens=9)
        assert isinstance(caught.value.__cause__, IndexError if where == "accept" else RuntimeError)
        assert other.result == expected
        wait_until(lambda: tiny._engine()._blocks.held == 0)

    def test_the_same_under_the_pipeline_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        plain = on_pipeline(tiny)
        options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.5, "seed": 2}
        found = ids_after(tiny, ids_of(9), mask=lambda: AllowOnly(self.IDS), **options)
        assert found == ids_after(plain, ids_of(9), mask=lambda: AllowOnly(self.IDS), **options)


def cached_tokens(llm: QuantizedHuggingFaceLLM, prompt_ids: Sequence[int], **options: Any) -> list[int | None]:
    return [a.usage.cached_tokens if a.usage else None for a in ask(llm, plan(llm, prompt_ids, **options))]


class TestPrefixes:
    @pytest.mark.compat
    def test_over_turns(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        first = ids_of(21)
        answer = ids_after(llm, first, max_new_tokens=30)
        second = [*first, *answer, *ids_of(9, seed=1)]
        # The keys of the answer's last token were never computed: 50 tokens, three whole pages.
        assert cached_tokens(llm, second, max_new_tokens=20) == [48]
        found = ids_after(llm, second, max_new_tokens=20)
        assert found == likeliest_ids(llm.pipeline.model, second, found)
        third = [*second, *found, *ids_of(40, seed=2)]
        assert cached_tokens(llm, third) == [(len(second) + 19) // BLOCK_TOKENS * BLOCK_TOKENS]
        found = ids_after(llm, third)
        assert found == likeliest_ids(llm.pipeline.model, third, found)

    def test_the_last_token_always_runs(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        for count, expected in ((32, 16), (33, 32), (16, 0), (17, 16)):
            before = ids_after(llm, ids_of(count))
            assert cached_tokens(llm, ids_of(count)) == [expected]
            assert ids_after(llm, ids_of(count)) == before

    def test_counted_in_usage(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        prompt = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3
        tokens = llm.get_num_tokens(prompt)
        whole = (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        for expected in (0, whole):
            result = llm.generate([prompt])
            usage = result.generations[0][0].generation_info["usage_metadata"]
            assert usage["input_token_details"] == {"cache_read": expected}
            assert usage["input_tokens"] == tokens
            assert result.llm_output["token_usage"]["cached_tokens"] == expected

    def test_not_without_prefix_caching(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny(prefix_caching=False)
        sharing = QuantizedHuggingFaceLLM(pipeline=llm.pipeline)
        for _ in range(2):
            assert cached_tokens(llm, ids_of(40)) == [0]
        assert cached_tokens(sharing, ids_of(40)) == [0]  # it left nothing for others
        assert cached_tokens(sharing, ids_of(40)) == [32]
        assert cached_tokens(llm, ids_of(40)) == [0]

    def test_samples_share_their_prompt_even_then(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny(prefix_caching=False)
        options: dict[str, Any] = {"n": 3, "do_sample": True, "top_k": 30, "seed": 1, "max_new_tokens": 20}
        llm._engine()
        with forwards(llm) as seen:
            assert cached_tokens(llm, ids_of(40), **options) == [0, 32, 32]
        assert seen.shapes[0] == (1, 40 + 8 + 8)
        assert cached_tokens(llm, ids_of(40), **options) == [0, 32, 32]  # not the other call's
        found = [a.token_ids for a in ask(llm, plan(llm, ids_of(40), **options))]
        assert found == [a.token_ids for a in ask(on_pipeline(llm), plan(on_pipeline(llm), ids_of(40), **options))]

    def test_rows_of_one_batch_share(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        prompts = [[*ids_of(33), *ids_of(4 + i, seed=i)] for i in range(4)]
        answers = ask(llm, [plan(llm, prompt)[0] for prompt in prompts])
        assert [a.usage.cached_tokens for a in answers if a.usage] == [0, 32, 32, 32]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == likeliest_ids(llm.pipeline.model, prompt, answer.token_ids)


ONE_ROW = 7 * BLOCK_TOKENS * 512  # a tiny Llama's token has 2 layers * 2 * 32 * 4 bytes = 512; page 0 is nobody's


class TestKVCacheMemory:
    def test_rows_that_do_not_fit_beside_each_other_wait(
        self, tiny: QuantizedHuggingFaceLLM, make_tiny: Callable[..., QuantizedHuggingFaceLLM]
    ) -> None:
        llm = make_tiny(kv_cache_memory=ONE_ROW)
        assert llm.engine_info.kv_cache_tokens == 6 * BLOCK_TOKENS
        requests = [
            *plan(tiny, ids_of(20), max_new_tokens=70),
            *plan(tiny, ids_of(17), max_new_tokens=60, do_sample=True, top_k=30, seed=1, n=2),
            *plan(tiny, ids_of(16), max_new_tokens=75, repetition_penalty=1.2, logprobs=1),
            *plan(tiny, ids_of(40), max_new_tokens=56),
            *plan(tiny, ids_of(1), max_new_tokens=95, min_new_tokens=20, eos_token_id=(5,)),
            *plan(tiny, ids_of(5), max_new_tokens=30, mask=lambda: AllowOnly(TestMasks.IDS)),
        ]
        found = ask(llm, requests)
        expected = ask(tiny, requests)
        assert llm._engine()._scheduler.preempted > 0
        assert tiny._engine()._scheduler.preempted == 0
        assert [a.token_ids for a in found] == [a.token_ids for a in expected]
        assert [entry.token_id for entry in found[3].logprobs] == found[3].token_ids
        assert [a.finish_reason for a in found] == [a.finish_reason for a in expected]
        assert all(a.usage and a.usage.completion_tokens == len(a.token_ids) for a in found)
        wait_until(lambda: llm._engine()._blocks.held == 0)

    @pytest.mark.parametrize("prefix_caching", [True, False])
    def test_a_crowd_in_little_room(
        self, tiny: QuantizedHuggingFaceLLM, make_tiny: Callable[..., QuantizedHuggingFaceLLM], prefix_caching: bool
    ) -> None:
        llm = make_tiny(kv_cache_memory=3 * ONE_ROW, prefix_caching=prefix_caching)
        requests = [
            plan(llm, [*ids_of(33), *ids_of(1 + i, seed=i)][i % 3 * 16 :], max_new_tokens=10 + 3 * i % 40)[0]
            for i in range(25)
        ]
        expected = ask(tiny, [replace(request, shares_prefix=False) for request in requests])
        for _ in range(2):
            assert [a.token_ids for a in ask(llm, requests)] == [a.token_ids for a in expected]
        wait_until(lambda: llm._engine()._blocks.held == 0)

    def test_too_long_is_an_error_at_once(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny(kv_cache_memory=ONE_ROW)
        expected = ids_after(llm, ids_of(10), max_new_tokens=50)
        with (
            forwards(llm, slowly(0.003)) as seen,
            Background(lambda: ids_after(llm, ids_of(10), max_new_tokens=50)) as other,
        ):
            seen.wait_for(3)
            with pytest.raises(PromptTooLongError, match="kv_cache_memory"):
                llm.invoke("word " * 120)
            request = replace(plan(llm, ids_of(40))[0], max_new_tokens=57)
            with pytest.raises(PromptTooLongError, match="kv_cache_memory"):
                llm._engine().submit([request])
        assert other.result == expected
        assert len(ids_after(llm, ids_of(40), max_new_tokens=56)) == 56  # fits exactly

    def test_the_pool_stays_within_the_budget(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        info = make_tiny(kv_cache_memory="1MiB").engine_info
        assert info.kv_cache_bytes is not None
        assert info.kv_cache_bytes <= 2**20

    @pytest.mark.parametrize("value", [0, -1, 1, 1.5, 0.0, -0.5, float("nan"), "lots", "", "4 apples", True])
    def test_values_that_make_no_sense(self, tiny: QuantizedHuggingFaceLLM, value: Any) -> None:
        with pytest.raises(InvalidOptionError, match="kv_cache_memory"):
            QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, kv_cache_memory=value)

    def test_too_little(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        with pytest.raises(NotEnoughMemoryError, match="kv_cache_memory"):
            make_tiny(kv_cache_memory=1000).invoke("Sea")

    def test_the_report_names_the_cache(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        assert llm.memory_report().kv_cache_bytes is None
        ids_after(llm, ids_of(40), max_new_tokens=20)
        report = llm.memory_report()
        assert report.kv_cache_bytes == 64 * 512  # 59 tokens in four pages
        assert "KV cache" in str(report)
        if sys.platform == "linux":
            assert report.kv_cache_bytes <= report.kv_resident_bytes

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is resident")
    def test_its_memory_is_taken_as_it_is_written_whatever_was_freed_before(self) -> None:
        cpu = torch.device("cpu")
        shape = LayerShape(kv_heads=2, key_dim=64, value_dim=64, dtype=torch.bfloat16, device=cpu)
        freed = [torch.ones(8 * 2**20, dtype=torch.uint8) for _ in range(16)]  # goes to the heap once one was freed
        kept = [torch.ones(1) for _ in range(4)]
        del freed
        pools = allocate_pools([shape] * 4, 2048)  # 16 MiB each
        assert resident_bytes(pools) == 0
        pools[1].kv[7] = 1
        assert pools[1].kv[7].nbytes <= resident_bytes(pools) <= 4 * 2**20  # pages of the system are 2 MiB at most
        assert not pools[1].kv[8].any()
        assert len(kept) == 4


class TestWrongRequests:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"prompt_ids": ()},
            {"prompt_ids": (5, -1)},
            {"prompt_ids": (49152,)},
            {"prompt_ids": (10**12,)},
            {"eos_token_ids": (49152,)},
            {"stop_token_ids": (-3,)},
            {"max_new_tokens": 10**6},
            {"options": GenerationOptions(extra={"num_beams": 2})},
        ],
        ids=str,
    )
    def test_are_refused_alone(self, tiny: QuantizedHuggingFaceLLM, wrong: dict[str, Any]) -> None:
        good = plan(tiny, ids_of(6))[0]
        expected = ask(tiny, [good])[0].token_ids
        engine = tiny._engine()
        with (
            Background(lambda: ask(tiny, [good])) as other,
            pytest.raises((InvalidOptionError, PromptTooLongError)),
        ):
            engine.submit([good, replace(good, **wrong)])
        assert other.result[0].token_ids == expected
        assert ask(tiny, [good])[0].token_ids == expected
        wait_until(lambda: engine._blocks.held == 0)

    def test_a_context_that_is_full(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer), context_tokens=64), tokenizer)
        found = ids_after(llm, ids_of(50), max_new_tokens=100)
        assert len(found) == 14
        assert found == likeliest_ids(llm.pipeline.model, ids_of(50), found)
        with pytest.raises(PromptTooLongError):
            ids_after(llm, ids_of(64))


class TestCancelling:
    def test_a_closed_stream_gives_its_pages_back_at_once(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        with forwards(tiny, slowly(0.003)) as seen:
            stream = engine.submit(plan(tiny, ids_of(40), max_new_tokens=2000))
            next(iter(stream))
            assert engine._blocks.held >= 3
            stream.close()
            count = seen.count
            wait_until(lambda: engine._blocks.held == 0, 1.0)
            assert seen.settle() <= count + 2  # the forward that ran, and one begun before the next look
        assert len(ids_after(tiny, ids_of(40))) == 12

    def test_beside_others(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        expected = ids_after(tiny, ids_of(10), max_new_tokens=60)
        with (
            forwards(tiny, slowly(0.002)) as seen,
            Background(lambda: ids_after(tiny, ids_of(10), max_new_tokens=60)) as other,
        ):
            seen.wait_for(2)
            streams = [engine.submit(plan(tiny, ids_of(200 + i), max_new_tokens=900)) for i in range(6)]
            seen.wait_for(12)
            for stream in streams:
                stream.close()
            wait_until(lambda: engine._blocks.held <= 5, 2.0)
        assert other.result == expected

    def test_breaking_off_a_langchain_stream(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        for _ in tiny.stream("Sea", max_new_tokens=3000):
            break
        wait_until(lambda: engine._blocks.held == 0, 5.0)

    def test_a_timeout_frees_its_row(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        with forwards(tiny, slowly(0.01)), pytest.raises(GenerationTimeoutError):
            tiny.invoke("Sea", max_new_tokens=3000, timeout=0.1)
        wait_until(lambda: engine._blocks.held == 0, 5.0)


class TestFailures:
    @pytest.mark.parametrize("number", [1, 4])
    def test_of_the_model_reach_all_that_run_and_nobody_else(self, tiny: QuantizedHuggingFaceLLM, number: int) -> None:
        expected = ids_after(tiny, ids_of(9))
        error = RuntimeError("the device is on fire")
        requests = [plan(tiny, ids_of(9))[0], plan(tiny, ids_of(30))[0]]
        with forwards(tiny, fail_at(number, error)):
            streams = [tiny._engine().submit([request]) for request in requests]
            for stream in streams:
                with pytest.raises(GenerationError, match="on fire") as caught:
                    list(stream)
                assert caught.value.__cause__ is error
            assert ids_after(tiny, ids_of(9)) == expected
        assert tiny._engine()._blocks.held == 0

    @pytest.fixture
    def spoiled(self, tokenizer: Any) -> Iterator[tuple[QuantizedHuggingFaceLLM, Request]]:
        """An LLM that knows no numbers for one token, and a request with that token in its prompt."""
        model = tiny_model(len(tokenizer))
        with torch.no_grad():
            model.get_input_embeddings().weight[7] = torch.nan
        llm = llm_of(model, tokenizer, kv_cache_memory=4 * ONE_ROW, prefix_caching=False)
        assert llm.engine_info.name == "fast"
        yield llm, plan(llm, [*ids_of(20), 7], max_new_tokens=30)[0]
        llm.unload()

    def test_scores_that_are_no_numbers_fail_their_row_alone(
        self, spoiled: tuple[QuantizedHuggingFaceLLM, Request]
    ) -> None:
        llm, bad = spoiled
        expected = ids_after(llm, ids_of(3), max_new_tokens=30)
        with (
            forwards(llm, slowly(0.002)) as seen,
            Background(lambda: ids_after(llm, ids_of(3), max_new_tokens=30)) as other,
        ):
            seen.wait_for(5)
            with pytest.raises(GenerationError, match="no numbers"):
                ask(llm, [bad])
        assert other.result == expected

    def test_and_not_those_who_get_its_pages(self, spoiled: tuple[QuantizedHuggingFaceLLM, Request]) -> None:
        """What is masked is multiplied by 0, and 0 times no number is none."""
        llm, bad = spoiled
        expected = [ids_after(llm, ids_of(count), max_new_tokens=30) for count in (3, 40)]
        for _ in range(3):
            with pytest.raises(GenerationError, match="no numbers"):
                ask(llm, [bad])
            answers = ask(llm, [plan(llm, ids_of(count), max_new_tokens=30)[0] for count in (3, 40)])
            assert [answer.token_ids for answer in answers] == expected

    def test_unloading_while_it_runs(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_model(len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path), max_new_tokens=12, progress=False)
        expected = llm.invoke("Sea")
        assert llm.engine_info.name == "fast"
        engine: Any = llm._engine()
        stream = llm.stream("Sea", max_new_tokens=5000)
        next(stream)
        llm.unload()
        assert not engine.kv_resident_bytes  # as a report finds it that is made meanwhile
        with pytest.raises(GenerationError, match="unloaded"):
            list(stream)
        assert llm.invoke("Sea") == expected
        llm.unload()

    def test_unloading_a_pipeline_of_one_s_own_ends_only_the_engine(
        self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]
    ) -> None:
        llm = make_tiny()
        expected = llm.invoke("Sea")
        llm.unload()
        assert greedy_text(llm, "Sea") == expected
        assert llm.invoke("Sea") == expected

    @pytest.mark.slow
    def test_a_forked_process_is_told_so(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_model(len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        code = """
import os, sys
from langchain_quantllm import QuantizedHuggingFaceLLM
llm = QuantizedHuggingFaceLLM(model_id=sys.argv[1], max_new_tokens=4, progress=False)
text = llm.invoke("Sea")
assert llm.engine_info.name == "fast"
stream = llm.stream("Sea", max_new_tokens=2000)
next(stream)
child = os.fork()
if child == 0:
    try:
        llm.invoke("Sea")
        os._exit(7)
    except Exception as error:
        os._exit(0 if "forked" in str(error) else 8)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
next(stream)
stream.close()
assert llm.invoke("Sea") == text
print("done")
"""
        assert run_python(code, tmp_path).stdout.strip().endswith("done")


@pytest.mark.compat
class TestChanges:
    """Keys and values that were computed with other weights are no use."""

    def test_weights_changed_in_place(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        model = llm.pipeline.model
        before = ids_after(llm, ids_of(40))
        weight = model.model.layers[0].self_attn.v_proj.weight
        wait_for_rest()
        with torch.no_grad():
            weight.mul_(-1.5)
        after = ids_after(llm, ids_of(40))
        assert after == generated_ids(model, ids_of(40), 12)
        assert after != before
        wait_for_rest()
        weight.data = weight.data / -1.5
        assert ids_after(llm, ids_of(40)) == before
        wait_for_rest()
        model.load_state_dict({name: -value for name, value in model.state_dict().items()})
        assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)

    def test_a_hook_that_steers(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        model = llm.pipeline.model
        before = ids_after(llm, ids_of(40))
        shift = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + shift)
        steered = generated_ids(model, ids_of(40), 12)
        assert steered != before
        wait_for_rest()
        assert ids_after(llm, ids_of(40)) == steered
        handle.remove()
        wait_for_rest()
        assert ids_after(llm, ids_of(40)) == before

    def test_at_once_after_a_call(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        """When the engine's thread is not asleep yet."""
        llm = make_tiny()
        weight = llm.pipeline.model.model.layers[0].self_attn.v_proj.weight
        for _ in range(5):
            ids_after(llm, ids_of(40))
            with torch.no_grad():
                weight.mul_(-1.1)
            assert ids_after(llm, ids_of(40)) == generated_ids(llm.pipeline.model, ids_of(40), 12)

    def test_while_others_run(self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
        llm = make_tiny()
        llm._engine()
        model = llm.pipeline.model
        with forwards(llm, slowly(0.005)) as seen, llm._engine().submit(plan(llm, ids_of(5), max_new_tokens=3000)):
            seen.wait_for(3)
            before = ids_after(llm, ids_of(40))
            with torch.no_grad():
                model.model.layers[0].self_attn.v_proj.weight.mul_(-1.5)
            after = ids_after(llm, ids_of(40))
        assert after == generated_ids(model, ids_of(40), 12)
        assert after != before

    @pytest.mark.skipif(not HAS_PEFT, reason="needs peft")
    @pytest.mark.parametrize("wraps", [True, False])
    def test_an_adapter(self, tokenizer: Any, wraps: bool) -> None:
        import peft

        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = tiny_model(len(tokenizer))
        plain = generated_ids(model, ids_of(40), 12)
        llm = llm_of(model, tokenizer)

        def check(what: str, expected: Sequence[int] | None = None) -> None:
            wait_for_rest()
            assert ids_after(llm, ids_of(40)) == (expected or generated_ids(model, ids_of(40), 12)), what

        check("before", plain)  # its keys are in the prefix cache now
        torch.manual_seed(0)
        if wraps:
            model = peft.get_peft_model(model, config)
        else:
            add_adapter(model, config)
        adapted = generated_ids(model, ids_of(40), 12)
        assert adapted != plain
        check("added", adapted)
        if wraps:
            with model.disable_adapter():
                check("disabled", plain)
        else:
            enable_adapters(model, False)
            check("disabled", plain)
            enable_adapters(model, True)
        check("enabled", adapted)
        layers = [module for module in model.modules() if hasattr(module, "set_scale")]
        for layer in layers:
            layer.merge()
        check("merged")
        for layer in layers:
            layer.unmerge()
        check("unmerged", adapted)
        for layer in layers:
            layer.set_scale("default", -4.0)
        check("scaled")

    @pytest.mark.skipif(not HAS_PEFT, reason="needs peft")
    def test_a_model_that_comes_with_its_adapter(self, tokenizer: Any) -> None:
        import peft

        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(tiny_model(len(tokenizer)), config)
        llm = llm_of(model, tokenizer)
        assert llm.engine_info.name == "fast"
        for _ in range(2):
            assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)


class TestCallers:
    def test_two_objects_over_one_model_meet_in_one_batch(self, tiny: QuantizedHuggingFaceLLM) -> None:
        other = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, max_new_tokens=30)
        assert other._engine() is tiny._engine()
        expected = [ids_after(tiny, ids_of(5), max_new_tokens=30), ids_after(other, ids_of(6), max_new_tokens=30)]
        with (
            forwards(tiny, slowly(0.003)) as seen,
            Background(lambda: ids_after(tiny, ids_of(5), max_new_tokens=30)) as one,
        ):
            seen.wait_for(3)
            assert ids_after(other, ids_of(6), max_new_tokens=30) == expected[1]
        assert one.result == expected[0]
        assert seen.count < 45  # 60 one after another

    def test_the_thread_is_idle_without_work(self, tiny: QuantizedHuggingFaceLLM) -> None:
        tiny.invoke("Sea")
        wait_for_rest()
        began = time.process_time()
        time.sleep(0.5)  # the time in which it is watched
        assert time.process_time() - began < 0.025

    def test_info(self, tiny: QuantizedHuggingFaceLLM) -> None:
        info, engine = tiny.engine_info, tiny._engine()
        assert (info.name, info.graphs) == ("fast", False)
        assert info.reason == "one running batch over KV cache blocks"
        assert info.kv_cache_tokens == engine.limits.cache_tokens
        assert info.kv_cache_tokens is not None
        assert info.kv_cache_tokens >= 8192  # the whole context
        assert info.kv_cache_bytes is not None
        assert 0 <= info.kv_cache_bytes - 512 * info.kv_cache_tokens <= 512 * BLOCK_TOKENS

    def test_the_other_engine_says_that_it_was_asked_for(self, tiny: QuantizedHuggingFaceLLM) -> None:
        info = on_pipeline(tiny).engine_info
        assert (info.name, info.kv_cache_tokens) == ("pipeline", None)
        assert "asked for" in info.reason

    @pytest.mark.parametrize("engine", ["bogus", "", "Fast"])
    def test_an_engine_that_there_is_not(self, tiny: QuantizedHuggingFaceLLM, engine: str) -> None:
        with pytest.raises(InvalidOptionError, match="'auto', 'fast', 'pipeline'"):
            QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, engine=engine)


class TestOptionsOfGenerate:
    @pytest.mark.parametrize(
        "options", [{"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[30], [31]]}], ids=str
    )
    def test_run_on_the_pipeline(self, llm: QuantizedHuggingFaceLLM, options: dict[str, Any]) -> None:
        expected = greedy_text(llm, PROMPTS[0], **options)
        assert llm.engine_info.name == "fast"
        assert llm.invoke(PROMPTS[0], **options) == expected
        strict = QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="fast")
        with forwards(strict) as seen, pytest.raises(InvalidOptionError, match=next(iter(options))):
            strict.invoke(PROMPTS[0], **options)
        assert seen.count == 0

    def test_rare_samplers(self, tiny: QuantizedHuggingFaceLLM) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "typical_p": 0.5, "seed": 1}
        assert tiny.invoke("Sea", **options) == on_pipeline(tiny, max_new_tokens=12).invoke("Sea", **options)
        strict = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, engine="fast")
        with pytest.raises(InvalidOptionError, match="typical_p"):
            strict.invoke("Sea", **options)

    def test_both_engines_at_once(self, llm: QuantizedHuggingFaceLLM) -> None:
        """Over one model: the pipeline's `generate` runs while the fast engine drives it."""
        fast = llm.invoke(PROMPTS[1], max_new_tokens=24)
        beams = llm.invoke(PROMPTS[0], num_beams=2)
        with Background(lambda: llm.invoke(PROMPTS[1], max_new_tokens=24)) as other:
            assert llm.invoke(PROMPTS[0], num_beams=2) == beams
        assert other.result == fast

    def test_an_encoder_decoder_is_refused(self, tokenizer: Any) -> None:
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

    def test_a_model_that_attends_both_ways_is_refused(self, tokenizer: Any) -> None:
        family = Family(config="GemmaConfig", options={**FAST["gemma"].options, "use_bidirectional_attention": True})
        info = llm_of(family_model(family), tokenizer).engine_info
        assert info.name == "pipeline"
        assert "ahead" in info.reason


class TestShortMemory:
    """The device's own error, raised where a real one would be: in a forward over too many tokens."""

    @pytest.mark.parametrize("most", [100, 17])
    def test_a_prefill_that_does_not_fit_goes_on_in_smaller_steps(
        self, make_tiny: Callable[..., QuantizedHuggingFaceLLM], most: int
    ) -> None:
        llm = make_tiny(prefix_caching=False)
        requests = [plan(llm, ids_of(count), max_new_tokens=9)[0] for count in (300, 5, 16, 150)]
        expected = [answer.token_ids for answer in ask(llm, requests)]

        def check(module: Any, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[1] > most:
                msg = "no room for so many tokens"
                raise torch.OutOfMemoryError(msg)

        handle = llm.pipeline.model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            assert [answer.token_ids for answer in ask(llm, requests)] == expected
        finally:
            handle.remove()
        engine: Any = llm._engine()
        assert engine._scheduler.prefill_tokens <= most
        assert engine._blocks.held == 0

    def test_no_room_for_anything_fails_those_in_flight_in_words(
        self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]
    ) -> None:
        llm = make_tiny()
        expected = llm.invoke("Sea")

        def check(module: Any, args: Any, kwargs: Any) -> None:
            msg = "no room at all"
            raise torch.OutOfMemoryError(msg)

        handle = llm.pipeline.model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            with pytest.raises(NotEnoughMemoryError, match="kv_cache_memory"):
                llm.invoke("Sea")
        finally:
            handle.remove()
        assert llm.invoke("Sea") == expected

    def test_a_mask_that_allows_nothing_fails_its_row_alone(
        self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]
    ) -> None:
        llm = make_tiny()
        good = plan(llm, ids_of(20))[0]
        expected = ask(llm, [good])[0].token_ids
        bad = plan(llm, ids_of(10), mask=lambda: AllowOnly(()))[0]
        with (
            Background(lambda: ask(llm, [good])[0].token_ids) as other,
            pytest.raises(GenerationError, match="no token"),
        ):
            ask(llm, [bad])
        assert other.result == expected

    def test_more_than_the_cache_holds_is_refused_where_it_was_asked_for(
        self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]
    ) -> None:
        llm = make_tiny(kv_cache_memory=ONE_ROW)
        with pytest.raises(PromptTooLongError, match="max_new_tokens=500 .* kv_cache_memory"):
            llm.invoke("Sea", max_new_tokens=500)

    def test_engine_info_is_that_of_the_object_s_own_options(
        self, make_tiny: Callable[..., QuantizedHuggingFaceLLM]
    ) -> None:
        llm = make_tiny(num_beams=2)
        assert llm.engine_info.name == "pipeline"
        assert "num_beams=2" in llm.engine_info.reason
