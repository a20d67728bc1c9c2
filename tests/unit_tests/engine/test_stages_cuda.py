"""Models in stages on CUDA GPUs: graphs, kernels and copies. With one GPU, both stages run on it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.engine import stages as stages_module
from langchain_quantllm.engine.device_links import DeviceLinks, HostLink
from langchain_quantllm.engine.stage_graphs import StagedGraph
from langchain_quantllm.engine.stages import Stages

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
GPUS = [pytest.param(1, id="one GPU"), pytest.param(2, id="two GPUs", marks=needs_two)]

PROMPTS = [
    "w1",
    "some words of a prompt that is longer than a block or two " * 3,
    "x y z",
    *("abc"[i] * (15 + i) for i in range(3)),
]

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    SHAPES["staged"] = SHAPE
    yield random_checkpoint("staged", tmp_path_factory.mktemp("staged"))
    SHAPES.pop("staged", None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    SHAPES["staged"] = SHAPE
    yield random_checkpoint("staged", tmp_path_factory.mktemp("packed"), gptq=True)
    SHAPES.pop("staged", None)


def make(folder: Path, gpus: int | None, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM in two stages on one GPU or two; None for no stages."""
    given: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True, "progress": False, "kv_cache_memory": "128MB"}
    device_map: Any = {"": 0}
    if gpus == 1:
        monkeypatch.setattr(stages_module, "find_stages", lambda model: Stages(model, first_layers=(2,)))
    elif gpus == 2:
        device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}
        device_map |= dict.fromkeys(
            ("model.layers.2", "model.layers.3", "model.norm", "model.rotary_emb", "lm_head"), 1
        )
    else:
        monkeypatch.undo()
    return QuantizedHuggingFaceLLM(model_id=str(folder), engine="fast", **{"device_map": device_map, **given, **fields})


def generated(llm: QuantizedHuggingFaceLLM, prompt: str, tokens: int = 48) -> str:
    tokenizer, model = llm.load().pipeline.tokenizer, llm.pipeline.model
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to("cuda:0")
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def runner_of(llm: QuantizedHuggingFaceLLM) -> Any:
    engine: Any = llm._engine()
    return engine._runner


