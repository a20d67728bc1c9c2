"""Renew the lock files in requirements/: the newest versions for `make demo` and `make test`, the oldest allowed ones.

    python tools/lock.py

Each holds exact versions with hashes for Python 3.10 to 3.13 on every system. torch stands in requirements/torch.txt,
which is written by hand: its build for CPUs has hashes that only PyTorch's own index tells.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from environment import ROOT, Environment, locked_torch

UV = "uv==0.13.9"
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


def main() -> None:
    """Write requirements/test.txt, demo.txt with the same versions, and oldest.txt."""
    environment = Environment(ROOT / ".venv-lock")
    environment.pip_install(UV)
    uv = environment.python.with_name("uv")
    everything = [f"--extra={extra}" for extra in EXTRAS] + ["--group=test"]
    oldest = [argument for argument in everything if argument.removeprefix("--extra=") not in NEWER_TORCH]
    build = "\n".join(BUILD)
    _compile(uv, "test", f"torch=={locked_torch()}\n{build}\n", *everything, "--group=docs")
    _compile(uv, "demo", f"torch=={locked_torch()}\n{build}\n", "--extra=demo", "--constraint=requirements/test.txt")
    # Triton's interpreter of that time does not run with a newer NumPy.
    _compile(uv, "oldest", f"torch=={OLDEST_TORCH}\nnumpy==2.2.6\n{build}\n", *oldest, "--resolution=lowest-direct")


if __name__ == "__main__":
    main()
