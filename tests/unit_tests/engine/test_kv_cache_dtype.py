"""A KV cache in 8 bits: what it holds, what models write with it, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from langchain_quantllm import QuantizedHuggingFaceLLM, estimate_memory
from langchain_quantllm.engine.build import EngineParts
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.kernels import kv_quantization
from langchain_quantllm.loading import registry
from tests.support.engine import MakeLLM, ask, ids_of, plan
from tests.support.families import FAST, INDEXED, LATENT, OWN_ATTENTION, WITH_STATES, family_model, random_ids
from tests.support.invariance import logits_of_requests
from tests.support.models import llm_of
from tests.support.selection import slow_but

DTYPES = ("fp8", "int8")
TOKEN_BYTES = 2 * (32 + 32 + 4)
"""Of `tiny_model`: two layers, a head of 32 numbers in keys and values, and the scales of both."""
SCORING = tuple(
    name
    for name in ("llama", "mistral", "gemma2", "gpt_oss", "llama4", "bloom", "cohere", "phi", "gpt_neox", "qwen2")
    if name in FAST
)
"""Grouped heads, windows, a cap of the scores, sinks, chunks, biases, and all ways to rotate keys."""


class RoundingCache(DynamicCache):
    """transformers' cache, which rounds keys and values as the pools of an engine do."""

    def __init__(self, parts: EngineParts, dtype: str, **given: Any) -> None:
        super().__init__(**given)
        layers = dict(zip(parts.probe.layers, parts.pools, strict=True))
        self.factors = {layer: pool.scales.factors for layer, pool in layers.items() if pool.scales is not None}
        self.codes = kv_quantization.KV_DTYPES[dtype]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        factors = self.factors[layer_idx][:, None]
        keys, values = (
            kv_quantization.dequantize(*kv_quantization.quantize(numbers, self.codes), numbers.dtype)
            for numbers in (key_states / factors, value_states)
        )
        return super().update(keys * factors, values, layer_idx, *args, **kwargs)


def parts_of(llm: QuantizedHuggingFaceLLM) -> EngineParts:
    engine: Any = llm._engine()
    return engine._parts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", slow_but(["llama", "gpt_oss", "gemma2"], list(SCORING)))
def test_logits_are_those_of_the_model_with_rounded_keys_and_values(name: str, dtype: str, tokenizer: Any) -> None:
    model = family_model(FAST[name])
    llm = llm_of(model, tokenizer, kv_cache_dtype=dtype, engine="fast", kv_cache_memory="2MiB")
    prompts = [random_ids(length, seed=length) for length in (3, 40, 70)]
    requests = [plan(llm, prompt, max_new_tokens=6, ignore_eos=True)[0] for prompt in prompts]
    answers = ask(llm, requests)
    found = logits_of_requests(llm, [plan(llm, prompt, max_new_tokens=6, ignore_eos=True)[0] for prompt in prompts])
    for prompt, answer, logits in zip(prompts, answers, found, strict=True):
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        cache = RoundingCache(parts_of(llm), dtype, config=model.config)
        with torch.no_grad():
            expected = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, len(prompt) - 1 :].float()
            exact = model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        # A number that lies between two codes may be rounded to the other one: far less than all rounding makes.
        rounding = (expected - exact).norm()
        assert rounding > 0
        assert (logits - expected).norm() <= 0.1 * rounding + 1e-4 * expected.norm()
    llm.unload()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_memory_holds_nearly_twice_the_tokens(make_tiny: MakeLLM, dtype: str) -> None:
    plain = make_tiny(kv_cache_memory="1MiB").engine_info
    info = make_tiny(kv_cache_memory="1MiB", kv_cache_dtype=dtype).engine_info
    assert (plain.kv_cache_dtype, info.kv_cache_dtype) == ("float32", dtype)
    assert plain.kv_cache_tokens is not None
    assert info.kv_cache_tokens is not None
    assert info.kv_cache_tokens // 16 == (1 << 20) // (TOKEN_BYTES * 16) - 1
    assert info.kv_cache_tokens > 3.5 * plain.kv_cache_tokens
    assert info.kv_cache_bytes is not None
    assert info.kv_cache_bytes <= 1 << 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cached_prefix_and_a_preempted_sequence_give_the_same_text(make_tiny: MakeLLM, dtype: str) -> None:
    ample = make_tiny(kv_cache_dtype=dtype)
    tight = make_tiny(kv_cache_dtype=dtype, kv_cache_memory=12 * 16 * TOKEN_BYTES)
    prompts = [ids_of(40, seed=seed) for seed in range(3)]
    given = {"max_new_tokens": 60, "ignore_eos": True}
    alone = [ask(ample, plan(ample, prompt, **given))[0].token_ids for prompt in prompts]
    again = [ask(ample, plan(ample, prompt, **given))[0] for prompt in prompts]
    assert [answer.token_ids for answer in again] == alone
    assert all(answer.usage is not None and answer.usage.cached_tokens >= 32 for answer in again)
    together = ask(tight, [plan(tight, prompt, **given)[0] for prompt in prompts])
    engine: Any = tight._engine()
    assert engine._scheduler.preempted > 0
    assert [answer.token_ids for answer in together] == alone


