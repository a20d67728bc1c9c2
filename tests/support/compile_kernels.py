"""Compile a test module's kernel cases for a GPU, without one: Triton's interpreter runs kernels that do not compile.

A process of its own, as the driver of the process is replaced:

    python -m tests.support.compile_kernels tests.unit_tests.kernels.test_attention

Runs all cases of the module with tensors on the CPU, compiles what they launch to the Triton compiler's first
representation for a Hopper GPU, and launches nothing. Prints the number of compiled kernels and what did not compile as
JSON. With `--for 80 CASE ...` it compiles what these cases launch to machine code of that compute capability.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver, jit
from triton.runtime.errors import PTXASError

HOPPER = 90
TABLES = ("CASES", "OTHERS", "MODELS", "CHECKS")
"""Where the modules have their cases, by name."""


class NoGPU:
    """A driver of a GPU that is not there, enough to compile for it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """Return the GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return its index."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream's handle."""
        return 0


def main(module_name: str, capability: int = HOPPER, names: Sequence[str] = ()) -> None:
    """Compile what the cases of a module launch; to machine code if the cases are named."""
    gpu = NoGPU(capability)
    driver.set_active(gpu)
    if not names:
        stop_after_first_stage(gpu.target)
    torch.set_num_threads(1)
    failures: list[str] = []
    compiled: Counter[str] = Counter()
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if "enable_fp_fusion" not in options:
            failures.append(f"{self.__name__}: launched without COMPILER_OPTIONS")
        try:
            launch(self, *args, grid=grid, warmup=True, **options)
            compiled[self.__name__] += 1
        except CompiledError:
            compiled[self.__name__] += 1
        except (triton.CompilationError, PTXASError, RuntimeError) as error:
            failures.append(f"{self.__name__}: {error}")

    jit.JITFunction.run = compile_only
    module = importlib.import_module(module_name)
    launch_as_on(capability)
    for name in names or [name for table in TABLES for name in getattr(module, table, ())]:
        with contextlib.suppress(AssertionError):  # nothing was computed: checks of results fail
            module.run(name, "cpu")
    print(json.dumps({"compiled": compiled, "failures": failures}))


class CompiledError(Exception):
    """The source of a kernel was compiled; what follows is left out."""


def stop_after_first_stage(target: GPUTarget) -> None:
    """Compile to the first representation only, where the errors of a kernel's source are found."""
    backend = type(compiler.make_backend(target))
    add_stages = backend.add_stages

    def stop(source: Any, metadata: Any) -> None:
        raise CompiledError

    def add_first(self: Any, stages: dict[str, Any], *args: Any) -> None:
        add_stages(self, stages, *args)
        for name in list(stages)[1:]:
            stages[name] = stop

    backend.add_stages = add_first


def launch_as_on(capability: int) -> None:
    """Launch as on such a GPU: on Hopper kernels begin early, and since Ada there are instructions for fp8."""
    from langchain_quantllm.kernels.attention import eight_bits

    if capability >= HOPPER:
        use_early_launches()
    converts_fp8 = eight_bits.converts_fp8
    for module in list(sys.modules.values()):
        if getattr(module, "converts_fp8", None) is converts_fp8:
            module.converts_fp8 = lambda device: capability >= 89  # type: ignore[attr-defined]


def use_early_launches() -> None:
    """Launch as on a Hopper GPU, where kernels begin early: in every module, also in those that are imported later."""
    from langchain_quantllm.kernels import launch

    if launch.gdc_wait is not None:  # Triton is new enough
        launch._LATE.update(launch._EARLY)


if __name__ == "__main__":
    if sys.argv[2:3] == ["--for"]:
        main(sys.argv[1], int(sys.argv[3]), sys.argv[4:])
    else:
        main(sys.argv[1])
