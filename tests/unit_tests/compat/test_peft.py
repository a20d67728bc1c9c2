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

from langchain_quantllm.compat.peft import (
    adapter_modules,
    base_layer_of,
    check_peft,
    choice_of,
    choose_adapter,
    is_peft_layer_class,
    lora_matrices,
    merged_adapter,
    peft_imported,
    restore_choice,
    state_of,
    unsupported_lora_reason,
)
from langchain_quantllm.compat.versions import TRIED
from langchain_quantllm.errors import MissingPackageError
from tests.support.models import tiny_model

pytest.importorskip("peft")


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