def test_a_key_or_a_value_that_is_no_number_is_found(make_tiny: MakeLLM) -> None:
    llm = make_tiny(kv_cache_dtype="int8")
    pool = parts_of(llm).pools[0]
    assert pool.scales is not None
    scales = pool.scales._replace(pairs=torch.zeros_like(pool.scales.pairs))
    key, value = torch.ones(2, 4, 1, 32).unbind(0)
    key[1, 0, 3], value[2, 0, 5] = torch.inf, torch.nan
    kv = torch.zeros_like(pool.kv)
    kv_quantization.write(key, value, kv, scales, torch.tensor([1, 1, 2, 2]), torch.tensor([0, 1, 0, 1]))
    both = kv_quantization.read(kv, scales, torch.tensor([1, 2]), key_dim=32, dtype=torch.float32)
    assert both[0, 0].isfinite().all()
    assert both[0, 1, 0, :32].isnan().all()
    assert both[0, 1, 0, 32:].isfinite().all()
    assert both[1, 0, 0, :32].isnan().all()
    assert (both[1, 0, 0, 32:] == 0).all()
    assert both[1, 1].isfinite().all()


def test_objects_of_each_dtype_share_the_weights_and_have_a_cache_of_their_own(make_tiny: MakeLLM) -> None:
    plain = make_tiny()
    rounded = QuantizedHuggingFaceLLM(pipeline=plain.pipeline, max_new_tokens=12, kv_cache_dtype="fp8")
    assert plain.engine_info.kv_cache_dtype == "float32"
    assert rounded.engine_info.kv_cache_dtype == "fp8"
    assert plain._engine() is not rounded._engine()
    assert rounded._engine() is QuantizedHuggingFaceLLM(pipeline=plain.pipeline, kv_cache_dtype="fp8")._engine()
    assert plain._identifying_params != rounded._identifying_params
    rounded.invoke("Sea")
    report = rounded.memory_report()
    assert report.kv_cache_bytes is not None
    tokens = rounded._loaded().engines.peak_cache_tokens
    assert report.kv_cache_bytes < 512 * tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("one_thread")
def test_batch_invariant_texts_are_the_same_bit_for_bit(make_tiny: MakeLLM, dtype: str) -> None:
    llm = make_tiny(kv_cache_dtype=dtype, batch_invariant=True, prefix_caching=False)
    assert llm.engine_info.batch_invariant
    assert llm.engine_info.kv_cache_dtype == dtype
    prompt = ids_of(37, seed=1)
    alone = logits_of_requests(llm, plan(llm, prompt, max_new_tokens=4))[0]
    others = [plan(llm, ids_of(5 + 9 * i, seed=i), max_new_tokens=4)[0] for i in range(5)]
    beside = logits_of_requests(llm, [*others, *plan(llm, prompt, max_new_tokens=4)])[-1]
    assert torch.equal(alone, beside)


