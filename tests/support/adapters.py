"""Adapters of peft, made in a moment: random, far from zero, so that each writes texts of its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm.compat.peft import adapter_modules, peft_imported

ATTENTION = ["q_proj", "v_proj"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Use peft without what it brings along, and without its advice."""
    with peft_imported(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(
    base: Path, folder: Path, *, seed: int, kind: str = "LoraConfig", scale: float = 1.0, **fields: Any
) -> Path:
    """Write an adapter for a model, with random weights in all of its matrices.

    Args:
        base: Folder of the model.
        folder: Folder to write.
        seed: Where its numbers start.
        kind: Class of its config in peft.
        scale: How large they are.
        **fields: Fields of the config.
    """
    with quietly():
        import peft

        if kind == "LoraConfig":
            fields = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **fields}
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **fields)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * scale * parameter.shape[-1] ** -0.5
                    parameter.add_(noise) if "lora_" not in name or "magnitude" in name else parameter.copy_(noise)
        model.save_pretrained(folder)
    return folder


# What users do to the adapters of a model, by peft's public functions: the methods of transformers 5.24 refuse every
# peft that there is.


def add_adapter(model: Any, config: Any, name: str = "default") -> None:
    """Put a new adapter into a model, and choose it."""
    with quietly():
        from peft.functional import inject_adapter_in_model

        inject_adapter_in_model(config, model, name)
    choose_adapter(model, name)


def choose_adapter(model: Any, name: str) -> None:
    """Choose the adapter that a model runs with, to be trained."""
    with quietly():
        from peft.functional import set_adapter

        set_adapter(model, name)


def enable_adapters(model: Any, is_enabled: bool) -> None:
    """Let a model run with its adapters, or without any."""
    for module in adapter_modules(model):
        module.enable_adapters(is_enabled)


def active_adapters(model: Any) -> list[str]:
    """Name the adapters that a model runs with."""
    [names] = {tuple(module.active_adapters) for module in adapter_modules(model)}
    return list(names)


def delete_adapter(model: Any, name: str) -> None:
    """Take a LoRA adapter off a model."""
    with quietly():
        from peft.functional import delete_adapter

        delete_adapter(model, name, "lora_")
    del model.peft_config[name]


class Reference:
    """What peft's own model writes: an adapter over the base, by transformers' `generate`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._models: dict[Path | None, Any] = {}

    def model(self, adapter: Path | None) -> Any:
        if adapter not in self._models:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
            if adapter is not None:
                with quietly():
                    import peft

                    model = peft.PeftModel.from_pretrained(model, adapter).eval()
            self._models[adapter] = model
        return self._models[adapter]

    def text(self, adapter: Path | None, prompt: str, tokens: int = 12, **options: Any) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        output = self.model(adapter).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": tokens, **options},
        )
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
