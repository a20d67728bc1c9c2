"""Dispatch modes of single threads, checked on PyTorch itself."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from langchain_quantllm.compat.torch_dispatch import ThreadMode, is_compiled


class Names(ThreadMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operations_of_its_thread_between_push_and_pop() -> None:
    mode, x = Names(), torch.ones(3)
    x.exp()
    mode.push()
    try:
        other = threading.Thread(target=x.sin)
        other.start()
        other.join()
        x.cos()
    finally:
        mode.pop()
    x.tan()
    assert mode.seen == ["aten::cos"]


def test_the_process_is_not_marked_as_being_in_a_mode() -> None:
    mode = Names()
    mode.push()
    try:
        assert not is_in_torch_dispatch_mode()
    finally:
        mode.pop()


def test_the_mode_calls_no_code_of_the_compiler() -> None:
    assert not hasattr(Names.__torch_dispatch__, "_torchdynamo_orig_callable")


def test_compiled_modules_are_known() -> None:
    layer = torch.nn.Linear(2, 2)
    assert not is_compiled(layer)
    assert is_compiled(torch.compile(torch.nn.Linear(2, 2), backend="eager"))
    layer.compile(backend="eager")
    assert is_compiled(layer)
