"""LoRA adapters: each call with its own, many in one batch, by both engines, over all kinds of models."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.cuda_graphs import WaitFinder
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.errors import (
    GenerationError,
    InvalidOptionError,
    UnsupportedError,
)
from tests.support.adapters import (
    LONG,
    NAMES,
    PROMPT,
    Reference,
    Texts,
    active_adapters,
    choose_adapter,
    delete_adapter,
    enable_adapters,
    expected_texts,
    make,
    make_adapter,
    make_adapter_folders,
)
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.gptq_checkpoints import make_gptq_checkpoint
from tests.support.models import forwards, slowly, tiny_model

pytest.importorskip("peft")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter_folders(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def reference(root: Path) -> Reference:
    return Reference(root / "tiny")


@pytest.fixture(scope="module")
def llm(root: Path) -> QuantizedHuggingFaceLLM:
    return make(root).load()


@pytest.fixture(scope="module", params=["fast", "pipeline"])
def either(request: pytest.FixtureRequest, llm: QuantizedHuggingFaceLLM, root: Path) -> QuantizedHuggingFaceLLM:
    """The same loaded model, by each of the engines."""
    other = make(root, engine=request.param)
    assert other.pipeline is llm.pipeline
    return other


@pytest.fixture(scope="module")
def expected(root: Path, reference: Reference) -> Texts:
    return expected_texts(root, reference)


@pytest.mark.compat
class TestCalls:
    @pytest.mark.parametrize("prompt", [PROMPT, LONG])
    def test_each_adapter_alone(self, either: QuantizedHuggingFaceLLM, expected: Texts, prompt: str) -> None:
        """Twice, so that the second time finds what the first has left in the KV cache."""
        for _ in range(2):
            for name in NAMES:
                assert either.invoke(prompt, adapter=name) == expected[name, prompt]
        assert either.invoke(prompt) == expected["base", prompt]

    async def test_together(self, either: QuantizedHuggingFaceLLM, expected: Texts) -> None:
        calls = [(name, prompt) for prompt in (PROMPT, LONG, "One") for name in NAMES] * 2
        texts = await asyncio.gather(*(either.ainvoke(prompt, adapter=name) for name, prompt in calls))
        assert texts == [expected[call] for call in calls]

    def test_rows_join_a_running_batch(self, llm: QuantizedHuggingFaceLLM, expected: Texts) -> None:
        calls = [(name, prompt) for name in NAMES for prompt in (PROMPT, "One")]
        with forwards(llm, slowly(0.01)) as seen, ThreadPoolExecutor(len(calls)) as threads:
            running = []
            for at, (name, prompt) in enumerate(calls):
                seen.wait_for(2 * at)
                running.append(threads.submit(llm.invoke, prompt, adapter=name))
            assert [row.result() for row in running] == [expected[call] for call in calls]
        assert seen.count < 45  # 72 one after another
        assert max(tokens for _, tokens in seen.shapes[-20:]) > 1  # several rows in one step

    def test_batch_and_bind(self, either: QuantizedHuggingFaceLLM, expected: Texts) -> None:
        prompts = [PROMPT, LONG, "One"]
        for name in NAMES:
            texts = [expected[name, prompt] for prompt in prompts]
            assert either.batch(prompts, adapter=name) == texts
            assert either.bind(adapter=name).batch(prompts, return_exceptions=True) == texts

    async def test_streams(self, either: QuantizedHuggingFaceLLM, expected: Texts) -> None:
        for name in NAMES:
            assert "".join(either.stream(PROMPT, adapter=name)) == expected[name, PROMPT]
            assert "".join([text async for text in either.astream(LONG, adapter=name)]) == expected[name, LONG]

    def test_several_samples(self, llm: QuantizedHuggingFaceLLM, root: Path, expected: Texts) -> None:
        greedy = llm.generate([PROMPT, LONG], n=2, adapter="chat").generations
        assert [[g.text for g in row] for row in greedy] == [[expected["chat", p]] * 2 for p in (PROMPT, LONG)]
        sampled = {
            name: [g.text for g in llm.generate([PROMPT], n=3, temperature=0.5, seed=4, adapter=name).generations[0]]
            for name in NAMES
        }
        plain = make(root, engine="pipeline")
        for name in NAMES:
            rows = plain.generate([PROMPT], n=3, temperature=0.5, seed=4, adapter=name).generations[0]
            assert [g.text for g in rows] == sampled[name]

    def test_options_of_generate(self, llm: QuantizedHuggingFaceLLM, root: Path, reference: Reference) -> None:
        for name in ("sql", "chat"):
            text = reference.text(root / name, PROMPT, num_beams=3)
            assert llm.invoke(PROMPT, adapter=name, num_beams=3) == text

    def test_both_engines_at_once(self, llm: QuantizedHuggingFaceLLM, root: Path, expected: Texts) -> None:
        plain = make(root, engine="pipeline")
        with ThreadPoolExecutor(12) as threads:
            calls = [(model, name) for model in (llm, plain) for name in NAMES] * 2
            running = [threads.submit(model.invoke, PROMPT, adapter=name) for model, name in calls]
            assert [row.result() for row in running] == [expected[name, PROMPT] for _, name in calls]

    def test_keys_and_values_are_shared_within_an_adapter_only(self, root: Path) -> None:
        llm = make(root).load()
        llm.unload()  # whatever other tests have left in the pages
        cached = []
        for name in (*NAMES, *NAMES):
            usage = llm.generate([LONG], adapter=name).generations[0][0].generation_info["usage_metadata"]  # type: ignore[index]
            cached.append(usage["input_token_details"]["cache_read"])
        assert cached[:3] == [0, 0, 0]
        assert all(tokens >= BLOCK_TOKENS for tokens in cached[3:])

    def test_chat(self, root: Path, reference: Reference) -> None:
        fields = {"adapters": {"sql": str(root / "sql"), "chat": str(root / "chat")}, "adapter": "chat"}
        chat = ChatQuantizedHuggingFace(
            model_id=str(root / "tiny"),
            dtype="float32",
            progress=False,
            max_new_tokens=8,
            chat_template=TEMPLATE,
            **fields,
        )
        prompt = "human: hello\nassistant:".replace("human", "user")
        for name in ("sql", "chat"):
            text = reference.text(root / name, prompt, 8)
            assert chat.invoke("hello", adapter=name).content == text
            assert "".join(str(c.content) for c in chat.bind(adapter=name).stream("hello")) == text
        assert chat.invoke("hello").content == reference.text(root / "chat", prompt, 8)
        assert chat.invoke("hello", adapter="base").content == reference.text(None, prompt, 8)
        with pytest.raises(InvalidOptionError, match="did you mean 'chat'"):
            chat.invoke("hello", adapter="chta")


class TestTheModelItself:
    """Changes of `llm.pipeline.model` by the user, and what the engines leave unchanged in it."""

    @pytest.fixture
    def own(self, root: Path) -> Iterator[QuantizedHuggingFaceLLM]:
        """A loaded model of its own."""
        llm = make(root, adapter="sql", cache_dir="of its own").load()
        yield llm
        llm.unload()

    def test_generate_beside_the_engine(self, llm: QuantizedHuggingFaceLLM, root: Path, reference: Reference) -> None:
        model, ids = llm.pipeline.model, reference.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        with (
            forwards(llm, slowly(0.003)) as seen,
            llm._engine().submit(
                llm._requests(LONG, llm._options(None, {"adapter": "chat", "max_new_tokens": 120}))
            ) as stream,
        ):
            seen.wait_for(3)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
            text = "".join(chunk.text for chunk in stream)
        assert reference.tokenizer.decode(output[0, ids.shape[1] :]) == reference.text(None, PROMPT)
        assert text == reference.text(root / "chat", LONG, 120)

    def test_the_pipeline_engine_leaves_it_as_it_was(self, own: QuantizedHuggingFaceLLM) -> None:
        own.engine = "pipeline"
        model = own.pipeline.model
        choose_adapter(model, "chat")
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        assert any(trained.values())
        own.batch([PROMPT, LONG], adapter="sql")
        own.invoke(PROMPT, adapter="base")
        assert active_adapters(model) == ["chat"]
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
        enable_adapters(model, False)
        own.invoke(PROMPT, adapter="sql")
        assert model.model.layers[0].self_attn.q_proj.disable_adapters

    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    @pytest.mark.compat
    def test_switching_by_hand_changes_no_call(
        self, own: QuantizedHuggingFaceLLM, expected: Texts, engine: str
    ) -> None:
        own.engine = engine
        model = own.pipeline.model
        for change in (
            lambda: choose_adapter(model, "chat"),
            lambda: enable_adapters(model, False),
            lambda: enable_adapters(model, True),
        ):
            change()
            for name in NAMES:
                assert own.invoke(LONG, adapter=name) == expected[name, LONG]

    def test_changed_weights(self, own: QuantizedHuggingFaceLLM, expected: Texts) -> None:
        assert own.invoke(LONG, adapter="sql") == expected["sql", LONG]
        layer = own.pipeline.model.model.layers[0].self_attn.v_proj
        with torch.no_grad():
            layer.lora_B["sql"].weight.mul_(-2)
        by_pipeline = own.model_copy(update={"engine": "pipeline"}).invoke(LONG, adapter="sql")
        assert own.invoke(LONG, adapter="sql") == by_pipeline != expected["sql", LONG]
        with torch.no_grad():
            layer.lora_B["sql"].weight.div_(-2)
        layer.set_scale("sql", 3.0)
        scaled = own.invoke(LONG, adapter="sql")
        assert scaled == own.model_copy(update={"engine": "pipeline"}).invoke(LONG, adapter="sql")
        assert own.invoke(LONG, adapter="chat") == expected["chat", LONG]

    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    @pytest.mark.compat
    def test_merged_by_hand(self, own: QuantizedHuggingFaceLLM, expected: Texts, engine: str) -> None:
        own.engine = engine
        assert own.invoke(PROMPT) == expected["sql", PROMPT]
        layers = [m for m in own.pipeline.model.modules() if hasattr(m, "set_scale")]
        for layer in layers:
            layer.merge(adapter_names=["sql"])
        for name in NAMES:
            with pytest.raises(GenerationError, match="'sql' is merged.*unload"):
                own.invoke(PROMPT, adapter=name)
        for layer in layers:
            layer.unmerge()
        assert own.invoke(PROMPT) == expected["sql", PROMPT]

    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    def test_deleted_by_hand(self, own: QuantizedHuggingFaceLLM, expected: Texts, engine: str) -> None:
        own.engine = engine
        assert own.invoke(PROMPT) == expected["sql", PROMPT]
        delete_adapter(own.pipeline.model, "chat")
        with pytest.raises(GenerationError, match="'chat' is not on the model any more"):
            own.invoke(PROMPT)
        own.unload()
        assert own.invoke(PROMPT, adapter="chat") == expected["chat", PROMPT]

    def test_added_by_hand(self, own: QuantizedHuggingFaceLLM, root: Path, expected: Texts) -> None:
        assert own.invoke(PROMPT) == expected["sql", PROMPT]
        own.pipeline.model.load_adapter(str(root / "chat"), adapter_name="third")
        for name in NAMES:
            assert own.invoke(PROMPT, adapter=name) == expected[name, PROMPT]

    def test_nothing_is_left_behind(self, own: QuantizedHuggingFaceLLM, reference: Reference, root: Path) -> None:
        own.invoke(PROMPT)
        model = own.pipeline.model
        layer = model.model.layers[0].self_attn.q_proj
        twin = copy.deepcopy(model)
        assert twin.model.layers[0].self_attn.q_proj.forward.__self__ is twin.model.layers[0].self_attn.q_proj
        own.unload()
        assert "forward" not in vars(layer)
        ids = reference.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        for left in (model, twin):
            output = left.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
            text = reference.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert text == reference.text(root / "sql", PROMPT)


def test_a_layer_makes_the_host_wait_for_nothing(llm: QuantizedHuggingFaceLLM) -> None:
    """What a CUDA graph could not hold is found by the operations of a step, on any device."""
    stack = llm._engine()._parts.adapters  # type: ignore[attr-defined]
    layer = llm.pipeline.model.lm_head
    x, numbers = torch.randn(1, 3, 64), torch.tensor([1, -1, 0], dtype=torch.int32)
    context = ForwardContext(adapters=stack.choice(numbers, numbers))
    with torch.no_grad(), WaitFinder() as finder, forward_context(context):
        found = layer(x)
    assert finder.found is None
    with torch.no_grad():
        base = layer.base_layer(x)
        delta = layer.lora_B["chat"](layer.lora_A["chat"](x)) * layer.scaling["chat"]
    assert torch.equal(found[0, 1:], base[0, 1:])  # `sql` leaves the head alone
    assert torch.allclose(found[0, 0], (base + delta)[0, 0], atol=1e-5)


class TestKinds:
    @pytest.mark.parametrize(
        ("kind", "fields", "words"),
        [
            ("LoraConfig", {"use_dora": True}, "Dora"),
            ("LoraConfig", {"lora_bias": True, "target_modules": ["q_proj"]}, "biases"),
            ("LoraConfig", {"modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
            ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
            ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}, "ia3"),
        ],
        ids=lambda value: value if isinstance(value, str) else ",".join(value),
    )
    def test_what_is_no_plain_lora_runs_by_itself(
        self, root: Path, tmp_path: Path, kind: str, fields: dict[str, Any], words: str
    ) -> None:
        base = root / "tiny"
        if fields.get("lora_bias"):
            base = make_checkpoint(tmp_path / "biased", dtype="float32", attention_bias=True)
        folder = make_adapter(base, tmp_path / "other", seed=3, kind=kind, **fields)
        reference = Reference(base)
        sql = root / "sql"
        llm = make(root, model_id=str(base), adapters={"other": str(folder), "sql": str(sql)})
        info = llm.engine_info
        assert info.name == "pipeline"
        assert words in info.reason
        assert "beside each other" in info.reason
        for name, adapter in (("other", folder), ("base", None), ("sql", sql), ("other", folder)):
            assert llm.invoke(PROMPT, adapter=name) == reference.text(adapter, PROMPT)
        assert reference.text(folder, PROMPT) != reference.text(None, PROMPT)
        with pytest.raises(UnsupportedError, match="beside each other"):
            llm.model_copy(update={"engine": "fast"}).invoke(PROMPT)
        llm.unload()

    @pytest.mark.parametrize(
        ("family", "targets"),
        [
            ("qwen2", ["q_proj", "o_proj"]),
            ("mistral", "all-linear"),
            ("gpt_neox", ["query_key_value", "dense_h_to_4h"]),
        ],
    )
    @pytest.mark.compat
    def test_families(self, tmp_path: Path, family: str, targets: Any) -> None:
        base = tmp_path / family
        tiny_model(512, family, context_tokens=256).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        folders = [make_adapter(base, tmp_path / str(i), seed=i, r=3 + i, target_modules=targets) for i in range(2)]
        adapters = {f"a{i}": str(folder) for i, folder in enumerate(folders)}
        llm = QuantizedHuggingFaceLLM(
            model_id=str(base), adapters=adapters, engine="fast", max_new_tokens=8, progress=False, dtype="float32"
        )
        reference = Reference(base)
        with ThreadPoolExecutor(3) as threads:
            texts = list(threads.map(lambda name: llm.invoke(LONG, adapter=name), ("a0", "a1", "base")))
        assert texts == [reference.text(adapter, LONG, 8) for adapter in (*folders, None)]
        llm.unload()

    @pytest.mark.parametrize("quantization", ["nf4", "int8"])
    def test_over_a_quantized_model(self, any_smollm2: Path, tmp_path: Path, quantization: str) -> None:
        folders = [make_adapter(any_smollm2, tmp_path / str(i), seed=i, scale=0.7) for i in range(2)]
        llm = QuantizedHuggingFaceLLM(
            model_id=str(any_smollm2),
            quantization=quantization,
            dtype="float32",
            adapters={f"a{i}": str(folder) for i, folder in enumerate(folders)},
            max_new_tokens=8,
            progress=False,
        )
        names = ("a0", "a1", "base")
        assert llm.engine_info.name == "fast"
        # What is an outlier for int8, it finds out for all rows of a step together.
        bound = [llm.bind(adapter=name, logprobs=True) for name in names]
        with ThreadPoolExecutor(3 if quantization == "nf4" else 1) as threads:
            results = list(threads.map(lambda one: one.bound.generate([PROMPT], **one.kwargs), bound))
        texts = [
            [entry["token_id"] for entry in result.generations[0][0].generation_info["logprobs"]["content"]]
            for result in results
        ]
        model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
        prompt_ids = tokenizer(PROMPT)["input_ids"]
        for name, text_ids in zip(names, texts, strict=True):
            enable_adapters(model, name != "base")
            if name != "base":
                choose_adapter(model, name)
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + text_ids])).logits[0, len(prompt_ids) - 1 : -1].float()
            found = logits.log_softmax(-1).gather(1, torch.tensor(text_ids)[:, None])[:, 0]
            # On some CPUs bitsandbytes' products round to bfloat16, by the number of rows: close choices vary.
            assert (logits.log_softmax(-1).amax(-1) - found).max() < 0.3, name
        assert len({tuple(text_ids) for text_ids in texts}) == 3
        llm.unload()

    def test_over_gptq(self, root: Path, tmp_path: Path) -> None:
        pytest.importorskip("optimum")
        base = make_gptq_checkpoint(root / "tiny", tmp_path / "gptq")
        llm = make(root, model_id=str(base), dtype="auto", max_new_tokens=8)
        plain = llm.model_copy(update={"engine": "pipeline"})
        assert llm.engine_info.name == "fast"
        texts = {name: llm.invoke(PROMPT, adapter=name) for name in NAMES}
        assert len(set(texts.values())) == 3
        assert {name: plain.invoke(PROMPT, adapter=name) for name in NAMES} == texts
        llm.unload()


def test_loading_says_nothing(root: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    llm = make(root, cache_dir="of its own")
    llm.invoke(PROMPT, adapter="chat")
    llm.unload()
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == []
