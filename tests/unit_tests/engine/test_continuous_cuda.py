"""The fast engine on a CUDA GPU: graphs, kernels, memory. On other machines these tests are skipped."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm import GPTQ, NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.engine import cuda_graphs as capture
from langchain_quantllm.engine.prefill_graphs import PrefillGraphs
from tests.support.adapters import add_adapter, choose_adapter, enable_adapters, make_adapter
from tests.support.models import llm_of, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LINEARS = 3 * 7  # quantized layers of the model

PROMPTS = [
    "w1",
    "some words of a prompt that is longer than a page or two " * 3,
    "x y z",
    "a" * 15,
    "b" * 16,
    "c" * 17,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A random Llama with grouped heads of 128."""
    SHAPES["grouped"] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
    }
    yield random_checkpoint("grouped", tmp_path_factory.mktemp("grouped"))
    del SHAPES["grouped"]


def make(folder: Any, **fields: Any) -> QuantizedHuggingFaceLLM:
    given = {"max_new_tokens": 64, "ignore_eos": True, "progress": False, "kv_cache_memory": "256MB", **fields}
    return QuantizedHuggingFaceLLM(model_id=str(folder), **given)


def generated(llm: QuantizedHuggingFaceLLM, prompt: str, tokens: int = 64) -> str:
    tokenizer, model = llm.load().pipeline.tokenizer, llm.pipeline.model
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_greedy_equals_generate_in_graphs(folder: Any) -> None:
    llm = make(folder, dtype="float32", engine="fast")
    assert llm.engine_info.graphs
    expected = [generated(llm, prompt) for prompt in PROMPTS]
    assert [llm.invoke(prompt) for prompt in PROMPTS] == expected
    for _ in range(2):  # the second time with prompts that are in the cache
        assert llm.batch(PROMPTS) == expected
    assert llm.batch(PROMPTS, max_new_tokens=5) == [generated(llm, prompt, 5) for prompt in PROMPTS]
    llm.unload()


def test_prompts_run_in_graphs_from_the_second_of_a_length_on(folder: Any) -> None:
    llm = make(folder, dtype="float32", engine="fast", prefix_caching=False, max_new_tokens=6)
    engine: Any = llm._engine()
    graphs: PrefillGraphs = engine._runner._prefill_graphs
    for words in (3, 40, 150, 700):
        for repeat in range(3):
            prompt = " ".join(f"w{(7 * words + 3 * i + repeat) % 900}" for i in range(words))
            assert llm.invoke(prompt) == generated(llm, prompt, 6)
    assert graphs.no_graph_reason is None
    assert len(graphs._graphs) == 3  # the last is longer than any
    alone = [generated(llm, prompt, 6) for prompt in PROMPTS]
    for _ in range(3):
        assert llm.batch(PROMPTS) == alone
    llm.unload()


def test_prompts_in_small_graphs_get_their_tokens_though_no_step_is_waited_for(folder: Any) -> None:
    """A step that ends no prompt samples nothing, so the host enqueues many before the device has run the first."""
    llm = make(folder, dtype="float32", engine="fast", prefix_caching=False, max_new_tokens=6)
    engine: Any = llm._engine()
    prompts = [" ".join(f"w{(11 * i + 5 * start) % 900}" for i in range(600)) for start in range(6)]
    expected = [generated(llm, prompt, 6) for prompt in prompts]
    engine._step_tokens = (16, 16)
    engine._scheduler.step_tokens = engine._scheduler.step_tokens_while_decoding = 16
    for _ in range(2):
        assert llm.batch(prompts) == expected
    llm.unload()


