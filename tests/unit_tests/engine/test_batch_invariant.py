"""`batch_invariant=True`: the same logits, bit for bit, and so the same text, whatever runs beside a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import GPTQ, NF4, ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from tests.support.adapters import make, make_adapter_folders
from tests.support.engine import PROMPTS, AllowOnly, ask, cached_tokens, ids_of, on_pipeline, plan
from tests.support.families import FAST, INDEXED, WITH_STATES, family_model, random_ids
from tests.support.invariance import logits_of_requests
from tests.support.models import llm_of, tiny_model
from tests.support.selection import skip_without_gptqmodel, slow_but

SCHEMES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "nf4": {"quantization": "nf4"},
    "nf4-float32": {"quantization": "nf4", "dtype": "float32"},
    "nf4-float16": {"quantization": "nf4", "dtype": "float16"},
    "fp4": {"quantization": "fp4"},
    "int8": {"quantization": "int8"},
    "int8-float32": {"quantization": "int8", "dtype": "float32"},
    "int8-float16": {"quantization": "int8", "dtype": "float16"},
    "gptq": {"quantization": GPTQ(), "gptq": {}},
    "gptq-torch": {"quantization": GPTQ(kernel="torch"), "gptq": {"desc_act": True, "sym": False}, "dtype": "float32"},
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=slow_but(["float32", "bfloat16", "nf4", "int8", "gptq"], list(SCHEMES)))
def llm(
    request: pytest.FixtureRequest, short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QuantizedHuggingFaceLLM]:
    """Two layers of SmolLM2 in each scheme."""
    fields = dict(SCHEMES[request.param])
    folder = short_smollm2
    if (gptq := fields.pop("gptq", None)) is not None:
        skip_without_gptqmodel()
        from tests.support.gptq_checkpoints import make_gptq_checkpoint

        folder = make_gptq_checkpoint(short_smollm2, tmp_path_factory.mktemp("gptq") / "model", **gptq)
    model = QuantizedHuggingFaceLLM(
        model_id=str(folder), device="cpu", batch_invariant=True, max_new_tokens=6, progress=False, **fields
    )
    assert model.engine_info.batch_invariant
    yield model
    model.unload()


def alone(llm: QuantizedHuggingFaceLLM, prompt_ids: list[int], **options: Any) -> torch.Tensor:
    """Return the logits of a request that nothing runs beside, without cached blocks."""
    request = plan(llm.model_copy(update={"prefix_caching": False}), prompt_ids, **options)
    return logits_of_requests(llm, request)[0]


def beside(llm: QuantizedHuggingFaceLLM, prompt_ids: list[int], others: int, place: int) -> torch.Tensor:
    """Return the logits of a request that runs beside others of many lengths, at a place among them."""
    requests = [plan(llm, ids_of(1 + (7 * i) % 40, seed=i), max_new_tokens=1 + i % 6)[0] for i in range(others)]
    requests[place:place] = plan(llm.model_copy(update={"prefix_caching": False}), prompt_ids, max_new_tokens=4)
    return logits_of_requests(llm, requests)[place]


def test_a_row_has_the_same_logits_beside_any_number_of_others_at_any_place(llm: QuantizedHuggingFaceLLM) -> None:
    for length in (1, 21):
        prompt = ids_of(length, seed=5)
        expected = alone(llm, prompt, max_new_tokens=4)
        for others, places in ((1, (0, 1)), (2, (1,)), (7, (0, 5)), (31, (13,))):
            for place in places:
                assert torch.equal(beside(llm, prompt, others, place), expected), (length, others, place)


def test_equal_prompts_in_one_batch_have_equal_logits(llm: QuantizedHuggingFaceLLM) -> None:
    requests = [plan(llm, ids_of(19), max_new_tokens=3)[0] for _ in range(24)]
    first, *others = logits_of_requests(llm, requests)
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("budget", [5, 16, 50])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(llm: QuantizedHuggingFaceLLM, budget: int) -> None:
    engine: Any = llm._engine()
    scheduler, prompt = engine._scheduler, ids_of(67)
    expected = alone(llm, prompt, max_new_tokens=4)
    before = scheduler.step_tokens, scheduler.step_tokens_while_decoding
    try:
        scheduler.step_tokens = scheduler.step_tokens_while_decoding = budget
        assert torch.equal(alone(llm, prompt, max_new_tokens=4), expected)
        assert torch.equal(beside(llm, prompt, 3, 1), expected)
    finally:
        scheduler.step_tokens, scheduler.step_tokens_while_decoding = before


def test_logits_after_cached_blocks_are_those_of_the_whole_prompt(llm: QuantizedHuggingFaceLLM) -> None:
    prompt = ids_of(70, seed=8)
    expected = alone(llm, prompt, max_new_tokens=6)
    for ids in (prompt[:40], prompt[:24], prompt):
        ask(llm, plan(llm, ids, max_new_tokens=3))
    assert cached_tokens(llm, prompt) == [64]
    assert torch.equal(logits_of_requests(llm, plan(llm, prompt, max_new_tokens=6))[0], expected)


def test_a_written_token_has_the_logits_that_it_has_in_a_prompt(llm: QuantizedHuggingFaceLLM) -> None:
    prompt = ids_of(13, seed=2)
    [answer] = ask(llm, plan(llm, prompt, max_new_tokens=12))
    expected = alone(llm, prompt, max_new_tokens=12)
    for count in (1, 4, 11):
        found = alone(llm, [*prompt, *answer.token_ids[:count]], max_new_tokens=1)
        assert torch.equal(found[0], expected[count])


def test_sampled_texts_and_log_probabilities_are_those_alone(llm: QuantizedHuggingFaceLLM) -> None:
    options = [
        {"do_sample": True, "temperature": 1.3, "seed": 1},
        {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 2},
        {"do_sample": True, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 3},
        {"repetition_penalty": 1.3},
    ]
    prompts = [ids_of(9 + 5 * i, seed=i) for i in range(len(options))]
    single = [ask(llm, plan(llm, ids, logprobs=4, **o))[0] for ids, o in zip(prompts, options, strict=True)]
    requests = [
        request
        for _ in range(3)
        for ids, o in zip(prompts, options, strict=True)
        for request in plan(llm, ids, logprobs=4, **o)
    ]
    for i, answer in enumerate(ask(llm, requests)):
        assert answer.token_ids == single[i % 4].token_ids
        assert answer.logprobs == single[i % 4].logprobs


def test_masked_texts_are_those_alone(llm: QuantizedHuggingFaceLLM) -> None:
    allowed = ids_of(60, seed=9)
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.5,
        "seed": 6,
        "min_new_tokens": 3,
        "max_new_tokens": 5,
    }
    options["eos_token_id"] = tuple(allowed[:30])
    requests = [plan(llm, ids_of(11), lambda: AllowOnly(allowed), **options)[0] for _ in range(9)]
    expected = ask(llm, requests[:1])[0].token_ids
    assert len(expected) >= 3
    assert [answer.token_ids for answer in ask(llm, requests)] == [expected] * 9


def test_calls_of_many_threads_give_the_texts_of_single_calls(llm: QuantizedHuggingFaceLLM) -> None:
    prompts = [f"{prompt} {i}" for i in range(2) for prompt in PROMPTS]
    expected = [llm.invoke(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as executor:
        assert list(executor.map(llm.invoke, prompts)) == expected
    assert llm.batch(prompts) == expected


def test_preempted_sequences_have_the_logits_of_those_that_were_not(tokenizer: Any) -> None:
    model = tiny_model(len(tokenizer), seed=3)
    roomy = llm_of(model, tokenizer, batch_invariant=True)
    prompts = [ids_of(20 + 9 * i, seed=i) for i in range(4)]
    expected = [alone(roomy, ids, max_new_tokens=30) for ids in prompts]
    tight = llm_of(model, tokenizer, batch_invariant=True, kv_cache_memory=10 * 16 * 512, prefix_caching=False)
    found = logits_of_requests(tight, [plan(tight, ids, max_new_tokens=30)[0] for ids in prompts])
    engine: Any = tight._engine()
    assert engine._scheduler.preempted
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for llm in (roomy, tight):
        llm.unload()


@pytest.mark.slow
def test_several_threads_of_torch_give_every_row_the_same_logits(tokenizer: Any) -> None:
    llm = llm_of(tiny_model(len(tokenizer), "gpt_neox", seed=4), tokenizer, batch_invariant=True)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            expected = alone(llm, ids_of(21), max_new_tokens=4)
            assert torch.equal(beside(llm, ids_of(21), 31, 11), expected)
    finally:
        torch.set_num_threads(before)
    llm.unload()


def test_rows_of_several_adapters_have_the_texts_of_single_calls(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    root = make_adapter_folders(tmp_path)
    llm = make(root, batch_invariant=True, engine="fast")
    calls = [(name, f"{prompt} {i}") for i in range(2) for prompt in PROMPTS[:2] for name in ("sql", "chat", "base")]
    expected = [llm.invoke(prompt, adapter=name) for name, prompt in calls]
    with ThreadPoolExecutor(len(calls)) as executor:
        assert list(executor.map(lambda call: llm.invoke(call[1], adapter=call[0]), calls)) == expected
    llm.unload()


VARIANT = {
    **dict.fromkeys(("llama4", "llama4-eager", "deepseek_v2", "deepseek_v2-lite"), "aten::polar"),
    "longcat_flash": "aten::aminmax",
    **dict.fromkeys(WITH_STATES, "its layers keep a state"),
    **dict.fromkeys(INDEXED, "an indexer chooses"),
}
"""Families with an operation that is not known to be invariant: complex numbers, for example."""

QUICK = ["llama", "gemma2", "mixtral", "falcon-7b", "gpt2", "gpt_oss", "bloom"]


@pytest.mark.parametrize("name", slow_but(["llama4", "qwen3_next"], VARIANT))
def test_families_with_an_operation_that_may_vary_are_refused(name: str, tokenizer: Any) -> None:
    llm = llm_of(family_model(FAST[name]), tokenizer, batch_invariant=True)
    with pytest.raises(UnsupportedError, match=VARIANT[name]):
        llm.invoke("a")
    llm.unload()


@pytest.mark.parametrize("name", slow_but(QUICK, [name for name in FAST if name not in VARIANT]))
def test_every_family_is_invariant(name: str, tokenizer: Any) -> None:
    llm = llm_of(family_model(FAST[name]), tokenizer, batch_invariant=True, engine="fast", kv_cache_memory=1 << 22)
    prompt = random_ids(37)
    requests = [plan(llm, random_ids(1 + 5 * i, seed=i), max_new_tokens=1 + i)[0] for i in range(9)]
    [expected] = logits_of_requests(llm, plan(llm, prompt, max_new_tokens=8))
    requests[4:4] = plan(llm, prompt, max_new_tokens=8)
    assert torch.equal(logits_of_requests(llm, requests)[4], expected)
    llm.unload()


# On a GPU.

GPU_SCHEMES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "nf4": {"quantization": NF4(double_quantization=True)},
    "fp4": {"quantization": "fp4", "dtype": "float16"},
    "int8": {"quantization": "int8", "dtype": "float16"},
    "gptq": {"quantization": GPTQ(kernel="torch"), "gptq": {}},
    "gptq-act-order": {"quantization": GPTQ(kernel="torch"), "gptq": {"desc_act": True, "sym": False}},
    "nf4-unfused": {"quantization": "nf4", "fuse": False},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scheme", GPU_SCHEMES)
def test_rows_on_a_gpu_have_the_same_logits_beside_any_others(scheme: str, short_smollm2: Path, tmp_path: Path) -> None:
    fields = dict(GPU_SCHEMES[scheme])
    folder = short_smollm2
    if (gptq := fields.pop("gptq", None)) is not None:
        skip_without_gptqmodel()
        from tests.support.gptq_checkpoints import make_gptq_checkpoint

        folder = make_gptq_checkpoint(short_smollm2, tmp_path / "model", **gptq)
    llm = QuantizedHuggingFaceLLM(
        model_id=str(folder), batch_invariant=True, kv_cache_memory="512MB", progress=False, **fields
    )
    assert llm.engine_info.graphs
    for length in (1, 21, 700, 1500):
        prompt = ids_of(length, seed=5)
        expected = alone(llm, prompt, max_new_tokens=4)
        for others in (1, 2, 7, 31, 100):
            for place in sorted({0, others // 2, others}):
                assert torch.equal(beside(llm, prompt, others, place), expected), (length, others, place)
        [answer] = ask(llm, plan(llm, prompt, max_new_tokens=4))
        again = logits_of_requests(llm, plan(llm, [*prompt, *answer.token_ids[:3]], max_new_tokens=1))[0]
        assert torch.equal(again[0], expected[3])
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "logprobs": 3, "seed": 4}
    [single] = ask(llm, plan(llm, ids_of(9), **options))
    for answer in ask(llm, [request for _ in range(40) for request in plan(llm, ids_of(9), **options)]):
        assert (answer.token_ids, answer.logprobs) == (single.token_ids, single.logprobs)
    llm.unload()


# What it is part of, and what it refuses.


def test_objects_that_share_weights_but_not_the_option_have_engines_of_their_own(short_smollm2: Path) -> None:
    fields: dict[str, Any] = {"model_id": str(short_smollm2), "quantization": "nf4", "progress": False}
    one = QuantizedHuggingFaceLLM(**fields, max_new_tokens=5)
    other = QuantizedHuggingFaceLLM(**fields, max_new_tokens=5, batch_invariant=True)
    expected = one.invoke("Hello")
    assert other.invoke("Hello", logprobs=None)
    assert one.pipeline is other.pipeline
    engines = one._engine(), other._engine()
    assert engines[0] is not engines[1]
    assert (one.engine_info.batch_invariant, other.engine_info.batch_invariant) == (False, True)
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda i: (one, other)[i % 2].invoke("Hello"), range(16)))
    assert found[::2] == [expected] * 8
    assert found[1::2] == [other.invoke("Hello")] * 8
    one.unload()
    assert not other.is_loaded


def test_chat_models_have_the_option(short_smollm2: Path) -> None:
    chat = ChatQuantizedHuggingFace(model_id=str(short_smollm2), batch_invariant=True, max_new_tokens=4, progress=False)
    expected = chat.invoke("Hi").content
    assert [answer.content for answer in chat.batch(["Hi"] * 5)] == [expected] * 5
    assert chat._identifying_params["batch_invariant"] is True
    chat.unload()


def test_generate_cannot_carry_it_out(make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
    with pytest.raises(InvalidOptionError, match="engine='pipeline' cannot carry out batch_invariant=True"):
        make_tiny(engine="pipeline", batch_invariant=True)
    with pytest.raises(InvalidOptionError, match="num_beams=2 is carried out by the pipeline engine only"):
        make_tiny(batch_invariant=True).invoke("a", num_beams=2)


def test_a_model_that_looks_at_other_rows_is_refused(make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
    llm = make_tiny(batch_invariant=True)
    layer = llm.pipeline.model.model.layers[1].mlp
    # The largest number of all tokens: exact, so that the engine's ordinary check does not see it.
    handle = layer.register_forward_hook(lambda module, args, output: output + 1e-6 * output.amax(1, keepdim=True))
    with pytest.raises(
        UnsupportedError, match="its logits .* differ from those alone, by up to .*batch_invariant=False"
    ):
        llm.invoke("a")
    handle.remove()


def test_an_operation_of_unknown_kind_is_refused_by_name(make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
    llm = make_tiny(batch_invariant=True)
    layer = llm.pipeline.model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda module, args, output: output + 0 * torch.cumprod(output, -1))
    with pytest.raises(UnsupportedError, match="aten::cumprod, whose results may depend on the rest of the batch"):
        llm.invoke("a")
    handle.remove()


def test_a_compiled_module_is_refused(make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
    llm = make_tiny(batch_invariant=True)
    llm.pipeline.model.model.layers[0].mlp.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp is compiled, which hides its operations"):
        llm.invoke("a")


def test_the_model_writes_the_text_of_generate(make_tiny: Callable[..., QuantizedHuggingFaceLLM]) -> None:
    llm = make_tiny(batch_invariant=True, max_new_tokens=20)
    assert llm.batch(PROMPTS) == on_pipeline(llm).batch(PROMPTS, max_new_tokens=20)