@pytest.mark.parametrize("gpus", GPUS)
def test_greedy_equals_generate_in_graphs(folder: Path, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(folder, gpus, monkeypatch, dtype="float32")
    assert llm.engine_info.graphs
    assert "2 stages" in llm.engine_info.reason
    expected = [generated(llm, prompt) for prompt in PROMPTS]
    assert [llm.invoke(prompt) for prompt in PROMPTS] == expected
    for _ in range(2):  # the second time with prompts that are in the cache
        assert llm.batch(PROMPTS) == expected
    runner = runner_of(llm)
    assert runner.no_graph_reason is None
    assert all(isinstance(graph, StagedGraph) for graph in runner._decode_graphs.values())
    devices = {part.place.device.index for graph in runner._decode_graphs.values() for part in graph._parts}
    assert len(devices) == gpus
    assert [generated(llm, prompt) for prompt in PROMPTS] == expected  # by accelerate's hooks, which are still there
    llm.unload()


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("scheme", ["bfloat16", "nf4", "int8", "gptq"])
def test_every_scheme_is_fused_and_captured(
    folder: Path, packed: Path, scheme: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"dtype": "bfloat16"} if scheme == "bfloat16" else {"quantization": scheme}
    fields = {} if scheme == "gptq" else fields
    checkpoint = packed if scheme == "gptq" else folder
    llm = make(checkpoint, gpus, monkeypatch, **fields)
    info = llm.engine_info
    assert info.graphs
    texts = [llm.invoke(prompt) for prompt in PROMPTS]
    llm.unload()
    alone = make(checkpoint, None, monkeypatch, **fields)
    # The cosines and sines are computed on each device.
    assert {**alone.engine_info.fused, "cos_sin": gpus} == info.fused
    runner_of(alone)._prefill_graphs = None  # which pad prompts: some products of more rows round differently
    assert [alone.invoke(prompt) for prompt in PROMPTS] == texts  # the same kernels on the same numbers
    alone.unload()


@pytest.mark.parametrize("gpus", GPUS)
def test_many_rows_in_parts_write_the_same(folder: Path, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(folder, gpus, monkeypatch, dtype="float32", batch_size=64)
    prompts = [f"w{3 * i} w{7 * i}" for i in range(64)]
    expected = [generated(llm, prompt) for prompt in prompts]
    runner, rows = runner_of(llm), []
    run = runner.run
    runner.run = lambda step, *given: (rows.append(len(step.decoding)), run(step, *given))[1]
    for _ in range(3):
        assert llm.batch(prompts) == expected
    assert runner.steps_at_once == gpus
    assert rows.count(64 // gpus) > 60
    llm.unload()


@pytest.mark.parametrize("gpus", GPUS)
def test_prompts_cancelled_and_preempted_rows_beside(folder: Path, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(folder, gpus, monkeypatch, dtype="float32", kv_cache_memory="6MiB", batch_size=64)
    texts = [f"w{3 * i} w{7 * i}" for i in range(40)]
    long = [" ".join(f"w{(11 * i + start) % 900}" for i in range(120)) for start in range(2)]
    expected = [generated(llm, prompt) for prompt in (*texts, *long)]
    for repeat in range(3):
        streams = [llm.stream(text) for text in texts[:8]]
        with ThreadPoolExecutor(len(texts) + 2) as executor:
            running = [executor.submit(llm.invoke, prompt) for prompt in texts]
            for stream in streams[repeat:]:
                next(stream)
            beside = [executor.submit(llm.invoke, prompt) for prompt in long]
            for stream in streams:
                stream.close()
            assert [call.result() for call in (*running, *beside)] == expected
    llm.unload()


@pytest.mark.parametrize("gpus", GPUS)
def test_samples_with_seeds_and_penalties_are_those_of_one_gpu(
    folder: Path, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 3,
    }
    llm = make(folder, gpus, monkeypatch, dtype="float32", **options)
    texts = [llm.invoke(prompt) for prompt in PROMPTS]
    llm.unload()
    alone = make(folder, None, monkeypatch, dtype="float32", **options)
    assert [alone.invoke(prompt) for prompt in PROMPTS] == texts
    alone.unload()


@needs_two
def test_through_pinned_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DeviceLinks.__init__

    def by_host(self: DeviceLinks) -> None:
        original(self)
        self.uses_host = True

    monkeypatch.setattr(DeviceLinks, "__init__", by_host)
    llm = make(folder, 2, monkeypatch, dtype="float32", batch_size=64)
    prompts = [*PROMPTS, *(f"w{3 * i} w{7 * i}" for i in range(40))]
    expected = [generated(llm, prompt) for prompt in prompts]
    for _ in range(3):
        assert llm.batch(prompts) == expected
    llm.unload()


def test_a_host_link_keeps_the_order_of_copies() -> None:
    devices = [torch.device("cuda", i % torch.cuda.device_count()) for i in range(2)]
    link = HostLink()
    source = torch.zeros(1 << 20, dtype=torch.float32, device=devices[0])
    targets = [torch.empty(1 << 20, dtype=torch.float32, device=devices[1]) for _ in range(16)]
    for number, target in enumerate(targets):
        source.fill_(number)
        link.copy(source, target)
    for number, target in enumerate(targets):
        assert bool((target == number).all())


@needs_two
def test_a_copy_waits_for_no_other_work() -> None:
    links = DeviceLinks()
    source, target = (torch.zeros(1 << 20, device=f"cuda:{i}") for i in range(2))

    def send() -> torch.cuda.Event:
        with links.beside(target.device):
            links.copy(source, target)
        sent = torch.cuda.Event()
        sent.record(torch.cuda.current_stream(source.device))
        return sent

    send()  # opens the link
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    with torch.cuda.device(1):
        torch.cuda._sleep(2_000_000_000)  # about a second
        busy = torch.cuda.Event()
        busy.record()
    with torch.cuda.device(0):
        source.fill_(3.0)
        send().synchronize()
    assert not busy.query()
    torch.cuda.synchronize(1)
    assert bool((target == 3).all())


@needs_two
def test_accelerates_own_division_runs_in_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(folder, 2, monkeypatch, dtype="float32", device_map="balanced")
    assert {p.device.index for p in llm.load().pipeline.model.parameters()} == {0, 1}
    assert llm.engine_info.graphs
    expected = [generated(llm, prompt) for prompt in PROMPTS]
    assert llm.batch(PROMPTS) == expected
    llm.unload()
