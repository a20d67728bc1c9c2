"""Models in stages: the same tokens as on one device. Two stages on one CPU stand for two GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.engine import scheduler
from langchain_quantllm.engine import stages as stages_module
from langchain_quantllm.engine.attention import Batch, LayerPool
from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.fusion.fuse import EXPERTS, LINEAR, Fusion
from langchain_quantllm.engine.kv_cache import allocate_pools
from langchain_quantllm.engine.lora import NO_ADAPTER, LoraStack
from langchain_quantllm.engine.model_check import run_greedily
from langchain_quantllm.engine.model_probe import inspect_model
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import bare_sequence
from langchain_quantllm.engine.stages import StageRun, Stages, find_stages
from langchain_quantllm.errors import GenerationError, InvalidOptionError, UnsupportedError
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.options import GenerationOptions
from tests.support.adapters import choose_adapter, enable_adapters, make_adapter
from tests.support.engine import AllowOnly, on_pipeline
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.fusion import forwards_in, logits_of, write
from tests.support.models import llm_of, pipeline_of, tiny_model
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
    plans = Scheduler(BlockManager(BLOCKS), slots=SLOTS, step_tokens=16, step_tokens_while_decoding=16)
    run_greedily(runner, sequences, plans)
    return [sequence.ids[len(ids) :] for sequence, ids in zip(sequences, prompts, strict=True)]


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_every_family_writes_the_same(name: str, fuses: bool, tokenizer: Any) -> None:
    model = hooked(family_model(FAST[name]))
    expected = [generated_ids(model, prompt, 12) for prompt in PROMPTS]
    engine = engine_in_stages(model, tokenizer, fuses=fuses)
    assert "2 stages" in engine.info.reason
    assert write(engine, PROMPTS, 12) == expected
    if fuses and name == "llama":
        assert all(not kind.left for kind in engine._parts._fusion.summary)
        assert {k for k, n in engine.info.fused.items() if not n} <= {LINEAR, EXPERTS}
    assert [generated_ids(model, prompt, 12) for prompt in PROMPTS] == expected
    engine.close()


def _same(mask: AllowOnly) -> AllowOnly:
    return mask


class TestPartsInTurn:
    """From some decoding sequences on, parts of them take turns, so that all stages work."""

    @pytest.fixture
    def engine(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """An engine that keeps steps in flight, as on two GPUs."""
        monkeypatch.setattr(ModelRunner, "steps_at_once", 2)
        monkeypatch.setattr(scheduler, "LEAST_DIVIDED", 4)
        engine = engine_in_stages(tiny_model(49152), tokenizer)
        engine._runner.is_asynchronous = True
        yield engine
        engine.close()

    def test_the_same_tokens(self, engine: Any) -> None:
        prompts = [random_ids(3 + 2 * i, seed=i) for i in range(7)]
        steps: list[list[Any]] = []
        run = engine._runner.run
        engine._runner.run = lambda step, *given: (steps.append(step.decoding), run(step, *given))[1]
        assert write(engine, prompts, 24) == [generated_ids(engine._parts.model, prompt, 24) for prompt in prompts]
        parts = [set(step) for step in steps if step]
        divided = [(a, b) for a, b in pairwise(parts) if len(a) + len(b) == len(prompts)]
        assert len(divided) > 20
        assert all(a.isdisjoint(b) for a, b in divided)

    def test_masks_see_every_token_before_the_next(self, engine: Any) -> None:
        allowed = [AllowOnly(AllowOnly.IDS) for _ in range(6)]
        asked = GenerationOptions(max_new_tokens=20, eos_token_id=())
        streams = []
        for i, mask in enumerate(allowed):
            given = {"shares_prefix": True, "mask": partial(_same, mask)}
            streams.append(engine.submit(plan_requests(random_ids(4 + i), asked, engine.limits, **given)))
        texts = [[i for chunk in stream for i in chunk.token_ids] for stream in streams]
        assert [mask.accepted for mask in allowed] == texts
        for prompt, text in zip(range(6), texts, strict=True):
            assert set(text) <= set(AllowOnly.IDS)
            logits = logits_of(engine._parts.model, random_ids(4 + prompt) + text)[0, 3 + prompt : -1]
            best = logits[:, list(AllowOnly.IDS)].argmax(-1)
            assert [AllowOnly.IDS[i] for i in best.tolist()] == text

    def test_preempted_and_cancelled_ones_harm_nobody(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ModelRunner, "steps_at_once", 2)
        monkeypatch.setattr(scheduler, "LEAST_DIVIDED", 3)
        model = tiny_model(49152)
        stages = Stages(model, first_layers=(1,))
        engine: Any = ContinuousEngine(pipeline_of(model, tokenizer), kv_cache_memory=14 * 16 * 512, stages=stages)
        engine._runner.is_asynchronous = True
        prompts = [random_ids(20, seed=i) for i in range(5)]
        expected = [generated_ids(model, prompt, 30) for prompt in prompts]
        asked = GenerationOptions(max_new_tokens=30, eos_token_id=())
        cancelled = engine.submit(plan_requests(random_ids(9), asked, engine.limits, shares_prefix=True))
        next(iter(cancelled))
        cancelled.close()
        assert write(engine, prompts, 30) == expected
        assert engine._scheduler.preempted
        engine._scheduler.check_integrity()
        engine.close()


class TestGraphs:
    """A step is a graph for each stage. Graphs of recorded operations stand for CUDA graphs."""

    @pytest.mark.parametrize("fuses", [False, True])
    @pytest.mark.parametrize("firsts", [(1,), (1, 2)])
    def test_replays_write_the_same(self, firsts: tuple[int, ...], fuses: bool) -> None:
        model = hooked(family_model(replace(FAST["llama"], options={**FAST["llama"].options, "num_hidden_layers": 3})))
        expected = [generated_ids(model, prompt, 16) for prompt in PROMPTS]
        stages = Stages(model, first_layers=firsts)
        fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference, stages=stages) if fuses else None
        runner = captured_runner(model, stages, fusion)
        for _ in range(2):
            assert written(runner, PROMPTS, 16) == expected
        assert runner.no_graph_reason is None
        graphs = list(runner._decode_graphs.values())
        assert len(graphs) > 1
        for graph in graphs:
            parts = graph._parts
            assert [part.place for part in parts] == list(stages.places)
            assert len({part.graph.replays for part in parts}) == 1
            assert [part.parcel is None for part in parts] == [True] + [False] * len(firsts)
        assert sum(graph._parts[0].graph.replays for graph in graphs) > 25

    def test_rows_with_different_adapters(self, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        tiny_model(300).save_pretrained(tmp_path / "base")
        names, targets = ("one", "two"), ["q_proj", "v_proj", "down_proj"]
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        for seed, name in enumerate(names):
            make_adapter(tmp_path / "base", tmp_path / name, seed=seed, target_modules=targets)
            model.load_adapter(str(tmp_path / name), adapter_name=name)
        model.generation_config.eos_token_id = None
        prompt, expected = PROMPTS[0], []
        prompt = [i % 300 for i in prompt]
        for name in names:
            choose_adapter(model, name)
            expected.append(generated_ids(model, prompt, 12))
        enable_adapters(model, False)
        expected.append(generated_ids(model, prompt, 12))
        assert len({tuple(ids) for ids in expected}) == 3
        stages = Stages(model, first_layers=(1,))
        runner = captured_runner(model, stages, adapters=LoraStack(model, names))
        assert written(runner, [prompt] * 3, 12, adapters=(0, 1, NO_ADAPTER)) == expected
        assert runner.no_graph_reason is None
        second = runner._decode_graphs[4]._parts[1].graph
        assert address_of(runner._table.adapters) not in second.read

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
        # Memory that a graph allocates may be where it keeps something else before.
        assert not {address_of(target) for _, target in graph._parts[1].moves} & second.made.keys()
        layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        for graph, layer in ((first, layers[1]), (second, layers[0])):
            assert not {address_of(weight) for weight in layer.parameters()} & graph.read.keys()
        assert {address_of(weight) for weight in layers[1].parameters()} <= second.read.keys()


class TestModules:
    """What happens to the model's modules."""

    def test_hooks_are_passed_by_in_the_engine_alone(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = hooked(family_model(FAST["llama"]))
        [expected] = [generated_ids(model, PROMPTS[0], 8)]
        engine = engine_in_stages(model, tokenizer)
        moved: list[str] = []
        original = AlignDevicesHook.pre_forward

        def pre_forward(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(type(module).__name__)
            return original(self, module, *args, **kwargs)

        monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
        assert write(engine, PROMPTS[:1], 8) == [expected]
        assert not moved
        assert generated_ids(model, PROMPTS[0], 8) == expected
        assert {"LlamaDecoderLayer", "LlamaRMSNorm", "Linear", "Embedding"} <= set(moved)
        engine.close()

    def test_close_puts_everything_back(self) -> None:
        model = hooked(tiny_model(300))
        before = {id(module): module.__dict__.get("forward") for module in model.modules()}
        stages = Stages(model, first_layers=(1,))
        assert any(isinstance(forward, ForwardPatch) for forward in forwards_in(model))
        assert signature(model.forward) == signature(type(model).forward.__get__(model))  # generate reads it
        stages.close()
        assert {id(module): module.__dict__.get("forward") for module in model.modules()} == before

    def test_a_model_on_one_device_has_none(self) -> None:
        assert find_stages(tiny_model(300)) is None
        assert find_stages(hooked(tiny_model(300))) is None

    @pytest.mark.parametrize("firsts", [(0,), (2,), (1, 1), (-1,)])
    def test_a_division_at_no_layer(self, firsts: tuple[int, ...]) -> None:
        model = tiny_model(300)
        with pytest.raises(InvalidOptionError, match="increasing numbers from 1 to 1, for a model on one device"):
            Stages(model, first_layers=firsts)
        assert not forwards_in(model)

    def test_each_stage_begins_where_its_layers_do(self) -> None:
        model = tiny_model(300)
        stages = Stages(model, first_layers=(1,))
        first, second = stages.places
        assert (stages.first, stages.last) == (first, second)
        placed = [model.model.layers[0], model.model.layers[1], model.model.norm, model.lm_head]
        assert [stages.place_of(id(module)) for module in placed] == [first, second, second, second]
        assert stages.place_of(id(model.model.rotary_emb)) is None


def spread(model: Any, **places: str) -> Any:
    """Put modules of a Llama on another device by name; "meta" stands for the second GPU."""
    for name, module in model.named_modules():
        if places.get(name.replace(".", "_")):
            module.to(places[name.replace(".", "_")])
    return model


def test_an_object_finds_and_closes_its_stages(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(49152)
    monkeypatch.setattr(stages_module, "find_stages", partial(Stages, first_layers=(1,)))
    llm, prompts = llm_of(model, tokenizer, max_new_tokens=12), ["The sea is", "1, 2, 3,"]
    assert "its layers run in 2 stages on cpu" in llm.engine_info.reason
    assert llm.batch(prompts) == on_pipeline(llm, max_new_tokens=12).batch(prompts)
    assert forwards_in(model)
    llm.unload()
    assert not forwards_in(model)


def test_a_model_that_stages_do_not_fit_runs_by_its_hooks(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def enter(*_: Any) -> Any:
        msg = "its code mixes devices"
        raise RuntimeError(msg)

    model = tiny_model(49152)
    monkeypatch.setattr(stages_module, "find_stages", partial(Stages, first_layers=(1,)))
    monkeypatch.setattr(stages_module.StageRun, "enter", enter)
    llm = llm_of(model, tokenizer, max_new_tokens=4, engine="fast", fuse=False)
    assert "accelerate's hooks move its tensors between devices" in llm.engine_info.reason
    assert "its code mixes devices" in llm.engine_info.reason
    assert not forwards_in(model)
    assert "its code mixes devices" in caplog.text
    llm.unload()


def test_why_a_model_cannot_be_divided_is_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(_: Any) -> Any:
        msg = "it has weights of its own beside modules on other devices"
        raise UnsupportedError(msg)

    monkeypatch.setattr(stages_module, "find_stages", find)
    llm = llm_of(tiny_model(49152), tokenizer, max_new_tokens=4, engine="fast")
    assert "by the host: it has weights of its own" in llm.engine_info.reason
    llm.unload()


@pytest.mark.parametrize("fuses", [False, True])
def test_a_model_whose_stages_compute_something_else_is_refused(
    fuses: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with fused steps, where its own logits are computed in stages as well."""
    monkeypatch.setattr(StageRun, "_copy", lambda _, tensor: tensor * 1.5 if tensor.is_floating_point() else tensor)
    model = hooked(tiny_model(49152))
    with pytest.raises(UnsupportedError, match="its logits in stages are not its own"):
        engine_in_stages(model, tokenizer, fuses=fuses)


def test_a_changed_model_is_divided_anew(tokenizer: Any) -> None:
    model = hooked(tiny_model(49152))
    engine = engine_in_stages(model, tokenizer, fuses=True)
    before = write(engine, PROMPTS[:1], 12)
    model.lm_head = torch.nn.Linear(64, 49152, bias=False)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    expected = [generated_ids(model, PROMPTS[0], 12)]
    assert write(engine, PROMPTS[:1], 12) == expected != before
    stages = engine._parts._stages
    assert stages.place_of(id(model.lm_head)) == stages.last
    assert isinstance(model.lm_head.__dict__["forward"], ForwardPatch)
    engine.close()


@pytest.mark.parametrize("name", ["gpt_neo", "diffllama"])
def test_hooks_are_passed_by_after_changes_too(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in modules that others of the engine's parts have patched over their stage."""
    model = hooked(family_model(FAST[name]))
    engine = engine_in_stages(model, tokenizer)

    def patches(module: Any) -> int:
        forward, count = module.__dict__.get("forward"), 0
        while isinstance(forward, ForwardPatch):
            forward, count = forward.before, count + 1
        return count

    moved: list[Any] = []

    def pre_forward(_: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(module)
        return args, kwargs

    before = [patches(module) for module in model.modules()]
    assert max(before) == 2
    for _ in range(2):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        expected = generated_ids(model, PROMPTS[0], 4)
        with monkeypatch.context() as patched:
            patched.setattr(AlignDevicesHook, "pre_forward", pre_forward)
            assert write(engine, PROMPTS[:1], 4) == [expected]
        assert not moved
    assert [patches(module) for module in model.modules()] == before
    engine.close()


def test_layers_that_lie_elsewhere_after_a_change_are_not_run(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks would be on another device than they are."""
    model = tiny_model(49152)
    engine = engine_in_stages(model, tokenizer)
    divide = Stages._divide

    def moved(self: Any, model: Any) -> None:
        divide(self, model)
        self._places[id(model.model.norm)] = self._places[id(model.model.layers[0])]

    monkeypatch.setattr(Stages, "_divide", moved)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    with pytest.raises(GenerationError, match="its layers lie on other devices; load it again"):
        write(engine, PROMPTS[:1], 4)
    engine.close()


class TestPlaces:
    """Places by the devices of a model's weights."""

    def test_layers_on_two_devices(self) -> None:
        model = spread(tiny_model(300), model_layers_1="meta", model_norm="meta", lm_head="meta")
        stages = Stages(model)
        cpu, meta = (torch.device(name) for name in ("cpu", "meta"))
        assert [place.device for place in stages.places] == [cpu, meta]
        assert (stages.first.device, stages.last.device) == (cpu, meta)
        assert [replica.inv_freq.device for replica in stages.replicas] == [meta]

    def test_small_modules_without_weights_run_where_they_are_called(self) -> None:
        """accelerate puts rotary frequencies where the last layer is, and cosines and sines go back to each layer."""
        model = spread(tiny_model(300), model_embed_tokens="meta", model_layers_0="meta")
        rotary = model.model.rotary_emb
        stages = Stages(model)
        [replica] = stages.replicas
        run = stages.begin()
        assert (run.place.device.type, replica.inv_freq.device.type) == ("meta", "meta")
        assert stages.call(rotary, rotary.forward, run.place.device) is replica
        assert rotary.inv_freq.device.type == "cpu"
        run.enter(id(model.model.layers[1]), (), {})
        assert stages.call(rotary, rotary.forward, run.place.device) is rotary.forward

    def test_arguments_come_along_once(self) -> None:
        model = spread(tiny_model(300), model_layers_1="meta", model_norm="meta", lm_head="meta")
        run = Stages(model).begin()
        hidden, cos = torch.ones(1, 3, 64, dtype=torch.float32), torch.ones(1, 3, 32, dtype=torch.float32)
        first, second, norm = *model.model.layers, model.model.norm
        kwargs = {"position_embeddings": (cos, cos), "use_cache": True}
        assert run.enter(id(first), (hidden,), kwargs) == ((hidden,), kwargs)
        args, moved = run.enter(id(second), (hidden,), kwargs)
        assert args[0].device.type == "meta"
        assert moved["use_cache"] is True
        assert moved["position_embeddings"][0] is moved["position_embeddings"][1]
        assert run.enter(id(second), args, moved) == (args, moved)
        assert run.enter(id(norm), (hidden,), {}) == (args, {})

    def test_a_head_that_shares_the_weights_of_the_embeddings_is_where_they_are(self) -> None:
        model = spread(tiny_model(300), model_layers_1="meta", model_norm="meta")
        model.lm_head.weight = model.model.embed_tokens.weight
        stages = Stages(model)
        assert stages.last == stages.first
        run = stages.begin()
        for name in ("model.layers.0", "model.layers.1", "model.norm", "lm_head"):
            run.enter(id(model.get_submodule(name)), (), {})
        assert run.place == stages.first
