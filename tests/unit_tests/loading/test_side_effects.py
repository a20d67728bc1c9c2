"""Loading changes no global state, no argument and no file."""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import ModelNotFoundError, QuantLLMError
from tests.support.checkpoints import edit_json, make_checkpoint
from tests.support.loading import PROMPT, count_tokens, make_llm


def global_state() -> dict[str, Any]:
    import huggingface_hub
    import transformers

    return {
        "environ": dict(os.environ),
        "dtype": torch.get_default_dtype(),
        "rng": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "levels": {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict},
        "root": (logging.root.level, list(logging.root.handlers)),
        "filters": list(warnings.filters),
        "bars": (
            transformers.utils.logging.is_progress_bar_enabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
        ),
        "verbosity": transformers.utils.logging.get_verbosity(),
    }


@pytest.mark.parametrize("quantization", [None, "int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("progress", [True, False])
def test_globals_stay(tiny: Path, quantization: str | None, progress: bool) -> None:
    before = global_state()
    make_llm(tiny, quantization=quantization, progress=progress).load().unload()
    after = global_state()
    after["levels"] = {name: level for name, level in after["levels"].items() if name in before["levels"]}
    assert after == before


@pytest.mark.parametrize("bars", [True, False])
def test_globals_stay_after_an_error(tmp_path: Path, bars: bool) -> None:
    import huggingface_hub
    import transformers

    broken = make_checkpoint(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    switch: Callable[[], None] = (
        transformers.utils.logging.enable_progress_bar if bars else transformers.utils.logging.disable_progress_bar
    )
    was = transformers.utils.logging.is_progress_bar_enabled()
    switch()
    try:
        before = global_state()
        with pytest.raises(QuantLLMError):
            make_llm(broken).load()
        assert global_state()["bars"] == before["bars"] == (bars, huggingface_hub.utils.are_progress_bars_disabled())
        assert global_state()["environ"] == before["environ"]
    finally:
        (transformers.utils.logging.enable_progress_bar if was else transformers.utils.logging.disable_progress_bar)()


def test_arguments_stay(tiny: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    device_map, max_memory = {"": "cpu"}, {"cpu": "20GB"}
    model_kwargs = {"torch_dtype": torch.float32, "low_cpu_mem_usage": True}
    generation_kwargs = {"no_repeat_ngram_size": 2}
    stop = ["x"]
    kwargs: dict[str, Any] = {
        "quantization_config": config,
        "device_map": device_map,
        "model_kwargs": model_kwargs,
        "generation_kwargs": generation_kwargs,
        "stop": stop,
    }
    before = copy.deepcopy(kwargs)
    before_config = config.to_dict()
    make_llm(tiny, **kwargs).invoke(PROMPT)
    make_llm(tiny, max_memory=max_memory).invoke(PROMPT)
    assert config.to_dict() == before_config
    assert {k: v for k, v in kwargs.items() if k != "quantization_config"} == {
        k: v for k, v in before.items() if k != "quantization_config"
    }
    assert max_memory == {"cpu": "20GB"}


def test_progress_is_shown_unless_turned_off(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_llm(tiny, progress=True).load().unload()
    said = capfd.readouterr()
    assert "100%" in said.err
    make_llm(tiny, progress=False).load().unload()
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_checkpoint_files_stay(tiny: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny.iterdir()}
    make_llm(tiny, quantization="nf4").invoke(PROMPT)
    assert {file.name: file.read_bytes() for file in tiny.iterdir()} == before


def test_generation_config_of_the_checkpoint_counts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "short")
    edit_json(folder / "generation_config.json", max_new_tokens=9)
    assert count_tokens(QuantizedHuggingFaceLLM(model_id=str(folder), progress=False)) == 9


def test_dropout_is_off(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dropout", attention_dropout=0.9)
    llm = make_llm(folder).load()
    assert not llm.pipeline.model.training
    assert llm.invoke(PROMPT) == llm.invoke(PROMPT)


def test_a_model_in_memory_outlives_its_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "gone")
    given = {"model_id": str(folder), "progress": False}
    first = QuantizedHuggingFaceLLM(**given).load()
    shutil.rmtree(folder)
    assert QuantizedHuggingFaceLLM(**given).load().pipeline is first.pipeline
    first.unload()
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        QuantizedHuggingFaceLLM(**given).load()
