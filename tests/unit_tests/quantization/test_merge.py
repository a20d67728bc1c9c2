"""Merging an adapter: what is written is the base with its adapter, a plain checkpoint, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import langchain_quantllm
from langchain_quantllm import QuantizedHuggingFaceLLM, merge_adapter, quantize
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, ModelNotFoundError, UnsupportedError
from tests.support.adapters import ATTENTION, Reference, make_adapter, quietly
from tests.support.checkpoints import SIZES, make_checkpoint, make_tokenizer, quicken
from tests.support.gptq_checkpoints import make_gptq_checkpoint

pytest.importorskip("peft")

PROMPT = "The capital of France is"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    folder = tmp_path_factory.mktemp("merging")
    base = make_checkpoint(folder / "tiny", dtype="float32", generation={"max_new_tokens": 7})
    (base / "chat_template.jinja").write_text(TEMPLATE)
    make_adapter(base, folder / "sql", seed=1, target_modules=[*ATTENTION, "down_proj"])
    return folder


def merge(root: Path, output: Path, **given: Any) -> Path:
    model, adapter = (str(given.pop(name, root / other)) for name, other in (("model_id", "tiny"), ("adapter", "sql")))
    return merge_adapter(model, adapter, output, **{"progress": False, **given})


@pytest.fixture(scope="module")
def exact(root: Path) -> dict[str, torch.Tensor]:
    """The merged weights in float32."""
    tensors: dict[str, torch.Tensor] = load_file(merge(root, root / "exact") / "model.safetensors")
    return tensors


def logits(model: Any, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.compat
def test_merged_is_base_plus_adapter(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = merge(root, tmp_path / "new" / "merged")
    assert capfd.readouterr() == ("", "")
    assert folder == tmp_path / "new" / "merged"
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}
    reference = Reference(root / "tiny")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert torch.allclose(logits(plain, folder), logits(reference.model(root / "sql"), folder), atol=1e-4)
    assert plain.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert Reference(folder).text(None, PROMPT) == reference.text(root / "sql", PROMPT) != reference.text(None, PROMPT)
    llm = QuantizedHuggingFaceLLM(model_id=str(folder), max_new_tokens=12, progress=False)
    assert llm.invoke(PROMPT) == reference.text(root / "sql", PROMPT)
    llm.unload()


def test_the_base_stays_as_it_is(root: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (root / "tiny").iterdir()}
    merge(root, tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in (root / "tiny").iterdir()} == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_another_dtype(root: Path, tmp_path: Path, exact: dict[str, torch.Tensor], dtype: str) -> None:
    folder = merge(root, tmp_path / "merged", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    for name, tensor in tensors.items():
        assert (tensor.float() - exact[name]).abs().max() <= 0.02 * exact[name].abs().max()


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8"])
@pytest.mark.compat
def test_a_quantized_base(root: Path, tmp_path: Path, exact: dict[str, torch.Tensor], quantization: str) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(root / "tiny"), quantization=quantization, progress=False, cache_dir="x")
    stored = tmp_path / "stored"
    llm.pipeline.model.save_pretrained(stored)
    llm.pipeline.tokenizer.save_pretrained(stored)
    llm.unload()
    folder = merge(root, tmp_path / "merged", model_id=stored)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == exact.keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    error = 0.35 if "4" in quantization else 0.02  # of the largest weight: the widest gap of a 4-bit code
    for name, tensor in merged.items():
        assert (tensor - exact[name]).abs().max() <= error * exact[name].abs().max()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(merged[name], exact[name])


def test_weights_that_were_repacked_are_found_out(root: Path) -> None:
    """Dequantized weights are compared with the scales that the checkpoint has for them."""
    from langchain_quantllm.quantization.merge import _check_scales

    weight = torch.randn(8, 64)
    scales = weight.view(-1, 32).abs().amax(1)
    _check_scales(weight, scales, 32, "layer")
    _check_scales(weight, weight.abs().amax(1), 0, "layer")
    for wrong in (weight.T.contiguous().view(8, 64), weight * 1.1, weight * float("nan")):
        with pytest.raises(CheckpointError, match="do not match their scales"):
            _check_scales(wrong, scales, 32, "layer")


@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "ia3"])
def test_other_kinds(root: Path, tmp_path: Path, kind: str) -> None:
    fields: dict[str, Any] = {
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "ia3": {"kind": "IA3Config", "target_modules": ["v_proj"], "feedforward_modules": []},
    }[kind]
    adapter = make_adapter(root / "tiny", tmp_path / kind, seed=3, **fields)
    folder = merge(root, tmp_path / "merged", adapter=adapter)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    reference = Reference(root / "tiny")
    assert torch.allclose(logits(plain, folder), logits(reference.model(adapter), folder), atol=1e-3)
    assert Reference(folder).text(None, PROMPT) == reference.text(adapter, PROMPT)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"trainable_token_indices": [11, 15, 17]},
        {"kind": "TrainableTokensConfig", "target_modules": ["embed_tokens"], "token_indices": [11, 12]},
        {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    ],
    ids=lambda fields: max(fields),
)
def test_tokens_and_parameters(tmp_path: Path, tied: bool, fields: dict[str, Any]) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32", tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter", seed=3, **fields)
    folder = merge_adapter(str(base), str(adapter), tmp_path / "merged", progress=False)
    merged, reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), Reference(base)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        found, expected, plain = (m(ids).logits for m in (merged, reference.model(adapter), reference.model(None)))
    assert merged.config.tie_word_embeddings == tied
    assert torch.allclose(found, expected, atol=1e-3)
    assert (expected - plain).abs().max() > 1


class TestExperts:
    """Adapters of experts: with their names in transformers 4, one layer each, and of whole parameters."""

    @pytest.fixture(scope="class", params=["mixtral", "qwen3_moe"])
    @classmethod
    def base(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp(request.param)
        sizes = {**SIZES, "moe_intermediate_size": 128, "head_dim": 32, "num_experts_per_tok": 2}
        config = AutoConfig.for_model(request.param, **sizes, num_experts=4, num_local_experts=4)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    def check(self, base: Path, adapter: Path, expected: torch.Tensor, output: Path) -> None:
        """Check the merged checkpoint, and the adapter in the unmerged model, against logits."""
        folder = merge_adapter(str(base), str(adapter), output, progress=False)
        found = self.logits(folder)
        assert torch.allclose(found, expected, atol=1e-3)
        assert (expected - self.logits(base)).abs().max() > 1
        llm = QuantizedHuggingFaceLLM(model_id=str(base), adapter=str(adapter), max_new_tokens=8, progress=False)
        assert llm.invoke(PROMPT) == Reference(folder).text(None, PROMPT, 8)
        assert llm.invoke(PROMPT, adapter="base") == Reference(base).text(None, PROMPT, 8)
        llm.unload()

    @staticmethod
    def logits(folder: Path) -> torch.Tensor:
        return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)

    def test_one_layer_for_each_expert(self, base: Path, tmp_path: Path) -> None:
        """Against the sum of weights and products, computed here from the files."""
        tensors = load_file(base / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        adapter, weights = tmp_path / "adapter", {}
        for name, weight in tensors.items():
            if ".experts." not in name and "q_proj" not in name:
                continue
            down, up = (
                torch.randn(size, generator=generator) * 0.15 for size in ((4, weight.shape[1]), (len(weight), 4))
            )
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"] = down, up
            tensors[name] = weight + 2.0 * up @ down
        adapter.mkdir()
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({name.split(".")[-3] for name in weights})
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        summed = Path(shutil.copytree(base, tmp_path / "summed"))
        save_file(tensors, summed / "model.safetensors", metadata={"format": "pt"})
        self.check(base, adapter, self.logits(summed), tmp_path / "merged")

    def test_parameters_of_all_experts(self, base: Path, tmp_path: Path) -> None:
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        fields = {"target_modules": ["q_proj"], "target_parameters": names}
        adapter = make_adapter(base, tmp_path / "adapter", seed=1, scale=0.3, **fields)
        expected = logits(Reference(base).model(adapter), base)
        self.check(base, adapter, expected, tmp_path / "merged")

    def test_into_quantized_experts(self, base: Path, tmp_path: Path) -> None:
        """Against an adapter in the model with the dequantized weights, which merging without one writes."""
        fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
        adapter = make_adapter(base, tmp_path / "adapter", seed=1, scale=0.3, **fields)
        nothing = make_adapter(base, tmp_path / "nothing", seed=1, scale=0.0, **fields)
        quantize(base, "nf4", output=tmp_path / "quantized", progress=False)
        plain = merge_adapter(tmp_path / "quantized", nothing, tmp_path / "plain", progress=False)
        merged = merge_adapter(tmp_path / "quantized", adapter, tmp_path / "merged", progress=False)
        quantized = QuantizedHuggingFaceLLM(model_id=str(tmp_path / "quantized"), progress=False).load()
        found = logits(quantized.pipeline.model, base)
        assert (self.logits(plain) - found).norm() < 0.05 * found.norm()  # bitsandbytes multiplies in bfloat16
        expected = logits(Reference(plain).model(adapter), plain)
        assert torch.allclose(self.logits(merged), expected, atol=1e-3)
        llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path / "quantized"), adapter=str(adapter), progress=False)
        with pytest.raises(UnsupportedError, match="changes the experts of this mixture, which are quantized"):
            llm.load()

    def test_of_dense_layers_beside_quantized_experts(self, base: Path, tmp_path: Path) -> None:
        names = ["q_proj", "down_proj"] if "mixtral" in base.name else ["q_proj"]  # peft knows qwen3's as experts
        adapter = make_adapter(base, tmp_path / "adapter", seed=1, scale=0.3, target_modules=names)
        options = {"quantization": "nf4", "max_new_tokens": 8, "progress": False}
        llm = QuantizedHuggingFaceLLM(model_id=str(base), adapter=str(adapter), **options)
        plain = QuantizedHuggingFaceLLM(model_id=str(base), **options)
        assert llm.invoke(PROMPT) != llm.invoke(PROMPT, adapter="base") == plain.invoke(PROMPT)


class TestOutput:
    def test_a_folder_that_is_not_empty(self, root: Path, tmp_path: Path) -> None:
        output = tmp_path / "merged"
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        with pytest.raises(InvalidOptionError, match="not empty.*overwrite=True"):
            merge(root, output)
        with pytest.raises(InvalidOptionError, match="holds 'mine.txt', and overwrite=True only replaces"):
            merge(root, output, overwrite=True)
        assert [path.name for path in output.iterdir()] == ["mine.txt"]
        (output / "mine.txt").unlink()
        merge(root, output, dtype="bfloat16")
        merge(root, output, overwrite=True)
        assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
        assert [path.name for path in tmp_path.iterdir()] == ["merged"]

    def test_an_empty_folder(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "merged").mkdir()
        assert (merge(root, tmp_path / "merged") / "config.json").is_file()

    def test_what_is_no_folder_of_its_own(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidOptionError, match="is a file"):
            merge(root, tmp_path / "file")
        for name in ("tiny", "sql"):
            with pytest.raises(InvalidOptionError, match=f"is .*{name}', one of the sources"):
                merge(root, root / name, overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_leaves_nothing(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
    ) -> None:
        output = tmp_path / "merged"
        if overwrite:
            output.mkdir()
            (output / "config.json").write_text("mine")

        def fail(self: Any, folder: Any, **_: Any) -> None:
            (Path(folder) / "half").write_text("half")
            raise OSError("the disk is full")

        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
        with pytest.raises(langchain_quantllm.errors.QuantLLMError, match="the disk is full"):
            merge(root, output, overwrite=overwrite)
        left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
        assert sorted(left) == (["merged", "merged/config.json"] if overwrite else [])


class TestErrors:
    def test_gptq(self, root: Path, tmp_path: Path) -> None:
        quantized = make_gptq_checkpoint(root / "tiny", tmp_path / "gptq")
        with pytest.raises(UnsupportedError, match="GPTQ.*unquantized model, and quantize the result"):
            merge(root, tmp_path / "merged", model_id=quantized)
        assert not (tmp_path / "merged").exists()

    def test_what_is_not_there(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError):
            merge(root, tmp_path / "merged", model_id="/no/where")
        with pytest.raises(ModelNotFoundError):
            merge(root, tmp_path / "merged", adapter="/no/where")

    def test_another_model(self, root: Path, tmp_path: Path) -> None:
        for sizes, words in (({"hidden_size": 128}, "takes 128"), ({"num_hidden_layers": 1}, "no weights for")):
            base = make_checkpoint(tmp_path / words, **sizes)
            adapter = make_adapter(base, tmp_path / f"{words} adapter", seed=1)
            with pytest.raises(CheckpointError, match=words):
                merge(root, tmp_path / "merged", adapter=adapter)

    def test_an_adapter_that_is_no_number(self, root: Path, tmp_path: Path) -> None:
        adapter = Path(shutil.copytree(root / "sql", tmp_path / "nan"))
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors[min(tensors)].fill_(float("inf"))
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises((UnsupportedError, CheckpointError)):
            merge(root, tmp_path / "merged", adapter=adapter)
        assert not (tmp_path / "merged").exists()

    def test_a_head_that_is_tied(self, root: Path, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
        adapter = make_adapter(base, tmp_path / "head", seed=1, target_modules=["lm_head", "q_proj"])
        with pytest.raises(UnsupportedError, match="lm_head.*uses twice"):
            merge(root, tmp_path / "merged", model_id=base, adapter=adapter)

    def test_a_merge_that_went_wrong(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """peft merges something else than it ran with."""
        with quietly():
            import peft

        layer = peft.tuners.lora.layer.Linear
        real = layer.get_delta_weight
        monkeypatch.setattr(layer, "get_delta_weight", lambda self, adapter: real(self, adapter) * 0.5)
        with pytest.raises(CheckpointError, match="logits differ by"):
            merge(root, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_smollm2(any_smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(any_smollm2, tmp_path / "adapter", seed=1, scale=0.7)
    folder = merge(tmp_path, tmp_path / "merged", model_id=any_smollm2, adapter=adapter, dtype="float32")
    reference = Reference(any_smollm2)
    assert Reference(folder).text(None, PROMPT, 5) == reference.text(adapter, PROMPT, 5)
    assert AutoTokenizer.from_pretrained(folder).chat_template == reference.tokenizer.chat_template
