"""Models in stages: the same tokens as on one device. Two stages on one CPU stand for two GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes

from langchain_quantllm.engine import stage_graphs
from langchain_quantllm.engine.attention import Batch, LayerPool
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.fusion.fuse import EXPERTS, LINEAR, Fusion
from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.kv_cache import allocate_pools
from langchain_quantllm.engine.lora import NO_ADAPTER
from langchain_quantllm.engine.model_check import inspect_model, run_greedily
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import bare_sequence
from langchain_quantllm.engine.stages import Stages
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.fusion import forwards_in, write
from tests.support.models import pipeline_of, tiny_model
from tests.support.stages import address_of, hooked, recorded
from tests.unit_tests.engine.test_prefill_graphs import BLOCKS, SLOTS, ReferenceAttention

PROMPTS = [random_ids(count) for count in (23, 5, 40)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_in_stages(model: Any, tokenizer: Any, *, fuses: bool = False, firsts: tuple[int, ...] = (1,)) -> Any:
    stages = Stages(model, first_layers=firsts)
    fusion = None
    if fuses:
        fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference, stages=stages)
    return ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion, stages=stages)


class GraphAttention(ReferenceAttention):
    """The attention of a GPU; decode steps read nothing on the host, so that they can be graphs."""

    def attend(self, pool: LayerPool, query: torch.Tensor, batch: Batch, **scoring: Any) -> torch.Tensor:
        if not batch.decodes:
            return super().attend(pool, query, batch, **scoring)
        blocks = pool.kv[batch.table[batch.slots.long()].long()]  # (tokens, blocks, tokens of a block, heads, dim)
        keys, values = blocks.flatten(1, 2).transpose(1, 2).split([pool.key_dim, pool.value_dim], -1)
        seen = torch.arange(keys.shape[2])[None] <= batch.positions[:, None]
        attended = scaled_dot_product_attention(
            query[0].transpose(0, 1)[:, :, None],
            keys,
            values,
            attn_mask=seen[:, None, None],
            scale=scoring["scale"],
            enable_gqa=True,
        )
        return attended[:, :, 0][None]


@pytest.fixture
def software_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let captures find values: unlike on a GPU, what is captured runs at once."""
    allocate = stage_graphs._Recorder._copy

    def copy(self: Any, source: torch.Tensor) -> torch.Tensor:
        target = allocate(self, source)
        with _disable_current_modes():
            return target.copy_(source)

    monkeypatch.setattr(stage_graphs._Recorder, "_copy", copy)


def captured_runner(model: Any, stages: Stages, fusion: Fusion | None = None, **given: Any) -> Any:
    """Make a runner whose decode steps and sampling become graphs."""
    probe = inspect_model(model)
    runner = ModelRunner(
        model,
        allocate_pools(probe.shapes, BLOCKS),
        GraphAttention(),
        slots=SLOTS,
        blocks_per_sequence=16,
        vocab_size=probe.vocab_size,
        by_sdpa=False,
        can_capture=True,
        stages=stages,
        fusion=fusion,
        **given,
    )
    runner._stages.pools.capture = recorded
    return runner


@torch.no_grad()
def written(runner: Any, prompts: list[list[int]], tokens: int, adapters: tuple[int, ...] = ()) -> list[list[int]]:
    """Continue prompts of several lengths beside each other, by greedy steps."""
    numbers = adapters or (NO_ADAPTER,) * len(prompts)
    sequences = [bare_sequence(ids, tokens, adapter=i) for ids, i in zip(prompts, numbers, strict=True)]
    scheduler = Scheduler(BlockManager(BLOCKS), slots=SLOTS, step_tokens=16, step_tokens_while_decoding=16)
    run_greedily(runner, sequences, scheduler)
    return [sequence.ids[len(ids) :] for sequence, ids in zip(sequences, prompts, strict=True)]


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_every_family_writes_the_same(name: str, fuses: bool, tokenizer: Any) -> None:
    model = hooked(family_model(FAST[name]))
    expected = [generated_ids(model, prompt, 24) for prompt in PROMPTS]
    engine = engine_in_stages(model, tokenizer, fuses=fuses)
    assert "2 stages" in engine.info.reason
    assert write(engine, PROMPTS, 24) == expected
    if fuses and name == "llama":
        assert all(not kind.left for kind in engine._parts._fusion.summary)
        assert {k for k, n in engine.info.fused.items() if not n} <= {LINEAR, EXPERTS}
    assert [generated_ids(model, prompt, 24) for prompt in PROMPTS] == expected
    engine.close()


@pytest.mark.usefixtures("software_graphs")
class TestGraphs:
    """A step is a graph for each stage. Graphs of recorded operations stand for CUDA graphs."""

    @pytest.mark.parametrize("fuses", [False, True])
    @pytest.mark.parametrize("firsts", [(1,), (1, 2)])
    def test_replays_write_the_same(self, firsts: tuple[int, ...], fuses: bool) -> None:
        model = hooked(family_model(replace(FAST["llama"], options={**FAST["llama"].options, "num_hidden_layers": 3})))
        expected = [generated_ids(model, prompt, 24) for prompt in PROMPTS]
        stages = Stages(model, first_layers=firsts)
        fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference, stages=stages) if fuses else None
        runner = captured_runner(model, stages, fusion)
        for _ in range(2):
            assert written(runner, PROMPTS, 24) == expected
        assert runner.no_graph_reason is None
        graphs = list(runner._decode_graphs.values())
        assert len(graphs) > 1
        for graph in graphs:
            parts = graph._parts
            assert [part.place for part in parts] == list(stages.places)
            assert len({part.graph.replays for part in parts}) == 1
            assert [part.parcel is None for part in parts] == [True] + [False] * len(firsts)
        assert sum(graph._parts[0].graph.replays for graph in graphs) > 40

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3"])
    @pytest.mark.parametrize("fuses", [False, True])
    def test_no_stage_uses_memory_of_another(self, name: str, fuses: bool) -> None:
        """On GPUs that memory would be another device's."""
        model = hooked(family_model(FAST[name]))
        stages = Stages(model, first_layers=(1,))
        fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference, stages=stages) if fuses else None
        runner = captured_runner(model, stages, fusion)
        assert written(runner, PROMPTS[:1], 4) == [generated_ids(model, PROMPTS[0], 4)]
        [graph] = runner._decode_graphs.values()
        first, second = (part.graph for part in graph._parts)
        table, sampler = runner._table, runner.sampler
        of_first = [runner._inputs, runner._ones, table.blocks, table.adapters, sampler.last_ids, *first.made.values()]
        strays = {name for tensor in of_first if (name := second.read.get(address_of(tensor)))}
        assert not strays
        layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        for graph, layer in ((first, layers[1]), (second, layers[0])):
            assert not {address_of(weight) for weight in layer.parameters()} & graph.read.keys()
        assert {address_of(weight) for weight in layers[1].parameters()} <= second.read.keys()
