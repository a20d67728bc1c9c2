"""What the fast engine finds out about a model while another thread switches the model's adapters."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.adapter_switch import AdapterSwitch, activate
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.forward_context import current_context
from langchain_quantllm.engine.fusion.fuse import CPU_KINDS, Fusion
from langchain_quantllm.kernels import cpu as cpu_kernels
from langchain_quantllm.kernels.linear import cpu as cpu_linear
from tests.support.adapters import PROMPT, Reference, make, make_adapter_folders

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter_folders(tmp_path_factory.mktemp("adapters"))


def switch_after_recording(model: Any) -> list[str]:
    """Activate another adapter whenever calls of the model's modules have been recorded; returns those activated."""
    activated = []

    def switch(module: Any, args: Any, output: Any) -> None:
        context = current_context()
        if context is not None and context.record is not None:
            activated.append(("chat", "sql", "base")[len(activated) % 3])
            activate(model, activated[-1])

    activate(model, "base")
    model.register_forward_hook(switch)
    return activated


def test_fused_steps_are_found_though_the_adapter_is_switched(root: Path) -> None:
    """As the pipeline engine does it in the middle, when it begins or ends a batch."""
    llm = make(root)
    expected = llm.engine_info.fused
    assert expected["residual"] > 0
    assert "layer" not in expected  # whole layers run without adapters only
    llm.unload()
    activated = switch_after_recording(llm.load().pipeline.model)
    assert llm.engine_info.fused == expected
    assert len(activated) == 1
    for count in (2, 3):
        with torch.no_grad():
            llm.pipeline.model.model.layers[0].mlp.down_proj.base_layer.weight.mul_(-1)
        llm.invoke(PROMPT)
        assert llm.engine_info.fused == expected
        assert len(activated) == count  # found anew
    assert llm.invoke(PROMPT, adapter="chat") == Reference(root / "tiny").text(root / "chat", PROMPT)
    llm.unload()


def test_no_adapter_is_switched_while_the_model_is_inspected(root: Path) -> None:
    llm = make(root)
    pipeline = llm.load().pipeline
    switch = AdapterSwitch(pipeline.model, ("sql", "chat"))
    inspected: list[bool] = []
    others: list[threading.Thread] = []

    def choose(ended: threading.Event) -> None:
        with switch.chosen("chat"):
            ended.set()

    def look(module: Any, args: Any, output: Any) -> None:
        if current_context() is None and not inspected:
            ended = threading.Event()
            others.append(threading.Thread(target=choose, args=(ended,), daemon=True))
            others[0].start()
            inspected.append(not ended.wait(0.3))

    handle = pipeline.model.register_forward_hook(look)
    engine = ContinuousEngine(pipeline, adapters=switch)
    handle.remove()
    assert inspected == [True]
    others[0].join(10)
    assert not others[0].is_alive()
    engine.close()
    llm.unload()


def test_a_request_that_runs_keeps_its_adapter_while_fused_steps_are_found(root: Path) -> None:
    """As for another engine of the same model, with another `kv_cache_dtype` say."""
    llm = make(root)
    model = llm.load().pipeline.model
    forwards, recording, ended, third = [0], threading.Event(), threading.Event(), threading.Event()
    answers: list[str] = []

    def wait(module: Any, args: Any) -> None:
        context = current_context()
        if not answers or context is None:
            return
        if context.record is not None:
            recording.set()
            ended.wait(30)
        elif context.attention is not None:
            forwards[0] += 1
            if forwards[0] == 3:
                third.set()
                recording.wait(30)

    model.register_forward_pre_hook(wait)
    answers = [llm.invoke(PROMPT, adapter="chat")]

    def run() -> None:
        answers.append(llm.invoke(PROMPT, adapter="chat"))
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert third.wait(30)
    Fusion(model, kernels=cpu_kernels, linear_kernels=cpu_linear, kinds=CPU_KINDS, names_adapters=True).close()
    thread.join(30)
    assert recording.is_set()
    assert len(answers) == 2
    assert answers[0] == answers[1]
    llm.unload()
