"""Adapters of peft with random weights, far from zero, so that each one writes other texts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.compat.peft import adapter_modules, peft_contained
from tests.support.checkpoints import make_checkpoint, quicken

ATTENTION = ["q_proj", "v_proj"]
PROMPT = "The capital of France is"
LONG = "Quantized models take less memory than the models that they were made of. " * 4
NAMES = ("sql", "chat", "base")

Texts = dict[tuple[str, str], str]
"""Texts by the name of the adapter and the prompt."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Use peft without its side effects and warnings."""
    with peft_contained(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(
    base: Path, folder: Path, *, seed: int, kind: str = "LoraConfig", scale: float = 1.0, **fields: Any
) -> Path:
    """Write an adapter for a model, with random weights in all of its matrices.

    Args:
        base: Folder of the model.
        folder: Folder to write.
        seed: Seed of the weights.
        kind: Class of its config in peft.
        scale: Factor of the weights.
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


# Changes of a model's adapters by the user, with peft's public functions: the methods of transformers 5.24 refuse every
# released peft.


def add_adapter(model: Any, config: Any, name: str = "default") -> None:
    """Add a new adapter to a model, and choose it."""
    with quietly():
        from peft.functional import inject_adapter_in_model

        inject_adapter_in_model(config, model, name)
    choose_adapter(model, name)


def choose_adapter(model: Any, name: str) -> None:
    """Choose the adapter that a model runs with, and make it trainable."""
    with quietly():
        from peft.functional import set_adapter

        set_adapter(model, name)


def enable_adapters(model: Any, is_enabled: bool) -> None:
    """Run a model with its adapters, or without any."""
    for module in adapter_modules(model):
        module.enable_adapters(is_enabled)


def active_adapters(model: Any) -> list[str]:
    """List the adapters that a model runs with."""
    [names] = {tuple(module.active_adapters) for module in adapter_modules(model)}
    return list(names)


def delete_adapter(model: Any, name: str) -> None:
    """Remove a LoRA adapter from a model."""
    with quietly():
        from peft.functional import delete_adapter

        delete_adapter(model, name, "lora_")
    del model.peft_config[name]


class Reference:
    """Texts of peft's own models: an adapter over the base, by transformers' `generate`."""

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


def make_adapter_folders(folder: Path) -> Path:
    """Write a tiny model, and two adapters for it: `sql` and `chat`."""
    quicken()
    base = make_checkpoint(folder / "tiny", dtype="float32")
    make_adapter(base, folder / "sql", seed=1)
    everywhere = [*ATTENTION, "up_proj", "down_proj", "lm_head"]
    make_adapter(base, folder / "chat", seed=2, r=6, lora_alpha=7, target_modules=everywhere)
    return folder


def make(root: Path, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM of the folders of `make_adapter_folders`."""
    given: dict[str, Any] = {
        "model_id": str(root / "tiny"),
        "progress": False,
        "dtype": "float32",
        "max_new_tokens": 12,
    }
    given["adapters"] = {"sql": str(root / "sql"), "chat": str(root / "chat")}
    return QuantizedHuggingFaceLLM(**{**given, **fields})


def expected_texts(root: Path, reference: Reference) -> Texts:
    """Write texts with peft's own models after each prompt."""
    texts = {
        (name, prompt): reference.text(None if name == "base" else root / name, prompt)
        for name in NAMES
        for prompt in (PROMPT, LONG, "One")
    }
    assert len({texts[name, PROMPT] for name in NAMES}) == 3
    return texts