def test_the_engine_is_checked_before_its_cache_is_rounded(make_tiny: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that rounding could hide is found: the check in 8 bits alone would let it pass."""
    own = ModelRunner.run

    def slightly_wrong(self: Any, *args: Any) -> Any:
        forward = own(self, *args)
        forward.logits.add_(0.05 * forward.logits.std() * torch.randn(forward.logits.shape))
        return forward

    monkeypatch.setattr(ModelRunner, "run", slightly_wrong)
    with pytest.raises(UnsupportedError, match="with kv_cache_dtype='int8' .*its logits .* are not its own"):
        make_tiny(kv_cache_dtype="int8").engine_info  # noqa: B018


class TestRefusals:
    @pytest.mark.parametrize("dtype", ["fp16", "INT8", 8, None, True])
    def test_unknown_dtypes(self, tiny: QuantizedHuggingFaceLLM, dtype: Any) -> None:
        with pytest.raises(InvalidOptionError, match="kv_cache_dtype=.*'auto', 'fp8', 'int8'"):
            QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, kv_cache_dtype=dtype)

    def test_generate_has_no_such_cache(self, tiny: QuantizedHuggingFaceLLM) -> None:
        with pytest.raises(InvalidOptionError, match="engine='pipeline' cannot carry out kv_cache_dtype='fp8'"):
            QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, kv_cache_dtype="fp8", engine="pipeline")

    def test_a_call_that_only_generate_carries_out(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(kv_cache_dtype="int8")
        with pytest.raises(InvalidOptionError, match="num_beams.* and kv_cache_dtype='auto'"):
            llm.invoke("Sea", num_beams=2)
        assert llm.invoke("Sea")

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            pytest.param(next(iter(LATENT.values())), "its layers keep latents", id="latents"),
            pytest.param(next(iter(INDEXED.values())), "(latents|indexers choose)", id="indexers"),
        ],
    )
    def test_families_without_plain_keys_and_values(self, model: Any, reason: str, tokenizer: Any) -> None:
        llm = llm_of(family_model(model), tokenizer, kv_cache_dtype="fp8")
        with pytest.raises(UnsupportedError, match=f"with kv_cache_dtype='fp8' .*{reason}.*use kv_cache_dtype='auto'"):
            llm.invoke("Sea")

    def test_a_checkpoint_is_refused_before_its_weights_are_read(
        self, tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family_model(next(iter(LATENT.values()))).save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((smollm2 / name).read_bytes())
        loaded = []
        own = registry.load_pipeline
        monkeypatch.setattr(registry, "load_pipeline", lambda *args: loaded.append(args) or own(*args))
        llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path), kv_cache_dtype="int8", dtype="bfloat16", progress=False)
        with pytest.raises(UnsupportedError, match="kv_cache_dtype='int8' is not possible .*latents.*'auto'"):
            llm.load()
        assert not loaded
        llm.kv_cache_dtype = "auto"
        llm.load()
        assert loaded
        llm.unload()


def test_estimates_know_the_dtype(smollm2: Path) -> None:
    plain, rounded = estimate_memory(str(smollm2)), estimate_memory(str(smollm2), kv_cache_dtype="int8")
    assert (plain.kv_cache_dtype, rounded.kv_cache_dtype) == ("auto", "int8")
    # 30 layers, 3 heads of 64.
    assert plain.kv_cache_bytes(100, 2) == 200 * 30 * 3 * 128 * 2
    assert rounded.kv_cache_bytes(100, 2) == 200 * 30 * 3 * (128 + 4)
    with pytest.raises(InvalidOptionError, match="kv_cache_dtype='bf16'"):
        estimate_memory(str(smollm2), kv_cache_dtype="bf16")
    latent = family_model(next(iter(LATENT.values()))).config
    with pytest.raises(UnsupportedError, match="kv_cache_dtype='fp8' .*latents"):
        estimate_memory(latent, dtype="bfloat16", kv_cache_dtype="fp8")


@pytest.mark.parametrize("name", slow_but([next(iter(OWN_ATTENTION))], list(OWN_ATTENTION)))
def test_attention_of_its_own_runs_with_it(name: str, tokenizer: Any) -> None:
    llm = llm_of(family_model(OWN_ATTENTION[name]), tokenizer, kv_cache_dtype="int8", engine="fast")
    assert llm.engine_info.kv_cache_dtype == "int8"
    assert len(ask(llm, plan(llm, random_ids(30, seed=1), max_new_tokens=5))[0].token_ids) == 5
    llm.unload()


@pytest.mark.parametrize("name", slow_but(["qwen3_next", "mamba2"], list(WITH_STATES)))
def test_states_stay_as_they_are_or_the_model_is_refused(name: str, tokenizer: Any) -> None:
    llm = llm_of(family_model(FAST[name]), tokenizer, kv_cache_dtype="int8")
    shapes = parts_of(llm.model_copy(update={"kv_cache_dtype": "auto"})).probe.shapes
    if not shapes or any(shape.is_latent for shape in shapes):
        with pytest.raises(UnsupportedError, match="its layers keep (no keys and values|latents)"):
            llm.engine_info  # noqa: B018
    else:
        assert llm.engine_info.kv_cache_dtype == "int8"
        assert llm.engine_info.state_bytes
        assert len(ask(llm, plan(llm, random_ids(30, seed=1), max_new_tokens=5))[0].token_ids) == 5
    llm.unload()


class TestFormats:
    def test_every_code_of_fp8_is_kept(self) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        numbers = codes.view(torch.float8_e4m3fn).float()
        finite = numbers.isfinite()
        found, scale = kv_quantization.quantize(numbers[finite], torch.uint8)
        assert scale == 1
        assert torch.equal(found, codes[finite])

    @pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 0.5 / 127), (torch.uint8, 1 / 16)])
    def test_errors_are_half_a_step(self, dtype: torch.dtype, most: float) -> None:
        made = torch.Generator().manual_seed(0)
        numbers = torch.randn(500, 64, generator=made) * torch.logspace(-20, 20, 500)[:, None]
        read = kv_quantization.dequantize(*kv_quantization.quantize(numbers, dtype), torch.float32)
        largest = numbers.abs().amax(-1, keepdim=True)
        allowed = most * (largest if dtype == torch.int8 else numbers.abs()) + largest / 448 * 2**-9
        # bfloat16 rounds the scale, by up to 1/256: steps are wider by as much, and the largest number may be cut off.
        allowed = allowed * 257 / 256 + numbers.abs() / 256 * (numbers.abs() == largest)
        assert ((numbers - read).abs() <= allowed).all()

    def test_zeros_and_the_smallest_numbers(self) -> None:
        for dtype in kv_quantization.LARGEST:
            for numbers in (torch.zeros(1, 8), torch.full((1, 8), 1e-42)):
                codes, scales = kv_quantization.quantize(numbers, dtype)
                assert scales.isfinite().all()
                assert (scales > 0).all()
                assert (kv_quantization.dequantize(codes, scales, torch.float32) - numbers).abs().max() <= 1e-38

    def test_factors_are_powers_of_two_that_even_out_the_numbers_of_keys(self) -> None:
        keys = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
        keys[1, :, 5] *= 200
        factors = kv_quantization.key_factors(keys)
        assert torch.equal(factors, torch.exp2(factors.log2().round()))
        assert factors[0].max() <= 4 * factors[0].min()
        # The number, its neighbour, those half a head away: a rotation may turn it into each of them.
        large = factors[1] > 50
        assert large.nonzero()[:, 0].tolist() == [4, 5, 12, 13]
        rounded = [
            (kv_quantization.dequantize(*kv_quantization.quantize(k / f, torch.int8), torch.float32) * f - k)
            for k, f in ((keys[1], torch.ones(16)), (keys[1], factors[1]))
        ]
        before, after = (error[:, ~large].norm() for error in rounded)
        assert after < before / 10
