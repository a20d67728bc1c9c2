"""Compile a test module's kernel cases for a GPU, without one: Triton's interpreter runs kernels that do not compile.

A process of its own, as the driver of the process is replaced:

    python -m tests.support.compile_kernels tests.unit_tests.kernels.test_attention

Runs all cases of the module with tensors on the CPU, compiles what they launch to the Triton compiler's first
representation for a Hopper GPU, and launches nothing. Prints the number of compiled kernels and what did not compile as
JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver, jit

HOPPER = GPUTarget("cuda", 90, 32)
TABLES = ("CASES", "OTHERS", "MODELS", "CHECKS")
"""Where the modules have their cases, by name."""


class NoGPU:
    """A driver of a GPU that is not there, enough to compile for it."""

    def get_current_target(self) -> GPUTarget:
        """Return the GPU to compile for."""
        return HOPPER

    def get_current_device(self) -> int:
        """Return its index."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream's handle."""
        return 0


def main(module_name: str) -> None:
    """Compile what the cases of a module launch."""
    driver.set_active(NoGPU())
    stop_after_first_stage()
    torch.set_num_threads(1)
    failures: list[str] = []
    compiled: Counter[str] = Counter()
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if "enable_fp_fusion" not in options:
            failures.append(f"{self.__name__}: launched without COMPILER_OPTIONS")
        try:
            launch(self, *args, grid=grid, warmup=True, **options)
        except CompiledError:
            compiled[self.__name__] += 1
        except triton.CompilationError as error:
            failures.append(f"{self.__name__}: {error}")

    jit.JITFunction.run = compile_only
    module = importlib.import_module(module_name)
    use_early_launches()
    for name in [name for table in TABLES for name in getattr(module, table, ())]:
        with contextlib.suppress(AssertionError):  # nothing was computed: checks of results fail
            module.run(name, "cpu")
    print(json.dumps({"compiled": compiled, "failures": failures}))


class CompiledError(Exception):
    """The source of a kernel was compiled; what follows is left out."""


def stop_after_first_stage() -> None:
    """Compile to the first representation only, where the errors of a kernel's source are found."""
    backend = type(compiler.make_backend(HOPPER))
    add_stages = backend.add_stages

    def stop(source: Any, metadata: Any) -> None:
        raise CompiledError

    def add_first(self: Any, stages: dict[str, Any], *args: Any) -> None:
        add_stages(self, stages, *args)
        for name in list(stages)[1:]:
            stages[name] = stop

    backend.add_stages = add_first


def use_early_launches() -> None:
    """Launch as on a Hopper GPU, where kernels begin early."""
    from langchain_quantllm.kernels import launch

    for module in list(sys.modules.values()):
        if getattr(module, "launch_options", None) is launch.launch_options:
            module.launch_options = lambda device: launch._EARLY  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(sys.argv[1])