@pytest.mark.parametrize("streams", [3, 20, 60])
def test_sequences_that_decode_beside_prompts_get_their_tokens(folder: Any, streams: int) -> None:
    llm = make(folder, dtype="float32", engine="fast", prefix_caching=False, max_new_tokens=100)
    texts = [f"w{3 * i} w{7 * i}" for i in range(streams)]
    long = [" ".join(f"w{(11 * i + start) % 900}" for i in range(500)) for start in range(3)]
    expected = [generated(llm, prompt, 100) for prompt in (*texts, *long)]
    engine: Any = llm._engine()
    between, decode_beside = [], engine._decode_beside
    engine._decode_beside = lambda step: (between.append(step), decode_beside(step))
    for _ in range(3):  # at first the decode steps have no graphs yet
        with ThreadPoolExecutor(streams + 3) as executor:
            running = [executor.submit(llm.invoke, prompt) for prompt in texts]
            time.sleep(0.05)
            beside = [executor.submit(llm.invoke, prompt) for prompt in long]
            assert [call.result() for call in (*running, *beside)] == expected
    assert between
    assert engine._runner._prefill_graphs.no_graph_reason is None
    llm.unload()


def test_sequences_that_are_preempted_or_cancelled_beside_prompts_harm_nobody(folder: Any) -> None:
    llm = make(folder, dtype="float32", engine="fast", max_new_tokens=100, kv_cache_memory="8MiB")
    texts = [f"w{3 * i} w{7 * i}" for i in range(20)]
    long = [" ".join(f"w{(11 * i + start) % 900}" for i in range(150)) for start in range(2)]
    expected = [generated(llm, prompt, 100) for prompt in (*texts, *long)]
    engine: Any = llm._engine()
    for repeat in range(4):
        streams = [llm.stream(text) for text in texts]
        with ThreadPoolExecutor(len(texts) + 2) as executor:
            running = [executor.submit(llm.invoke, prompt) for prompt in texts]
            for stream in streams[repeat:]:
                next(stream)
            beside = [executor.submit(llm.invoke, prompt) for prompt in long]
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]
            assert [call.result() for call in (*running, *beside)] == expected
    assert engine._scheduler.preempted
    engine._scheduler.check_integrity()
    llm.unload()


