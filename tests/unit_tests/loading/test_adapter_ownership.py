"""An adapter changes nothing but its own: the base and the other adapters write what they write without it.

The pairs of kinds are compared by logits, as every kind of adapter must keep to itself whatever is loaded beside it.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from langchain_quantllm import QuantizedHuggingFaceLLM, merge_adapter
from langchain_quantllm.engine.adapter_switch import activate
from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.loading.adapter_weights import load_adapters
from langchain_quantllm.loading.adapters import check_adapters_share, find_adapters
from langchain_quantllm.loading.spec import LoadSpec
from tests.support.adapters import PROMPT, Reference, make_adapter, quietly
from tests.support.checkpoints import edit_json, make_checkpoint, quicken, spoil_weights

pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "rank": {"r": 12, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head_copy": {"modules_to_save": ["lm_head"]},
    "layer_copy": {"modules_to_save": ["up_proj"]},
    "embedding_copy": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [11, 15, 17]},
    "more_tokens": {"trainable_token_indices": [12, 15, 19, 20]},
    "matrices": {"target_modules": ["v_proj"], "target_parameters": ["k_proj.weight"]},
    "up": {"target_modules": ["up_proj"]},
    "ia3": {"kind": "IA3Config", "target_modules": ["k_proj", "q_proj"], "feedforward_modules": []},
    "loha": {"kind": "LoHaConfig", "target_modules": ["q_proj"], "r": 4},
    "norms": {"kind": "LNTuningConfig", "target_modules": ["input_layernorm"]},
    "oft": {"kind": "OFTConfig", "target_modules": ["q_proj"], "r": 0, "oft_block_size": 16},
    "only_tokens": {"kind": "TrainableTokensConfig", "target_modules": ["embed_tokens"], "token_indices": [11, 15]},
    "hra": {"kind": "HRAConfig", "target_modules": ["q_proj"], "r": 4},
}
"""Fields of an adapter of each kind."""

GOOD_PAIRS = [
    ("plain", "rank"),
    ("tokens", "rank"),
    ("tokens", "more_tokens"),
    ("norms", "tokens"),
    ("head_copy", "embedding"),
    ("rank", "hra"),
    ("up", "matrices"),
    ("layer_copy", "only_tokens"),
]
IDS = torch.arange(10, 30)[None]


class Models:
    """Adapters of all kinds over one base, and the logits of each when it is loaded alone."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self.base = make_checkpoint(folder / "base", dtype="float32", tie_word_embeddings=tied)
        self._alone: dict[str, torch.Tensor] = {}

    def folder(self, name: str) -> Path:
        folder = self.base.with_name(name)
        if not folder.exists():
            make_adapter(self.base, folder, seed=list(KINDS).index(name), **KINDS[name])
        return folder

    def load(self, *names: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        adapters = {name: str(self.folder(name)) for name in names}
        spec = LoadSpec(model_id=str(self.base), adapters=adapters, progress=False)
        load_adapters(model, find_adapters(spec), spec)
        return model

    def alone(self, name: str) -> torch.Tensor:
        if name not in self._alone:
            self._alone[name] = logits(self.load() if name == "base" else self.load(name), name)
        return self._alone[name]

    def check(self, first: str, second: str) -> bool:
        """Check that two adapters and the base stay what they are; returns False if they do not load together."""
        try:
            model = self.load(first, second)
        except CheckpointError as error:
            assert repr(second) in str(error)  # noqa: PT017
            return False
        for name in ("base", first, second, "base", first):
            torch.testing.assert_close(logits(model, name), self.alone(name), rtol=1e-4, atol=1e-4)
        return True


def logits(model: Any, name: str) -> torch.Tensor:
    activate(model, name)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    quicken()
    return Models(tmp_path_factory.mktemp("kinds"), tied=request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_peft_makes_of_it(models: Models, kind: str) -> None:
    with quietly():
        import peft

        plain = AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32).eval()
        with torch.no_grad():
            base = plain(IDS).logits
        model = peft.PeftModel.from_pretrained(plain, models.folder(kind)).eval()
        with torch.no_grad():
            expected = model(IDS).logits
    torch.testing.assert_close(models.alone(kind), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(models.alone("base"), base)
    assert (expected - base).abs().max() > 1


@pytest.mark.parametrize("pair", [pair for ends in GOOD_PAIRS for pair in (ends, ends[::-1])], ids=" ".join)
def test_two_kinds_beside_each_other(models: Models, pair: tuple[str, str]) -> None:
    assert models.check(*pair)


@pytest.mark.slow
def test_all_kinds_beside_each_other(models: Models) -> None:
    pairs = list(itertools.permutations(KINDS, 2))
    right = sum(models.check(*pair) for pair in pairs)
    assert right >= 0.7 * len(pairs)  # the others are refused: two that change one module in two ways


@pytest.mark.slow
def test_many_beside_each_other(models: Models) -> None:
    chance = random.Random(0)
    several = ["plain", "rank", "dora", "up", "ia3", "loha", "norms", "oft", "hra"]
    for _ in range(5):
        names = chance.sample(several, 5)
        model = models.load(*names)
        for name in chance.choices([*names, "base"], k=12):
            torch.testing.assert_close(logits(model, name), models.alone(name), rtol=1e-4, atol=1e-4)


class TestFiles:
    """Files with tensors that are not the adapter's own."""

    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("files")
        base = make_checkpoint(folder / "tiny", dtype="float32")
        make_adapter(base, folder / "sql", seed=1)
        make_adapter(base, folder / "chat", seed=2, target_modules=["q_proj", "down_proj"], r=6)
        return folder

    @pytest.fixture
    def strange(self, root: Path, tmp_path: Path) -> Path:
        """A copy of `chat`, to be changed."""
        return Path(shutil.copytree(root / "chat", tmp_path / "strange"))

    @pytest.fixture(params=[None, "nf4"], ids=["float32", "nf4"])
    def fields(self, request: pytest.FixtureRequest, root: Path) -> dict[str, Any]:
        return {
            "model_id": str(root / "tiny"),
            "quantization": request.param,
            "dtype": "float32",
            "progress": False,
            "max_new_tokens": 6,
        }

    def test_the_bases_own_embeddings_are_left_out(self, root: Path, strange: Path, fields: dict[str, Any]) -> None:
        add_tensors(strange, {"model.embed_tokens.weight": stored(root, "model.embed_tokens.weight")})
        self.check_same(root, strange, fields)

    def test_embeddings_in_less_precision_are_the_same(self, root: Path, strange: Path, fields: dict[str, Any]) -> None:
        add_tensors(strange, {"model.embed_tokens.weight": stored(root, "model.embed_tokens.weight").bfloat16()})
        self.check_same(root, strange, fields)

    def test_a_copy_of_a_module(self, root: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
        adapter = make_adapter(root / "tiny", tmp_path / "copy", seed=4, modules_to_save=["lm_head"])
        self.check_same(root, adapter, fields)

    def check_same(self, root: Path, adapter: Path, fields: dict[str, Any]) -> None:
        """Check that base, `sql` and an adapter write the same alone and together, in both orders and engines."""
        sources = {"sql": str(root / "sql"), "strange": str(adapter)}
        texts = {}
        for name, given in (
            ("base", {}),
            ("sql", {"sql": sources["sql"]}),
            ("strange", {"strange": sources["strange"]}),
        ):
            alone = QuantizedHuggingFaceLLM(**fields, adapters=given)
            texts[name] = alone.invoke(PROMPT, **({"adapter": name} if given else {}))
            alone.unload()
        assert len(set(texts.values())) == 3
        for order in (["sql", "strange"], ["strange", "sql"]):
            llm = QuantizedHuggingFaceLLM(**fields, adapters={name: sources[name] for name in order})
            for engine in ("auto", "pipeline"):
                either = llm.model_copy(update={"engine": engine})
                for name in ("strange", "base", "sql", "base"):
                    assert either.invoke(PROMPT, adapter=name) == texts[name]
            llm.adapters = {"sql": sources["sql"]}  # the other is taken away
            assert [llm.invoke(PROMPT, adapter=name) for name in ("sql", "base")] == [texts["sql"], texts["base"]]
            llm.unload()

    @pytest.mark.parametrize(
        "key",
        [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.norm.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.self_attn.q_proj.base_layer.weight",
        ],
    )
    def test_other_values_for_the_base_are_refused(
        self, root: Path, strange: Path, fields: dict[str, Any], key: str
    ) -> None:
        plain = key.replace(".base_layer", "")
        add_tensors(strange, {key: stored(root, plain) * 1.5})
        llm = QuantizedHuggingFaceLLM(**fields, adapters={"mine": str(strange)})
        with pytest.raises(CheckpointError, match=rf"'mine'.*'{plain}'.*merge_adapter") as caught:
            llm.load()
        assert "\n" not in str(caught.value)

    def test_a_buffer_of_the_base(self, root: Path, strange: Path, fields: dict[str, Any]) -> None:
        add_tensors(strange, {"model.rotary_emb.inv_freq": torch.ones(16)})
        with pytest.raises(CheckpointError, match=r"'model\.rotary_emb\.inv_freq'"):
            QuantizedHuggingFaceLLM(**fields, adapters={"mine": str(strange)}).load()

    @pytest.mark.parametrize(
        "key",
        [
            "model.layers.0.self_attn.q_proj.lora_A.sql.weight",
            "model.layers.0.self_attn.k_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "lm_head.modules_to_save.sql.weight",
        ],
    )
    def test_names_that_the_model_does_not_have(
        self, root: Path, strange: Path, fields: dict[str, Any], key: str
    ) -> None:
        add_tensors(strange, {key: torch.ones(4, 64)})
        sources = {"sql": str(root / "sql"), "mine": str(strange)}
        with pytest.raises(CheckpointError, match="'mine'.*(no place for|would change|size mismatch)"):
            QuantizedHuggingFaceLLM(**fields, adapters=sources).load()

    def test_a_copy_of_a_quantized_module(self, root: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
        adapter = make_adapter(root / "tiny", tmp_path / "copy", seed=4, modules_to_save=["up_proj"])
        llm = QuantizedHuggingFaceLLM(**fields, adapters={"mine": str(adapter)})
        if fields["quantization"] is None:
            assert llm.invoke(PROMPT, adapter="mine") == Reference(root / "tiny").text(adapter, PROMPT, 6)
            llm.unload()
            return
        with pytest.raises(CheckpointError, match=r"up_proj' \(modules_to_save\), which is quantized"):
            llm.load()

    def test_trained_embeddings_can_be_merged(self, root: Path, strange: Path, tmp_path: Path) -> None:
        add_tensors(strange, {"model.embed_tokens.weight": stored(root, "model.embed_tokens.weight").flip(0)})
        merged = merge_adapter(str(root / "tiny"), str(strange), tmp_path / "merged", progress=False)
        text = Reference(root / "tiny").text(strange, PROMPT)
        assert Reference(merged).text(None, PROMPT) == text != Reference(root / "tiny").text(root / "chat", PROMPT)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"init_lora_weights": "pissa"}, "'pissa', which changes the base's weights"),
            ({"init_lora_weights": "pissa_niter_4"}, "which changes the base's weights"),
            ({"init_lora_weights": "OLoRA"}, "which changes the base's weights"),
            ({"layer_replication": [[0, 1], [0, 2]]}, "repeats layers"),
            ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "imports a module"),
            ({"alora_invocation_tokens": [1, 2]}, "starts at certain tokens"),
            ({"peft_type": "XLORA"}, "XLORA"),
            ({"peft_type": "VERA", "r": 8}, "share matrices"),
            ({"peft_type": "NOPE"}, "'NOPE'"),
        ],
        ids=str,
    )
    def test_settings_that_reach_beyond_the_adapter(
        self, root: Path, strange: Path, tmp_path: Path, settings: dict[str, Any], words: str
    ) -> None:
        """Refused before a weight is read: those of this base are garbage."""
        base = spoil_weights(Path(shutil.copytree(root / "tiny", tmp_path / "garbage")))
        edit_json(strange / "adapter_config.json", **settings)
        with pytest.raises(CheckpointError, match=words) as caught:
            QuantizedHuggingFaceLLM(model_id=str(base), adapters={"mine": str(strange)}, progress=False).load()
        assert "\n" not in str(caught.value)

    def test_whatever_an_initialization_does_to_the_base_is_noticed(self, root: Path, tmp_path: Path) -> None:
        """Past the check of the settings, as for a kind that is not known here."""
        adapter = make_adapter(root / "tiny", tmp_path / "pissa", seed=1, init_lora_weights="pissa")
        spec = LoadSpec(model_id=str(root / "tiny"), adapters={"mine": str(adapter)}, progress=False)
        model = AutoModelForCausalLM.from_pretrained(root / "tiny", dtype=torch.float32)
        [found] = find_adapters(spec)
        with pytest.raises(CheckpointError, match="init_lora_weights"):
            check_adapters_share([found])
        with pytest.raises(CheckpointError, match=r"would change 'model\.layers\.\d\.self_attn\.._proj\.weight'"):
            load_adapters(model, [found], spec)


def stored(root: Path, name: str) -> torch.Tensor:
    tensor: torch.Tensor = load_file(root / "tiny" / "model.safetensors")[name]
    return tensor


def add_tensors(adapter: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to the file of an adapter, by the model's names."""
    file = adapter / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] is None
