"""peft's layers and adapters, checked on peft itself."""

from __future__ import annotations

import itertools
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from langchain_quantllm.compat.peft import (
    adapter_modules,
    base_layer_of,
    check_peft,
    choice_of,
    choose_adapter,
    clashing_module,
    copied_modules,
    copied_names,
    inject,
    is_peft_layer_class,
    lora_matrices,
    merged_adapter,
    peft_imported,
    plain_name,
    restore_choice,
    set_weights,
    settings_from,
    state_of,
    unsupported_lora_reason,
    why_not_injected,
)
from langchain_quantllm.compat.versions import TRIED
from langchain_quantllm.errors import MissingPackageError
from tests.support.models import tiny_model

pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
TOKENS = {"TrainableTokensLayer"}
"""Inside its wrapper."""


def test_what_is_installed_will_do() -> None:
    check_peft()


def test_another_packages_smallest_version_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0.0", raising=False)
    check_peft()


@pytest.mark.parametrize(
    ("version", "is_new_enough"),
    [("0.19.9", False), ("0.20", True), ("0.20.0.dev0", True), ("1.0", True), ("1!0.1+cpu", True)],
)
def test_the_smallest_version_is_our_own(monkeypatch: pytest.MonkeyPatch, version: str, is_new_enough: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    if is_new_enough:
        check_peft()
        return
    with pytest.raises(
        MissingPackageError, match=rf"peft 0\.20\.0 or newer, and {version} is installed: .*pip install"
    ):
        check_peft()


def test_it_is_the_one_of_the_extra() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert {Version(v) for v in re.findall(r'"peft>=([\d.]+)', project)} == {Version(TRIED["peft"].oldest)}


class TestLoading:
    """The steps of loading an adapter onto a model."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        with peft_imported():
            import peft

            config = peft.LoraConfig(
                r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 4]
            )
            model = peft.get_peft_model(tiny_model(512), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(tmp_path)
        return tmp_path

    def test_what_a_file_has_is_in_the_layers_afterwards(self, folder: Path) -> None:
        tensors = {key.removeprefix("base_model.model."): t for key, t in load_file(folder / WEIGHTS).items()}
        model = tiny_model(512)
        base = set(dict(model.named_parameters()))
        with peft_imported():
            settings = settings_from(str(folder))
            assert settings.inference_mode
            assert why_not_injected(settings) is None
            inject(model, settings, "one")
            assert (type(model)._hf_peft_config_loaded, model._hf_peft_config_loaded) == (False, True)
            tokens = "model.embed_tokens.token_adapter.trainable_tokens_delta"
            assert copied_names(model, "one") == {"lm_head.weight", tokens}
            assert list(copied_modules(model, "one")) == ["lm_head"]
            missing, unexpected = set_weights(model, "one", {**tensors, "strange": torch.ones(1)})
        assert unexpected == ["strange"]
        own = {name: t for name, t in model.state_dict().items() if plain_name(name) not in base}
        assert not own.keys() & set(missing)
        assert {plain_name(name) for name in missing} <= {*base, "lm_head.weight", "model.embed_tokens.weight"}
        for key, tensor in tensors.items():
            assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in own.values()), key

    def test_an_adapter_beside_one_with_tokens(self, folder: Path) -> None:
        """peft looks for the tokens of the first in the file of the second."""
        model = tiny_model(512)
        with peft_imported():
            import peft

            inject(model, settings_from(str(folder)), "one")
            inject(model, peft.LoraConfig(r=2, target_modules=["v_proj"]), "two")
            name = "model.layers.{}.self_attn.v_proj.lora_{}.weight"
            layer = model.model.layers[0].self_attn.v_proj
            tensors = {
                name.format(i, matrix): torch.ones_like(getattr(layer, f"lora_{matrix}")["two"].weight)
                for i in range(len(model.model.layers))
                for matrix in "AB"
            }
            missing, unexpected = set_weights(model, "two", tensors)
        assert not unexpected
        assert not [key for key in missing if key.endswith(".two.weight")]
        assert layer.lora_B["two"].weight.eq(1).all()

    def test_kinds_that_are_not_put_into_a_model(self) -> None:
        with peft_imported():
            import peft

            assert "share" in str(why_not_injected(peft.VeraConfig(target_modules=["q_proj"])))
            assert why_not_injected(peft.PromptTuningConfig(num_virtual_tokens=2)) is not None

    def test_tokens_of_a_module_that_was_copied(self, folder: Path) -> None:
        model = tiny_model(512)
        with peft_imported():
            import peft

            inject(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), "one")
            assert clashing_module(model) is None
            inject(model, settings_from(str(folder)), "two")
            assert clashing_module(model) == "model.embed_tokens"

    def test_layers_without_the_adapter_run_without(self) -> None:
        model = tiny_model(512)
        with peft_imported():
            import peft

            inject(model, peft.LNTuningConfig(target_modules=["input_layernorm"]), "norms")
            inject(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]), "tokens")
        for name in ("norms", "tokens"):
            for module in adapter_modules(model):
                choose_adapter(module, name)
            running = {type(module).__name__ for module in adapter_modules(model) if not choice_of(module)[1]}
            assert running == ({"LNTuningLayer"} if name == "norms" else {"Linear", "TrainableTokensWrapper"} | TOKENS)
            model(torch.arange(8)[None])


class TestLayers:
    """Layers of a model with LoRA of two kinds and a copy of a whole module."""

    @pytest.fixture
    def model(self) -> Any:
        with peft_imported():
            import peft
            from peft.functional import inject_adapter_in_model

            model = tiny_model(512)
            for name in ("one", "two"):
                config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
                inject_adapter_in_model(config, model, name)
            whole = peft.LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"])
            inject_adapter_in_model(whole, model, "whole")
        return model

    def test_modules_and_their_kinds(self, model: Any) -> None:
        modules = adapter_modules(model)
        kinds = {type(module).__name__ for module in modules}
        assert kinds == {"Linear", "ModulesToSaveWrapper"}
        assert all(is_peft_layer_class(type(module)) for module in modules)
        assert not any(is_peft_layer_class(type(m)) for m in model.modules() if m not in modules)

    def test_choosing_and_going_back(self, model: Any) -> None:
        modules = adapter_modules(model)
        before = [choice_of(module) for module in modules]
        for name in ("one", "whole", None):
            for module in modules:
                choose_adapter(module, name)
            running = [choice_of(module)[0] for module in modules if not choice_of(module)[1]]
            assert all(names == [name] for names in running)
            assert bool(running) == (name is not None)
            assert not any(p.requires_grad for module in modules for p in module.parameters())
        for module, choice in zip(modules, before, strict=True):
            restore_choice(module, choice)
        assert [choice_of(module) for module in modules] == before

    def test_lora_is_scaled_b_of_a(self, model: Any) -> None:
        layer = model.model.layers[0].self_attn.q_proj
        assert unsupported_lora_reason(layer, ("one", "two", "whole")) is None
        assert lora_matrices(layer, "whole") is None
        choose_adapter(layer, "one")
        down, up, scaling = lora_matrices(layer, "one") or (None, None, None)
        assert scaling == 2.0
        x = torch.randn(4, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), base_layer_of(layer)(x) + scaling * (x @ down.T @ up.T))

    def test_what_is_no_plain_lora(self, model: Any) -> None:
        assert "ModulesToSaveWrapper" in str(unsupported_lora_reason(model.lm_head, ("whole",)))

    def test_what_changes_its_output_is_seen(self, model: Any) -> None:
        layer = model.model.layers[0].self_attn.q_proj
        states = [state_of(layer, names_adapters=False)]
        for change in (
            lambda: layer.set_adapter("two"),
            lambda: layer.enable_adapters(False),
            lambda: layer.enable_adapters(True),
            lambda: layer.set_scale("two", 3.0),
            layer.merge,
        ):
            change()
            states.append(state_of(layer, names_adapters=False))
        assert all(a != b for a, b in itertools.pairwise(states))
        assert merged_adapter(layer) == "two"
        layer.unmerge()
        assert merged_adapter(layer) is None