def test_one_graph_runs_sequences_of_several_adapters(folder: Any, tmp_path: Any) -> None:
    pytest.importorskip("peft")
    paths = {name: str(make_adapter(folder, tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two"))}
    llm = make(folder, dtype="float32", engine="fast", adapters=paths, max_new_tokens=24)
    assert llm.engine_info.graphs
    names = ["base", "one", "two"] * 4
    prompts = [f"w{i} w{7 * i} w{i * i}" for i in range(len(names))]
    expected = []
    for name, prompt in zip(names, prompts, strict=True):
        model = llm.load().pipeline.model
        enable_adapters(model, name != "base")
        if name != "base":
            choose_adapter(model, name)
        expected.append(generated(llm, prompt, 24))
    enable_adapters(model, False)
    assert len(set(expected)) == len(expected)
    bound = [llm.bind(adapter=name) for name in names]
    for _ in range(3):  # the later ones from graphs and shared blocks
        with ThreadPoolExecutor(len(names)) as executor:
            found = list(executor.map(lambda one, prompt: one.invoke(prompt), bound, prompts))
        assert found == expected
    llm.unload()


def test_seeds_penalties_and_logprobs_are_those_of_the_pipeline_engine(folder: Any) -> None:
    llm = make(folder, dtype="float32", engine="fast", max_new_tokens=24)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 3}
    options["repetition_penalty"] = 1.2
    assert llm.engine_info.fused["sampling"] == 1
    alone = llm.invoke(PROMPTS[0], **options)
    assert llm.batch(PROMPTS, **options)[0] == alone
    assert "".join(llm.stream(PROMPTS[0], **options)) == alone
    plain = make(folder, dtype="float32", engine="pipeline", max_new_tokens=24)
    assert plain.invoke(PROMPTS[0], **options) == alone
    for some in ({"temperature": 1.1}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.4}):
        assert llm.batch(PROMPTS, seed=2, **some) == [plain.invoke(prompt, seed=2, **some) for prompt in PROMPTS]
    found = llm.generate([PROMPTS[0]], logprobs=3).generations[0][0].generation_info or {}
    expected = plain.generate([PROMPTS[0]], logprobs=3).generations[0][0].generation_info or {}
    for ours, theirs in zip(found["logprobs"]["content"], expected["logprobs"]["content"], strict=True):
        assert ours["token_id"] == theirs["token_id"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)
    llm.unload()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_and_nf4_run_in_graphs(folder: Any, dtype: str) -> None:
    for quantization in ("none", "nf4"):
        llm = make(folder, dtype=dtype, quantization=quantization, engine="fast")
        assert llm.engine_info.graphs
        assert all(llm.batch(PROMPTS))
        llm.unload()


@pytest.mark.parametrize("quantization", ["int8", Int8(threshold=0.0)])
def test_int8_runs_in_graphs_by_fused_products_only(folder: Any, quantization: Any) -> None:
    given = {"quantization": quantization, "dtype": "float16", "engine": "fast"}
    llm = make(folder, **given)
    assert llm.engine_info.graphs, llm.engine_info.reason
    assert llm.engine_info.fused["linear"] == LINEARS + 1  # and the output head in 16 bits
    assert all(llm.batch(PROMPTS, max_new_tokens=8))
    llm.unload()
    llm = make(folder, **given, fuse=False)
    assert not llm.engine_info.graphs
    assert "int8" in llm.engine_info.reason
    assert llm.engine_info.fused == {}
    assert all(llm.batch(PROMPTS, max_new_tokens=8))
    llm.unload()


@pytest.mark.parametrize("quantization", ["nf4", NF4(double_quantization=True), "fp4"])
def test_fused_products_write_what_generate_writes(folder: Any, quantization: Any) -> None:
    llm = make(folder, dtype="float32", quantization=quantization, engine="fast")
    assert llm.engine_info.graphs
    assert llm.engine_info.fused["linear"] == LINEARS
    expected = [generated(llm, prompt, 32) for prompt in PROMPTS]
    for _ in range(2):
        assert llm.batch(PROMPTS, max_new_tokens=32) == expected
    assert [generated(llm, prompt, 32) for prompt in PROMPTS] == expected
    llm.unload()


@pytest.mark.parametrize(("bits", "kernel"), [(4, "gptq_triton"), (3, "gptq_torch")])
def test_gptq_runs_in_graphs_and_compiles_no_cuda(folder: Any, tmp_path: Any, bits: int, kernel: str) -> None:
    pytest.importorskip("gptqmodel")
    packed = random_checkpoint("grouped", tmp_path / "gptq", gptq=True, bits=bits)
    llm = make(packed, engine="fast")
    assert llm.engine_info.graphs, llm.engine_info.reason
    assert isinstance(llm.scheme, GPTQ)
    assert llm.scheme.kernel == kernel
    assert llm.engine_info.fused["linear"] == LINEARS + 1
    assert all(llm.batch(PROMPTS))
    llm.unload()


@pytest.mark.parametrize("sees", [True, False])
def test_a_model_that_cannot_be_captured_runs_eagerly_and_leaves_the_gpu_usable(
    folder: Any, sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sees:  # a wait that is not found before the capture fails
        monkeypatch.setattr(capture, "_WAITS", ())
    llm = make(folder, dtype="float32", engine="fast").load()
    expected = generated(llm, PROMPTS[1])

    layer = llm.pipeline.model.model.layers[1]

    def wait(*args: Any, **kwargs: Any) -> Any:
        output = type(layer).forward(layer, *args, **kwargs)
        float(output[0].sum())
        return output

    layer.forward = wait
    try:
        assert llm.invoke(PROMPTS[1]) == expected
        info = llm.engine_info
        assert not info.graphs
        assert ("_local_scalar_dense" in info.reason) if sees else ("failed" in info.reason)
    finally:
        del layer.forward
    assert len(torch.rand(3, device="cuda").tolist()) == 3  # a failed capture leaves these broken
    active = torch.cuda.memory_stats()["active_bytes.all.current"]
    shared = torch.empty(10_000_000, device="cuda")
    shared.record_stream(torch.cuda.Stream())
    del shared
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_stats()["active_bytes.all.current"] < active + 1_000_000  # and the allocator waiting
    llm.unload()
    other = make(folder, dtype="float32", engine="fast")
    assert other.engine_info.graphs
    assert other.invoke(PROMPTS[1]) == expected
    other.unload()


def test_a_hook_that_is_added_later_is_called(folder: Any) -> None:
    llm = make(folder, dtype="float32", engine="fast").load()
    before = [generated(llm, prompt) for prompt in PROMPTS]
    assert llm.batch(PROMPTS) == before
    assert llm.engine_info.graphs
    layer, seen = llm.pipeline.model.model.layers[1], []
    shift = torch.randn(llm.pipeline.model.config.hidden_size, device="cuda")

    def steer(module: Any, args: Any, output: Any) -> Any:
        seen.append(output.shape)
        return output + shift

    handle = layer.register_forward_hook(steer)
    expected = [generated(llm, prompt) for prompt in PROMPTS]
    assert expected != before
    seen.clear()
    assert llm.batch(PROMPTS) == expected
    assert len(seen) > 5
    assert not llm.engine_info.graphs
    assert "a hook on model.layers.1" in llm.engine_info.reason
    handle.remove()
    assert llm.batch(PROMPTS) == before
    assert llm.engine_info.graphs
    llm.unload()


def test_the_cache_takes_its_budget_and_unload_frees_it(folder: Any) -> None:
    make(folder).load().unload()  # what CUDA and its libraries keep for good
    gc.collect()
    before = torch.cuda.memory_allocated()
    llm = make(folder, kv_cache_memory=300_000_000).load()
    loaded = torch.cuda.memory_allocated()
    info = llm.engine_info
    assert info.kv_cache_bytes == pytest.approx(300_000_000, rel=0.01)
    assert torch.cuda.memory_allocated() - loaded >= info.kv_cache_bytes
    llm.batch(PROMPTS)
    llm.unload()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 100_000_000  # workspaces of cuBLAS, one a stream
    with_fraction = make(folder, kv_cache_memory=0.01)
    free, _ = torch.cuda.mem_get_info()
    assert with_fraction.engine_info.kv_cache_bytes == pytest.approx(0.01 * free, rel=0.2)
    with_fraction.unload()


def test_others_may_use_the_gpu_while_graphs_are_captured(folder: Any) -> None:
    done = threading.Event()
    errors: list[BaseException] = []
    numbers = torch.Generator("cuda")

    def compute() -> None:
        try:
            while not done.is_set():
                # Of its own: PyTorch 2.11 lends a capture the default generator for a moment.
                x = torch.randn(256, 256, device="cuda", generator=numbers)
                float((x @ x).sum())
                torch.empty(1_000_000, device="cuda").fill_(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        llm = make(folder, dtype="float32", engine="fast")
        texts = llm.batch(PROMPTS * 3)
    finally:
        done.set()
        thread.join()
    assert not errors
    assert llm.engine_info.graphs
    assert texts == [generated(llm, prompt) for prompt in PROMPTS * 3]
    llm.unload()


def test_adapters_are_noticed(folder: Any) -> None:
    peft = pytest.importorskip("peft")
    llm = make(folder, dtype="float32", engine="fast").load()
    before = llm.invoke(PROMPTS[1])
    assert before == generated(llm, PROMPTS[1])
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    add_adapter(llm.pipeline.model, config, "one")
    for parameter in llm.pipeline.model.parameters():
        parameter.data = parameter.data.to("cuda")
    after = llm.invoke(PROMPTS[1])
    assert after == generated(llm, PROMPTS[1])
    assert after != before
    assert llm.engine_info.graphs
    enable_adapters(llm.pipeline.model, False)
    assert llm.invoke(PROMPTS[1]) == before
    llm.unload()


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt2", "phi", "falcon"])
def test_families_write_what_generate_writes(name: str, byte_tokenizer: Any) -> None:
    """Soft caps, windows, learned positions, partial rotary, and attention that is called directly."""
    common = {"vocab_size": len(byte_tokenizer), "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    common |= {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = {
        "gemma2": lambda: transformers.Gemma2Config(
            **common, head_dim=80, intermediate_size=256, num_key_value_heads=1, sliding_window=16
        ),
        "mistral": lambda: transformers.MistralConfig(
            **common, intermediate_size=256, num_key_value_heads=1, sliding_window=16
        ),
        "gpt2": lambda: transformers.GPT2Config(**common),
        "phi": lambda: transformers.PhiConfig(**common, intermediate_size=256),
        "falcon": lambda: transformers.FalconConfig(**common, new_decoder_architecture=False, multi_query=True),
    }[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().cuda()
    if name == "gemma2":  # whose caps older SDPA leaves out
        model.set_attn_implementation("eager")
    llm = llm_of(model, byte_tokenizer, engine="fast", max_new_tokens=48, ignore_eos=True, kv_cache_memory="64MB")
    assert llm.batch(PROMPTS) == [generated(llm, prompt, 48) for prompt in PROMPTS]
    # Falcon takes keys and values apart with lists as indices, which PyTorch brings to the GPU each time.
    assert llm.engine_info.graphs == (name != "falcon"), llm.engine_info.reason
    assert len(torch.rand(3, device="cuda").tolist()) == 3
    llm.unload()


def test_spread_over_two_gpus_runs_eagerly(folder: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layers = {f"model.layers.{i}": min(i, 1) for i in range(3)}
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1, **layers}
    llm = make(folder, dtype="float32", engine="fast", device_map=device_map)
    assert not llm.engine_info.graphs
    assert llm.batch(PROMPTS) == [generated(llm, prompt) for prompt in PROMPTS]
    llm.unload()


def test_a_model_on_the_second_gpu_runs_in_graphs(folder: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    held = torch.cuda.memory_allocated(0)
    llm = make(folder, dtype="float32", engine="fast", device="cuda:1")
    assert llm.engine_info.graphs, llm.engine_info.reason
    assert {p.device for p in llm.pipeline.model.parameters()} == {torch.device("cuda:1")}
    assert llm.batch(PROMPTS) == [generated(llm, prompt) for prompt in PROMPTS]
    assert llm.invoke(PROMPTS[0], temperature=1.0, seed=1) == llm.invoke(PROMPTS[0], temperature=1.0, seed=1)
    assert torch.cuda.memory_allocated(0) == held
    llm.unload()


def test_layers_on_the_cpu_run_eagerly(folder: Any) -> None:
    layers = {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(3)}
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0, **layers}
    llm = make(folder, dtype="float32", engine="fast", device_map=device_map)
    assert not llm.engine_info.graphs
    assert llm.batch(PROMPTS) == [generated(llm, prompt) for prompt in PROMPTS]
    llm.unload()


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    from benchmarks.soak_model import byte_tokenizer

    return byte_tokenizer()


def test_preempted_sequences_get_the_same_tokens(byte_tokenizer: Any) -> None:
    model = tiny_model(len(byte_tokenizer)).cuda()
    token_bytes = 2 * 2 * 32 * 4
    llm = llm_of(model, byte_tokenizer, engine="fast", max_new_tokens=60, kv_cache_memory=300 * token_bytes)
    assert llm.batch(PROMPTS * 2) == [generated(llm, prompt, 60) for prompt in PROMPTS * 2]
    engine: Any = llm._engine()
    assert engine._scheduler.preempted
    assert engine._blocks.held == 0
    llm.unload()
